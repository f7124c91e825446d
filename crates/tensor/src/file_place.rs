//! Where mapped bytes lie in their file, for readers that want them in memory of their own.

use crate::{Error, Result};
use std::fs::File;
use std::io;
use std::path::Path;

/// A position in an open file.
#[derive(Debug, Clone, Copy)]
pub struct FilePlace<'a> {
    file: &'a File,
    path: &'a Path,
    offset: u64,
}

impl<'a> FilePlace<'a> {
    /// Byte `offset` of `file`; `path` is its name in messages.
    pub fn new(file: &'a File, path: &'a Path, offset: u64) -> Self {
        FilePlace { file, path, offset }
    }

    /// `count` bytes further.
    #[must_use]
    pub fn skip(self, count: usize) -> Self {
        FilePlace { offset: self.offset + count as u64, ..self }
    }

    /// Reads all of `to`; threads may read one file at the same time.
    ///
    /// # Errors
    /// If the system refuses, or the file ends before: names the file and the range.
    pub fn read(&self, to: &mut [u8]) -> Result<()> {
        let end = self.offset + to.len() as u64;
        let wrong = |found: String| {
            Error::mismatch(format!("{}: bytes {} to {end}", self.path.display(), self.offset), found, "all of them")
        };
        let mut done = 0;
        while done < to.len() {
            match read_at(self.file, &mut to[done..], self.offset + done as u64) {
                Ok(0) => return Err(wrong(format!("the end of the file after {done} bytes"))),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(wrong(error.to_string())),
            }
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_at(file: &File, to: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::unix::fs::FileExt::read_at(file, to, offset)
}

/// Moves the file's own position as well, which nobody uses.
#[cfg(windows)]
fn read_at(file: &File, to: &mut [u8], offset: u64) -> io::Result<usize> {
    std::os::windows::fs::FileExt::seek_read(file, to, offset)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MatrixView, Rows, WeightFormat};

    const ROWS: usize = 96;
    const COLS: usize = 1024;

    /// Checks that what a view reads from its file is what its bytes say, in a few large ranges; the file's bytes differ from those of
    /// the view in the lowest bit, so that nothing else than a read can give them.
    fn check(what: &str, rows: Rows<'_>, num_rows: usize) {
        let expected: Vec<u8> = rows.span(num_rows).iter().map(|byte| byte ^ 1).collect();
        for (start, len) in [(0, expected.len()), (4097, 70_000), (expected.len() - 65_536, 65_536)] {
            let mut found = vec![0; len];
            rows.copy_to(start, &mut found).expect("the file is whole");
            assert!(found == expected[start..start + len], "{what}, from byte {start}");
        }
    }

    #[test]
    fn parts_of_a_view_are_read_where_they_lie_in_the_file() {
        const HEADER: usize = 77;
        let codes: Vec<u8> = (0..4 * ROWS * COLS).map(|i| (i * i / 7 + i) as u8).collect();
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("shard");
        let on_disk: Vec<u8> = [0; HEADER].into_iter().chain(codes.iter().map(|byte| byte ^ 1)).collect();
        std::fs::write(&path, on_disk).expect("the file is written");
        let file = File::open(&path).expect("the file opens");
        let plain = MatrixView::new("w", WeightFormat::F32, [ROWS, COLS], &codes, &[], &[]).expect("they fit");
        let view = plain.with_places([Some(FilePlace::new(&file, &path, HEADER as u64)), None, None]);
        check("all", view.codes, ROWS);
        check("rows 5 to 90", view.row_range(5..90).codes, 85);
        check("rows 30 to 60 of rows 5 to 90", view.row_range(5..90).row_range(30..60).codes, 30);
        let odd = view.every_row(1, 2).expect("rows have no common scales");
        check("every second row", odd.codes, ROWS / 2);
        check("of every second row the last 20", odd.row_range(28..48).codes, 20);

        // Few bytes come from the map, as all do without a file.
        let mut few = [0; 100];
        view.codes.copy_to(9, &mut few).expect("no file is read");
        assert_eq!(few, codes[9..109]);
        let mut all = vec![0; codes.len()];
        plain.codes.copy_to(0, &mut all).expect("no file is read");
        assert!(all == codes);
    }

    #[test]
    fn a_file_that_was_cut_is_named() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("shard");
        std::fs::write(&path, [1; 5000]).expect("the file is written");
        let file = File::open(&path).expect("the file opens");
        let error = FilePlace::new(&file, &path, 3000).read(&mut [0; 2500]).expect_err("the file is too short");
        let expected = format!(
            "{}: bytes 3000 to 5500: found the end of the file after 2000 bytes, expected all of them",
            path.display()
        );
        assert_eq!(error.to_string(), expected);
    }
}
