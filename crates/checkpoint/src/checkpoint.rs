//! An open model directory: shards mapped, headers checked, configs parsed. No tensor data is read here.

use crate::mapped_file::MappedFile;
use crate::{Error, Result, header, index, json_file};
use moellon_tensor::{Dtype, MatrixView, ScaleDtype};
use rayon::prelude::*;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// One tensor of a checkpoint, borrowed from the map.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// Name in the checkpoint.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, row-major.
    pub shape: &'a [usize],
    /// Data, little-endian, without alignment.
    pub bytes: &'a [u8],
    /// The file that holds it.
    pub file: &'a Path,
}

impl TensorView<'_> {
    /// An error about this tensor.
    pub(crate) fn wrong(&self, what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Error {
        Error::tensor(self.file, self.name, what, found, expected)
    }

    /// Checks the shape, which must not be empty in any dimension.
    pub(crate) fn expect_shape(&self, expected: &[usize]) -> Result<()> {
        if expected.contains(&0) {
            return Err(self.wrong("expected shape", format!("{expected:?}"), "positive dimensions"));
        }
        if self.shape != expected {
            return Err(self.wrong("shape", format!("{:?}", self.shape), format!("{expected:?}")));
        }
        Ok(())
    }

    /// The float type of a float tensor.
    pub(crate) fn expect_float(&self) -> Result<ScaleDtype> {
        ScaleDtype::from_dtype(self.dtype).ok_or_else(|| self.wrong("dtype", self.dtype, "F32, F16 or BF16"))
    }
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// An open checkpoint. Opening touches headers and JSON files only.
#[derive(Debug)]
pub struct Checkpoint {
    /// `config.json`.
    pub config: Value,
    /// `generation_config.json`, if there is one.
    pub generation_config: Option<Value>,
    /// `hf_quant_config.json` (ModelOpt), if there is one.
    pub hf_quant_config: Option<Value>,
    dir: PathBuf,
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Entry>,
}

/// Name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// Name of an unsharded checkpoint's only file.
pub const SINGLE_FILE: &str = "model.safetensors";

impl Checkpoint {
    /// Opens a model directory: the shards that `model.safetensors.index.json` names, else `model.safetensors`, else
    /// every `*.safetensors` file.
    ///
    /// # Errors
    /// If `config.json` or the shards are missing or malformed, a tensor stands in two files, or the files and the
    /// index disagree.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let Some(config) = json_file::read_object(&dir.join("config.json"))? else {
            return Err(missing(dir, "config.json", "the model's configuration"));
        };
        let index_path = dir.join(INDEX_FILE);
        let index = json_file::read_bytes(&index_path)?.map(|bytes| index::parse(&index_path, &bytes)).transpose()?;
        let shards = match &index {
            Some(index) => index.shards().into_iter().map(|shard| dir.join(shard)).collect(),
            None => unindexed_shards(dir)?,
        };
        let mut checkpoint = Checkpoint {
            config,
            generation_config: json_file::read_object(&dir.join("generation_config.json"))?,
            hf_quant_config: json_file::read_object(&dir.join("hf_quant_config.json"))?,
            dir: dir.to_owned(),
            files: Vec::with_capacity(shards.len()),
            entries: BTreeMap::new(),
        };
        for shard in shards {
            if index.is_some() && !shard.exists() {
                let name = shard.file_name().unwrap_or_default().display().to_string();
                return Err(missing(dir, &format!("shard {name}"), &format!("a file, as {INDEX_FILE} says")));
            }
            checkpoint.add_file(&shard)?;
        }
        if let Some(index) = &index {
            checkpoint.check_index(&index_path, index)?;
        }
        Ok(checkpoint)
    }

    /// A checkpoint whose files are part of the program: `config.json` and its shards, each with its name.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn embedded(name: &str, config: &'static [u8], shards: &[(&str, &'static [u8])]) -> Result<Self> {
        let dir = PathBuf::from(name);
        let mut checkpoint = Checkpoint {
            config: json_file::parse_object(&dir.join("config.json"), config)?,
            generation_config: None,
            hf_quant_config: None,
            dir: dir.clone(),
            files: Vec::with_capacity(shards.len()),
            entries: BTreeMap::new(),
        };
        for (shard, bytes) in shards {
            checkpoint.add(MappedFile::embedded(&dir.join(shard), bytes))?;
        }
        Ok(checkpoint)
    }

    fn add_file(&mut self, path: &Path) -> Result<()> {
        self.add(MappedFile::open(path)?)
    }

    fn add(&mut self, file: MappedFile) -> Result<()> {
        let path = file.path();
        let header = header::parse(path, file.bytes())?;
        for tensor in header.tensors {
            let entry = Entry { file: self.files.len(), dtype: tensor.dtype, shape: tensor.shape, range: tensor.range };
            if let Some(other) = self.entries.get(&tensor.name) {
                let first = self.files[other.file].path().display();
                return Err(Error::tensor(path, &tensor.name, "files that hold it", format!("also {first}"), "one"));
            }
            self.entries.insert(tensor.name, entry);
        }
        self.files.push(file);
        Ok(())
    }

    /// Every tensor must be where the index says, and the shards must hold nothing else (they would be of another
    /// revision).
    fn check_index(&self, index_path: &Path, index: &index::Index) -> Result<()> {
        for (tensor, shard) in &index.weight_map {
            let Some(entry) = self.entries.get(tensor) else {
                let printable = tensor.escape_debug().to_string();
                return Err(Error::tensor(
                    &self.dir.join(shard),
                    &printable,
                    "entries",
                    0,
                    format!("1, as {INDEX_FILE} says"),
                ));
            };
            let found = self.files[entry.file].path();
            if found.file_name() != Some(shard.as_ref()) {
                let found = found.file_name().unwrap_or_default().display();
                return Err(Error::tensor(index_path, tensor, "shard that holds it", found, shard));
            }
        }
        match self.entries.iter().find(|(name, _)| !index.weight_map.contains_key(*name)) {
            Some((name, entry)) => {
                let file = self.files[entry.file].path();
                Err(Error::tensor(
                    file,
                    name,
                    format!("entry in {INDEX_FILE}"),
                    "none",
                    "one (is the shard of another revision?)",
                ))
            }
            None => Ok(()),
        }
    }

    /// The model directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.entries.get_key_value(name).map(|(name, entry)| self.view(name, entry))
    }

    /// The tensor of that name, or the error that it is missing.
    ///
    /// # Errors
    /// [`Error::Missing`], and a shard that was cut since it was opened.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>> {
        let found = self.entries.get_key_value(name);
        let (name, entry) =
            found.ok_or_else(|| missing(&self.dir, &format!("tensor {name}"), "it in one of the shards"))?;
        self.files[entry.file].check_whole()?;
        Ok(self.view(name, entry))
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.entries.iter().map(|(name, entry)| self.view(name, entry))
    }

    /// Names that start with `prefix`, in order.
    pub(crate) fn names_under(&self, prefix: String) -> impl Iterator<Item = &str> {
        self.entries
            .range(prefix.clone()..)
            .map(|(name, _)| name.as_str())
            .take_while(move |name| name.starts_with(&prefix))
    }

    fn view<'a>(&'a self, name: &'a str, entry: &'a Entry) -> TensorView<'a> {
        let file = &self.files[entry.file];
        TensorView {
            name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &file.bytes()[entry.range.clone()],
            file: file.path(),
        }
    }

    /// The shards with their sizes in bytes, in the order they were opened.
    pub fn files(&self) -> impl Iterator<Item = (&Path, u64)> {
        self.files.iter().map(|file| (file.path(), file.bytes().len() as u64))
    }

    /// Bytes of all shards.
    pub fn size_bytes(&self) -> u64 {
        self.files().map(|(_, size_bytes)| size_bytes).sum()
    }

    /// Checks that no shard was replaced, cut or changed since it was opened (reading a cut one would be a SIGBUS).
    ///
    /// # Errors
    /// Names the file and what changed.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(MappedFile::unchanged)
    }

    /// Tells the system that these bytes of a tensor are not needed in memory any more, so that repacking a checkpoint
    /// never holds two copies of it. Reading them again stays correct. Bytes of other origin are left alone.
    pub fn release(&self, bytes: &[u8]) {
        self.release_addresses(&addresses(bytes));
    }

    fn release_addresses(&self, addresses: &Range<usize>) {
        self.files.iter().for_each(|file| file.release(addresses));
    }

    /// [`Checkpoint::release`] for the codes, scales and offsets of matrices. Those that lie side by side, as experts do, are released
    /// together: a call takes 5 us and more where other threads use the map, and a layer of 128 experts would have 1,152 of them.
    pub fn release_matrices(&self, matrices: &[MatrixView<'_>]) {
        /// Bytes that one call releases: 0.2 ms of work, shared by the cores.
        const SHARE: usize = 16 << 20;
        let mut parts: Vec<Range<usize>> = Vec::with_capacity(3 * matrices.len());
        for matrix in matrices {
            parts.push(addresses(matrix.codes.span(matrix.rows)));
            if matrix.format.is_quantized() {
                // Blocks of rows may begin before the first row of the view; other formats have no such offset.
                let rows = matrix.format.scale_rows(matrix.first_block_row + matrix.rows);
                parts.push(addresses(matrix.scales.span(rows)));
            }
            if matrix.format.has_offsets() {
                parts.push(addresses(matrix.offsets.span(matrix.rows)));
            }
        }
        let shares = joined(parts).into_iter().flat_map(|part| {
            let end = part.end;
            part.step_by(SHARE).map(move |start| start..(start + SHARE).min(end))
        });
        shares.collect::<Vec<_>>().par_iter().for_each(|share| self.release_addresses(share));
    }
}

fn addresses(bytes: &[u8]) -> Range<usize> {
    let start = bytes.as_ptr() as usize;
    start..start + bytes.len()
}

/// The same addresses in order, ranges that touch or overlap made one.
fn joined(mut parts: Vec<Range<usize>>) -> Vec<Range<usize>> {
    parts.sort_unstable_by_key(|part| part.start);
    let mut all: Vec<Range<usize>> = Vec::new();
    for part in parts {
        match all.last_mut() {
            Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
            _ => all.push(part),
        }
    }
    all
}

pub(crate) fn missing(dir: &Path, missing: &str, expected: &str) -> Error {
    Error::Missing { dir: dir.to_owned(), missing: missing.to_owned(), expected: expected.to_owned() }
}

/// `model.safetensors` if it is there, else every `*.safetensors` file that is not hidden, by name.
fn unindexed_shards(dir: &Path) -> Result<Vec<PathBuf>> {
    let single = dir.join(SINGLE_FILE);
    if single.exists() {
        return Ok(vec![single]);
    }
    let mut shards = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if !hidden && path.extension().is_some_and(|extension| extension == "safetensors") {
            shards.push(path);
        }
    }
    if shards.is_empty() {
        return Err(missing(dir, "every *.safetensors file", "at least one"));
    }
    shards.sort();
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use super::joined;

    #[test]
    fn neighbours_are_released_together() {
        assert_eq!(joined(vec![30..40, 0..10, 10..20, 15..18, 41..50]), [0..20, 30..40, 41..50]);
    }
}
