//! Qwen3 and Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

use serde_json::Value;

use super::block::BlockFormat;
use super::schema::ToolSchema;
use super::stream::{Scan, StreamSyntax, token};
use super::{ParsedCall, arguments_object, ends_in_json_string};

pub(super) const FORMAT: BlockFormat = BlockFormat {
    open: "<tool_call>",
    close: "</tool_call>",
    is_inside_value: ends_in_json_string,
    parse,
    stream: StreamSyntax::Json { name: stream_name, end: None },
};

/// The name, where it stands before the arguments: `{"name": "NAME", "arguments": {`. Up to the last brace.
fn stream_name(text: &str) -> Scan<String> {
    let mut rest = text;
    let mut name = None;
    for expected in ["{", "\"name\"", ":", "NAME", ",", "KEY", ":", "OBJECT"] {
        rest = rest.trim_start();
        let found = match expected {
            "NAME" => match json_string(rest) {
                Scan::Found(text, len) if !text.is_empty() => {
                    name = Some(text);
                    Scan::Found((), len)
                }
                Scan::Wait => Scan::Wait,
                Scan::Found(..) | Scan::Other => Scan::Other,
            },
            "KEY" => match (token(rest, "\"arguments\""), token(rest, "\"parameters\"")) {
                (Scan::Found((), len), _) | (_, Scan::Found((), len)) => Scan::Found((), len),
                (Scan::Wait, _) | (_, Scan::Wait) => Scan::Wait,
                (Scan::Other, Scan::Other) => Scan::Other,
            },
            "OBJECT" => match (rest.chars().next(), name.take()) {
                (Some('{'), Some(name)) => return Scan::Found(name, text.len() - rest.len()),
                (None, _) => Scan::Wait,
                (Some(_), _) => Scan::Other,
            },
            fixed => token(rest, fixed),
        };
        match found {
            Scan::Found((), len) => rest = &rest[len..],
            Scan::Wait => return Scan::Wait,
            Scan::Other => return Scan::Other,
        }
    }
    Scan::Other
}

/// A JSON string at the beginning of `text`.
fn json_string(text: &str) -> Scan<String> {
    match text.chars().next() {
        None => return Scan::Wait,
        Some('"') => {}
        Some(_) => return Scan::Other,
    }
    let mut is_escaped = false;
    for (index, character) in text.char_indices().skip(1) {
        match character {
            _ if is_escaped => is_escaped = false,
            '\\' => is_escaped = true,
            '"' => {
                return match serde_json::from_str(&text[..=index]) {
                    Ok(string) => Scan::Found(string, index + 1),
                    Err(_) => Scan::Other,
                };
            }
            _ => {}
        }
    }
    Scan::Wait
}

pub(super) fn parse(body: &str, _tools: &[ToolSchema]) -> Result<Vec<ParsedCall>, String> {
    let value: Value =
        serde_json::from_str(body.trim()).map_err(|error| format!("found a body that is not JSON: {error}"))?;
    let Value::Object(mut call) = value else {
        return Err(format!("found {value:.80}, expected a JSON object with name and arguments"));
    };
    // Some models keep the OpenAI wrapping that they saw in the tool's description.
    if let Some(Value::Object(inner)) = call.remove("function") {
        call = inner;
    }
    let name = match call.remove("name") {
        Some(Value::String(name)) if !name.is_empty() => name,
        other => return Err(format!("found name {}, expected a non-empty string", other.unwrap_or_default())),
    };
    let arguments = call.remove("arguments").or_else(|| call.remove("parameters")).unwrap_or(Value::Null);
    Ok(vec![ParsedCall { name, arguments: arguments_object(arguments)? }])
}
