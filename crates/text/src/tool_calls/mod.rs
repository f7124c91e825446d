//! Finds tool calls in a model's output, as it streams.
//!
//! A call is given as one event when its end has come, and with [`ToolCallParser::streaming`] its name and the text of its
//! arguments before that, as they come. Everything else passes through at once. The events, with neighbouring texts
//! joined, do not depend on how the output was cut into chunks.
//!
//! A malformed call is never dropped: its raw text comes out as text, followed by a [`ToolEvent::Malformed`]. If a part of
//! it was given before, which cannot be taken back, the event alone has the raw text and says so.

mod block;
mod deepseek;
mod glm;
mod harmony;
mod hermes;
mod literal;
mod qwen_coder;
mod schema;
mod stream;

use serde_json::{Map, Value};

use self::block::{BlockFormat, BlockParser};
use self::harmony::HarmonyParser;
pub use self::schema::ToolSchema;

/// How a family of models writes tool calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ToolCallFormat {
    /// GLM-4.5 and later: `<tool_call>NAME<arg_key>K</arg_key><arg_value>V</arg_value>...</tool_call>`.
    Glm,
    /// Qwen3, Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.
    Hermes,
    /// Qwen3-Coder: `<tool_call><function=NAME><parameter=K>V</parameter></function></tool_call>`.
    QwenCoder,
    /// DeepSeek V3 and V3.1: `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>...`.
    DeepSeek,
    /// DeepSeek V3.2: `<｜DSML｜function_calls><｜DSML｜invoke name="NAME"><｜DSML｜parameter name="K" string="true">V...`.
    DeepSeekDsml,
    /// gpt-oss: channels of the harmony format, which carry the thinking as well.
    Harmony,
}

/// One tool call.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCall {
    /// Position among the calls of this output, from 0.
    pub index: usize,
    /// The function's name.
    pub name: String,
    /// The arguments, in the order in which the model wrote them.
    pub arguments: Map<String, Value>,
    /// Whether a tool of this name was offered.
    pub is_offered: bool,
}

impl ToolCall {
    /// The arguments as JSON text, as the OpenAI protocol wants them.
    pub fn arguments_json(&self) -> String {
        Value::Object(self.arguments.clone()).to_string()
    }
}

/// A piece of the output.
#[derive(Debug, Clone, PartialEq)]
pub enum ToolEvent {
    /// Text of the answer.
    Text(String),
    /// Text of the thinking; only harmony, where it has a channel. For others see
    /// [`ThinkingSplitter`](crate::ThinkingSplitter).
    Thinking(String),
    /// A call begins; only from [`ToolCallParser::streaming`].
    CallStart {
        /// Its position among the calls of this output, from 0.
        index: usize,
        /// The function's name.
        name: String,
        /// Whether a tool of this name was offered.
        is_offered: bool,
    },
    /// More of the JSON text of its arguments; only from [`ToolCallParser::streaming`].
    CallArguments {
        /// The call's position.
        index: usize,
        /// To be joined with what came before: together they are JSON of the call's arguments.
        text: String,
    },
    /// A complete call.
    Call(ToolCall),
    /// Something that began like a call and is none. The same text went out as [`Text`](Self::Text) just before, unless a
    /// call had begun.
    Malformed {
        /// The call of which something was given already.
        begun: Option<usize>,
        /// The text, markers included.
        raw: String,
        /// What was found and expected.
        reason: String,
    },
}

/// A call without its place in the output.
#[derive(Debug, PartialEq)]
pub(crate) struct ParsedCall {
    pub(crate) name: String,
    pub(crate) arguments: Map<String, Value>,
}

/// The tool-call parser of one sequence. Give it text with its markers: detokenized with `skip_special = false`, after
/// the thinking was split off.
#[derive(Debug)]
pub struct ToolCallParser {
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Block(Box<BlockParser>),
    Harmony(HarmonyParser),
}

impl ToolCallParser {
    /// A parser for one sequence. The schemas decide which arguments are text where the format does not say.
    pub fn new(format: ToolCallFormat, tools: Vec<ToolSchema>) -> ToolCallParser {
        ToolCallParser::with(format, tools, false)
    }

    /// A parser that also gives calls while they come.
    pub fn streaming(format: ToolCallFormat, tools: Vec<ToolSchema>) -> ToolCallParser {
        ToolCallParser::with(format, tools, true)
    }

    fn with(format: ToolCallFormat, tools: Vec<ToolSchema>, is_streaming: bool) -> ToolCallParser {
        let block = |format: BlockFormat| Inner::Block(Box::new(BlockParser::new(format, tools.clone(), is_streaming)));
        let inner = match format {
            ToolCallFormat::Glm => block(glm::FORMAT),
            ToolCallFormat::Hermes => block(hermes::FORMAT),
            ToolCallFormat::QwenCoder => block(qwen_coder::FORMAT),
            ToolCallFormat::DeepSeek => block(deepseek::FORMAT),
            ToolCallFormat::DeepSeekDsml => block(deepseek::DSML_FORMAT),
            ToolCallFormat::Harmony => Inner::Harmony(HarmonyParser::new(tools, is_streaming)),
        };
        ToolCallParser { inner }
    }

    /// Takes a chunk and returns what is final.
    pub fn push(&mut self, chunk: &str) -> Vec<ToolEvent> {
        match &mut self.inner {
            Inner::Block(parser) => parser.push(chunk),
            Inner::Harmony(parser) => parser.push(chunk),
        }
    }

    /// Ends the output. A call that did not end is malformed, unless all that is missing is a stop token.
    pub fn finish(&mut self) -> Vec<ToolEvent> {
        match &mut self.inner {
            Inner::Block(parser) => parser.finish(),
            Inner::Harmony(parser) => parser.finish(),
        }
    }

    /// Bytes of a call that has begun and not ended: a server that shows progress sees it grow.
    pub fn pending_bytes(&self) -> usize {
        match &self.inner {
            Inner::Block(parser) => parser.pending_bytes(),
            Inner::Harmony(parser) => parser.pending_bytes(),
        }
    }
}

/// Appends an event; text is joined with text before it, and empty text is left out.
pub(crate) fn push_event(events: &mut Vec<ToolEvent>, event: ToolEvent) {
    match (events.last_mut(), event) {
        (_, ToolEvent::Text(text) | ToolEvent::Thinking(text) | ToolEvent::CallArguments { text, .. })
            if text.is_empty() => {}
        (Some(ToolEvent::Text(last)), ToolEvent::Text(text)) => last.push_str(&text),
        (Some(ToolEvent::Thinking(last)), ToolEvent::Thinking(text)) => last.push_str(&text),
        (Some(ToolEvent::CallArguments { text: last, .. }), ToolEvent::CallArguments { text, .. }) => {
            last.push_str(&text)
        }
        (_, event) => events.push(event),
    }
}

/// Reads a JSON object of arguments; a JSON string that holds one is accepted, as some models encode twice.
pub(crate) fn arguments_object(value: Value) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(object) => Ok(object),
        Value::Null => Ok(Map::new()),
        Value::String(text) => match serde_json::from_str(&text) {
            Ok(Value::Object(object)) => Ok(object),
            _ => Err("found arguments that are a string, expected a JSON object".to_owned()),
        },
        other => Err(format!("found arguments {other}, expected a JSON object")),
    }
}

/// Whether a text ends inside of a JSON string: then a marker in it is the string's own text.
pub(crate) fn ends_in_json_string(text: &str) -> bool {
    let mut is_inside = false;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => is_inside = !is_inside,
            '\\' if is_inside => {
                characters.next();
            }
            _ => {}
        }
    }
    is_inside
}

/// Whether the last of one marker has none of the other after it.
pub(crate) fn ends_between(text: &str, open: &str, close: &str) -> bool {
    match (text.rfind(open), text.rfind(close)) {
        (Some(open), Some(close)) => open > close,
        (Some(_), None) => true,
        (None, _) => false,
    }
}
