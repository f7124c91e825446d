//! The header of a safetensors file: `u64` length, that many bytes of JSON, then the data.
//!
//! Parsed here and not by the `safetensors` crate, because its errors do not say which tensor is wrong and its map
//! drops duplicate names. Everything is checked before anything is allocated by a size that the file claims: the
//! header is at most 100 MB and no longer than the file, shapes have at most eight dimensions, sizes are multiplied
//! with overflow checks, and the data is covered by the tensors without overlap or gap.

use crate::{Error, Result};
use moellon_tensor::Dtype;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::path::Path;

/// Longest header in bytes, the limit of the reference implementation.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 8;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Name, unique in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, row-major.
    pub shape: Vec<usize>,
    /// Bytes of the file that hold the data.
    pub range: Range<usize>,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their data.
    pub tensors: Vec<TensorEntry>,
    /// The `__metadata__` map.
    pub metadata: BTreeMap<String, String>,
    /// Bytes before the data: 8 plus the length of the JSON.
    pub data_start: usize,
}

/// Parses and checks the header of a whole safetensors file; `file` is only for messages.
///
/// # Errors
/// One line that names the file, the tensor where there is one, the value found and the value expected.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<Header> {
    let Some((length, rest)) = bytes.split_first_chunk::<8>() else {
        return Err(Error::file(file, "file size in bytes", bytes.len(), "at least 8"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(Error::file(file, "header length in bytes", length, format!("at most {MAX_HEADER_BYTES}")));
    }
    let length = length as usize;
    if length > rest.len() {
        let expected = format!("at most {}, the rest of the file", rest.len());
        return Err(Error::file(file, "header length in bytes", length, expected));
    }
    let (json, data) = rest.split_at(length);
    let raw: RawHeader = serde_json::from_slice(json).map_err(|e| Error::json(file, &e))?;
    let data_start = 8 + length;
    let mut tensors = Vec::with_capacity(raw.tensors.len());
    for (name, raw) in raw.tensors {
        tensors.push(check_tensor(file, name, raw, data_start, data.len())?);
    }
    tensors.sort_by(|a, b| (a.range.start, a.range.end, &a.name).cmp(&(b.range.start, b.range.end, &b.name)));
    check_coverage(file, &tensors, data_start, bytes.len())?;
    check_unique(file, &tensors)?;
    Ok(Header { tensors, metadata: raw.metadata, data_start })
}

/// Checks one tensor by itself: dtype, overflow, bytes against shape, end against the file.
fn check_tensor(
    file: &Path,
    name: String,
    raw: RawTensor,
    data_start: usize,
    data_bytes: usize,
) -> Result<TensorEntry> {
    let wrong = |what: &str, found: String, expected: String| Err(Error::tensor(file, &name, what, found, expected));
    let Some(dtype) = Dtype::from_safetensors_name(&raw.dtype) else {
        return wrong(
            "dtype",
            raw.dtype.escape_debug().to_string(),
            "one of F64, F32, F16, BF16, F8_*, I*, U*, BOOL".into(),
        );
    };
    let shape = raw.shape.0;
    let size = shape
        .iter()
        .try_fold(dtype.size_bytes() as u64, |size, &dim| size.checked_mul(dim))
        .filter(|&size| usize::try_from(size).is_ok());
    let Some(size) = size else {
        return wrong("shape", format!("{shape:?}"), "a size that fits memory".into());
    };
    let [begin, end] = raw.data_offsets;
    if begin > end {
        return wrong("data_offsets", format!("[{begin}, {end}]"), "begin before end".into());
    }
    if end > data_bytes as u64 {
        return wrong(
            "end of its data (is the file truncated?)",
            end.to_string(),
            format!("at most {data_bytes}, the data bytes of the file"),
        );
    }
    if end - begin != size {
        return wrong("bytes of data", (end - begin).to_string(), format!("{size} for {dtype} {shape:?}"));
    }
    // Both fit `usize`: they are at most the length of a slice. So do the dimensions unless one of them is zero.
    let Ok(shape) = shape.iter().map(|&dim| usize::try_from(dim)).collect() else {
        return wrong("shape", format!("{shape:?}"), "dimensions that fit memory".into());
    };
    Ok(TensorEntry { name, dtype, shape, range: data_start + begin as usize..data_start + end as usize })
}

/// Checks that the tensors, in the order of their data, cover the file from the header to the end.
fn check_coverage(file: &Path, tensors: &[TensorEntry], data_start: usize, file_bytes: usize) -> Result<()> {
    let mut covered = data_start;
    for tensor in tensors {
        if tensor.range.start != covered {
            let what =
                if tensor.range.start < covered { "data overlaps the tensor before it" } else { "gap before its data" };
            let offset = |at: usize| format!("offset {}", at - data_start);
            return Err(Error::tensor(file, &tensor.name, what, offset(tensor.range.start), offset(covered)));
        }
        covered = tensor.range.end;
    }
    if covered != file_bytes {
        return Err(Error::file(file, "bytes after the last tensor", file_bytes - covered, 0));
    }
    Ok(())
}

fn check_unique(file: &Path, tensors: &[TensorEntry]) -> Result<()> {
    let mut names: Vec<&str> = tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(Error::tensor(file, pair[0], "entries in the header", "at least 2", 1)),
        None => Ok(()),
    }
}

/// The JSON as it stands; duplicates are still there.
struct RawHeader {
    tensors: Vec<(String, RawTensor)>,
    metadata: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: RawShape,
    data_offsets: [u64; 2],
}

struct RawShape(Vec<u64>);

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = RawHeader;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors by name")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<RawHeader, A::Error> {
                let mut header = RawHeader { tensors: Vec::new(), metadata: BTreeMap::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value()?;
                        continue;
                    }
                    // Names end up in one-line messages and logs.
                    if name.is_empty() || name.chars().any(char::is_control) {
                        return Err(A::Error::custom(format!("tensor name {name:?}: expected printable characters")));
                    }
                    let tensor = map.next_value().map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
                    header.tensors.push((name, tensor));
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for RawShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Dimensions;
        impl<'de> Visitor<'de> for Dimensions {
            type Value = RawShape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_RANK} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<RawShape, A::Error> {
                let mut shape = Vec::new();
                while let Some(dim) = seq.next_element()? {
                    if shape.len() == MAX_RANK {
                        return Err(A::Error::custom(format!("shape has more than {MAX_RANK} dimensions")));
                    }
                    shape.push(dim);
                }
                Ok(RawShape(shape))
            }
        }
        deserializer.deserialize_seq(Dimensions)
    }
}
