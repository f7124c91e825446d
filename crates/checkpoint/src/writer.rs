//! Writes checkpoints: sharded safetensors, atomically, resumable at shard granularity.
//!
//! The tensors (names, dtypes, shapes) are declared up front, which fixes the shards, their headers and every offset.
//! Data then arrives in any order. A shard grows under a hidden temporary name; when its last tensor is there it is
//! flushed to disk and renamed. The index comes last, so a directory with an index is whole. A writer that is created
//! again over the same directory with the same declaration keeps the shards that have their final name
//! ([`Writer::is_done`]) and starts the others anew: resuming loses at most the shards that were being written.

use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::{Error, Result};
use moellon_tensor::Dtype;
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name, unique in the checkpoint.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, row-major.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Bytes of the data; `None` if that does not fit.
    pub fn size_bytes(&self) -> Option<usize> {
        self.shape.iter().try_fold(self.dtype.size_bytes(), |size, &dim| size.checked_mul(dim))
    }
}

/// How to write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WriterOptions {
    /// A shard is closed before its data would exceed this; a larger tensor has a shard of its own.
    pub max_shard_bytes: usize,
    /// The `__metadata__` of every shard.
    pub metadata: Vec<(String, String)>,
}

impl Default for WriterOptions {
    /// Shards of 5 GB, as `save_pretrained` makes them, and `format: pt`, which loaders look for.
    fn default() -> Self {
        WriterOptions { max_shard_bytes: 5_000_000_000, metadata: vec![("format".to_owned(), "pt".to_owned())] }
    }
}

/// A checkpoint that is being written.
#[derive(Debug)]
pub struct Writer {
    dir: PathBuf,
    shards: Vec<Shard>,
    /// Shard and tensor in the shard, by name.
    places: HashMap<String, (usize, usize)>,
}

#[derive(Debug)]
struct Shard {
    file_name: String,
    /// Length and JSON, padded to a multiple of eight bytes.
    header: Vec<u8>,
    tensors: Vec<Placed>,
    state: ShardState,
}

#[derive(Debug)]
enum ShardState {
    Planned,
    Open(File),
    Done,
}

#[derive(Debug)]
struct Placed {
    spec: TensorSpec,
    size_bytes: usize,
    /// Offset in the file.
    offset: u64,
    written: bool,
}

impl Writer {
    /// Plans the shards of `specs` in `dir` (created if missing) and looks for shards of an earlier run.
    ///
    /// # Errors
    /// If there are no tensors, a name occurs twice or is not printable, a size overflows, a file with the name of a shard holds something
    /// else, or the file system fails.
    pub fn create(dir: impl AsRef<Path>, specs: Vec<TensorSpec>, options: &WriterOptions) -> Result<Self> {
        let dir = dir.as_ref().to_owned();
        std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        let groups = assign_to_shards(&dir, specs, options.max_shard_bytes)?;
        let count = groups.len();
        let mut writer = Writer { dir, shards: Vec::with_capacity(count), places: HashMap::new() };
        for (at, tensors) in groups.into_iter().enumerate() {
            let file_name = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
            };
            writer.add_shard(file_name, tensors, &options.metadata)?;
        }
        Ok(writer)
    }

    fn add_shard(&mut self, file_name: String, mut tensors: Vec<Placed>, metadata: &[(String, String)]) -> Result<()> {
        // Wide elements first, so that every tensor is aligned to its element.
        tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.spec.dtype.size_bytes()));
        let header = serialize_header(&mut tensors, metadata);
        for (at, tensor) in tensors.iter_mut().enumerate() {
            tensor.offset += header.len() as u64;
            if self.places.insert(tensor.spec.name.clone(), (self.shards.len(), at)).is_some() {
                return Err(Error::tensor(&self.dir, &tensor.spec.name, "declarations", "at least 2", 1));
            }
        }
        let mut shard = Shard { file_name, header, tensors, state: ShardState::Planned };
        if shard.is_complete_in(&self.dir)? {
            shard.mark_done();
        }
        self.shards.push(shard);
        Ok(())
    }

    /// Whether the tensor is in a shard that is complete, from this run or an earlier one.
    pub fn is_done(&self, name: &str) -> bool {
        self.places.get(name).is_some_and(|&(shard, _)| matches!(self.shards[shard].state, ShardState::Done))
    }

    /// Writes the data of one tensor, in any order of tensors. Does nothing for a tensor of a shard that an earlier
    /// run completed.
    ///
    /// # Errors
    /// If the tensor was not declared or was written before, `bytes` has the wrong length, or the file system fails.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        let Some(&(shard, at)) = self.places.get(name) else {
            return Err(Error::tensor(&self.dir, name, "declaration", "none", "one in Writer::create"));
        };
        let shard = &mut self.shards[shard];
        let path = self.dir.join(&shard.file_name);
        let tensor = &shard.tensors[at];
        if bytes.len() != tensor.size_bytes {
            let expected = format!("{} for {} {:?}", tensor.size_bytes, tensor.spec.dtype, tensor.spec.shape);
            return Err(Error::tensor(&path, name, "bytes of data", bytes.len(), expected));
        }
        if let ShardState::Done = shard.state {
            return Ok(());
        }
        if tensor.written {
            return Err(Error::tensor(&path, name, "times written", 2, 1));
        }
        shard.write_at(&self.dir, at, bytes).map_err(|e| Error::io(&shard.partial_path(&self.dir), e))?;
        if shard.tensors.iter().all(|tensor| tensor.written) {
            shard.close(&self.dir).map_err(|e| Error::io(&path, e))?;
        }
        Ok(())
    }

    /// Writes a JSON file such as `config.json` beside the shards, atomically.
    ///
    /// # Errors
    /// If the file system fails.
    pub fn write_json(&self, file_name: &str, value: &Value) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(value).expect("a JSON value serialises");
        text.push(b'\n');
        write_atomically(&self.dir, file_name, &text).map_err(|e| Error::io(&self.dir.join(file_name), e))
    }

    /// Checks that everything was written and writes the index (for more than one shard).
    ///
    /// # Errors
    /// Names the first tensor that was not written; or if the file system fails.
    pub fn finish(self) -> Result<()> {
        let mut weight_map = Map::new();
        let mut total_size = 0;
        for shard in &self.shards {
            if let Some(tensor) = shard.tensors.iter().find(|tensor| !tensor.written) {
                let path = self.dir.join(&shard.file_name);
                return Err(Error::tensor(&path, &tensor.spec.name, "times written", 0, 1));
            }
            for tensor in &shard.tensors {
                total_size += tensor.size_bytes;
                weight_map.insert(tensor.spec.name.clone(), json!(shard.file_name));
            }
        }
        if self.shards.len() > 1 {
            weight_map.sort_keys();
            self.write_json(
                INDEX_FILE,
                &json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map }),
            )?;
        }
        Ok(())
    }
}

impl Shard {
    fn partial_path(&self, dir: &Path) -> PathBuf {
        dir.join(format!(".{}.partial", self.file_name))
    }

    fn size_bytes(&self) -> u64 {
        self.header.len() as u64 + self.tensors.iter().map(|tensor| tensor.size_bytes as u64).sum::<u64>()
    }

    /// Whether an earlier run finished this shard: the final name, the same header, the right length.
    fn is_complete_in(&self, dir: &Path) -> Result<bool> {
        let path = dir.join(&self.file_name);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io(&path, e)),
        };
        let size_bytes = file.metadata().map_err(|e| Error::io(&path, e))?.len();
        let mut header = vec![0; self.header.len()];
        let same_header = file.read_exact(&mut header).is_ok() && header == self.header;
        if !same_header || size_bytes != self.size_bytes() {
            return Err(Error::file(&path, "contents", "another checkpoint", "no file, or this checkpoint's shard"));
        }
        Ok(true)
    }

    fn mark_done(&mut self) {
        self.state = ShardState::Done;
        self.tensors.iter_mut().for_each(|tensor| tensor.written = true);
    }

    fn write_at(&mut self, dir: &Path, at: usize, bytes: &[u8]) -> std::io::Result<()> {
        if let ShardState::Planned = self.state {
            let mut file = File::create(self.partial_path(dir))?;
            file.write_all(&self.header)?;
            self.state = ShardState::Open(file);
        }
        let ShardState::Open(file) = &mut self.state else {
            unreachable!("the caller returned for a shard that is done")
        };
        let tensor = &mut self.tensors[at];
        file.seek(SeekFrom::Start(tensor.offset))?;
        file.write_all(bytes)?;
        tensor.written = true;
        Ok(())
    }

    fn close(&mut self, dir: &Path) -> std::io::Result<()> {
        if let ShardState::Open(file) = std::mem::replace(&mut self.state, ShardState::Done) {
            // The end of the file may be a tensor without bytes, or not have been the last one written.
            file.set_len(self.size_bytes())?;
            file.sync_all()?;
            std::fs::rename(self.partial_path(dir), dir.join(&self.file_name))?;
            sync_directory(dir)?;
        }
        Ok(())
    }
}

/// Splits the tensors into shards in the declared order; offsets are still missing.
fn assign_to_shards(dir: &Path, specs: Vec<TensorSpec>, max_shard_bytes: usize) -> Result<Vec<Vec<Placed>>> {
    if specs.is_empty() {
        return Err(Error::file(dir, "tensors to write", 0, "at least 1"));
    }
    let mut shards: Vec<Vec<Placed>> = vec![Vec::new()];
    let mut shard_bytes = 0usize;
    for spec in specs {
        if spec.name.is_empty() || spec.name == "__metadata__" || spec.name.chars().any(char::is_control) {
            return Err(Error::tensor(
                dir,
                &spec.name.escape_debug().to_string(),
                "name",
                "this",
                "printable characters",
            ));
        }
        let Some(size_bytes) = spec.size_bytes() else {
            return Err(Error::tensor(
                dir,
                &spec.name,
                "shape",
                format!("{:?}", spec.shape),
                "a size that fits memory",
            ));
        };
        let shard = shards.last_mut().expect("there is always one shard");
        if !shard.is_empty() && shard_bytes.saturating_add(size_bytes) > max_shard_bytes {
            shards.push(Vec::new());
            shard_bytes = 0;
        }
        shard_bytes = shard_bytes.saturating_add(size_bytes);
        let shard = shards.last_mut().expect("there is always one shard");
        shard.push(Placed { spec, size_bytes, offset: 0, written: false });
    }
    Ok(shards)
}

/// Lays the tensors out one after the other (offsets from the end of the header) and writes the header down.
fn serialize_header(tensors: &mut [Placed], metadata: &[(String, String)]) -> Vec<u8> {
    let mut entries = Map::new();
    if !metadata.is_empty() {
        entries.insert("__metadata__".to_owned(), metadata.iter().map(|(k, v)| (k.clone(), json!(v))).collect());
    }
    let mut offset = 0;
    for tensor in tensors {
        tensor.offset = offset;
        let end = offset + tensor.size_bytes as u64;
        let TensorSpec { name, dtype, shape } = &tensor.spec;
        let entry = json!({ "dtype": dtype.safetensors_name(), "shape": shape, "data_offsets": [offset, end] });
        entries.insert(name.clone(), entry);
        offset = end;
    }
    let mut json = serde_json::to_vec(&entries).expect("a JSON value serialises");
    json.resize(json.len().next_multiple_of(8), b' ');
    [&(json.len() as u64).to_le_bytes(), json.as_slice()].concat()
}

/// Writes a file under a temporary name, flushes and renames it.
fn write_atomically(dir: &Path, file_name: &str, bytes: &[u8]) -> std::io::Result<()> {
    let partial = dir.join(format!(".{file_name}.partial"));
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&partial, dir.join(file_name))?;
    sync_directory(dir)
}

/// Makes a rename durable. Directories cannot be opened on Windows, where the rename itself is.
fn sync_directory(dir: &Path) -> std::io::Result<()> {
    if cfg!(unix) { File::open(dir)?.sync_all() } else { Ok(()) }
}
