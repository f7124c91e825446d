//! Calls between an opening and a closing marker: everything but harmony.

use serde_json::Value;

use super::schema::ToolSchema;
use super::stream::{CallStream, Piece, StreamSyntax};
use super::{ParsedCall, ToolCall, ToolEvent, push_event};
use crate::marker_scan::MarkerScanner;

/// Reads the text between the markers.
type ParseBody = fn(&str, &[ToolSchema]) -> Result<Vec<ParsedCall>, String>;

/// A format as data.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockFormat {
    /// Begins a block.
    pub(crate) open: &'static str,
    /// Ends a block.
    pub(crate) close: &'static str,
    /// Whether a block that so far holds this text is inside of a value, so that a closing marker belongs to it.
    pub(crate) is_inside_value: fn(&str) -> bool,
    /// Reads a block.
    pub(crate) parse: ParseBody,
    /// How to read it while it comes.
    pub(super) stream: StreamSyntax,
}

#[derive(Debug)]
pub(crate) struct BlockParser {
    format: BlockFormat,
    tools: Vec<ToolSchema>,
    opening: MarkerScanner,
    closing: MarkerScanner,
    /// Text of the block that is open, without its opening marker.
    body: Option<String>,
    num_calls: usize,
    /// White space after a call, dropped when another call or the end follows.
    space_after_call: Option<String>,
    /// Whether calls are given while they come.
    is_streaming: bool,
    reader: CallStream,
    /// Bytes of the block that belong to calls that were given.
    given: usize,
    /// The call that has begun and not ended.
    begun: Option<Begun>,
}

/// A call of which something was given.
#[derive(Debug)]
struct Begun {
    name: String,
    /// JSON text of its arguments so far.
    arguments: String,
}

impl BlockParser {
    pub(crate) fn new(format: BlockFormat, tools: Vec<ToolSchema>, is_streaming: bool) -> BlockParser {
        BlockParser {
            is_streaming,
            reader: CallStream::new(format.stream),
            given: 0,
            begun: None,
            format,
            tools,
            opening: MarkerScanner::new(&[format.open]),
            closing: MarkerScanner::new(&[format.close]),
            body: None,
            num_calls: 0,
            space_after_call: None,
        }
    }

    pub(crate) fn push(&mut self, chunk: &str) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        self.scan(chunk, &mut events);
        events
    }

    fn scan(&mut self, chunk: &str, events: &mut Vec<ToolEvent>) {
        let mut rest = chunk;
        while !rest.is_empty() {
            match &mut self.body {
                None => {
                    let (text, marker, taken) = self.opening.push_until_marker(rest);
                    rest = &rest[taken..];
                    self.text(&text, events);
                    if marker.is_some() {
                        self.body = Some(String::new());
                        self.reader = CallStream::new(self.format.stream);
                        self.given = 0;
                    }
                }
                Some(body) => {
                    let (text, marker, taken) = self.closing.push_until_marker(rest);
                    rest = &rest[taken..];
                    body.push_str(&text);
                    let is_end = marker.is_some() && !(self.format.is_inside_value)(body);
                    if marker.is_some() && !is_end {
                        body.push_str(self.format.close);
                    }
                    if self.is_streaming {
                        self.read_ahead(events);
                    }
                    if is_end {
                        let body = self.body.take().unwrap_or_default();
                        self.block(&body, events);
                    }
                }
            }
        }
    }

    pub(crate) fn finish(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        let rest = self.opening.finish();
        self.text(&rest, &mut events);
        while let Some(mut body) = self.body.take() {
            body.push_str(&self.closing.finish());
            if self.begun.is_some() {
                // Its arguments are on their way: nothing behind it can be read as if they were not.
                let raw = format!("{}{body}", self.format.open);
                self.malformed(raw, "found the end of the output inside of a call", &mut events);
                break;
            }
            let body = body.split_off(self.given);
            match body.find(self.format.close) {
                // A closing marker was taken for a value's text, but the value never ended: what follows that marker
                // is read again, so that a good call after a bad one is not lost.
                Some(end) => {
                    let bad = format!("{}{}{}", self.format.open, &body[..end], self.format.close);
                    self.malformed(
                        bad,
                        "found a value that does not end, expected its end before the call's",
                        &mut events,
                    );
                    self.scan(&body[end + self.format.close.len()..], &mut events);
                    let rest = self.opening.finish();
                    self.text(&rest, &mut events);
                }
                None => {
                    let bad = format!("{}{body}", self.format.open);
                    self.malformed(bad, "found the end of the output inside of a call", &mut events);
                }
            }
        }
        self.space_after_call = None;
        events
    }

    pub(crate) fn pending_bytes(&self) -> usize {
        self.body.as_ref().map_or(0, |body| self.format.open.len() + body.len() + self.closing.held().len())
    }

    fn text(&mut self, text: &str, events: &mut Vec<ToolEvent>) {
        if let Some(space) = &mut self.space_after_call {
            if text.trim_start().is_empty() {
                space.push_str(text);
                return;
            }
            push_event(events, ToolEvent::Text(std::mem::take(space)));
            self.space_after_call = None;
        }
        push_event(events, ToolEvent::Text(text.to_owned()));
    }

    /// Gives what is certain of the open block.
    fn read_ahead(&mut self, events: &mut Vec<ToolEvent>) {
        let Some(body) = self.body.take() else { return };
        for piece in self.reader.advance(&body, &self.tools) {
            match piece {
                Piece::Start(name) => {
                    // White space between two calls belongs to neither.
                    self.space_after_call = None;
                    push_event(events, self.start_of(&name));
                    self.begun = Some(Begun { name, arguments: String::new() });
                }
                Piece::Arguments(text) => self.give_arguments(&text, events),
                Piece::End(end) => {
                    let call = body[self.given..end].to_owned();
                    self.given = end;
                    self.block_of(&call, events);
                }
            }
        }
        self.body = Some(body);
    }

    fn start_of(&self, name: &str) -> ToolEvent {
        let is_offered = self.tools.iter().any(|tool| tool.name() == name);
        ToolEvent::CallStart { index: self.num_calls, name: name.to_owned(), is_offered }
    }

    fn give_arguments(&mut self, text: &str, events: &mut Vec<ToolEvent>) {
        if let Some(begun) = &mut self.begun {
            begun.arguments.push_str(text);
        }
        push_event(events, ToolEvent::CallArguments { index: self.num_calls, text: text.to_owned() });
    }

    fn block(&mut self, body: &str, events: &mut Vec<ToolEvent>) {
        let rest = &body[self.given..];
        // All of its calls may have ended before it did.
        if self.given > 0 && self.begun.is_none() && rest.trim().is_empty() {
            return;
        }
        let rest = rest.to_owned();
        self.block_of(&rest, events);
    }

    /// Reads the calls of a block, or of a part of it that was given.
    fn block_of(&mut self, body: &str, events: &mut Vec<ToolEvent>) {
        let parsed = (self.format.parse)(body, &self.tools).and_then(|calls| self.agree(calls));
        match parsed {
            Ok(calls) => {
                for call in calls {
                    if self.is_streaming {
                        self.give_rest(&call, events);
                    }
                    let is_offered = self.tools.iter().any(|tool| tool.name() == call.name);
                    let index = self.num_calls;
                    self.num_calls += 1;
                    let (name, arguments) = (call.name, call.arguments);
                    push_event(events, ToolEvent::Call(ToolCall { index, name, arguments, is_offered }));
                }
                self.space_after_call = Some(String::new());
            }
            Err(reason) => {
                self.malformed(format!("{}{body}{}", self.format.open, self.format.close), &reason, events);
            }
        }
    }

    /// Checks that the call that has begun is the first of those that were read.
    fn agree(&self, calls: Vec<ParsedCall>) -> Result<Vec<ParsedCall>, String> {
        let Some(begun) = &self.begun else { return Ok(calls) };
        let text = format!("{}{}", begun.arguments, self.reader.closing());
        let given: Result<Value, _> = serde_json::from_str(&text);
        match (calls.first(), given) {
            (Some(call), Ok(Value::Object(given))) if call.name == begun.name && call.arguments == given => Ok(calls),
            _ => Err(format!("found a call of {} that ends in another way than it began", begun.name)),
        }
    }

    /// Gives what was not given of a call that is whole.
    fn give_rest(&mut self, call: &ParsedCall, events: &mut Vec<ToolEvent>) {
        match self.begun.is_some() {
            true => self.give_arguments(self.reader.closing(), events),
            false => {
                push_event(events, self.start_of(&call.name));
                self.give_arguments(&Value::Object(call.arguments.clone()).to_string(), events);
            }
        }
        self.begun = None;
    }

    fn malformed(&mut self, raw: String, reason: &str, events: &mut Vec<ToolEvent>) {
        let begun = self.begun.take().map(|_| self.num_calls);
        if begun.is_none() {
            self.text(&raw, events);
        }
        push_event(events, ToolEvent::Malformed { raw, reason: reason.to_owned(), begun });
    }
}
