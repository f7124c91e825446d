//! What the engine is asked and what it answers: the contract with servers and the command line. Token ids only; text is
//! made above.

use crate::sampler::SamplingParams;
use moellon_text::constraint::Constraint;
use std::time::Duration;

/// One sequence to generate.
pub struct Request {
    /// Name in logs and metrics.
    pub id: String,
    /// Prompt ids, at least one, all in the vocabulary.
    pub prompt: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to generate at most; the end of the context ends it too. 0 computes the prompt only (`echo`).
    pub max_tokens: usize,
    /// Tokens that are generated before a stop token may be chosen.
    pub min_tokens: usize,
    /// Tokens that end the generation. They are reported, not hidden. A constraint allows them only where it may end.
    pub stop_token_ids: Vec<u32>,
    /// Alternatives to report with each token: `None` for no log-probabilities, `Some(0)` for the chosen token's only.
    pub logprobs: Option<usize>,
    /// Whether the prompt's own log-probabilities are wanted (legacy completions with `echo`), with as many alternatives as
    /// `logprobs` says. Such a prompt is computed in full: what is cached has no logits.
    pub prompt_logprobs: bool,
    /// Which tokens are allowed at each step; fails closed.
    pub constraint: Option<Box<dyn Constraint>>,
    /// A hard limit on thinking.
    pub thinking_budget: Option<ThinkingBudget>,
    /// Keeps cached prefixes of different users or adapters apart.
    pub cache_salt: Option<String>,
}

/// Ends thoughts that are too long: after `max_tokens` of them, `end_token_ids` are forced, and no other thought begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThinkingBudget {
    /// Tokens that the request's thoughts may take together.
    pub max_tokens: usize,
    /// Whether the prompt ends inside a thought.
    pub starts_inside: bool,
    /// Token that opens a thought.
    pub open_token_id: u32,
    /// Token that closes it.
    pub close_token_id: u32,
    /// What is written when the budget is spent, `close_token_id` at its end. The constraint sees these tokens too: behind a
    /// [`Deferred`](moellon_text::constraint::Deferred) that waits for `close_token_id` it binds what follows.
    pub end_token_ids: Vec<u32>,
}

/// What happens to a request, in order: `Started`, any number of `Prefill`, `Tokens`, then one `Finished` or `Failed`.
#[derive(Debug, Clone)]
pub enum Event {
    /// Its first tokens are about to be computed; the blocks for its prompt are reserved.
    Started(Started),
    /// Prompt tokens computed so far.
    Prefill {
        /// Computed or found cached. Falls back when the request is preempted before its first token.
        done_tokens: usize,
        /// Tokens of the prompt.
        prompt_tokens: usize,
    },
    /// One or more tokens of one step (several when drafts were accepted).
    Tokens(Vec<SampledToken>),
    /// The end.
    Finished(Finished),
    /// The engine could not go on with this request; other requests do.
    Failed(RequestError),
}

/// What the prefix cache gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Started {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of them found cached.
    pub cached_tokens: usize,
    /// Why the rest was not: `None` if everything that can be was.
    pub miss: Option<CacheMiss>,
    /// Time in the queue.
    pub queued: Duration,
}

/// Why a prompt was not cached further: the first token at which the best cached sequence differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheMiss {
    /// Position of the first token that differs.
    pub position: usize,
    /// The prompt's token there.
    pub found: u32,
    /// The cached sequence's token there; `None` if it ends before (or nothing is cached).
    pub cached: Option<u32>,
}

/// One chosen token.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledToken {
    /// Its id.
    pub id: u32,
    /// Natural logarithm of its probability under the unmodified logits, where asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens with theirs, best first.
    pub top_logprobs: Vec<(u32, f32)>,
    /// Whether the engine forced it (the end of a thinking budget).
    pub forced: bool,
}

/// What the model thought of a token of the prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptScore {
    /// Natural logarithm of its probability.
    pub logprob: f32,
    /// The most likely tokens in its place with theirs, best first.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// Why and how a generation ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// Tokens generated.
    pub completion_tokens: usize,
    /// Of them drafted by speculation and accepted.
    pub accepted_draft_tokens: usize,
    /// How often the request gave its blocks to older ones and was computed again.
    pub preemptions: usize,
    /// Log-probabilities of the prompt's tokens, the first `None`, where asked for.
    pub prompt_logprobs: Option<Vec<Option<PromptScore>>>,
    /// From `Started` to the first token.
    pub prefill: Duration,
    /// From the first token to the last.
    pub decode: Duration,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token, or the constraint allows nothing more.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The client left.
    Cancelled,
}

/// Why a request cannot be served.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RequestError {
    /// The prompt does not fit the context.
    #[error("the prompt has {prompt_tokens} tokens, expected at most {max_prompt_tokens}")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt_tokens: usize,
        /// Tokens that would fit.
        max_prompt_tokens: usize,
    },
    /// A parameter is outside its range.
    #[error(transparent)]
    Setting(#[from] crate::sampler::SettingError),
    /// A token of the prompt is none of the model's.
    #[error("the prompt has token {token} at position {position}, expected ids below {vocab_size}")]
    UnknownToken {
        /// The token.
        token: u32,
        /// Where.
        position: usize,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// The prompt is empty.
    #[error("the prompt has no tokens, expected at least 1")]
    EmptyPrompt,
    /// Its cache would never fit.
    #[error("the prompt needs {needed_bytes} bytes of cache, the cache has {total_bytes}")]
    CacheTooSmall {
        /// Bytes for the prompt and one token; an output that outgrows the cache ends with `FinishReason::Length`.
        needed_bytes: u64,
        /// Bytes of the whole cache.
        total_bytes: u64,
    },
    /// The queue is full; try again later.
    #[error("{waiting} requests are waiting, expected fewer than {limit}")]
    QueueFull {
        /// Requests in the queue.
        waiting: usize,
        /// Its limit.
        limit: usize,
    },
    /// The constraint failed or allows no token.
    #[error("constraint: {0}")]
    Constraint(String),
    /// The model computed no usable logits for this request; other requests go on.
    #[error("the model's logits after {position} tokens are unusable: {reason}")]
    Logits {
        /// Tokens of the sequence so far.
        position: usize,
        /// What is wrong with them.
        reason: String,
    },
    /// The engine failed during a step (device error, a panic); it restarts.
    #[error("engine: {0}")]
    Engine(String),
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    ShuttingDown,
}
