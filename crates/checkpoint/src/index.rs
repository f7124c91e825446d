//! `model.safetensors.index.json`: which shard holds which tensor.

use crate::json_file::parse_object;
use crate::{Error, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The weight map of an index, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// File name (in the directory of the index) by tensor name.
    pub weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Names of the shards, each once, in order.
    pub fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }
}

/// Parses an index; `file` is only for messages.
///
/// # Errors
/// If it is not JSON, has no `weight_map` of strings, or names a shard that is not a plain `*.safetensors` file name.
pub fn parse(file: &Path, bytes: &[u8]) -> Result<Index> {
    let mut json = parse_object(file, bytes)?;
    let Some(Value::Object(entries)) = json.get_mut("weight_map").map(Value::take) else {
        return Err(Error::file(file, "weight_map", "none", "an object of file names by tensor name"));
    };
    let mut weight_map = BTreeMap::new();
    for (tensor, shard) in entries {
        match shard {
            Value::String(shard) if is_plain_shard_name(&shard) => weight_map.insert(tensor, shard),
            other => {
                let found = other.to_string();
                let expected = "a plain file name that ends in .safetensors";
                let tensor = tensor.escape_debug().to_string();
                return Err(Error::tensor(file, &tensor, "shard named by the index", found, expected));
            }
        };
    }
    if weight_map.is_empty() {
        return Err(Error::file(file, "entries of weight_map", 0, "at least 1"));
    }
    Ok(Index { weight_map })
}

/// A file name without any path: no separator, no drive, not hidden, no control characters.
fn is_plain_shard_name(name: &str) -> bool {
    name.ends_with(".safetensors")
        && !name.starts_with('.')
        && name.len() <= 255
        && !name.chars().any(|c| c.is_control() || matches!(c, '/' | '\\' | ':'))
}
