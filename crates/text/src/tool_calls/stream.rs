//! Reads a call while it is being written: the name as soon as it is certain, then the JSON text of the arguments as it
//! comes. What has been given cannot be taken back, so only text that no continuation changes is given; where the format
//! leaves doubt (a value that may be a number or a text) it waits for the value's end.
//!
//! The block's own parser has the last word: it reads the whole call when its end has come, and the text that was given
//! must say the same.

use serde_json::Value;

use super::schema::{ToolSchema, read_argument, streams_as_text};

/// What can be said about the text so far.
pub(super) enum Scan<T> {
    /// More text must come first.
    Wait,
    /// Found, with the bytes that it took.
    Found(T, usize),
    /// Something else: nothing of this call is given before its end.
    Other,
}

/// What follows in a call that is written with tags.
pub(super) enum Tag {
    /// An argument, whose value follows.
    Key {
        name: String,
        /// Whether the tag says that the value is text; `None` leaves it to the schema.
        is_text: Option<bool>,
    },
    /// The call's end.
    End,
}

/// How a format writes calls, as far as reading ahead needs it.
#[derive(Debug, Clone, Copy)]
pub(super) enum StreamSyntax {
    /// Arguments between tags.
    Tags {
        /// The name at the beginning of a call.
        name: fn(&str) -> Scan<String>,
        /// What comes after the name or a value.
        tag: fn(&str) -> Scan<Tag>,
        /// Ends a value.
        close: &'static str,
        /// Whether a newline on either side of a value belongs to the tags.
        is_framed: bool,
    },
    /// Arguments as one JSON object behind the name.
    Json {
        /// The name at the beginning of a call; what follows is the object.
        name: fn(&str) -> Scan<String>,
        /// What follows the object up to the call's end, where a block holds several calls.
        end: Option<fn(&str) -> Scan<()>>,
    },
}

/// A new piece of a call.
#[derive(Debug, PartialEq)]
pub(super) enum Piece {
    /// A call begins.
    Start(String),
    /// More of its arguments.
    Arguments(String),
    /// It ends after this many bytes of the text; only in blocks of several calls.
    End(usize),
}

#[derive(Debug)]
enum State {
    Name,
    /// Between values.
    Between,
    /// In a text that is passed on as it comes. `is_first`: none of it has come.
    Text {
        is_first: bool,
    },
    /// In a value that is given when it is whole.
    Whole {
        key: String,
        is_text: Option<bool>,
    },
    /// Passing on a JSON object.
    Object(ObjectEnd),
    /// Behind the object.
    Behind,
    /// Nothing of this call can be given before its end.
    Other,
}

/// Reads the calls of one block.
#[derive(Debug)]
pub(super) struct CallStream {
    syntax: StreamSyntax,
    state: State,
    /// Bytes of the text that were used.
    position: usize,
    name: String,
    num_arguments: usize,
}

impl CallStream {
    pub(super) fn new(syntax: StreamSyntax) -> CallStream {
        CallStream { syntax, state: State::Name, position: 0, name: String::new(), num_arguments: 0 }
    }

    /// Takes the text of the block so far, which only grows, and gives what is new and certain.
    pub(super) fn advance(&mut self, text: &str, tools: &[ToolSchema]) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while self.step(text, tools, &mut pieces) {}
        pieces
    }

    /// What closes the arguments when the call's end has come and nothing is open.
    pub(super) fn closing(&self) -> &'static str {
        match (&self.syntax, &self.state) {
            (StreamSyntax::Tags { .. }, State::Between) => "}",
            _ => "",
        }
    }

    /// One transition; `false` if more text must come.
    fn step(&mut self, text: &str, tools: &[ToolSchema], pieces: &mut Vec<Piece>) -> bool {
        let rest = &text[self.position..];
        match (&mut self.state, self.syntax) {
            (State::Name, StreamSyntax::Tags { name, .. } | StreamSyntax::Json { name, .. }) => match name(rest) {
                Scan::Wait => return false,
                Scan::Other => self.state = State::Other,
                Scan::Found(name, taken) => {
                    self.position += taken;
                    self.name.clone_from(&name);
                    self.num_arguments = 0;
                    pieces.push(Piece::Start(name));
                    if let StreamSyntax::Tags { .. } = self.syntax {
                        pieces.push(Piece::Arguments("{".to_owned()));
                        self.state = State::Between;
                    } else {
                        self.state = State::Object(ObjectEnd::default());
                    }
                }
            },
            (State::Between, StreamSyntax::Tags { tag, .. }) => match tag(rest) {
                Scan::Wait => return false,
                Scan::Other => self.state = State::Other,
                Scan::Found(Tag::End, taken) => {
                    self.position += taken;
                    pieces.push(Piece::Arguments("}".to_owned()));
                    pieces.push(Piece::End(self.position));
                    self.state = State::Name;
                }
                Scan::Found(Tag::Key { name, is_text }, taken) => {
                    self.position += taken;
                    let comma = if self.num_arguments > 0 { "," } else { "" };
                    self.num_arguments += 1;
                    pieces.push(Piece::Arguments(format!("{comma}{}:", Value::from(name.as_str()))));
                    self.state = if is_text.unwrap_or_else(|| streams_as_text(tools, &self.name, &name)) {
                        pieces.push(Piece::Arguments("\"".to_owned()));
                        State::Text { is_first: true }
                    } else {
                        State::Whole { key: name, is_text }
                    };
                }
            },
            (State::Text { is_first }, StreamSyntax::Tags { close, is_framed, .. }) => {
                if *is_first && is_framed {
                    if rest.is_empty() {
                        return false;
                    }
                    self.position += usize::from(rest.starts_with('\n'));
                    *is_first = false;
                    return true;
                }
                if let Some(end) = rest.find(close) {
                    let value = rest[..end].strip_suffix('\n').filter(|_| is_framed).unwrap_or(&rest[..end]);
                    pieces.push(Piece::Arguments(format!("{}\"", escaped(value))));
                    self.position += end + close.len();
                    self.state = State::Between;
                    return true;
                }
                let certain = rest.len() - held_back(rest, close, is_framed);
                if certain > 0 {
                    pieces.push(Piece::Arguments(escaped(&rest[..certain])));
                    self.position += certain;
                }
                return false;
            }
            (State::Whole { key, is_text }, StreamSyntax::Tags { close, is_framed, .. }) => {
                let Some(end) = rest.find(close) else { return false };
                let mut value = &rest[..end];
                if is_framed {
                    value = value.strip_prefix('\n').unwrap_or(value);
                    value = value.strip_suffix('\n').unwrap_or(value);
                }
                let value = match is_text {
                    // The tag said that it is JSON; if it is not, the call is none.
                    Some(_) => serde_json::from_str(value.trim()).ok(),
                    None => Some(read_argument(tools, &self.name, key, value)),
                };
                match value {
                    Some(value) => {
                        pieces.push(Piece::Arguments(value.to_string()));
                        self.position += end + close.len();
                        self.state = State::Between;
                    }
                    None => self.state = State::Other,
                }
            }
            (State::Object(object), StreamSyntax::Json { .. }) => {
                let (taken, is_over) = object.take(rest);
                if taken > 0 {
                    pieces.push(Piece::Arguments(rest[..taken].to_owned()));
                    self.position += taken;
                }
                if !is_over {
                    return false;
                }
                self.state = State::Behind;
            }
            (State::Behind, StreamSyntax::Json { end: Some(end), .. }) => match end(rest) {
                Scan::Wait => return false,
                Scan::Other => self.state = State::Other,
                Scan::Found((), taken) => {
                    self.position += taken;
                    pieces.push(Piece::End(self.position));
                    self.state = State::Name;
                }
            },
            (State::Behind | State::Other, _) => return false,
            (State::Between | State::Text { .. } | State::Whole { .. }, StreamSyntax::Json { .. })
            | (State::Object(_), StreamSyntax::Tags { .. }) => {
                unreachable!("states belong to their syntax")
            }
        }
        true
    }
}

/// A text as the inside of a JSON string.
fn escaped(text: &str) -> String {
    let quoted = Value::from(text).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// Bytes at the end of `text` that may begin `close`, or the newline before it.
fn held_back(text: &str, close: &str, is_framed: bool) -> usize {
    let begins = |pattern: &str| {
        let longest = pattern.len().min(text.len());
        let is_boundary = |len: &usize| pattern.is_char_boundary(*len) && text.is_char_boundary(text.len() - len);
        (1..=longest).rev().filter(is_boundary).find(|len| text.ends_with(&pattern[..*len])).unwrap_or(0)
    };
    let held = begins(close);
    let newline = usize::from(is_framed && text[..text.len() - held].ends_with('\n'));
    held + newline
}

/// Finds the end of a JSON object as it streams.
#[derive(Debug, Default)]
pub(super) struct ObjectEnd {
    depth: usize,
    is_in_string: bool,
    is_escaped: bool,
}

impl ObjectEnd {
    /// Bytes of `text` that belong to the object, and whether it ends there.
    pub(super) fn take(&mut self, text: &str) -> (usize, bool) {
        for (index, byte) in text.bytes().enumerate() {
            match byte {
                _ if self.is_escaped => self.is_escaped = false,
                b'\\' if self.is_in_string => self.is_escaped = true,
                b'"' => self.is_in_string = !self.is_in_string,
                _ if self.is_in_string => {}
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return (index + 1, true);
                    }
                }
                _ => {}
            }
        }
        (text.len(), false)
    }
}

/// Whether `text` begins with `token`, as far as it goes.
pub(super) fn token(text: &str, token: &str) -> Scan<()> {
    match text.strip_prefix(token) {
        Some(_) => Scan::Found((), token.len()),
        None if token.starts_with(text) => Scan::Wait,
        None => Scan::Other,
    }
}
