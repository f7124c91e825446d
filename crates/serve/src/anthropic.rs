//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's protocol, as Claude Code and its SDKs speak it.

use crate::app::App;
use crate::chat_request::{
    ChatRequest, ThinkingRequest, ToolChoice, check_count, check_tool_choice, content_text, output_format,
    stable_system_text, template_kwargs, tool, tool_call_message,
};
use crate::error::{ApiError, Protocol, json_response};
use crate::fields::{Fields, shown};
use crate::job::{Ending, Job, Timings, Usage};
use crate::openai_chat::{Envelope, call_id};
use crate::pipeline::Delta;
use crate::settings::{Settings, read_stop};
use crate::stream::{StreamEncoder, collect, event_frame};
use axum::body::Body;
use axum::http::{Response, StatusCode};
use moellon_engine::Finished;
use serde_json::{Map, Value, json};

/// Thoughts carry a signature that clients send back; ours proves nothing, so it is a constant.
const SIGNATURE: &str = "bW9lbGxvbg==";

/// Reads the body. `max_tokens` is required to answer, not to count.
pub(crate) fn parse(body: &Map<String, Value>, app: &App, is_count: bool) -> Result<ChatRequest, ApiError> {
    let fields = Fields::of_body(body);
    let limits = &app.options.request;
    app.check_model(fields)?;
    fields.refuse(&[("mcp_servers", "MCP on the server's side"), ("container", "containers")])?;
    let mut settings = Settings::read(fields, &app.workshop.model, limits)?.single();
    settings.max_tokens = fields.count("max_tokens", 1, usize::MAX)?;
    // No default: the protocol demands it.
    if settings.max_tokens.is_none() && !is_count {
        return Err(ApiError::field("max_tokens", "nothing", "a whole number of at least 1"));
    }
    settings.stop = read_stop(fields, "stop_sequences", limits)?;
    let mut warnings = Vec::new();
    let tools = tools(fields, limits.max_tools, &mut warnings)?;
    let (tool_choice, parallel_tool_calls) = tool_choice(fields)?;
    check_tool_choice(&tool_choice, &tools)?;
    let (mut thinking, mut grammar) = (thinking(fields)?, None);
    if let Some(config) = fields.object("output_config")? {
        let inside = Fields::inside(config, "output_config.");
        if let Some(effort) = inside.text("effort")? {
            thinking.set_effort("output_config.effort", effort)?;
        }
        if let Some(format) = inside.object("format")? {
            grammar = output_format(Fields::inside(format, "output_config.format."), limits)?;
        }
    }
    if let Some(format) = fields.object("output_format")? {
        grammar = output_format(Fields::inside(format, "output_format."), limits)?;
    }
    Ok(ChatRequest {
        messages: messages(fields, limits.max_messages)?,
        tools,
        tool_choice,
        parallel_tool_calls,
        grammar,
        thinking,
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
    let mut messages = Vec::new();
    if let Some(system) = fields.get("system") {
        messages.push(json!({"role": "system", "content": system_text(system, "system")?}));
    }
    for (index, message) in list.iter().enumerate() {
        let path = format!("messages[{index}]");
        let object = message.as_object().ok_or_else(|| ApiError::field(&path, shown(message), "an object"))?;
        let prefix = format!("{path}.");
        let inside = Fields::inside(object, &prefix);
        let role = inside.text("role")?.ok_or_else(|| ApiError::field(inside.path("role"), "nothing", "a string"))?;
        let content_path = inside.path("content");
        let content = inside
            .get("content")
            .ok_or_else(|| ApiError::field(content_path.clone(), "nothing", "a string or a list of blocks"))?;
        match role {
            "user" => user_message(content, &content_path, &mut messages)?,
            "assistant" => messages.push(assistant_message(content, &content_path)?),
            // Claude Code sends reminders this way; they keep their place.
            "system" => {
                messages.push(json!({"role": "system", "content": system_text(content, &content_path)?}));
            }
            other => {
                return Err(ApiError::field(inside.path("role"), shown(&json!(other)), "user, assistant or system"));
            }
        }
    }
    Ok(messages)
}

/// A system prompt: its blocks are paragraphs, and the billing line among them is made constant.
fn system_text(system: &Value, path: &str) -> Result<String, ApiError> {
    let Value::Array(blocks) = system else { return Ok(stable_system_text(content_text(system, path)?)) };
    let mut texts = Vec::with_capacity(blocks.len());
    for (index, block) in blocks.iter().enumerate() {
        let text = content_text(&json!([block]), &format!("{path}[{index}]"))?;
        texts.push(stable_system_text(text));
    }
    Ok(texts.join("\n\n"))
}

/// The blocks of a content; a string is one text block.
fn blocks<'a>(content: &'a Value, path: &str) -> Result<Option<&'a [Value]>, ApiError> {
    match content {
        Value::String(_) => Ok(None),
        Value::Array(blocks) => Ok(Some(blocks)),
        other => Err(ApiError::field(path, shown(other), "a string or a list of blocks")),
    }
}

/// A user's message: tool results become messages of their own, texts around them stay in order.
fn user_message(content: &Value, path: &str, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let Some(list) = blocks(content, path)? else {
        messages.push(json!({"role": "user", "content": content}));
        return Ok(());
    };
    let mut texts: Vec<String> = Vec::new();
    let flush = |texts: &mut Vec<String>, messages: &mut Vec<Value>| {
        if !texts.is_empty() {
            messages.push(json!({"role": "user", "content": std::mem::take(texts).join("\n")}));
        }
    };
    for (index, block) in list.iter().enumerate() {
        let path = format!("{path}[{index}]");
        match block["type"].as_str() {
            Some("tool_result") => {
                flush(&mut texts, messages);
                let id = block["tool_use_id"].as_str().unwrap_or_default();
                let mut text = match block.get("content") {
                    Some(content) => content_text(content, &format!("{path}.content"))?,
                    None => String::new(),
                };
                if block["is_error"] == json!(true) {
                    text.insert_str(0, "Error: ");
                }
                messages.push(json!({"role": "tool", "tool_call_id": id, "content": text}));
            }
            Some("text") => texts.push(content_text(&json!([block]), &path)?),
            Some("document") if block["source"]["type"] == "text" => {
                texts.push(block["source"]["data"].as_str().unwrap_or_default().to_owned());
            }
            Some(other) => {
                return Err(ApiError::unsupported(format!("{path}.type"), &format!("content of type {other:?}")));
            }
            None => return Err(ApiError::field(format!("{path}.type"), "no string", "text or tool_result")),
        }
    }
    flush(&mut texts, messages);
    Ok(())
}

fn assistant_message(content: &Value, path: &str) -> Result<Value, ApiError> {
    let Some(list) = blocks(content, path)? else { return Ok(json!({"role": "assistant", "content": content})) };
    let (mut texts, mut thoughts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (index, block) in list.iter().enumerate() {
        let path = format!("{path}[{index}]");
        match block["type"].as_str() {
            Some("text") => texts.push(content_text(&json!([block]), &path)?),
            Some("thinking") => thoughts.push(block["thinking"].as_str().unwrap_or_default().to_owned()),
            // Encrypted by another server: nothing to read.
            Some("redacted_thinking") => {}
            Some("tool_use") => {
                let name = block["name"].as_str();
                let name = name.ok_or_else(|| ApiError::field(format!("{path}.name"), "no string", "a string"))?;
                calls.push(tool_call_message(block["id"].as_str().unwrap_or_default(), name, &block["input"]));
            }
            Some(other) => {
                return Err(ApiError::unsupported(format!("{path}.type"), &format!("content of type {other:?}")));
            }
            None => return Err(ApiError::field(format!("{path}.type"), "no string", "text, thinking or tool_use")),
        }
    }
    let mut message = json!({"role": "assistant", "content": texts.join("\n")});
    if !thoughts.is_empty() {
        message["reasoning_content"] = json!(thoughts.join("\n"));
    }
    if !calls.is_empty() {
        message["tool_calls"] = Value::Array(calls);
    }
    Ok(message)
}

fn tools(fields: Fields<'_>, most: usize, warnings: &mut Vec<String>) -> Result<Vec<Value>, ApiError> {
    let Some(list) = fields.list("tools")? else { return Ok(Vec::new()) };
    check_count("tools", "tools", list.len(), most)?;
    let mut tools = Vec::new();
    for (index, found) in list.iter().enumerate() {
        let path = format!("tools[{index}]");
        let object = found.as_object().ok_or_else(|| ApiError::field(&path, shown(found), "an object"))?;
        match object.get("type").and_then(Value::as_str) {
            None | Some("custom") => {
                let strict = found["strict"] == json!(true);
                let parts = (object.get("description"), object.get("input_schema"));
                tools.push(tool(&path, &found["name"], parts.0, parts.1, strict)?);
            }
            // Anthropic's own tools run on Anthropic's side.
            Some(other) => warnings.push(format!("{path}: tools of type {} are skipped", shown(&json!(other)))),
        }
    }
    Ok(tools)
}

/// `tool_choice`, and whether more than one call may come.
fn tool_choice(fields: Fields<'_>) -> Result<(ToolChoice, bool), ApiError> {
    let Some(choice) = fields.object("tool_choice")? else { return Ok((ToolChoice::Auto, true)) };
    let inside = Fields::inside(choice, "tool_choice.");
    let one_only = inside.flag("disable_parallel_tool_use")?.unwrap_or(false);
    let choice = match inside.text("type")? {
        Some("auto") => ToolChoice::Auto,
        Some("none") => ToolChoice::None,
        Some("any") => ToolChoice::Required,
        Some("tool") => {
            let name = inside.text("name")?;
            ToolChoice::Named(
                name.ok_or_else(|| ApiError::field("tool_choice.name", "nothing", "a string"))?.to_owned(),
            )
        }
        Some(_) | None => {
            let found = inside.get("type").map_or("nothing".to_owned(), shown);
            return Err(ApiError::field("tool_choice.type", found, "auto, any, tool or none"));
        }
    };
    Ok((choice, !one_only))
}

fn thinking(fields: Fields<'_>) -> Result<ThinkingRequest, ApiError> {
    let mut thinking = ThinkingRequest::default();
    if let Some(config) = fields.object("thinking")? {
        let inside = Fields::inside(config, "thinking.");
        match inside.text("type")? {
            Some("enabled") => {
                thinking.enabled = Some(true);
                thinking.budget = inside.count("budget_tokens", 0, usize::MAX)?;
            }
            Some("disabled") => thinking.enabled = Some(false),
            // As the model and the server's policy see fit.
            Some("adaptive") | None => {}
            Some(other) => {
                let expected = "enabled, disabled or adaptive";
                return Err(ApiError::field("thinking.type", shown(&json!(other)), expected));
            }
        }
    }
    Ok(thinking)
}

/// `usage`: cached tokens are counted apart.
fn usage_json(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt.saturating_sub(usage.cached),
        "output_tokens": usage.completion,
        "cache_read_input_tokens": usage.cached,
        "cache_creation_input_tokens": 0,
    })
}

fn stop_reason(ending: &Ending) -> (&'static str, Value) {
    match ending {
        Ending::Stop => ("end_turn", Value::Null),
        Ending::StopString(text) => ("stop_sequence", json!(text)),
        Ending::Length => ("max_tokens", Value::Null),
        Ending::ToolCalls => ("tool_use", Value::Null),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Block {
    Thinking,
    Text,
    ToolUse,
}

/// Frames of a message stream.
pub(crate) struct MessagesEncoder {
    envelope: Envelope,
    has_started: bool,
    /// The open block.
    block: Option<Block>,
    /// Blocks opened so far.
    num_blocks: usize,
}

impl MessagesEncoder {
    pub(crate) fn new(envelope: Envelope) -> MessagesEncoder {
        MessagesEncoder { envelope, has_started: false, block: None, num_blocks: 0 }
    }

    fn index(&self) -> usize {
        self.num_blocks.saturating_sub(1)
    }

    fn close(&mut self, out: &mut String) {
        let Some(block) = self.block.take() else { return };
        let index = self.index();
        if block == Block::Thinking {
            let delta = json!({"type": "signature_delta", "signature": SIGNATURE});
            event_frame(out, &json!({"type": "content_block_delta", "index": index, "delta": delta}));
        }
        event_frame(out, &json!({"type": "content_block_stop", "index": index}));
    }

    fn start_block(&mut self, content: Value, out: &mut String) {
        self.close(out);
        let index = self.num_blocks;
        self.num_blocks += 1;
        event_frame(out, &json!({"type": "content_block_start", "index": index, "content_block": content}));
    }

    fn open(&mut self, block: Block, out: &mut String) {
        if self.block == Some(block) {
            return;
        }
        let content = match block {
            Block::Thinking => json!({"type": "thinking", "thinking": "", "signature": ""}),
            Block::Text => json!({"type": "text", "text": ""}),
            Block::ToolUse => unreachable!("a call's block is opened where its name is known"),
        };
        self.start_block(content, out);
        self.block = Some(block);
    }

    fn block_delta(&self, delta: Value, out: &mut String) {
        event_frame(out, &json!({"type": "content_block_delta", "index": self.index(), "delta": delta}));
    }
}

impl StreamEncoder for MessagesEncoder {
    fn started(&mut self, usage: &Usage, out: &mut String) {
        self.has_started = true;
        let message = json!({
            "id": self.envelope.id,
            "type": "message",
            "role": "assistant",
            "model": self.envelope.model,
            "content": [],
            "stop_reason": null,
            "stop_sequence": null,
            "usage": usage_json(usage),
        });
        event_frame(out, &json!({"type": "message_start", "message": message}));
        event_frame(out, &json!({"type": "ping"}));
    }

    fn delta(&mut self, _choice: usize, delta: &Delta, out: &mut String) {
        match delta {
            Delta::Thinking(text) => {
                self.open(Block::Thinking, out);
                self.block_delta(json!({"type": "thinking_delta", "thinking": text}), out);
            }
            Delta::Text { text, .. } if text.is_empty() => {}
            Delta::Text { text, .. } => {
                self.open(Block::Text, out);
                self.block_delta(json!({"type": "text_delta", "text": text}), out);
            }
            Delta::CallStart { name, .. } => {
                let content = json!({"type": "tool_use", "id": call_id("toolu_"), "name": name, "input": {}});
                self.start_block(content, out);
                self.block = Some(Block::ToolUse);
            }
            Delta::CallArguments { text, .. } => {
                self.block_delta(json!({"type": "input_json_delta", "partial_json": text}), out);
            }
            Delta::Call(_) => self.close(out),
        }
    }

    fn ended(&mut self, _choice: usize, ending: &Ending, _: Option<&Finished>, usage: &Usage, out: &mut String) {
        self.close(out);
        let (reason, sequence) = stop_reason(ending);
        let delta = json!({"stop_reason": reason, "stop_sequence": sequence});
        event_frame(out, &json!({"type": "message_delta", "delta": delta, "usage": usage_json(usage)}));
    }

    fn done(&mut self, _usage: &Usage, _timings: &Timings, out: &mut String) {
        event_frame(out, &json!({"type": "message_stop"}));
    }

    fn failed(&mut self, error: &ApiError, out: &mut String) {
        let body = error.body(Protocol::Anthropic, &self.envelope.request_id);
        event_frame(out, &body);
    }

    fn heartbeat(&mut self, _progress: Option<(usize, usize)>, out: &mut String) {
        match self.has_started {
            true => event_frame(out, &json!({"type": "ping"})),
            // SDKs want message_start first.
            false => out.push_str(": keepalive\n\n"),
        }
    }
}

/// The whole answer at once.
pub(crate) async fn respond_at_once(mut job: Job, envelope: &Envelope) -> Result<Response<Body>, ApiError> {
    let answers = collect(&mut job, 1).await?;
    let mut content = Vec::new();
    let mut reason = ("end_turn", Value::Null);
    for answer in &answers {
        if !answer.thinking.is_empty() {
            content.push(json!({"type": "thinking", "thinking": answer.thinking, "signature": SIGNATURE}));
        }
        if !answer.text.is_empty() {
            content.push(json!({"type": "text", "text": answer.text}));
        }
        for call in &answer.calls {
            let id = call_id("toolu_");
            content.push(json!({"type": "tool_use", "id": id, "name": call.name, "input": call.arguments}));
        }
        if let Some(ending) = &answer.ending {
            reason = stop_reason(ending);
        }
    }
    let body = json!({
        "id": envelope.id,
        "type": "message",
        "role": "assistant",
        "model": envelope.model,
        "content": content,
        "stop_reason": reason.0,
        "stop_sequence": reason.1,
        "usage": usage_json(&job.usage),
    });
    Ok(json_response(StatusCode::OK, &body))
}
