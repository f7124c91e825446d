//! Reading `config.json` with errors that name the field, the value found and the value expected.

use crate::{Error, Result};
use serde_json::Value;

/// A JSON object and its path in the file.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    value: &'a Value,
    path: &'a str,
}

/// Larger than any model's dimension, small enough that products of three cannot overflow: what stops a config bomb.
const LARGEST_DIMENSION: u64 = 1 << 20;

impl<'a> Fields<'a> {
    pub(crate) fn new(value: &'a Value) -> Self {
        Fields { value, path: "" }
    }

    /// The object at `key`, if there is one that is not null.
    pub(crate) fn object(&self, key: &'a str) -> Option<Fields<'a>> {
        self.get(key).filter(|v| v.is_object()).map(|value| Fields { value, path: key })
    }

    /// The value at `key`, null counted as absent.
    pub(crate) fn get(&self, key: &str) -> Option<&'a Value> {
        self.value.get(key).filter(|v| !v.is_null())
    }

    pub(crate) fn error(&self, key: &str, expected: impl ToString) -> Error {
        let found = self.value.get(key).map_or("missing".to_owned(), |v| shorten(&v.to_string()));
        let field = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Error::config(field, found, expected)
    }

    /// A positive integer up to 2^20.
    pub(crate) fn dimension(&self, key: &str) -> Result<usize> {
        self.optional_dimension(key)?.ok_or_else(|| self.error(key, "a positive integer"))
    }

    pub(crate) fn optional_dimension(&self, key: &str) -> Result<Option<usize>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=LARGEST_DIMENSION).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.error(key, format!("an integer from 1 to {LARGEST_DIMENSION}"))),
            },
        }
    }

    /// An integer from 0 to 2^20, `default` where absent.
    pub(crate) fn count_or(&self, key: &str, default: usize) -> Result<usize> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => match value.as_u64() {
                Some(n) if n <= LARGEST_DIMENSION => Ok(n as usize),
                _ => Err(self.error(key, format!("an integer from 0 to {LARGEST_DIMENSION}"))),
            },
        }
    }

    /// A finite number, `default` where absent.
    pub(crate) fn number_or(&self, key: &str, default: f64) -> Result<f64> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    pub(crate) fn optional_number(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => match value.as_f64() {
                Some(x) if x.is_finite() => Ok(Some(x)),
                _ => Err(self.error(key, "a finite number")),
            },
        }
    }

    /// A positive finite number.
    pub(crate) fn positive_number(&self, key: &str) -> Result<f64> {
        self.optional_number(key)?.filter(|x| *x > 0.0).ok_or_else(|| self.error(key, "a positive number"))
    }

    pub(crate) fn flag_or(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| self.error(key, "true or false")),
        }
    }

    pub(crate) fn optional_text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => value.as_str().map(Some).ok_or_else(|| self.error(key, "a string")),
        }
    }

    /// A list of strings of exactly `len` entries.
    pub(crate) fn optional_texts(&self, key: &str, len: usize) -> Result<Option<Vec<&'a str>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let expected = format!("a list of {len} strings");
        let list = value.as_array().ok_or_else(|| self.error(key, &expected))?;
        let texts: Option<Vec<&str>> = list.iter().map(Value::as_str).collect();
        texts.filter(|t| t.len() == len).map(Some).ok_or_else(|| self.error(key, &expected))
    }

    /// An integer or a list of integers, as `eos_token_id` is written.
    pub(crate) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let list = match value {
            Value::Array(list) => list.as_slice(),
            single => std::slice::from_ref(single),
        };
        let ids: Option<Vec<u32>> = list.iter().map(|v| v.as_u64().and_then(|n| u32::try_from(n).ok())).collect();
        ids.ok_or_else(|| self.error(key, "a token id or a list of them"))
    }

    /// Refuses a field whose value is not one that we implement.
    pub(crate) fn expect_text(&self, key: &str, allowed: &[&str]) -> Result<()> {
        match self.optional_text(key)? {
            Some(text) if !allowed.contains(&text) => Err(self.error(key, allowed.join(" or "))),
            _ => Ok(()),
        }
    }
}

fn shorten(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    }
}
