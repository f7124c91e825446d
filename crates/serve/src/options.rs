//! How the server is to run. The program reads flags, environment and files, and fills these in.

use std::net::SocketAddr;
use std::time::Duration;

/// How the server is to run.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Where to listen. Loopback by default: a model server on the open net is an open door.
    pub address: SocketAddr,
    /// Keys, one of which a client must show, as `Authorization: Bearer`, `x-api-key` or the password of HTTP Basic (what
    /// browsers ask for on the page). Empty: no key is asked for.
    pub api_keys: Vec<String>,
    /// Names besides `localhost` and loopback addresses that a `Host` header may carry. They are checked when `address`
    /// is a loopback address, against DNS rebinding.
    pub allowed_hosts: Vec<String>,
    /// Origins (`https://chat.example`) whose pages may use the server. Empty: only our own page.
    pub allowed_origins: Vec<String>,
    /// Limits of the protocol layer.
    pub http: HttpLimits,
    /// Limits of a single request's fields.
    pub request: RequestLimits,
    /// Time between signs of life on a stream without tokens.
    pub heartbeat: Duration,
    /// A step that takes longer than this counts as stuck: heartbeats stop and `/health` fails.
    pub stall: Duration,
    /// Time that running requests get after a stop signal.
    pub drain: Duration,
    /// Thinking where a request says nothing.
    pub thinking: ThinkingPolicy,
    /// Thinking tokens by `reasoning_effort`, where a request gives no budget; other efforts have no limit.
    pub effort_budgets: Vec<(String, usize)>,
    /// Emit `reasoning` beside `reasoning_content`, for clients of vLLM, Ollama and mlx-lm.
    pub reasoning_alias: bool,
    /// Let the texts of special tokens in messages stand for those tokens. Off: a message that contains `<|assistant|>`
    /// cannot pose as a turn of the assistant.
    pub trust_special_tokens: bool,
}

impl Default for ServeOptions {
    fn default() -> ServeOptions {
        ServeOptions {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            api_keys: Vec::new(),
            allowed_hosts: Vec::new(),
            allowed_origins: Vec::new(),
            http: HttpLimits::default(),
            request: RequestLimits::default(),
            heartbeat: Duration::from_secs(5),
            stall: Duration::from_secs(120),
            drain: Duration::from_secs(30),
            thinking: ThinkingPolicy::Template,
            effort_budgets: vec![("minimal".to_owned(), 512), ("low".to_owned(), 2048), ("medium".to_owned(), 8192)],
            reasoning_alias: true,
            trust_special_tokens: false,
        }
    }
}

/// Whether the model thinks where a request does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ThinkingPolicy {
    /// What the chat template does by itself.
    Template,
    /// Always.
    On,
    /// Never.
    Off,
    /// As the template does, but not on steps that are mostly mechanical: after a tool's result that is no failure, where a
    /// call or a choice is prescribed, and where at most 64 tokens are wanted.
    Auto,
}

/// Limits of connections and messages.
#[derive(Debug, Clone)]
pub struct HttpLimits {
    /// Largest request body; more is 413.
    pub max_body_bytes: usize,
    /// Largest request head; more is 431. At least 8192.
    pub max_header_bytes: usize,
    /// Most headers of a request; more is 431.
    pub max_headers: usize,
    /// Time for a request's head to arrive.
    pub header_timeout: Duration,
    /// Time for a request's body to arrive; longer is 408.
    pub body_timeout: Duration,
    /// Time for a client to take a piece of a stream; longer ends the request.
    pub write_timeout: Duration,
    /// Open connections at once; more wait to be accepted.
    pub max_connections: usize,
    /// Requests in work at once; more get 429.
    pub max_requests: usize,
}

impl Default for HttpLimits {
    fn default() -> HttpLimits {
        HttpLimits {
            max_body_bytes: 32 << 20,
            max_header_bytes: 32 << 10,
            max_headers: 100,
            header_timeout: Duration::from_secs(15),
            body_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(60),
            max_connections: 1024,
            max_requests: 512,
        }
    }
}

/// Limits of a request's fields; more is 400.
#[derive(Debug, Clone)]
pub struct RequestLimits {
    /// Answers to one prompt (`n`).
    pub max_choices: usize,
    /// Prompts of one legacy completion.
    pub max_prompts: usize,
    /// Tools on offer.
    pub max_tools: usize,
    /// Messages of a conversation.
    pub max_messages: usize,
    /// Stop strings, and stop token ids.
    pub max_stop_strings: usize,
    /// Bytes of a stop string.
    pub max_stop_bytes: usize,
    /// Tokens in `logit_bias`.
    pub max_logit_biases: usize,
    /// Alternatives with each token.
    pub max_top_logprobs: usize,
    /// Bytes of a schema or grammar.
    pub max_grammar_bytes: usize,
}

impl Default for RequestLimits {
    fn default() -> RequestLimits {
        RequestLimits {
            max_choices: 8,
            max_prompts: 64,
            max_tools: 1024,
            max_messages: 20_000,
            max_stop_strings: 64,
            max_stop_bytes: 4096,
            max_logit_biases: 1024,
            max_top_logprobs: 20,
            max_grammar_bytes: 256 << 10,
        }
    }
}
