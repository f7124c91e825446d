//! A model directory in the making: `DST.partial` until it is whole, then `DST`. A journal beside it holds what was asked
//! for and what every finished module measured, so that a killed run goes on where it was and ends with the same bytes.

use crate::{Error, Result};
use moellon_checkpoint::{TensorSpec, Writer, WriterOptions};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A product that is being written.
pub(crate) struct Product {
    destination: PathBuf,
    partial: PathBuf,
    journal_path: PathBuf,
    journal: File,
    writer: Writer,
    /// Journal entries by module, of this run and earlier ones.
    entries: HashMap<String, Value>,
}

/// How a product begins.
#[expect(clippy::large_enum_variant, reason = "made once a run")]
pub(crate) enum Begun {
    /// There is work to do.
    Open(Product),
    /// An earlier run with the same job finished it.
    Complete,
}

fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_name().map_or_else(|| OsString::from("model"), OsString::from);
    name.push(suffix);
    path.with_file_name(name)
}

impl Product {
    /// Begins or resumes `destination`. `job` says everything that decides the result; an earlier run with another job is
    /// refused.
    pub(crate) fn begin(
        destination: &Path,
        job: &Value,
        specs: Vec<TensorSpec>,
        max_shard_bytes: usize,
    ) -> Result<Begun> {
        let partial = beside(destination, ".partial");
        let journal_path = beside(destination, ".journal");
        let (first_line, entries) = read_journal(&journal_path)?;
        let resumed = match &first_line {
            Some(found) if found != job => {
                return Err(Error::mismatch(
                    format!("job of {}", journal_path.display()),
                    found,
                    format!("{job} (remove it and {} to start anew)", partial.display()),
                ));
            }
            found => found.is_some(),
        };
        if destination.exists() {
            if resumed && !partial.exists() {
                remove(&journal_path)?;
                return Ok(Begun::Complete);
            }
            return Err(Error::mismatch(format!("{}", destination.display()), "there already", "a new directory"));
        }
        if !resumed && partial.exists() {
            return Err(Error::mismatch(
                format!("{}", partial.display()),
                "there without a journal",
                "what an earlier run of this command left",
            ));
        }
        let mut journal = open_journal(&journal_path, resumed)?;
        if !resumed {
            append(&mut journal, job).map_err(|e| Error::io(&journal_path, e))?;
        }
        let options = WriterOptions { max_shard_bytes, ..WriterOptions::default() };
        let writer = Writer::create(&partial, specs, &options)?;
        Ok(Begun::Open(Product {
            destination: destination.to_owned(),
            partial,
            journal_path,
            journal,
            writer,
            entries,
        }))
    }

    /// What an earlier run noted for a module whose tensors are all on disk.
    pub(crate) fn finished(&self, module: &str, specs: &[TensorSpec]) -> Option<&Value> {
        specs.iter().all(|spec| self.writer.is_done(&spec.name)).then(|| self.entries.get(module)).flatten()
    }

    /// Notes what a module measured. Comes before its data: a shard that is whole has all its modules in the journal.
    pub(crate) fn note(&mut self, module: &str, entry: Value) -> Result<()> {
        append(&mut self.journal, &json!({ "module": module, "entry": entry }))
            .map_err(|e| Error::io(&self.journal_path, e))?;
        self.entries.insert(module.to_owned(), entry);
        Ok(())
    }

    /// Writes a tensor.
    pub(crate) fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        Ok(self.writer.write(name, bytes)?)
    }

    /// Whether a tensor needs no writing.
    pub(crate) fn is_done(&self, name: &str) -> bool {
        self.writer.is_done(name)
    }

    /// The entry of a module, if there is one, whether its tensors are on disk or not.
    pub(crate) fn noted(&self, module: &str) -> Option<&Value> {
        self.entries.get(module)
    }

    /// The entry of a module, which must have been noted.
    pub(crate) fn entry(&self, module: &str) -> &Value {
        self.entries.get(module).expect("every module was noted before the product is finished")
    }

    /// Completes the checkpoint, adds `files`, and gives the directory its name.
    pub(crate) fn finish(self, config: &Value, files: &[(String, Vec<u8>)]) -> Result<()> {
        let Product { destination, partial, journal_path, journal, writer, entries: _ } = self;
        writer.write_json("config.json", config)?;
        for (name, bytes) in files {
            write_file(&partial.join(name), bytes)?;
        }
        writer.finish()?;
        std::fs::rename(&partial, &destination).map_err(|e| Error::io(&destination, e))?;
        sync_parent(&destination)?;
        drop(journal);
        remove(&journal_path)
    }
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_file(path).map_err(|e| Error::io(path, e))
}

/// The job and the entries of a journal. A line that a kill cut off is the last one and is not counted.
fn read_journal(path: &Path) -> Result<(Option<Value>, HashMap<String, Value>)> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok((None, HashMap::new())),
        Err(e) => return Err(Error::io(path, e)),
    };
    let mut lines = bytes
        .split_inclusive(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Value>(line.strip_suffix(b"\n")?).ok());
    let job = lines.next();
    let entries =
        lines.filter_map(|line| Some((line.get("module")?.as_str()?.to_owned(), line.get("entry")?.clone()))).collect();
    Ok((job, entries))
}

/// Opens the journal for appending, on a new line, and locks it: two runs would write into the same shards.
fn open_journal(path: &Path, resumed: bool) -> Result<File> {
    let io = |e| Error::io(path, e);
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        std::fs::create_dir_all(parent).map_err(io)?;
    }
    let mut file = OpenOptions::new().create(true).append(true).open(path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Error::mismatch(format!("{}", path.display()), "in use by another run", "one run at a time"));
        }
        Err(TryLockError::Error(e)) => return Err(io(e)),
    }
    if resumed {
        file.write_all(b"\n").map_err(io)?;
    }
    Ok(file)
}

fn append(journal: &mut File, line: &Value) -> std::io::Result<()> {
    let mut text = line.to_string();
    text.push('\n');
    journal.write_all(text.as_bytes())?;
    journal.sync_data()
}

/// Writes a file under a temporary name, flushes and renames it.
pub(crate) fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = beside(path, ".partial");
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().map_err(|e| Error::io(path, e))?;
    sync_parent(path)
}

/// Makes a rename durable. Directories cannot be opened on Windows, where the rename itself is.
fn sync_parent(path: &Path) -> Result<()> {
    if !cfg!(unix) {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|e| Error::io(parent, e))
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::Dtype;

    #[test]
    fn two_runs_do_not_share_a_product() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let begin = || {
            let spec = TensorSpec { name: "a".to_owned(), dtype: Dtype::U8, shape: vec![4] };
            Product::begin(&dir.path().join("model"), &json!({ "command": "test" }), vec![spec], 1000)
                .map_err(|e| e.to_string())
        };
        let first = begin().expect("a new product");
        let second = begin().err().expect("it is being written");
        assert!(second.contains("model.journal is in use by another run"), "{second}");
        drop(first);
        begin().expect("the run that held it has ended");
    }
}
