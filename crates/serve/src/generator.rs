//! What the server needs of an engine. The engine implements it, and so does the scripted generator of the tests.

use moellon_engine::{Event, Request, RequestError};
use moellon_text::constraint::{Constraint, ConstraintError};
use serde_json::Value;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc::UnboundedReceiver;

/// The events of one request, in order. Dropping it cancels the request within one step.
///
/// Unbounded, and still small: an event is a few dozen bytes a token, and a request has a token limit. Slow readers are
/// bounded where text is made.
pub type EventStream = Box<dyn EventSource>;

/// Where events come from: an engine's queue, or a script's.
pub trait EventSource: Send {
    /// The next event, `None` after the last.
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>>;
}

impl EventSource for UnboundedReceiver<Event> {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.poll_recv(context)
    }
}

/// Turns requests into tokens.
pub trait Generator: Send + Sync {
    /// Queues a request.
    ///
    /// # Errors
    /// What can be said before any work: a prompt that is too long, a full queue, a parameter outside its range.
    fn submit(&self, request: Request) -> Result<EventStream, RequestError>;

    /// How it is doing.
    fn stats(&self) -> GeneratorStats;

    /// Gives its memory back until the next request.
    ///
    /// # Errors
    /// [`UnloadError`]; by default it cannot be unloaded.
    fn unload(&self) -> Result<(), UnloadError> {
        Err(UnloadError::Unsupported)
    }

    /// Ends it: it keeps on disk what it keeps there, and gives its memory back. Nothing is submitted afterwards.
    fn close(&self) {}
}

/// Why a generator keeps its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnloadError {
    /// It has work.
    #[error("the model has {requests} requests in work, expected none")]
    Busy {
        /// Requests that run or wait.
        requests: usize,
    },
    /// It is not made for it.
    #[error("this model cannot be unloaded")]
    Unsupported,
}

/// A generator's state, for `/health`, `/metrics` and the page. What is not known is `None` and not shown.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GeneratorStats {
    /// Requests with cache blocks.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Steps done since the start.
    pub steps: u64,
    /// Time since the last step ended, or since the start.
    pub since_last_step: Duration,
    /// Whether its memory was given back until the next request.
    pub unloaded: bool,
    /// Whether it failed and has not restarted yet.
    pub failed: bool,
    /// Steps that failed since the last one that did not.
    pub failures_in_a_row: u64,
    /// Times it restarted after a failure.
    pub restarts: u64,
    /// Bytes of cache in use by running requests.
    pub cache_used_bytes: u64,
    /// Bytes of cache that hold reusable prefixes and can be evicted.
    pub cache_reusable_bytes: u64,
    /// Bytes of the whole cache.
    pub cache_total_bytes: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queried_tokens: u64,
    /// Of them found.
    pub prefix_hit_tokens: u64,
    /// Of them read from disk.
    pub disk_hit_tokens: u64,
    /// Masks of constraints computed.
    pub masks: u64,
    /// Their time.
    pub mask_time: Duration,
    /// Requests put back into the queue for want of cache.
    pub preemptions: u64,
    /// Requests refused for want of memory.
    pub admission_rejects: u64,
    /// Speculation: drafts proposed.
    pub drafts: u64,
    /// Speculation: tokens in them.
    pub draft_tokens: u64,
    /// Speculation: tokens accepted.
    pub accepted_draft_tokens: u64,
    /// Speculation: seconds saved by the governor's reckoning, below 0 lost.
    pub speculation_saved: Option<f64>,
    /// Speculation: seconds spent drafting.
    pub draft_time: f64,
    /// Speculation: chance that the head's first draft is right, as the governor sees it.
    pub head_acceptance: Option<f64>,
    /// Bytes of weights on the device.
    pub weights_bytes: u64,
    /// Bytes read for one token at batch 1.
    pub bytes_read_per_token: Option<f64>,
    /// Share of the measured bandwidth that decoding reaches, 0 to 1.
    pub bandwidth_fraction: Option<f64>,
    /// Distinct experts read in a step, average over recent steps.
    pub experts_unique_per_step: Option<f64>,
}

/// What an answer must look like.
#[derive(Debug, Clone, PartialEq)]
pub enum Grammar {
    /// Any JSON object.
    JsonObject,
    /// JSON of this schema.
    JsonSchema(Value),
    /// Text that matches a regular expression.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's Lark form.
    Lark(String),
    /// Tool calls.
    ToolCalls(ToolCallGrammar),
    /// A gpt-oss answer whose final message is this.
    InHarmony(Box<Grammar>),
}

/// Tool calls of a request, as a grammar.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolCallGrammar {
    /// How the model writes calls.
    pub format: moellon_text::ToolCallFormat,
    /// Tools that may be called.
    pub tools: Vec<moellon_text::ToolSchema>,
    /// At least one call must come; otherwise text may come instead.
    pub required: bool,
    /// Whether more than one call may come.
    pub parallel: bool,
}

/// Makes constraints of grammars: llguidance, in the program; absent, and every constrained request gets 400.
pub trait ConstraintCompiler: Send + Sync {
    /// Compiles within a time and size limit of its own.
    ///
    /// # Errors
    /// [`ConstraintError::Busy`], which becomes 503 with `Retry-After`, or why the grammar cannot be used: 400
    /// `invalid_schema`.
    fn compile(&self, grammar: &Grammar) -> Result<Box<dyn Constraint>, ConstraintError>;
}
