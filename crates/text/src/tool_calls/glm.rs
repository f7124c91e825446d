//! GLM: `<tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>...</tool_call>`.

use serde_json::{Map, Value};

use super::block::BlockFormat;
use super::hermes;
use super::schema::{ToolSchema, read_argument};
use super::stream::{Scan, StreamSyntax, Tag, token};
use super::{ParsedCall, arguments_object, ends_between};

const KEY: (&str, &str) = ("<arg_key>", "</arg_key>");
const VALUE: (&str, &str) = ("<arg_value>", "</arg_value>");

pub(super) const FORMAT: BlockFormat = BlockFormat {
    open: "<tool_call>",
    close: "</tool_call>",
    is_inside_value: |body| ends_between(body, VALUE.0, VALUE.1),
    parse,
    stream: StreamSyntax::Tags { name: stream_name, tag: stream_tag, close: VALUE.1, is_framed: false },
};

/// The name is certain when the first key begins.
fn stream_name(text: &str) -> Scan<String> {
    match text.find(KEY.0) {
        None => Scan::Wait,
        Some(end) => match check_name(text[..end].trim()) {
            Ok(name) => Scan::Found(name, end),
            Err(_) => Scan::Other,
        },
    }
}

fn stream_tag(text: &str) -> Scan<Tag> {
    let inside = text.trim_start();
    match token(inside, KEY.0) {
        Scan::Found((), _) => {}
        Scan::Wait => return Scan::Wait,
        Scan::Other => return Scan::Other,
    }
    let Some((key, after)) = inside[KEY.0.len()..].split_once(KEY.1) else { return Scan::Wait };
    let value = after.trim_start();
    match token(value, VALUE.0) {
        Scan::Found((), len) => {
            let name = key.trim().to_owned();
            Scan::Found(Tag::Key { name, is_text: None }, text.len() - value.len() + len)
        }
        Scan::Wait => Scan::Wait,
        Scan::Other => Scan::Other,
    }
}

fn parse(body: &str, tools: &[ToolSchema]) -> Result<Vec<ParsedCall>, String> {
    let (head, mut rest) = body.split_at(body.find(KEY.0).unwrap_or(body.len()));
    let head = head.trim();
    if rest.is_empty() {
        // Habits of other families: a JSON body, or a name and a JSON object.
        if head.starts_with('{') {
            return hermes::parse(head, tools);
        }
        let name = head.split(['{', '\n', ' ']).next().unwrap_or_default();
        let json = head[name.len()..].trim();
        if json.starts_with('{') {
            let value: Value = serde_json::from_str(json)
                .map_err(|error| format!("found {json:.80?} after the name, expected a JSON object: {error}"))?;
            return Ok(vec![ParsedCall { name: check_name(name)?, arguments: arguments_object(value)? }]);
        }
    }
    let name = check_name(head)?;
    let mut arguments = Map::new();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            return Ok(vec![ParsedCall { name, arguments }]);
        }
        let (key, after_key) = between(rest, KEY)?;
        let (value, after_value) = between(after_key.trim_start(), VALUE)?;
        let key = key.trim();
        arguments.insert(key.to_owned(), read_argument(tools, &name, key, value));
        rest = after_value;
    }
}

/// The text between two markers at the beginning of `text`, and what follows.
fn between<'a>(text: &'a str, (open, close): (&str, &str)) -> Result<(&'a str, &'a str), String> {
    let inside = text.strip_prefix(open).ok_or_else(|| format!("found {text:.80?}, expected {open}"))?;
    inside.split_once(close).ok_or_else(|| format!("found {open} without {close}"))
}

/// A name, without the stray closing tags that models write after the name of a call without arguments.
fn check_name(head: &str) -> Result<String, String> {
    let (name, tail) = head.split_at(head.find('<').unwrap_or(head.len()));
    let is_stray = tail.replace(KEY.1, "").replace(VALUE.1, "").trim().is_empty();
    let name = name.trim();
    if name.is_empty() || !is_stray || name.contains(char::is_whitespace) {
        return Err(format!("found function name {head:.80?}, expected a single word"));
    }
    Ok(name.to_owned())
}
