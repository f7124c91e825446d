//! Reading the fields of a JSON body: every wrong value is an error that names field, value and expectation.
//!
//! `null` is the same as a missing field, as in both protocols' SDKs.

use crate::error::ApiError;
use serde_json::{Map, Value};

/// How much of a wrong value an error repeats, in bytes.
const MAX_SHOWN_BYTES: usize = 80;

/// An object of a request body and the path to it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    prefix: &'a str,
}

impl<'a> Fields<'a> {
    /// The fields of the body itself.
    pub(crate) fn of_body(object: &'a Map<String, Value>) -> Fields<'a> {
        Fields { object, prefix: "" }
    }

    /// The fields of an object inside; `prefix` ends in a dot.
    pub(crate) fn inside(object: &'a Map<String, Value>, prefix: &'a str) -> Fields<'a> {
        Fields { object, prefix }
    }

    /// The full name of a field.
    pub(crate) fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// A field that is there and not null.
    pub(crate) fn get(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// An error about a field.
    pub(crate) fn wrong(&self, name: &str, value: &Value, expected: &str) -> ApiError {
        ApiError::field(self.path(name), shown(value), expected)
    }

    fn read<T>(
        &self,
        name: &str,
        expected: &str,
        convert: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        match self.get(name) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| self.wrong(name, value, expected)),
        }
    }

    pub(crate) fn text(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.read(name, "a string", Value::as_str)
    }

    pub(crate) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        self.read(name, "true or false", Value::as_bool)
    }

    pub(crate) fn object(&self, name: &str) -> Result<Option<&'a Map<String, Value>>, ApiError> {
        self.read(name, "an object", Value::as_object)
    }

    pub(crate) fn list(&self, name: &str) -> Result<Option<&'a Vec<Value>>, ApiError> {
        self.read(name, "a list", Value::as_array)
    }

    /// A finite number that survives as f32.
    pub(crate) fn number(&self, name: &str) -> Result<Option<f32>, ApiError> {
        self.read(name, "a number", |value| value.as_f64().map(|x| x as f32).filter(|x| x.is_finite()))
    }

    /// A whole number from `least` to `most`.
    pub(crate) fn count(&self, name: &str, least: usize, most: usize) -> Result<Option<usize>, ApiError> {
        let convert = |value: &Value| usize::try_from(whole(value)?).ok().filter(|n| (least..=most).contains(n));
        match self.get(name) {
            None => Ok(None),
            Some(value) => convert(value).map(Some).ok_or_else(|| {
                let expected = match most {
                    usize::MAX => format!("a whole number of at least {least}"),
                    _ => format!("a whole number from {least} to {most}"),
                };
                self.wrong(name, value, &expected)
            }),
        }
    }

    /// Refuses fields that change the answer and are not supported.
    pub(crate) fn refuse(&self, names: &[(&str, &str)]) -> Result<(), ApiError> {
        for (name, what) in names {
            let asked = match self.get(name) {
                None | Some(Value::Bool(false)) => false,
                Some(Value::Array(list)) => !list.is_empty(),
                Some(_) => true,
            };
            if asked {
                return Err(ApiError::unsupported(self.path(name), what));
            }
        }
        Ok(())
    }
}

/// A value as errors show it: shortened JSON.
pub(crate) fn shown(value: &Value) -> String {
    let text = match value {
        // Not the content: it may be a megabyte, or a secret.
        Value::Array(list) => return format!("a list of {}", list.len()),
        Value::Object(object) => return format!("an object of {} fields", object.len()),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    };
    if text.len() <= MAX_SHOWN_BYTES {
        return text;
    }
    let end = text.floor_char_boundary(MAX_SHOWN_BYTES);
    format!("{}... ({} bytes)", &text[..end], text.len())
}

/// A whole number, also one that is written as `4.0`: JSON does not tell them apart, and some languages only write such.
fn whole(value: &Value) -> Option<u64> {
    /// Beyond it a float is not one number any more.
    const MAX_EXACT: f64 = (1u64 << 53) as f64;
    let is_exact = |number: &f64| number.fract() == 0.0 && (0.0..=MAX_EXACT).contains(number);
    value.as_u64().or_else(|| value.as_f64().filter(is_exact).map(|number| number as u64))
}
