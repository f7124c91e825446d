//! JSON files of a model directory, with a size limit. Nesting is limited to 128 levels by `serde_json`.

use crate::{Error, Result};
use serde_json::Value;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Largest JSON file in bytes; the index of a model with 240,000 tensors has 25 MB.
pub(crate) const MAX_JSON_BYTES: u64 = 100_000_000;

/// Reads a file of at most [`MAX_JSON_BYTES`]; `None` if it does not exist.
pub(crate) fn read_bytes(path: &Path) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_JSON_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_JSON_BYTES {
        return Err(Error::file(path, "size in bytes", "more", format!("at most {MAX_JSON_BYTES}")));
    }
    Ok(Some(bytes))
}

/// Reads a JSON object; `None` if the file does not exist.
pub(crate) fn read_object(path: &Path) -> Result<Option<Value>> {
    read_bytes(path)?.map(|bytes| parse_object(path, &bytes)).transpose()
}

/// Parses a JSON object. Byte order marks are skipped; `file` is only for messages.
///
/// # Errors
/// If the bytes are not JSON (trailing text, numbers beyond f64 and deep nesting included) or not an object.
pub fn parse_object(file: &Path, bytes: &[u8]) -> Result<Value> {
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let value: Value = serde_json::from_slice(bytes).map_err(|e| Error::json(file, &e))?;
    if !value.is_object() {
        return Err(Error::file(file, "kind of JSON value", kind(&value), "an object"));
    }
    Ok(value)
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
