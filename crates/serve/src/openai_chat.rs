//! `POST /v1/chat/completions`: OpenAI's chat protocol with the extras that clients of local servers send.

use crate::app::App;
use crate::chat_request::{
    ChatRequest, ThinkingRequest, ToolChoice, check_count, check_tool_choice, content_text, output_format,
    stable_system_text, structured_outputs, template_kwargs, tool, tool_call_message,
};
use crate::error::{ApiError, Protocol, json_response};
use crate::fields::{Fields, shown};
use crate::job::{Ending, Job, Timings, Usage};
use crate::pipeline::Delta;
use crate::settings::{Settings, random_number};
use crate::stream::{Answer, StreamEncoder, collect, data_frame};
use axum::body::Body;
use axum::http::{Response, StatusCode};
use moellon_engine::{Finished, SampledToken};
use moellon_text::{Tokenizer, ToolCall};
use serde_json::{Map, Value, json};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

/// Changes with everything that could change an answer to the same seed; ours is the version.
pub(crate) const FINGERPRINT: &str = concat!("moellon-", env!("CARGO_PKG_VERSION"));

/// Reads the body.
pub(crate) fn parse(body: &Map<String, Value>, app: &App) -> Result<ChatRequest, ApiError> {
    let fields = Fields::of_body(body);
    let limits = &app.options.request;
    app.check_model(fields)?;
    fields.refuse(&[
        ("adapter", "adapters"),
        ("lora", "adapters"),
        ("draft_model", "a draft model of the request's choice"),
        ("functions", "the old function interface (use tools)"),
        ("function_call", "the old function interface (use tool_choice)"),
        ("audio", "audio"),
        ("web_search_options", "web search"),
        ("prediction", "predicted output"),
        ("grammar", "llama.cpp's grammar format (use structured_outputs.grammar)"),
        ("continue_final_message", "continuing a message"),
    ])?;
    if let Some(modalities) = fields.list("modalities")?
        && modalities.iter().any(|modality| modality != "text")
    {
        return Err(ApiError::unsupported("modalities", "output other than text"));
    }
    let mut warnings = Vec::new();
    let tools = tools(fields, limits.max_tools, &mut warnings)?;
    let tool_choice = tool_choice(fields)?;
    check_tool_choice(&tool_choice, &tools)?;
    let grammar = match fields.object("response_format")? {
        Some(format) => output_format(Fields::inside(format, "response_format."), limits)?,
        None => None,
    };
    let grammar = match grammar {
        Some(grammar) => Some(grammar),
        None => structured_outputs(fields, limits)?,
    };
    let mut settings = Settings::read(fields, &app.workshop.model, limits)?;
    settings.max_tokens = match fields.count("max_completion_tokens", 1, usize::MAX)? {
        Some(max_tokens) => Some(max_tokens),
        None => fields.count("max_tokens", 1, usize::MAX)?.or(settings.max_tokens),
    };
    let top_logprobs = fields.count("top_logprobs", 0, limits.max_top_logprobs)?;
    if fields.flag("logprobs")? == Some(true) {
        settings.logprobs = Some(top_logprobs.unwrap_or(0));
    } else if top_logprobs.is_some_and(|count| count > 0) {
        return Err(ApiError::field("top_logprobs", "a number without logprobs: true", "logprobs: true beside it"));
    }
    Ok(ChatRequest {
        messages: messages(fields, limits.max_messages)?,
        tools,
        tool_choice,
        parallel_tool_calls: fields.flag("parallel_tool_calls")?.unwrap_or(true),
        grammar,
        thinking: thinking(fields)?,
        template_kwargs: template_kwargs(fields)?,
        settings,
        warnings,
    })
}

fn messages(fields: Fields<'_>, most: usize) -> Result<Vec<Value>, ApiError> {
    let list = fields.list("messages")?.filter(|list| !list.is_empty());
    let list = list.ok_or_else(|| {
        let found = fields.get("messages").map_or("nothing".to_owned(), shown);
        ApiError::field("messages", found, "a list of at least one message")
    })?;
    check_count("messages", "messages", list.len(), most)?;
    list.iter().enumerate().map(|(index, message)| read_message(index, message)).collect()
}

fn read_message(index: usize, message: &Value) -> Result<Value, ApiError> {
    let path = format!("messages[{index}]");
    let object = message.as_object().ok_or_else(|| ApiError::field(&path, shown(message), "an object"))?;
    let prefix = format!("{path}.");
    let fields = Fields::inside(object, &prefix);
    let role = fields.text("role")?.ok_or_else(|| ApiError::field(fields.path("role"), "nothing", "a string"))?;
    let content = || match fields.get("content") {
        Some(content) => content_text(content, &fields.path("content")),
        None => Ok(String::new()),
    };
    match role {
        // Developer messages are OpenAI's newer name for what templates call system.
        "system" | "developer" => Ok(json!({"role": "system", "content": stable_system_text(content()?)})),
        "user" if fields.get("content").is_none() => {
            Err(ApiError::field(fields.path("content"), "nothing", "a string or a list of parts"))
        }
        "user" => Ok(json!({"role": "user", "content": content()?})),
        "assistant" => {
            let mut message = json!({"role": "assistant", "content": content()?});
            // Both names are in use; agents send back what they got.
            let reasoning = match fields.text("reasoning_content")? {
                Some(text) => Some(text),
                None => fields.text("reasoning")?,
            };
            if let Some(text) = reasoning.filter(|text| !text.is_empty()) {
                message["reasoning_content"] = json!(text);
            }
            if let Some(calls) = fields.list("tool_calls")?.filter(|calls| !calls.is_empty()) {
                let read = |(at, call): (usize, &Value)| {
                    let function = &call["function"];
                    let name = function["name"].as_str().ok_or_else(|| {
                        ApiError::field(format!("{path}.tool_calls[{at}].function.name"), "no string", "a string")
                    })?;
                    Ok(tool_call_message(call["id"].as_str().unwrap_or_default(), name, &function["arguments"]))
                };
                let calls: Result<Vec<Value>, ApiError> = calls.iter().enumerate().map(read).collect();
                message["tool_calls"] = Value::Array(calls?);
            }
            Ok(message)
        }
        "tool" | "function" => {
            let id = fields.text("tool_call_id")?.unwrap_or_default();
            let mut message = json!({"role": "tool", "content": content()?, "tool_call_id": id});
            if let Some(name) = fields.text("name")? {
                message["name"] = json!(name);
            }
            Ok(message)
        }
        other => {
            let expected = "system, developer, user, assistant or tool";
            Err(ApiError::field(fields.path("role"), shown(&json!(other)), expected))
        }
    }
}

fn tools(fields: Fields<'_>, most: usize, warnings: &mut Vec<String>) -> Result<Vec<Value>, ApiError> {
    let Some(list) = fields.list("tools")? else { return Ok(Vec::new()) };
    check_count("tools", "tools", list.len(), most)?;
    let mut tools = Vec::new();
    for (index, found) in list.iter().enumerate() {
        let path = format!("tools[{index}]");
        let object = found.as_object().ok_or_else(|| ApiError::field(&path, shown(found), "an object"))?;
        match object.get("type").and_then(Value::as_str) {
            Some("function") | None => {
                let function = object.get("function").unwrap_or(found);
                let path = format!("{path}.function");
                let strict = function["strict"] == json!(true);
                let parts = (function.get("description"), function.get("parameters"));
                tools.push(tool(&path, &function["name"], parts.0, parts.1, strict)?);
            }
            Some(other) => warnings.push(format!("{path}: tools of type {} are skipped", shown(&json!(other)))),
        }
    }
    Ok(tools)
}

fn tool_choice(fields: Fields<'_>) -> Result<ToolChoice, ApiError> {
    let expected = "none, auto, required or {\"type\": \"function\", \"function\": {\"name\"}}";
    match fields.get("tool_choice") {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" => Ok(ToolChoice::Required),
            _ => Err(ApiError::field("tool_choice", shown(&json!(word)), expected)),
        },
        Some(choice) => match choice["function"]["name"].as_str() {
            Some(name) => Ok(ToolChoice::Named(name.to_owned())),
            None => Err(ApiError::field("tool_choice", shown(choice), expected)),
        },
    }
}

fn thinking(fields: Fields<'_>) -> Result<ThinkingRequest, ApiError> {
    let mut thinking = ThinkingRequest::default();
    if let Some(effort) = fields.text("reasoning_effort")? {
        thinking.set_effort("reasoning_effort", effort)?;
    }
    // OpenRouter's form.
    if let Some(reasoning) = fields.object("reasoning")? {
        let inside = Fields::inside(reasoning, "reasoning.");
        if let Some(effort) = inside.text("effort")? {
            thinking.set_effort("reasoning.effort", effort)?;
        }
        thinking.enabled = inside.flag("enabled")?.or(thinking.enabled);
        thinking.budget = inside.count("max_tokens", 0, usize::MAX)?;
    }
    // GLM's own API.
    if let Some(switch) = fields.object("thinking")? {
        thinking.enabled = match Fields::inside(switch, "thinking.").text("type")? {
            Some("enabled") => Some(true),
            Some("disabled") => Some(false),
            Some(_) | None => thinking.enabled,
        };
    }
    if let Some(kwargs) = fields.object("chat_template_kwargs")? {
        let inside = Fields::inside(kwargs, "chat_template_kwargs.");
        thinking.enabled = inside.flag("enable_thinking")?.or(thinking.enabled);
    }
    thinking.enabled = fields.flag("enable_thinking")?.or(thinking.enabled);
    for name in ["thinking_token_budget", "reasoning_budget_tokens", "thinking_budget_tokens", "thinking_budget"] {
        // -1 is "no limit" in llama.cpp.
        if fields.get(name).is_some_and(|value| value.as_i64() == Some(-1)) {
            continue;
        }
        thinking.budget = fields.count(name, 0, usize::MAX)?.or(thinking.budget);
    }
    Ok(thinking)
}

/// Whether and how to stream.
pub(crate) struct StreamOptions {
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
}

/// `stream` and `stream_options`.
pub(crate) fn stream_options(fields: Fields<'_>) -> Result<StreamOptions, ApiError> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    let include_usage = match fields.object("stream_options")? {
        Some(options) => Fields::inside(options, "stream_options.").flag("include_usage")?.unwrap_or(false),
        None => false,
    };
    Ok(StreamOptions { stream, include_usage })
}

/// What all frames and bodies of one request share.
#[derive(Clone)]
pub(crate) struct Envelope {
    pub(crate) id: String,
    pub(crate) created: u64,
    pub(crate) model: String,
    pub(crate) tokenizer: Arc<Tokenizer>,
    pub(crate) reasoning_alias: bool,
    pub(crate) request_id: String,
}

impl Envelope {
    pub(crate) fn new(prefix: &str, app: &App, request_id: &str) -> Envelope {
        Envelope {
            id: format!("{prefix}{:016x}", random_number()),
            created: unix_seconds(),
            model: app.workshop.model.name.clone(),
            tokenizer: Arc::clone(&app.workshop.model.tokenizer),
            reasoning_alias: app.options.reasoning_alias,
            request_id: request_id.to_owned(),
        }
    }
}

/// Seconds since 1970.
#[expect(clippy::disallowed_methods, reason = "answers are dated")]
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The name of an ending in both OpenAI protocols.
pub(crate) fn finish_reason(ending: &Ending) -> &'static str {
    match ending {
        Ending::Stop | Ending::StopString(_) => "stop",
        Ending::Length => "length",
        Ending::ToolCalls => "tool_calls",
    }
}

/// The `usage` object.
pub(crate) fn usage_json(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    })
}

/// llama.cpp's `timings`, which web interfaces show.
pub(crate) fn timings_json(usage: &Usage, timings: &Timings) -> Value {
    let prompt_n = usage.prompt.saturating_sub(usage.cached);
    let rate = |count: usize, seconds: f64| if seconds > 0.0 { count as f64 / seconds } else { 0.0 };
    let (prefill_s, decode_s) = (timings.prefill.as_secs_f64(), timings.decode.as_secs_f64());
    json!({
        "cache_n": usage.cached,
        "prompt_n": prompt_n,
        "prompt_ms": prefill_s * 1e3,
        "prompt_per_second": rate(prompt_n, prefill_s),
        "predicted_n": usage.completion,
        "predicted_ms": decode_s * 1e3,
        // The first token is the prefill's.
        "predicted_per_second": rate(usage.completion.saturating_sub(1), decode_s),
    })
}

/// One token of `logprobs.content`.
fn logprob_json(token: &SampledToken, tokenizer: &Tokenizer) -> Value {
    let entry = |id: u32, logprob: f32| {
        let bytes = tokenizer.token_bytes(id);
        // JSON has no infinity; OpenAI writes -9999 for "very unlikely".
        let logprob = if logprob.is_finite() { f64::from(logprob) } else { -9999.0 };
        json!({"token": String::from_utf8_lossy(bytes), "logprob": logprob, "bytes": bytes})
    };
    let mut json = entry(token.id, token.logprob.unwrap_or(f32::NEG_INFINITY));
    json["top_logprobs"] = token.top_logprobs.iter().map(|(id, logprob)| entry(*id, *logprob)).collect();
    json
}

fn logprobs_json(tokens: &[SampledToken], tokenizer: &Tokenizer) -> Value {
    let content: Vec<Value> = tokens.iter().map(|token| logprob_json(token, tokenizer)).collect();
    json!({"content": content, "refusal": null})
}

/// An id for a tool call.
pub(crate) fn call_id(prefix: &str) -> String {
    format!("{prefix}{:016x}", random_number())
}

/// Frames of a chat stream.
pub(crate) struct ChatEncoder {
    envelope: Envelope,
    num_choices: usize,
    include_usage: bool,
    /// The end of a choice, if no other choice has ended since.
    last: Option<Value>,
}

impl ChatEncoder {
    pub(crate) fn new(envelope: Envelope, num_choices: usize, include_usage: bool) -> ChatEncoder {
        ChatEncoder { envelope, num_choices, include_usage, last: None }
    }

    fn chunk(&self, choices: Value) -> Value {
        json!({
            "id": self.envelope.id,
            "object": "chat.completion.chunk",
            "created": self.envelope.created,
            "model": self.envelope.model,
            "system_fingerprint": FINGERPRINT,
            "choices": choices,
        })
    }

    fn frame(&self, choice: usize, delta: Value, logprobs: Value, finish_reason: Value, out: &mut String) {
        let choice = json!({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason});
        data_frame(out, &self.chunk(json!([choice])));
    }
}

impl StreamEncoder for ChatEncoder {
    fn started(&mut self, _usage: &Usage, out: &mut String) {
        for choice in 0..self.num_choices {
            self.frame(choice, json!({"role": "assistant", "content": null}), Value::Null, Value::Null, out);
        }
    }

    fn delta(&mut self, choice: usize, delta: &Delta, out: &mut String) {
        match delta {
            Delta::Thinking(text) => {
                let mut delta = json!({"reasoning_content": text});
                if self.envelope.reasoning_alias {
                    delta["reasoning"] = json!(text);
                }
                self.frame(choice, delta, Value::Null, Value::Null, out);
            }
            Delta::Text { text, logprobs } => {
                let logprobs = match logprobs.is_empty() {
                    true => Value::Null,
                    false => logprobs_json(logprobs, &self.envelope.tokenizer),
                };
                self.frame(choice, json!({"content": text}), logprobs, Value::Null, out);
            }
            Delta::CallStart { index, name } => {
                let function = json!({"name": name, "arguments": ""});
                let head = json!({"index": index, "id": call_id("call_"), "type": "function", "function": function});
                self.frame(choice, json!({"tool_calls": [head]}), Value::Null, Value::Null, out);
            }
            Delta::CallArguments { index, text } => {
                let more = json!({"index": index, "function": {"arguments": text}});
                self.frame(choice, json!({"tool_calls": [more]}), Value::Null, Value::Null, out);
            }
            // All of it has been sent.
            Delta::Call(_) => {}
        }
    }

    fn ended(&mut self, choice: usize, ending: &Ending, _: Option<&Finished>, _: &Usage, out: &mut String) {
        let choice = json!({"index": choice, "delta": {}, "logprobs": null, "finish_reason": finish_reason(ending)});
        let frame = self.chunk(json!([choice]));
        if let Some(before) = self.last.replace(frame) {
            data_frame(out, &before);
        }
    }

    fn done(&mut self, usage: &Usage, timings: &Timings, out: &mut String) {
        // The last choice's end was held back for them: a chunk without choices comes only where it is asked for.
        if let Some(mut last) = self.last.take() {
            if !self.include_usage {
                last["timings"] = timings_json(usage, timings);
            }
            data_frame(out, &last);
        }
        if self.include_usage {
            let mut chunk = self.chunk(json!([]));
            chunk["usage"] = usage_json(usage);
            chunk["timings"] = timings_json(usage, timings);
            data_frame(out, &chunk);
        }
        out.push_str("data: [DONE]\n\n");
    }

    fn failed(&mut self, error: &ApiError, out: &mut String) {
        if let Some(last) = self.last.take() {
            data_frame(out, &last);
        }
        data_frame(out, &error.body(Protocol::OpenAi, &self.envelope.request_id));
    }
}

/// The `tool_calls` of a whole message.
fn calls_json(calls: &[ToolCall]) -> Value {
    let call = |call: &ToolCall| {
        let function = json!({"name": call.name, "arguments": call.arguments_json()});
        json!({"id": call_id("call_"), "type": "function", "function": function})
    };
    calls.iter().map(call).collect()
}

fn choice_json(index: usize, answer: &Answer, envelope: &Envelope, wants_logprobs: bool) -> Value {
    let content = match answer.text.is_empty() && !answer.calls.is_empty() {
        true => Value::Null,
        false => json!(answer.text),
    };
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !answer.thinking.is_empty() {
        message["reasoning_content"] = json!(answer.thinking);
        if envelope.reasoning_alias {
            message["reasoning"] = json!(answer.thinking);
        }
    }
    if !answer.calls.is_empty() {
        message["tool_calls"] = calls_json(&answer.calls);
    }
    let logprobs = match wants_logprobs {
        true => logprobs_json(&answer.logprobs, &envelope.tokenizer),
        false => Value::Null,
    };
    let finish = answer.ending.as_ref().map(finish_reason);
    json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish})
}

/// The whole answer at once.
pub(crate) async fn respond_at_once(
    mut job: Job,
    envelope: &Envelope,
    num_choices: usize,
    wants_logprobs: bool,
) -> Result<Response<Body>, ApiError> {
    let answers = collect(&mut job, num_choices).await?;
    let choices: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(index, answer)| choice_json(index, answer, envelope, wants_logprobs))
        .collect();
    let body = json!({
        "id": envelope.id,
        "object": "chat.completion",
        "created": envelope.created,
        "model": envelope.model,
        "system_fingerprint": FINGERPRINT,
        "choices": choices,
        "usage": usage_json(&job.usage),
        "timings": timings_json(&job.usage, &job.timings),
    });
    Ok(json_response(StatusCode::OK, &body))
}
