//! Calls between an opening and a closing marker: everything but harmony.

use super::schema::ToolSchema;
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
}

impl BlockParser {
    pub(crate) fn new(format: BlockFormat, tools: Vec<ToolSchema>) -> BlockParser {
        BlockParser {
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
                    }
                }
                Some(body) => {
                    let (text, marker, taken) = self.closing.push_until_marker(rest);
                    rest = &rest[taken..];
                    body.push_str(&text);
                    if marker.is_some() {
                        if (self.format.is_inside_value)(body) {
                            body.push_str(self.format.close);
                        } else {
                            let body = self.body.take().unwrap_or_default();
                            self.block(&body, events);
                        }
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

    fn block(&mut self, body: &str, events: &mut Vec<ToolEvent>) {
        match (self.format.parse)(body, &self.tools) {
            Ok(calls) => {
                for call in calls {
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

    fn malformed(&mut self, raw: String, reason: &str, events: &mut Vec<ToolEvent>) {
        self.text(&raw, events);
        push_event(events, ToolEvent::Malformed { raw, reason: reason.to_owned() });
    }
}
