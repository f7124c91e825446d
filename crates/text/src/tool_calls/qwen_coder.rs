//! Qwen3-Coder: `<tool_call><function=NAME><parameter=K>V</parameter>...</function></tool_call>`.

use serde_json::Map;

use super::block::BlockFormat;
use super::hermes;
use super::schema::{ToolSchema, read_argument};
use super::stream::{Scan, StreamSyntax, Tag, token};
use super::{ParsedCall, ends_between};

pub(super) const FORMAT: BlockFormat = BlockFormat {
    open: "<tool_call>",
    close: "</tool_call>",
    is_inside_value: |body| ends_between(body, "<parameter=", "</parameter>"),
    parse,
    stream: StreamSyntax::Tags { name: stream_name, tag: stream_tag, close: "</parameter>", is_framed: true },
};

fn stream_name(text: &str) -> Scan<String> {
    stream_open(text, "<function=")
}

fn stream_tag(text: &str) -> Scan<Tag> {
    let inside = text.trim_start();
    let space = text.len() - inside.len();
    match token(inside, "</function>") {
        Scan::Found((), len) => return Scan::Found(Tag::End, space + len),
        Scan::Wait => return Scan::Wait,
        Scan::Other => {}
    }
    match stream_open(text, "<parameter=") {
        Scan::Found(name, taken) => Scan::Found(Tag::Key { name, is_text: None }, taken),
        Scan::Wait => Scan::Wait,
        Scan::Other => Scan::Other,
    }
}

/// [`tag`], of a text that goes on.
fn stream_open(text: &str, open: &str) -> Scan<String> {
    let inside = text.trim_start();
    match token(inside, open) {
        Scan::Found((), _) if !inside.contains('>') => Scan::Wait,
        Scan::Found((), _) => match tag(inside, open) {
            Ok((name, rest)) => Scan::Found(name.to_owned(), text.len() - rest.len()),
            Err(_) => Scan::Other,
        },
        Scan::Wait => Scan::Wait,
        Scan::Other => Scan::Other,
    }
}

fn parse(body: &str, tools: &[ToolSchema]) -> Result<Vec<ParsedCall>, String> {
    let mut rest = body.trim();
    if rest.starts_with('{') {
        return hermes::parse(rest, tools);
    }
    let mut calls = Vec::new();
    while !rest.is_empty() {
        let (name, after_name) = tag(rest, "<function=")?;
        let mut arguments = Map::new();
        rest = after_name.trim_start();
        while !rest.starts_with("</function>") {
            let (key, after_key) = tag(rest, "<parameter=")?;
            let (value, after_value) = after_key
                .split_once("</parameter>")
                .ok_or_else(|| format!("found parameter {key:.80?} without </parameter>"))?;
            // The template puts the value on lines of its own.
            let value = value.strip_prefix('\n').unwrap_or(value);
            let value = value.strip_suffix('\n').unwrap_or(value);
            arguments.insert(key.to_owned(), read_argument(tools, name, key, value));
            rest = after_value.trim_start();
        }
        rest = rest["</function>".len()..].trim_start();
        calls.push(ParsedCall { name: name.to_owned(), arguments });
    }
    if calls.is_empty() {
        return Err("found an empty call, expected <function=NAME>".to_owned());
    }
    Ok(calls)
}

/// The name in a tag such as `<function=NAME>` at the beginning of `text`, and what follows the tag.
fn tag<'a>(text: &'a str, open: &str) -> Result<(&'a str, &'a str), String> {
    let inside = text.strip_prefix(open).ok_or_else(|| format!("found {text:.80?}, expected {open}NAME>"))?;
    let (name, rest) = inside.split_once('>').ok_or_else(|| format!("found {open} without >"))?;
    let name = name.trim().trim_matches('"');
    if name.is_empty() || name.contains(['<', '\n']) {
        return Err(format!("found name {name:.80?} in {open}...>, expected a word"));
    }
    Ok((name, rest))
}
