//! From sampled tokens to what clients see: text, thoughts and tool calls of one answer.

use crate::error::{ApiError, ErrorKind};
use crate::model::ServedModel;
use moellon_engine::SampledToken;
use moellon_text::{
    Detokenizer, StopStrings, StopTokens, ThinkingPiece, ThinkingSplitter, ThinkingStart, ToolCall, ToolCallFormat,
    ToolCallParser, ToolEvent, ToolSchema,
};
use std::sync::Arc;

/// How to read an answer.
#[derive(Debug, Clone)]
pub(crate) struct PipelineSettings {
    /// Where the answer begins, where the model can think.
    pub(crate) thinking: Option<ThinkingStart>,
    /// How calls are written, and the tools on offer.
    pub(crate) tool_calls: Option<(ToolCallFormat, Vec<ToolSchema>)>,
    /// Whether the answer goes on after a call.
    pub(crate) parallel_tool_calls: bool,
    /// Whether calls are given while they come: for streams.
    pub(crate) stream_calls: bool,
    /// Show special tokens in the text.
    pub(crate) keep_special: bool,
}

/// A new piece of an answer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Delta {
    Thinking(String),
    Text {
        text: String,
        /// Of the tokens that became visible, where asked for.
        logprobs: Vec<SampledToken>,
    },
    /// A call begins; only where calls are streamed.
    CallStart {
        index: usize,
        name: String,
    },
    /// More of the JSON text of its arguments; only where calls are streamed.
    CallArguments {
        index: usize,
        text: String,
    },
    /// A whole call.
    Call(ToolCall),
}

/// How much of a malformed call an error repeats.
const MAX_SHOWN_CHARS: usize = 2000;

/// The texts that must survive although they may be special tokens: the parsers look for them.
fn is_marker(text: &str, model: &ServedModel) -> bool {
    const MARKERS: [&str; 12] = [
        "<tool_call>",
        "</tool_call>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<|start|>",
        "<|channel|>",
        "<|message|>",
        "<|constrain|>",
        "<|end|>",
        "<|call|>",
    ];
    let format = &model.thinking_format;
    MARKERS.contains(&text)
        || text == format.open
        || text == format.close
        || text.contains("tool▁")
        || text.contains("DSML")
}

/// Reads one answer, token by token.
pub(crate) struct Pipeline {
    model: Arc<ServedModel>,
    stop_tokens: StopTokens,
    detokenizer: Detokenizer,
    splitter: Option<ThinkingSplitter>,
    parser: Option<ToolCallParser>,
    stop_strings: StopStrings,
    stop_texts: Vec<String>,
    keep_special: bool,
    one_call: bool,
    wants_logprobs: bool,
    pending_logprobs: Vec<SampledToken>,
    /// The last visible piece was a thought: where the splitter cannot say (harmony).
    was_thinking: bool,
    /// Tokens of thoughts, markers included.
    pub(crate) reasoning_tokens: usize,
    /// The stop string that ended the answer.
    pub(crate) stop_string: Option<String>,
    /// Complete calls so far.
    pub(crate) num_calls: usize,
    /// Why something that began like a call is none.
    pub(crate) malformed: Vec<String>,
    /// Why a call of which something was given is none: the answer cannot be completed.
    pub(crate) broken_call: Option<String>,
    /// Nothing more is wanted, though the engine would go on.
    pub(crate) is_over: bool,
}

impl Pipeline {
    pub(crate) fn new(
        model: &Arc<ServedModel>,
        settings: &PipelineSettings,
        stop: &[String],
        stop_token_ids: &[u32],
        wants_logprobs: bool,
    ) -> Result<Pipeline, ApiError> {
        let refuse = |error: moellon_text::Error| ApiError::new(ErrorKind::InvalidRequest, error.to_string());
        let splitter = match settings.thinking {
            Some(start) => Some(ThinkingSplitter::new(model.thinking_format.clone(), start).map_err(refuse)?),
            None => None,
        };
        let make = if settings.stream_calls { ToolCallParser::streaming } else { ToolCallParser::new };
        let parser = settings.tool_calls.as_ref().map(|(format, tools)| make(*format, tools.clone()));
        Ok(Pipeline {
            model: Arc::clone(model),
            stop_tokens: StopTokens::new(stop_token_ids.iter().copied()),
            detokenizer: Detokenizer::continuing(Arc::clone(&model.tokenizer), false),
            splitter,
            parser,
            stop_strings: StopStrings::new(stop).map_err(|error| refuse(error).with_param("stop"))?,
            stop_texts: stop.to_vec(),
            keep_special: settings.keep_special,
            one_call: !settings.parallel_tool_calls,
            wants_logprobs,
            pending_logprobs: Vec::new(),
            was_thinking: false,
            reasoning_tokens: 0,
            stop_string: None,
            num_calls: 0,
            malformed: Vec::new(),
            broken_call: None,
            is_over: false,
        })
    }

    /// Takes a token and appends what became final.
    pub(crate) fn push(&mut self, token: &SampledToken, deltas: &mut Vec<Delta>) {
        if self.is_over || self.stop_tokens.contains(token.id) {
            return;
        }
        let before = self.is_thinking();
        let is_hidden = !self.keep_special
            && self.model.tokenizer.is_special(token.id)
            && !self.model.tokenizer.token(token.id).is_some_and(|text| is_marker(&text, &self.model));
        let text = if is_hidden { String::new() } else { self.detokenizer.push(token.id).to_owned() };
        self.split(&text, deltas);
        if before || self.is_thinking() {
            self.reasoning_tokens += 1;
        } else if self.wants_logprobs {
            self.pending_logprobs.push(token.clone());
        }
        self.attach_logprobs(deltas);
    }

    /// Ends the answer: what was held back comes out.
    pub(crate) fn finish(&mut self, deltas: &mut Vec<Delta>) {
        if !self.is_over {
            let rest = self.detokenizer.finish().to_owned();
            self.split(&rest, deltas);
            if let Some(splitter) = &mut self.splitter {
                let pieces = splitter.finish();
                self.pieces(pieces, deltas);
            }
            if let Some(parser) = &mut self.parser {
                let events = parser.finish();
                self.events(events, deltas);
            }
            if !self.is_over {
                let held = self.stop_strings.finish();
                push_text(deltas, held);
            }
        }
        self.attach_logprobs(deltas);
        if !self.pending_logprobs.is_empty() {
            let logprobs = std::mem::take(&mut self.pending_logprobs);
            deltas.push(Delta::Text { text: String::new(), logprobs });
        }
    }

    /// Bytes of a call that has begun: it shows that something is going on.
    pub(crate) fn pending_call_bytes(&self) -> usize {
        self.parser.as_ref().map_or(0, ToolCallParser::pending_bytes)
    }

    fn is_thinking(&self) -> bool {
        self.splitter.as_ref().map_or(self.was_thinking, ThinkingSplitter::is_thinking)
    }

    fn attach_logprobs(&mut self, deltas: &mut [Delta]) {
        if self.pending_logprobs.is_empty() {
            return;
        }
        let texts = deltas.iter_mut().rev();
        if let Some(Delta::Text { logprobs, .. }) = texts.into_iter().find(|delta| matches!(delta, Delta::Text { .. }))
        {
            logprobs.append(&mut self.pending_logprobs);
        }
    }

    fn split(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        if text.is_empty() {
            return;
        }
        match &mut self.splitter {
            Some(splitter) => {
                let pieces = splitter.push(text);
                self.pieces(pieces, deltas);
            }
            None => self.answer(text, deltas),
        }
    }

    fn pieces(&mut self, pieces: Vec<ThinkingPiece>, deltas: &mut Vec<Delta>) {
        for piece in pieces {
            match piece {
                ThinkingPiece::Thinking(text) => deltas.push(Delta::Thinking(text)),
                ThinkingPiece::Answer(text) => self.answer(&text, deltas),
            }
        }
    }

    fn answer(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        match &mut self.parser {
            Some(parser) => {
                let events = parser.push(text);
                self.events(events, deltas);
            }
            None => self.stop(text, deltas),
        }
    }

    fn events(&mut self, events: Vec<ToolEvent>, deltas: &mut Vec<Delta>) {
        for event in events {
            if self.is_over {
                return;
            }
            match event {
                ToolEvent::Text(text) => {
                    self.was_thinking = false;
                    self.stop(&text, deltas);
                }
                ToolEvent::Thinking(text) => {
                    self.was_thinking = true;
                    deltas.push(Delta::Thinking(text));
                }
                ToolEvent::CallStart { index, name, .. } => {
                    self.was_thinking = false;
                    // A stop string does not reach across a call.
                    let held = self.stop_strings.finish();
                    push_text(deltas, held);
                    deltas.push(Delta::CallStart { index, name });
                }
                ToolEvent::CallArguments { index, text } => deltas.push(Delta::CallArguments { index, text }),
                ToolEvent::Call(call) => {
                    self.was_thinking = false;
                    let held = self.stop_strings.finish();
                    push_text(deltas, held);
                    self.num_calls += 1;
                    deltas.push(Delta::Call(call));
                    self.is_over |= self.one_call;
                }
                ToolEvent::Malformed { raw, reason, begun: Some(_) } => {
                    let shown: String = raw.chars().take(MAX_SHOWN_CHARS).collect();
                    self.broken_call = Some(format!("{reason}; the model wrote {shown:?}"));
                    self.is_over = true;
                }
                ToolEvent::Malformed { reason, begun: None, .. } => self.malformed.push(reason),
            }
        }
    }

    /// Stop strings end answers, not thoughts: a newline to stop at would end most thoughts at once.
    fn stop(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        let outcome = self.stop_strings.push(text);
        push_text(deltas, outcome.text);
        if let Some(index) = outcome.matched {
            self.stop_string = self.stop_texts.get(index).cloned();
            self.is_over = true;
        }
    }
}

fn push_text(deltas: &mut Vec<Delta>, text: String) {
    if text.is_empty() {
        return;
    }
    match deltas.last_mut() {
        Some(Delta::Text { text: last, .. }) => last.push_str(&text),
        Some(Delta::Thinking(_) | Delta::CallStart { .. } | Delta::CallArguments { .. } | Delta::Call(_)) | None => {
            deltas.push(Delta::Text { text, logprobs: Vec::new() })
        }
    }
}
