//! gpt-oss: messages with a header and a channel.
//!
//! ```text
//! <|channel|>analysis<|message|>thoughts<|end|>
//! <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>
//! <|start|>assistant<|channel|>final<|message|>answer<|return|>
//! ```
//! The prompt ends in `<|start|>assistant`, so the output begins inside of a header. `<|call|>` and `<|return|>` are
//! stop tokens and may be missing from the text.

use serde_json::Value;

use super::schema::ToolSchema;
use super::{ToolCall, ToolEvent, arguments_object, push_event};
use crate::marker_scan::{Found, MarkerScanner};

const MARKERS: [&str; 7] =
    ["<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>"];
const START: usize = 0;
const CHANNEL: usize = 1;
const MESSAGE: usize = 2;
const CONSTRAIN: usize = 3;

#[derive(Debug)]
enum Place {
    /// In a header; its text so far, markers included.
    Header(String),
    /// In a message that is passed on as thinking, as it comes.
    Thinking,
    /// In a message that is passed on as the answer, as it comes.
    Answer,
    /// In a message to a tool: its header, recipient and body so far.
    Call { header: String, recipient: String, body: String, is_begun: bool },
    /// Behind a message.
    Between,
}

#[derive(Debug)]
pub(super) struct HarmonyParser {
    scanner: MarkerScanner,
    place: Place,
    tools: Vec<ToolSchema>,
    num_calls: usize,
    /// Whether calls are given while they come.
    is_streaming: bool,
}

impl HarmonyParser {
    pub(super) fn new(tools: Vec<ToolSchema>, is_streaming: bool) -> HarmonyParser {
        HarmonyParser {
            scanner: MarkerScanner::new(&MARKERS),
            place: Place::Header(String::new()),
            tools,
            num_calls: 0,
            is_streaming,
        }
    }

    pub(super) fn push(&mut self, chunk: &str) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        for found in self.scanner.push(chunk) {
            match found {
                Found::Text(text) => self.text(&text, &mut events),
                Found::Marker(marker) => self.marker(marker, &mut events),
            }
        }
        events
    }

    pub(super) fn finish(&mut self) -> Vec<ToolEvent> {
        let mut events = Vec::new();
        let rest = self.scanner.finish();
        self.text(&rest, &mut events);
        self.end_message(&mut events);
        events
    }

    pub(super) fn pending_bytes(&self) -> usize {
        match &self.place {
            Place::Call { header, body, .. } => header.len() + body.len(),
            Place::Header(_) | Place::Thinking | Place::Answer | Place::Between => 0,
        }
    }

    fn text(&mut self, text: &str, events: &mut Vec<ToolEvent>) {
        match &mut self.place {
            Place::Header(header) => header.push_str(text),
            Place::Thinking => push_event(events, ToolEvent::Thinking(text.to_owned())),
            Place::Answer => push_event(events, ToolEvent::Text(text.to_owned())),
            Place::Call { recipient, body, is_begun, .. } => {
                let before = body.len();
                body.push_str(text);
                if !self.is_streaming {
                    return;
                }
                let index = self.num_calls;
                if !*is_begun && body.trim_start().starts_with('{') {
                    let name = tool_name(recipient).to_owned();
                    let is_offered = self.tools.iter().any(|tool| tool.name() == name);
                    events.push(ToolEvent::CallStart { index, name, is_offered });
                    *is_begun = true;
                    push_event(events, ToolEvent::CallArguments { index, text: body.trim_start().to_owned() });
                } else if *is_begun {
                    push_event(events, ToolEvent::CallArguments { index, text: body[before..].to_owned() });
                }
            }
            Place::Between if text.trim().is_empty() => {}
            // Text without a header: an answer.
            Place::Between => {
                self.place = Place::Answer;
                push_event(events, ToolEvent::Text(text.trim_start().to_owned()));
            }
        }
    }

    fn marker(&mut self, marker: usize, events: &mut Vec<ToolEvent>) {
        match (&mut self.place, marker) {
            (Place::Header(header), MESSAGE) => {
                let header = std::mem::take(header);
                self.place = place_of(header);
            }
            (Place::Header(header), CHANNEL | CONSTRAIN) => header.push_str(MARKERS[marker]),
            (_, START) => {
                self.end_message(events);
                self.place = Place::Header(String::new());
            }
            // A message that was not ended: the next header begins.
            (_, CHANNEL) => {
                self.end_message(events);
                self.place = Place::Header(MARKERS[CHANNEL].to_owned());
            }
            (Place::Between, _) => {}
            (_, MESSAGE | CONSTRAIN) => self.text(MARKERS[marker], events),
            _ => self.end_message(events),
        }
    }

    /// Ends whatever is open.
    fn end_message(&mut self, events: &mut Vec<ToolEvent>) {
        match std::mem::replace(&mut self.place, Place::Between) {
            Place::Thinking | Place::Answer | Place::Between => {}
            Place::Header(header) => {
                // A header that a stop token cut off is nothing; anything else is an answer without its frame.
                let is_role = matches!(header.trim(), "" | "assistant");
                if header.contains("<|") {
                    let reason = "found a header without <|message|>".to_owned();
                    push_event(events, ToolEvent::Text(header.clone()));
                    push_event(events, ToolEvent::Malformed { raw: header, reason, begun: None });
                } else if !is_role {
                    push_event(events, ToolEvent::Text(header));
                }
            }
            Place::Call { header, recipient, body, is_begun } => match self.call(&recipient, &body) {
                Ok(call) => {
                    if self.is_streaming && !is_begun {
                        let (index, name, is_offered) = (call.index, call.name.clone(), call.is_offered);
                        events.push(ToolEvent::CallStart { index, name, is_offered });
                        push_event(events, ToolEvent::CallArguments { index, text: call.arguments_json() });
                    }
                    events.push(ToolEvent::Call(call));
                }
                Err(reason) => {
                    let raw = format!("{header}{}{body}", MARKERS[MESSAGE]);
                    if !is_begun {
                        push_event(events, ToolEvent::Text(raw.clone()));
                    }
                    let begun = is_begun.then_some(self.num_calls);
                    push_event(events, ToolEvent::Malformed { raw, reason, begun });
                }
            },
        }
    }

    fn call(&mut self, recipient: &str, body: &str) -> Result<ToolCall, String> {
        let name = tool_name(recipient).to_owned();
        let value: Value = match body.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text)
                .map_err(|error| format!("call of {name}: arguments are not JSON: {error}"))?,
        };
        let arguments = arguments_object(value)?;
        let index = self.num_calls;
        self.num_calls += 1;
        let is_offered = self.tools.iter().any(|tool| tool.name() == name);
        Ok(ToolCall { index, name, arguments, is_offered })
    }
}

/// The function that a message is for.
fn tool_name(recipient: &str) -> &str {
    recipient.strip_prefix("functions.").unwrap_or(recipient)
}

/// What a header says about its message.
fn place_of(header: String) -> Place {
    let recipient = header
        .split_once("to=")
        .map(|(_, rest)| rest.split(|end: char| end.is_whitespace() || end == '<').next().unwrap_or_default())
        .filter(|recipient| !recipient.is_empty() && *recipient != "user");
    if let Some(recipient) = recipient {
        let recipient = recipient.to_owned();
        return Place::Call { header, recipient, body: String::new(), is_begun: false };
    }
    let channel = header.split_once(MARKERS[CHANNEL]).map_or("", |(_, rest)| rest.trim());
    if channel.starts_with("analysis") { Place::Thinking } else { Place::Answer }
}
