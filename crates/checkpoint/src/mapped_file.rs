//! Read-only memory maps of shards, and shards that are part of the program. The only `unsafe` of this crate: `mmap` and `madvise`.
#![allow(unsafe_code)]

use crate::{Error, Result};
use memmap2::Mmap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// One shard's bytes.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    source: Source,
}

#[derive(Debug)]
enum Source {
    File { file: File, map: Mmap, modified: Option<SystemTime> },
    Embedded(&'static [u8]),
}

impl MappedFile {
    /// Maps `path`; reads nothing yet.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let io = |e| Error::io(path, e);
        let file = File::open(path).map_err(io)?;
        let metadata = file.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(Error::file(path, "kind of file", "a directory or device", "a regular file"));
        }
        // SAFETY: the map is private and read-only, and nobody gets a mutable reference to it. Another process that
        // truncates the file can still make reads fail with SIGBUS; no user of mmap can rule that out. Shards are
        // written to a new file and renamed (as our writer and the Hub client do), which leaves the mapped one whole;
        // `check_whole` finds the others before a tensor is read, `unchanged` before a model is served.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(MappedFile { path: path.to_owned(), source: Source::File { file, map, modified: metadata.modified().ok() } })
    }

    /// A shard that is part of the program; `path` is only its name in messages.
    pub(crate) fn embedded(path: &Path, bytes: &'static [u8]) -> Self {
        MappedFile { path: path.to_owned(), source: Source::Embedded(bytes) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match &self.source {
            Source::File { map, .. } => map,
            Source::Embedded(bytes) => bytes,
        }
    }

    /// Checks that the mapped file has not been cut: reading what it has lost would end the program with a SIGBUS.
    pub(crate) fn check_whole(&self) -> Result<()> {
        let Source::File { file, map, .. } = &self.source else { return Ok(()) };
        let size_bytes = file.metadata().map_err(|e| Error::io(&self.path, e))?.len();
        if size_bytes < map.len() as u64 {
            return Err(Error::file(&self.path, "size in bytes since it was opened", size_bytes, map.len()));
        }
        Ok(())
    }

    /// Whether the file under this name still has the size and time of change that it had when it was mapped.
    pub(crate) fn unchanged(&self) -> Result<()> {
        let Source::File { map, modified, .. } = &self.source else { return Ok(()) };
        let metadata = std::fs::metadata(&self.path).map_err(|e| Error::io(&self.path, e))?;
        if metadata.len() != map.len() as u64 {
            return Err(Error::file(&self.path, "size in bytes since it was opened", metadata.len(), map.len()));
        }
        if metadata.modified().ok() != *modified {
            return Err(Error::file(&self.path, "time of change since it was opened", "a later one", "no change"));
        }
        Ok(())
    }

    /// Tells the system that what lies at `addresses` in this map is not needed in memory any more: whole pages, those that it shares with
    /// its neighbours included, since scales of an expert are smaller than a page, and a ninth of a 4-bit file. Addresses outside of
    /// the map are left alone (maps may lie side by side). Reading pages again is correct, and costs a read from the file or the
    /// system's cache.
    pub(crate) fn release(&self, addresses: &Range<usize>) {
        let Source::File { map, .. } = &self.source else { return };
        let base = map.as_ptr() as usize;
        let offset = addresses.start.saturating_sub(base);
        let end = addresses.end.saturating_sub(base).min(map.len());
        if offset >= end {
            return;
        }
        #[cfg(unix)]
        {
            // A multiple of the page size of every system we run on (4, 16 and 64 KiB); the map starts on a page.
            const PAGE_BYTES: usize = 64 << 10;
            let first = offset / PAGE_BYTES * PAGE_BYTES;
            let last = end.next_multiple_of(PAGE_BYTES).min(map.len());
            // SAFETY: the map is read-only and backed by a file: dropped pages are read again on the next access
            // with the same contents, so no reference into the map sees a change.
            let advised =
                unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, first, last - first) };
            // Advice only: a system that refuses keeps the pages, and nothing else changes.
            drop(advised);
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::MappedFile;

    /// Kilobytes of the map of `file` that are resident in this process.
    fn resident_kb(file: &MappedFile) -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("the system has smaps");
        let mut lines =
            maps.lines().skip_while(|line| !line.ends_with(file.path().to_str().expect("the path is text")));
        let rss = lines.find(|line| line.starts_with("Rss:")).expect("the file is mapped");
        rss.split_whitespace().nth(1).expect("Rss has a number").parse().expect("Rss is a number")
    }

    #[test]
    fn parts_smaller_than_a_page_leave_nothing_resident() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("shard");
        std::fs::write(&path, vec![1u8; 1 << 20]).expect("the file is written");
        let file = MappedFile::open(&path).expect("the file opens");
        for part in file.bytes().chunks(5000) {
            assert!(part.iter().all(|byte| *byte == 1));
        }
        assert!(resident_kb(&file) >= 1024);
        for part in file.bytes().chunks(5000) {
            let start = part.as_ptr() as usize;
            file.release(&(start..start + part.len()));
        }
        assert_eq!(resident_kb(&file), 0);
        assert!(file.bytes().iter().all(|byte| *byte == 1));
    }
}
