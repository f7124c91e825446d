//! DeepSeek: `<｜tool▁call▁begin｜>` markers with JSON (V3, V3.1), and `<｜DSML｜...>` tags (V3.2).

use serde_json::{Map, Value};

use super::block::BlockFormat;
use super::schema::ToolSchema;
use super::stream::{Scan, StreamSyntax, Tag, token};
use super::{ParsedCall, arguments_object, ends_between, ends_in_json_string};

const CALL: (&str, &str) = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>");
const SEPARATOR: &str = "<｜tool▁sep｜>";

/// V3 writes `function<｜tool▁sep｜>NAME` and the arguments in a code fence, V3.1 `NAME<｜tool▁sep｜>` and bare JSON.
pub(super) const FORMAT: BlockFormat = BlockFormat {
    open: "<｜tool▁calls▁begin｜>",
    close: "<｜tool▁calls▁end｜>",
    is_inside_value: ends_in_json_string,
    parse,
    stream: StreamSyntax::Json { name: stream_name, end: Some(stream_end) },
};

/// V3.1's head, `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>`, up to the object. V3's calls come whole.
fn stream_name(text: &str) -> Scan<String> {
    let inside = text.trim_start();
    match token(inside, CALL.0) {
        Scan::Found((), _) => {}
        Scan::Wait => return Scan::Wait,
        Scan::Other => return Scan::Other,
    }
    let Some((head, tail)) = inside[CALL.0.len()..].split_once(SEPARATOR) else { return Scan::Wait };
    let (name, object) = (head.trim(), tail.trim_start());
    match object.chars().next() {
        None => Scan::Wait,
        Some('{') if !name.is_empty() && !name.contains(char::is_whitespace) => {
            Scan::Found(name.to_owned(), text.len() - object.len())
        }
        Some(_) => Scan::Other,
    }
}

fn stream_end(text: &str) -> Scan<()> {
    let inside = text.trim_start();
    match token(inside, CALL.1) {
        Scan::Found((), len) => Scan::Found((), text.len() - inside.len() + len),
        Scan::Wait => Scan::Wait,
        Scan::Other => Scan::Other,
    }
}

fn parse(body: &str, _tools: &[ToolSchema]) -> Result<Vec<ParsedCall>, String> {
    let mut calls = Vec::new();
    let mut rest = body.trim();
    while !rest.is_empty() {
        let inside = rest.strip_prefix(CALL.0).ok_or_else(|| format!("found {rest:.80?}, expected {}", CALL.0))?;
        let end = inside
            .match_indices(CALL.1)
            .map(|(index, _)| index)
            .find(|end| !ends_in_json_string(&inside[..*end]))
            .ok_or_else(|| format!("found {} without {}", CALL.0, CALL.1))?;
        calls.push(parse_one(&inside[..end])?);
        rest = inside[end + CALL.1.len()..].trim_start();
    }
    if calls.is_empty() {
        return Err(format!("found no call, expected {}", CALL.0));
    }
    Ok(calls)
}

fn parse_one(call: &str) -> Result<ParsedCall, String> {
    let (head, tail) = call.split_once(SEPARATOR).ok_or_else(|| format!("found {call:.80?} without {SEPARATOR}"))?;
    let (name, arguments) = match tail.trim_end().strip_suffix("```").and_then(|tail| tail.split_once("```")) {
        // The fence may name its language, on the same line.
        Some((name, fenced)) if head.trim() == "function" => (name, fenced.strip_prefix("json").unwrap_or(fenced)),
        _ => (head, tail),
    };
    let name = name.trim();
    if name.is_empty() || name.contains(char::is_whitespace) {
        return Err(format!("found function name {name:.80?}, expected a single word"));
    }
    let value: Value = match arguments.trim() {
        "" => Value::Null,
        text => {
            serde_json::from_str(text).map_err(|error| format!("call of {name}: arguments are not JSON: {error}"))?
        }
    };
    Ok(ParsedCall { name: name.to_owned(), arguments: arguments_object(value)? })
}

const INVOKE: (&str, &str) = ("<｜DSML｜invoke name=\"", "</｜DSML｜invoke>");
const PARAMETER: (&str, &str) = ("<｜DSML｜parameter name=\"", "</｜DSML｜parameter>");

/// V3.2: every parameter says whether it is text.
pub(super) const DSML_FORMAT: BlockFormat = BlockFormat {
    open: "<｜DSML｜function_calls>",
    close: "</｜DSML｜function_calls>",
    is_inside_value: |body| ends_between(body, PARAMETER.0, PARAMETER.1),
    parse: parse_dsml,
    stream: StreamSyntax::Tags { name: stream_invoke, tag: stream_parameter, close: PARAMETER.1, is_framed: false },
};

fn stream_invoke(text: &str) -> Scan<String> {
    let inside = text.trim_start();
    match stream_attribute(inside, INVOKE.0) {
        Scan::Found(name, taken) => match token(inside[taken..].trim_start(), ">") {
            Scan::Found((), _) => {
                let after = &inside[taken..].trim_start()[1..];
                Scan::Found(name, text.len() - after.len())
            }
            Scan::Wait => Scan::Wait,
            Scan::Other => Scan::Other,
        },
        other => other,
    }
}

fn stream_parameter(text: &str) -> Scan<Tag> {
    let inside = text.trim_start();
    match token(inside, INVOKE.1) {
        Scan::Found((), len) => return Scan::Found(Tag::End, text.len() - inside.len() + len),
        Scan::Wait => return Scan::Wait,
        Scan::Other => {}
    }
    let (name, taken) = match stream_attribute(inside, PARAMETER.0) {
        Scan::Found(name, taken) => (name, taken),
        Scan::Wait => return Scan::Wait,
        Scan::Other => return Scan::Other,
    };
    let kind = inside[taken..].trim_start();
    match stream_attribute(kind, "string=\"") {
        Scan::Found(word, taken) => match (word.as_str(), token(&kind[taken..], ">")) {
            ("true" | "false", Scan::Found((), len)) => {
                let after = &kind[taken + len..];
                Scan::Found(Tag::Key { name, is_text: Some(word == "true") }, text.len() - after.len())
            }
            ("true" | "false", Scan::Wait) => Scan::Wait,
            _ => Scan::Other,
        },
        Scan::Wait => Scan::Wait,
        Scan::Other => Scan::Other,
    }
}

/// [`attribute`], of a text that goes on.
fn stream_attribute(text: &str, open: &str) -> Scan<String> {
    match token(text, open) {
        Scan::Found((), len) if !text[len..].contains('"') => Scan::Wait,
        Scan::Found((), _) => match attribute(text, open) {
            Ok((value, rest)) => Scan::Found(value.to_owned(), text.len() - rest.len()),
            Err(_) => Scan::Other,
        },
        Scan::Wait => Scan::Wait,
        Scan::Other => Scan::Other,
    }
}

fn parse_dsml(body: &str, _tools: &[ToolSchema]) -> Result<Vec<ParsedCall>, String> {
    let mut calls = Vec::new();
    let mut rest = body.trim();
    while !rest.is_empty() {
        let (name, after_name) = attribute(rest, INVOKE.0)?;
        rest = after_name.trim_start().strip_prefix('>').ok_or("found <｜DSML｜invoke without >")?.trim_start();
        let mut arguments = Map::new();
        while let Some(after) = rest.strip_prefix(PARAMETER.0).map(|_| rest) {
            let (key, after_key) = attribute(after, PARAMETER.0)?;
            let (kind, after_kind) = attribute(after_key.trim_start(), "string=\"")?;
            let after_tag = after_kind.strip_prefix('>').ok_or("found <｜DSML｜parameter without >")?;
            let (text, after_value) =
                after_tag.split_once(PARAMETER.1).ok_or_else(|| format!("found parameter {key:?} without its end"))?;
            let value = match kind {
                "true" => Value::String(text.to_owned()),
                "false" => serde_json::from_str(text.trim())
                    .map_err(|error| format!("call of {name}: parameter {key} is not JSON: {error}"))?,
                other => return Err(format!("parameter {key}: found string={other:?}, expected true or false")),
            };
            arguments.insert(key.to_owned(), value);
            rest = after_value.trim_start();
        }
        rest = rest.strip_prefix(INVOKE.1).ok_or_else(|| format!("found {rest:.80?}, expected {}", INVOKE.1))?;
        rest = rest.trim_start();
        calls.push(ParsedCall { name: name.to_owned(), arguments });
    }
    if calls.is_empty() {
        return Err("found no call, expected <｜DSML｜invoke".to_owned());
    }
    Ok(calls)
}

/// The text up to the next quote after `open` at the beginning of `text`, and what follows the quote.
fn attribute<'a>(text: &'a str, open: &str) -> Result<(&'a str, &'a str), String> {
    let inside = text.strip_prefix(open).ok_or_else(|| format!("found {text:.80?}, expected {open}"))?;
    let (value, rest) = inside.split_once('"').ok_or_else(|| format!("found {open} without a closing quote"))?;
    if value.is_empty() { Err(format!("found an empty name after {open}")) } else { Ok((value, rest)) }
}
