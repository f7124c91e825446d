//! Floor 5 of Moellon: the HTTP server. OpenAI's and Anthropic's protocols, limits, keys, metrics and a page.
//!
//! The way of a request: a protocol's module reads the body into a `ChatRequest` (`openai_chat`, `openai_responses`,
//! `anthropic`), `prompt` renders and tokenizes it, [`Generator`] makes tokens, `pipeline` makes text, thoughts and tool
//! calls of them, and the protocol's encoder writes frames or one body. Everything between the two ends is written once.

mod anthropic;
mod app;
mod body;
mod chat_request;
mod constraints;
mod error;
mod fields;
mod generator;
mod guard;
mod job;
mod metrics;
mod model;
mod openai_chat;
mod openai_completions;
mod openai_responses;
mod openapi;
mod options;
mod page;
mod pipeline;
mod prompt;
mod registry;
mod resident;
pub mod scripted;
mod server;
mod settings;
mod status;
mod stream;
mod tokenize;

pub use constraints::GrammarConstraints;
pub use generator::{
    ConstraintCompiler, EventSource, EventStream, Generator, GeneratorStats, Grammar, ToolCallGrammar, UnloadError,
};
pub use model::{ServedModel, detect_tool_call_format};
pub use options::{HttpLimits, RequestLimits, ServeOptions, ThinkingPolicy};
pub use resident::Resident;
pub use server::{ServeError, Server, run};
