//! Values as Python prints them: `str()`, `repr()` and `json.dumps`.
//!
//! Models were trained on prompts that Python wrote, so `True`, `1e+22` and `{"a": 1}` with its space matter.

use std::fmt::Write as _;

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::limits::LimitReached;

/// Nesting at which printing stops. Python stops near 1000; a request's JSON is limited to 128 levels.
pub(super) const MAX_DEPTH: usize = 200;

/// `str(value)`, with undefined as the empty string as in jinja2.
///
/// # Errors
/// When the text would be longer than `max_bytes` or the value is nested deeper than `MAX_DEPTH`.
pub(super) fn to_str(value: &Value, max_bytes: u64) -> Result<String, Error> {
    let mut text = String::new();
    match value.as_str() {
        Some(string) => text.push_str(string),
        None if value.is_undefined() => {}
        None => write_repr(&mut text, value, max_bytes, 0)?,
    }
    Ok(text)
}

fn check(text: &str, max_bytes: u64, depth: usize) -> Result<(), Error> {
    if text.len() as u64 > max_bytes {
        return Err(LimitReached { what: "bytes in one value", limit: max_bytes }.into_error());
    }
    if depth > MAX_DEPTH {
        return Err(LimitReached { what: "levels of nested values", limit: MAX_DEPTH as u64 }.into_error());
    }
    Ok(())
}

fn write_repr(text: &mut String, value: &Value, max_bytes: u64, depth: usize) -> Result<(), Error> {
    check(text, max_bytes, depth)?;
    match value.kind() {
        ValueKind::Undefined => text.push_str("Undefined"),
        ValueKind::None => text.push_str("None"),
        ValueKind::Bool => text.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => text.push_str(&number(value, "nan", "inf")),
        ValueKind::String => write_string_repr(text, value.as_str().unwrap_or_default()),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ("(", ")") } else { ("[", "]") };
            text.push_str(open);
            let mut count = 0;
            for item in value.try_iter()? {
                if count > 0 {
                    text.push_str(", ");
                }
                write_repr(text, &item, max_bytes, depth + 1)?;
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                text.push(',');
            }
            text.push_str(close);
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                if index > 0 {
                    text.push_str(", ");
                }
                write_repr(text, &key, max_bytes, depth + 1)?;
                text.push_str(": ");
                write_repr(text, &value.get_item(&key)?, max_bytes, depth + 1)?;
            }
            text.push('}');
        }
        _ => {
            let _ = write!(text, "{value}");
        }
    }
    check(text, max_bytes, depth)
}

fn write_string_repr(text: &mut String, string: &str) {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for character in string.chars() {
        match character {
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            _ if character == quote => {
                text.push('\\');
                text.push(quote);
            }
            _ if is_printable(character) => text.push(character),
            _ => {
                let code = u32::from(character);
                let _ = match code {
                    0..=0xFF => write!(text, "\\x{code:02x}"),
                    0x100..=0xFFFF => write!(text, "\\u{code:04x}"),
                    _ => write!(text, "\\U{code:08x}"),
                };
            }
        }
    }
    text.push(quote);
}

/// Python's `str.isprintable` for the characters that occur: controls, format characters, separators and private use
/// are not. Unassigned code points, which Python escapes as well, are taken as printable: that needs its tables.
fn is_printable(character: char) -> bool {
    !matches!(u32::from(character),
        0x00..=0x1F | 0x7F..=0xA0 | 0xAD | 0x0600..=0x0605 | 0x061C | 0x06DD | 0x070F | 0x1680 | 0x180E
        | 0x2000..=0x200F | 0x2028..=0x202F | 0x205F..=0x206F | 0x3000 | 0xE000..=0xF8FF | 0xFEFF
        | 0xFFF0..=0xFFFB | 0xFFFE..=0xFFFF | 0xE0000..=0xE0FFF | 0xF0000..=0x10FFFF)
}

/// A number as Python prints it; infinity and not-a-number have other names in JSON.
fn number(value: &Value, nan: &str, infinity: &str) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(float) if float.is_nan() => nan.to_owned(),
        Ok(float) if float.is_infinite() => format!("{}{infinity}", if float < 0.0 { "-" } else { "" }),
        Ok(float) => float_repr(float),
        Err(_) => value.to_string(),
    }
}

/// `repr(float)`: the shortest digits that read back, in scientific notation below 1e-4 and from 1e16.
fn float_repr(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    let plain = format!("{float}");
    if plain.contains('.') { plain } else { format!("{plain}.0") }
}

/// How `json.dumps` separates and escapes.
#[derive(Debug, Clone)]
pub(super) struct JsonStyle {
    /// Escape everything outside of ASCII.
    pub(super) ensure_ascii: bool,
    /// What one level is indented with; `None` puts everything on one line.
    pub(super) indent: Option<String>,
    /// Between items.
    pub(super) item_separator: String,
    /// Between a key and its value.
    pub(super) key_separator: String,
    /// Sort objects by key.
    pub(super) sort_keys: bool,
}

/// `json.dumps(value)`.
///
/// # Errors
/// When a value is undefined or has no JSON form, or a limit as in [`to_str`].
pub(super) fn to_json(value: &Value, style: &JsonStyle, max_bytes: u64) -> Result<String, Error> {
    let mut text = String::new();
    write_json(&mut text, value, style, max_bytes, 0)?;
    Ok(text)
}

fn write_json(text: &mut String, value: &Value, style: &JsonStyle, max_bytes: u64, depth: usize) -> Result<(), Error> {
    check(text, max_bytes, depth)?;
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&number(value, "NaN", "Infinity")),
        ValueKind::String => write_json_string(text, value.as_str().unwrap_or_default(), style.ensure_ascii),
        ValueKind::Seq | ValueKind::Iterable => {
            text.push('[');
            let mut is_empty = true;
            for item in value.try_iter()? {
                write_item_start(text, style, depth + 1, is_empty);
                is_empty = false;
                write_json(text, &item, style, max_bytes, depth + 1)?;
            }
            write_container_end(text, style, depth, is_empty);
            text.push(']');
        }
        ValueKind::Map => {
            text.push('{');
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort();
            }
            for (index, key) in keys.iter().enumerate() {
                write_item_start(text, style, depth + 1, index == 0);
                write_json_string(text, &json_key(key)?, style.ensure_ascii);
                text.push_str(&style.key_separator);
                write_json(text, &value.get_item(key)?, style, max_bytes, depth + 1)?;
            }
            write_container_end(text, style, depth, keys.is_empty());
            text.push('}');
        }
        kind => {
            return Err(Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson: found a value of type {kind}, which JSON cannot express"),
            ));
        }
    }
    check(text, max_bytes, depth)
}

fn write_item_start(text: &mut String, style: &JsonStyle, depth: usize, is_first: bool) {
    if !is_first {
        text.push_str(&style.item_separator);
    }
    write_line_start(text, style, depth);
}

fn write_container_end(text: &mut String, style: &JsonStyle, depth: usize, is_empty: bool) {
    if !is_empty {
        write_line_start(text, style, depth);
    }
}

fn write_line_start(text: &mut String, style: &JsonStyle, depth: usize) {
    if let Some(indent) = &style.indent {
        text.push('\n');
        for _ in 0..depth {
            text.push_str(indent);
        }
    }
}

fn json_key(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key, "NaN", "Infinity")),
        kind => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: found a key of type {kind}, expected a string, number, boolean or none"),
        )),
    }
}

fn write_json_string(text: &mut String, string: &str, ensure_ascii: bool) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            '\0'..='\u{1f}' => {
                let _ = write!(text, "\\u{:04x}", u32::from(character));
            }
            '\u{7f}'.. if ensure_ascii => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
            _ => text.push(character),
        }
    }
    text.push('"');
}

/// Python's `str.isspace` of one character: Unicode's white space and four separators of ASCII.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_print_like_python() {
        for (float, expected) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e22, "1.5e+22"),
            (0.0001, "0.0001"),
            (0.00001234, "1.234e-05"),
            (5e-324, "5e-324"),
        ] {
            assert_eq!(float_repr(float), expected);
        }
    }

    #[test]
    fn strings_print_like_python() {
        let repr = |string: &str| {
            let mut text = String::new();
            write_string_repr(&mut text, string);
            text
        };
        assert_eq!(repr("it's"), "\"it's\"");
        assert_eq!(repr("it's \"x\"\n\u{7f}é\u{200b}"), "'it\\'s \"x\"\\n\\x7fé\\u200b'");
    }
}
