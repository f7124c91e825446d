//! Text in and out of a language model: tokenizer, chat templates, streaming detokenization, stop strings, thinking
//! and tool calls.
//!
//! The way of a chat request through this crate:
//!
//! 1. [`ChatTemplate::render`] writes the conversation and its tools as one text, byte for byte as Hugging Face
//!    transformers would.
//! 2. [`Tokenizer::encode`] turns it into token ids; special tokens in it are recognised.
//! 3. Every sampled token goes through [`StopTokens`] and [`Detokenizer::push`], which never emits half a character.
//! 4. The text goes through [`StopStrings`], [`ThinkingSplitter`] and [`ToolCallParser`]. Each takes chunks of any
//!    size and gives the same result for every way to cut them.
//!
//! Nothing here panics on bad input: a damaged tokenizer file, a broken or hostile template and a malformed tool call
//! are errors or events with a message that says what was found and expected.

pub mod constraint;
mod detokenize;
mod error;
mod marker_scan;
mod stop;
mod template;
mod thinking;
mod token_bytes;
mod tokenizer;
mod tokenizer_config;
mod tool_calls;

pub use detokenize::Detokenizer;
pub use error::Error;
pub use stop::{StopOutcome, StopStrings, StopTokens};
pub use template::{ChatTemplate, Clock, RenderInput, TemplateLimits};
pub use thinking::{ThinkingFormat, ThinkingPiece, ThinkingSplitter, ThinkingStart};
pub use tokenizer::Tokenizer;
pub use tokenizer_config::TokenizerConfig;
pub use tool_calls::{ToolCall, ToolCallFormat, ToolCallParser, ToolEvent, ToolSchema};
