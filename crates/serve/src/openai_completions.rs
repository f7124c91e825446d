//! `POST /v1/completions`: the legacy protocol, for plain continuation and for scoring (`echo` with `logprobs`).

use crate::app::App;
use crate::chat_request::check_count;
use crate::error::{ApiError, Protocol, json_response};
use crate::fields::{Fields, shown};
use crate::job::{Ending, Job, Plan, Timings, Usage};
use crate::openai_chat::{Envelope, FINGERPRINT, finish_reason, usage_json};
use crate::pipeline::{Delta, PipelineSettings};
use crate::settings::{Settings, token_id};
use crate::stream::{Answer, StreamEncoder, collect, data_frame};
use axum::body::Body;
use axum::http::{Response, StatusCode};
use moellon_engine::{Finished, PromptScore, SampledToken};
use moellon_text::Tokenizer;
use serde_json::{Map, Value, json};

/// A legacy completion.
#[derive(Debug, Clone)]
pub(crate) struct CompletionRequest {
    /// Prompt ids, one list an answer.
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) settings: Settings,
    pub(crate) echo: bool,
}

/// Tokens of an answer where a request says nothing: OpenAI's number for this old protocol.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Reads the body. Tokenizes, so not for async threads.
pub(crate) fn parse(body: &Map<String, Value>, app: &App) -> Result<CompletionRequest, ApiError> {
    let fields = Fields::of_body(body);
    let limits = &app.options.request;
    app.check_model(fields)?;
    fields.refuse(&[
        ("adapter", "adapters"),
        ("lora", "adapters"),
        ("draft_model", "a draft model of the request's choice"),
        ("suffix", "filling in the middle"),
        ("response_format", "structured output here (use /v1/chat/completions)"),
        ("structured_outputs", "structured output here (use /v1/chat/completions)"),
        ("grammar", "llama.cpp's grammar format"),
    ])?;
    let mut settings = Settings::read(fields, &app.workshop.model, limits)?;
    let default = settings.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    settings.max_tokens = Some(fields.count("max_tokens", 0, usize::MAX)?.unwrap_or(default));
    settings.logprobs = fields.count("logprobs", 0, limits.max_top_logprobs)?;
    let echo = fields.flag("echo")?.unwrap_or(false);
    if settings.max_tokens == Some(0) && !echo {
        return Err(ApiError::field("max_tokens", "0 without echo", "at least 1, or echo: true"));
    }
    Ok(CompletionRequest { prompts: prompts(fields, app)?, settings, echo })
}

/// A string, a list of strings, a list of ids, or a list of lists of ids.
fn prompts(fields: Fields<'_>, app: &App) -> Result<Vec<Vec<u32>>, ApiError> {
    let expected = "a string, strings, token ids or lists of token ids";
    let model = &app.workshop.model;
    let encode = |text: &str| {
        let add_special = model.tokenizer.config().add_bos_token().unwrap_or(true);
        let ids =
            model.tokenizer.encode(text, add_special).map_err(|error| ApiError::field("prompt", error, expected))?;
        // Scoring begins with an empty prompt: the model's first token stands for it.
        Ok(match (ids.is_empty(), model.tokenizer.bos_id()) {
            (true, Some(bos)) => vec![bos],
            _ => ids,
        })
    };
    let ids = |list: &Vec<Value>| {
        let id = |value: &Value| {
            let expected = format!("token ids below {}", model.vocab_size);
            token_id(value, model).ok_or_else(|| ApiError::field("prompt", shown(value), &expected))
        };
        list.iter().map(id).collect::<Result<Vec<u32>, ApiError>>()
    };
    let prompts = match fields.get("prompt") {
        Some(Value::String(text)) => vec![encode(text)?],
        Some(Value::Array(list)) if list.first().is_some_and(Value::is_number) => vec![ids(list)?],
        Some(Value::Array(list)) if !list.is_empty() => {
            check_count("prompt", "prompts", list.len(), app.options.request.max_prompts)?;
            let read = |item: &Value| match item {
                Value::String(text) => encode(text),
                Value::Array(list) => ids(list),
                other => Err(ApiError::field("prompt", shown(other), expected)),
            };
            list.iter().map(read).collect::<Result<Vec<_>, _>>()?
        }
        other => return Err(ApiError::field("prompt", other.map_or("nothing".to_owned(), shown), expected)),
    };
    match prompts.iter().any(Vec::is_empty) {
        true => Err(ApiError::field("prompt", "a prompt without tokens", "at least one token")),
        false => Ok(prompts),
    }
}

/// What the engine is asked for one prompt. A token is always generated, for scoring too: it is left out of the answer.
pub(crate) fn plan(request: &CompletionRequest, prompt: &[u32]) -> Plan {
    let mut settings = request.settings.clone();
    settings.max_tokens = settings.max_tokens.map(|max_tokens| max_tokens.max(1));
    Plan {
        prompt: prompt.to_vec(),
        prompt_param: "prompt",
        prompt_logprobs: request.echo && settings.logprobs.is_some(),
        settings,
        constraints: Vec::new(),
        thinking_budget: None,
        pipeline: PipelineSettings {
            thinking: None,
            tool_calls: None,
            parallel_tool_calls: true,
            stream_calls: false,
            keep_special: false,
        },
        warnings: Vec::new(),
    }
}

/// `logprobs` of the old protocol: parallel lists.
#[derive(Default)]
struct Scores {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<Value>,
    /// Characters so far.
    offset: usize,
}

impl Scores {
    fn push(&mut self, id: u32, logprob: Option<f32>, top: &[(u32, f32)], tokenizer: &Tokenizer) {
        let text = String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned();
        let number = |x: f32| if x.is_finite() { json!(x) } else { json!(-9999.0) };
        let mut best = Map::new();
        // The protocol lists the token itself in any case.
        for (id, logprob) in top.iter().copied().chain(logprob.map(|logprob| (id, logprob))) {
            best.insert(String::from_utf8_lossy(tokenizer.token_bytes(id)).into_owned(), number(logprob));
        }
        self.text_offset.push(json!(self.offset));
        self.offset += text.chars().count();
        self.tokens.push(json!(text));
        self.token_logprobs.push(logprob.map_or(Value::Null, number));
        self.top_logprobs.push(if logprob.is_none() { Value::Null } else { Value::Object(best) });
    }

    fn extend(&mut self, tokens: &[SampledToken], tokenizer: &Tokenizer) {
        for token in tokens {
            self.push(token.id, token.logprob, &token.top_logprobs, tokenizer);
        }
    }

    /// The lists so far; they are empty afterwards, the offset goes on.
    fn take(&mut self) -> Value {
        json!({
            "tokens": std::mem::take(&mut self.tokens),
            "token_logprobs": std::mem::take(&mut self.token_logprobs),
            "top_logprobs": std::mem::take(&mut self.top_logprobs),
            "text_offset": std::mem::take(&mut self.text_offset),
        })
    }
}

fn choice_json(
    index: usize,
    answer: &Answer,
    request: &CompletionRequest,
    prompt: &[u32],
    prompt_scores: Option<&[Option<PromptScore>]>,
    tokenizer: &Tokenizer,
) -> Value {
    let is_scoring_only = request.settings.max_tokens == Some(0);
    let mut scores = Scores::default();
    let mut text = String::new();
    if request.echo {
        text.push_str(&tokenizer.decode(prompt, false));
        for (position, id) in prompt.iter().enumerate() {
            let score = prompt_scores.and_then(|scores| scores.get(position)?.as_ref());
            let top = score.map_or(&[][..], |score| &score.top_logprobs);
            scores.push(*id, score.map(|score| score.logprob), top, tokenizer);
        }
    }
    if !is_scoring_only {
        text.push_str(&answer.text);
        scores.extend(&answer.logprobs, tokenizer);
    }
    let logprobs = if request.settings.logprobs.is_some() { scores.take() } else { Value::Null };
    let finish = if is_scoring_only { Some("length") } else { answer.ending.as_ref().map(finish_reason) };
    json!({"text": text, "index": index, "logprobs": logprobs, "finish_reason": finish})
}

fn envelope_json(envelope: &Envelope, choices: Value) -> Value {
    json!({
        "id": envelope.id,
        "object": "text_completion",
        "created": envelope.created,
        "model": envelope.model,
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
    })
}

/// The whole answer at once. The jobs are those of the prompts, in order; they run at the same time.
pub(crate) async fn respond_at_once(
    jobs: Vec<Job>,
    envelope: &Envelope,
    request: &CompletionRequest,
) -> Result<Response<Body>, ApiError> {
    let n = request.settings.n;
    let mut choices = Vec::new();
    let mut usage = Usage::default();
    for (mut job, prompt) in jobs.into_iter().zip(&request.prompts) {
        let answers = collect(&mut job, n).await?;
        let scores = answers.first().and_then(|answer| answer.finished.as_ref()?.prompt_logprobs.as_deref());
        for answer in &answers {
            choices.push(choice_json(choices.len(), answer, request, prompt, scores, &envelope.tokenizer));
        }
        usage.prompt += job.usage.prompt;
        usage.cached += job.usage.cached;
        usage.completion += if request.settings.max_tokens == Some(0) { 0 } else { job.usage.completion };
    }
    let mut body = envelope_json(envelope, Value::Array(choices));
    body["usage"] = usage_json(&usage);
    Ok(json_response(StatusCode::OK, &body))
}

/// Frames of a completion stream.
pub(crate) struct CompletionEncoder {
    envelope: Envelope,
    include_usage: bool,
    /// Text to send before the answers (`echo`).
    prompt_text: Option<String>,
    scores: Vec<Scores>,
}

impl CompletionEncoder {
    pub(crate) fn new(envelope: Envelope, request: &CompletionRequest, include_usage: bool) -> CompletionEncoder {
        let prompt = request.prompts.first().filter(|_| request.echo);
        let prompt_text = prompt.map(|prompt| envelope.tokenizer.decode(prompt, false));
        let scores = (0..request.settings.n).map(|_| Scores::default()).collect();
        CompletionEncoder { envelope, include_usage, prompt_text, scores }
    }

    fn frame(&self, choice: usize, text: &str, logprobs: Value, finish: Value, out: &mut String) {
        let choice = json!({"text": text, "index": choice, "logprobs": logprobs, "finish_reason": finish});
        data_frame(out, &envelope_json(&self.envelope, json!([choice])));
    }
}

impl StreamEncoder for CompletionEncoder {
    fn started(&mut self, _usage: &Usage, out: &mut String) {
        if let Some(text) = self.prompt_text.take() {
            for choice in 0..self.scores.len() {
                self.scores[choice].offset = text.chars().count();
                self.frame(choice, &text, Value::Null, Value::Null, out);
            }
        }
    }

    fn delta(&mut self, choice: usize, delta: &Delta, out: &mut String) {
        let Delta::Text { text, logprobs } = delta else { return };
        let scores = match logprobs.is_empty() {
            true => Value::Null,
            false => {
                self.scores[choice].extend(logprobs, &self.envelope.tokenizer);
                self.scores[choice].take()
            }
        };
        self.frame(choice, text, scores, Value::Null, out);
    }

    fn ended(&mut self, choice: usize, ending: &Ending, _: Option<&Finished>, _: &Usage, out: &mut String) {
        self.frame(choice, "", Value::Null, json!(finish_reason(ending)), out);
    }

    fn done(&mut self, usage: &Usage, _timings: &Timings, out: &mut String) {
        if self.include_usage {
            let mut body = envelope_json(&self.envelope, json!([]));
            body["usage"] = usage_json(usage);
            data_frame(out, &body);
        }
        out.push_str("data: [DONE]\n\n");
    }

    fn failed(&mut self, error: &ApiError, out: &mut String) {
        data_frame(out, &error.body(Protocol::OpenAi, &self.envelope.request_id));
    }
}
