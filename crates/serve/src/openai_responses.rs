//! `POST /v1/responses`: OpenAI's responses protocol, without storage, as Codex and the SDKs speak it.

use crate::app::App;
use crate::chat_request::{
    ChatRequest, ThinkingRequest, ToolChoice, check_count, check_tool_choice, content_text, output_format,
    stable_system_text, template_kwargs, tool, tool_call_message,
};
use crate::error::{ApiError, json_response};
use crate::fields::{Fields, shown};
use crate::job::{Ending, Job, Timings, Usage};
use crate::openai_chat::{Envelope, call_id};
use crate::pipeline::Delta;
use crate::settings::Settings;
use crate::stream::{StreamEncoder, collect, event_frame};
use axum::body::Body;
use axum::http::{Response, StatusCode};
use moellon_engine::Finished;
use serde_json::{Map, Value, json};

/// Reads the body.
pub(crate) fn parse(body: &Map<String, Value>, app: &App) -> Result<ChatRequest, ApiError> {
    let fields = Fields::of_body(body);
    let limits = &app.options.request;
    app.check_model(fields)?;
    fields.refuse(&[
        ("previous_response_id", "continuing a stored response (responses are not stored: send the whole input)"),
        ("conversation", "a stored conversation"),
        ("background", "running in the background"),
        ("prompt", "a stored prompt"),
    ])?;
    if fields.text("truncation")?.is_some_and(|truncation| truncation != "disabled") {
        return Err(ApiError::unsupported("truncation", "dropping parts of the input"));
    }
    let mut settings = Settings::read(fields, &app.workshop.model, limits)?.single();
    settings.max_tokens = fields.count("max_output_tokens", 1, usize::MAX)?.or(settings.max_tokens);
    let mut warnings = Vec::new();
    let tools = tools(fields, limits.max_tools, &mut warnings)?;
    let tool_choice = tool_choice(fields)?;
    check_tool_choice(&tool_choice, &tools)?;
    let mut thinking = ThinkingRequest::default();
    if let Some(reasoning) = fields.object("reasoning")?
        && let Some(effort) = Fields::inside(reasoning, "reasoning.").text("effort")?
    {
        thinking.set_effort("reasoning.effort", effort)?;
    }
    let mut grammar = None;
    if let Some(text) = fields.object("text")?
        && let Some(format) = Fields::inside(text, "text.").object("format")?
    {
        grammar = output_format(Fields::inside(format, "text.format."), limits)?;
    }
    Ok(ChatRequest {
        messages: messages(fields, limits.max_messages, &mut warnings)?,
        tools,
        tool_choice,
        parallel_tool_calls: fields.flag("parallel_tool_calls")?.unwrap_or(true),
        grammar,
        thinking,
        template_kwargs: template_kwargs(fields)?,
        settings,
        warnings,
    })
}

fn messages(fields: Fields<'_>, most: usize, warnings: &mut Vec<String>) -> Result<Vec<Value>, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = fields.text("instructions")? {
        messages.push(json!({"role": "system", "content": stable_system_text(instructions.to_owned())}));
    }
    let items = match fields.get("input") {
        Some(Value::String(text)) => {
            messages.push(json!({"role": "user", "content": text}));
            return Ok(messages);
        }
        Some(Value::Array(items)) if !items.is_empty() => items,
        other => {
            let found = other.map_or("nothing".to_owned(), shown);
            return Err(ApiError::field("input", found, "a string or a list of at least one item"));
        }
    };
    check_count("input", "items", items.len(), most)?;
    for (index, item) in items.iter().enumerate() {
        let path = format!("input[{index}]");
        let object = item.as_object().ok_or_else(|| ApiError::field(&path, shown(item), "an object"))?;
        read_item(object, &path, &mut messages, warnings)?;
    }
    Ok(messages)
}

fn read_item(
    item: &Map<String, Value>,
    path: &str,
    messages: &mut Vec<Value>,
    warnings: &mut Vec<String>,
) -> Result<(), ApiError> {
    let prefix = format!("{path}.");
    let fields = Fields::inside(item, &prefix);
    let text_of = |name: &str| match fields.get(name) {
        Some(content) => content_text(content, &fields.path(name)),
        None => Ok(String::new()),
    };
    match fields.text("type")? {
        None | Some("message") => {
            let text = text_of("content")?;
            match fields.text("role")? {
                Some("user") => messages.push(json!({"role": "user", "content": text})),
                Some("system" | "developer") => {
                    messages.push(json!({"role": "system", "content": stable_system_text(text)}));
                }
                Some("assistant") => {
                    let message = assistant(messages);
                    let before = message["content"].as_str().unwrap_or_default();
                    message["content"] = json!(format!("{before}{text}"));
                }
                other => {
                    let found = other.map_or("nothing".to_owned(), |role| shown(&json!(role)));
                    let expected = "user, assistant, system or developer";
                    return Err(ApiError::field(fields.path("role"), found, expected));
                }
            }
        }
        Some("function_call") => {
            let name =
                fields.text("name")?.ok_or_else(|| ApiError::field(fields.path("name"), "nothing", "a string"))?;
            let id = fields.text("call_id")?.unwrap_or_default();
            let call = tool_call_message(id, name, &item.get("arguments").cloned().unwrap_or_default());
            let message = assistant(messages);
            match message.get_mut("tool_calls").and_then(Value::as_array_mut) {
                Some(calls) => calls.push(call),
                None => message["tool_calls"] = json!([call]),
            }
        }
        Some("function_call_output") => {
            let id = fields.text("call_id")?.unwrap_or_default();
            messages.push(json!({"role": "tool", "tool_call_id": id, "content": text_of("output")?}));
        }
        Some("reasoning") => {
            // Plain text where there is any; what another server encrypted cannot be read.
            let mut texts = Vec::new();
            for part in ["content", "summary"] {
                let parts = fields.list(part)?.map_or(&[][..], Vec::as_slice);
                texts.extend(parts.iter().filter_map(|part| part["text"].as_str()));
                if !texts.is_empty() {
                    break;
                }
            }
            if !texts.is_empty() {
                messages.push(json!({"role": "assistant", "content": "", "reasoning_content": texts.join("\n")}));
            }
        }
        Some("item_reference") => {
            return Err(ApiError::unsupported(fields.path("type"), "a reference to a stored item"));
        }
        Some(other) => warnings.push(format!("{path}: items of type {} are skipped", shown(&json!(other)))),
    }
    Ok(())
}

/// The assistant's message that items add to: thought, text and calls of one turn are items of their own.
fn assistant(messages: &mut Vec<Value>) -> &mut Value {
    let is_open = messages.last().is_some_and(|message| message["role"] == "assistant");
    if !is_open {
        messages.push(json!({"role": "assistant", "content": ""}));
    }
    let last = messages.len() - 1;
    &mut messages[last]
}

fn tools(fields: Fields<'_>, most: usize, warnings: &mut Vec<String>) -> Result<Vec<Value>, ApiError> {
    let Some(list) = fields.list("tools")? else { return Ok(Vec::new()) };
    check_count("tools", "tools", list.len(), most)?;
    let mut tools = Vec::new();
    for (index, found) in list.iter().enumerate() {
        let path = format!("tools[{index}]");
        let object = found.as_object().ok_or_else(|| ApiError::field(&path, shown(found), "an object"))?;
        match object.get("type").and_then(Value::as_str) {
            Some("function") => {
                let strict = found["strict"] == json!(true);
                let parts = (object.get("description"), object.get("parameters"));
                tools.push(tool(&path, &found["name"], parts.0, parts.1, strict)?);
            }
            // Codex sends namespace and web_search among others: they run on OpenAI's side.
            kind => {
                let kind = kind.unwrap_or("none");
                warnings.push(format!("{path}: tools of type {} are skipped", shown(&json!(kind))));
            }
        }
    }
    Ok(tools)
}

fn tool_choice(fields: Fields<'_>) -> Result<ToolChoice, ApiError> {
    let expected = "none, auto, required or {\"type\": \"function\", \"name\"}";
    match fields.get("tool_choice") {
        None => Ok(ToolChoice::Auto),
        Some(Value::String(word)) => match word.as_str() {
            "auto" => Ok(ToolChoice::Auto),
            "none" => Ok(ToolChoice::None),
            "required" => Ok(ToolChoice::Required),
            _ => Err(ApiError::field("tool_choice", shown(&json!(word)), expected)),
        },
        Some(choice) => match (choice["type"].as_str(), choice["name"].as_str()) {
            (Some("function"), Some(name)) => Ok(ToolChoice::Named(name.to_owned())),
            _ => Err(ApiError::field("tool_choice", shown(choice), expected)),
        },
    }
}

fn usage_json(usage: &Usage) -> Value {
    json!({
        "input_tokens": usage.prompt,
        "input_tokens_details": {"cached_tokens": usage.cached},
        "output_tokens": usage.completion,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning},
        "total_tokens": usage.prompt + usage.completion,
    })
}

/// What the response object repeats of the request.
#[derive(Clone)]
pub(crate) struct Echo(Value);

impl Echo {
    pub(crate) fn new(body: &Map<String, Value>) -> Echo {
        let or =
            |name: &str, default: Value| body.get(name).filter(|value| !value.is_null()).cloned().unwrap_or(default);
        Echo(json!({
            "instructions": or("instructions", Value::Null),
            "max_output_tokens": or("max_output_tokens", Value::Null),
            "metadata": or("metadata", json!({})),
            "parallel_tool_calls": or("parallel_tool_calls", json!(true)),
            "previous_response_id": null,
            "reasoning": or("reasoning", json!({"effort": null, "summary": null})),
            "store": false,
            "temperature": or("temperature", json!(1.0)),
            "text": or("text", json!({"format": {"type": "text"}})),
            "tool_choice": or("tool_choice", json!("auto")),
            "tools": or("tools", json!([])),
            "top_p": or("top_p", json!(1.0)),
            "truncation": "disabled",
        }))
    }
}

/// The response object: the envelope, its state and the echo of the request.
fn response_json(envelope: &Envelope, echo: &Echo, status: &str, output: &[Value], usage: Option<&Usage>) -> Value {
    let incomplete = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
    let mut response = json!({
        "id": envelope.id,
        "object": "response",
        "created_at": envelope.created,
        "status": status,
        "error": null,
        "incomplete_details": incomplete,
        "model": envelope.model,
        "output": output,
        "usage": usage.map(usage_json),
    });
    if let (Some(response), Some(echo)) = (response.as_object_mut(), echo.0.as_object()) {
        response.extend(echo.clone());
    }
    response
}

fn status(ending: Option<&Ending>) -> &'static str {
    match ending {
        Some(Ending::Length) => "incomplete",
        Some(Ending::Stop | Ending::StopString(_) | Ending::ToolCalls) | None => "completed",
    }
}

fn reasoning_item(id: &str, text: &str) -> Value {
    json!({"id": id, "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": text}]})
}

fn text_part(text: &str) -> Value {
    json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
}

fn message_item(id: &str, status: &str, content: Value) -> Value {
    json!({"id": id, "type": "message", "status": status, "role": "assistant", "content": content})
}

fn call_item(id: &str, call: &str, status: &str, name: &str, arguments: &str) -> Value {
    json!({
        "id": id,
        "type": "function_call",
        "status": status,
        "call_id": call,
        "name": name,
        "arguments": arguments,
    })
}

/// An output item that is being written.
enum Open {
    Reasoning { id: String, text: String },
    Message { id: String, text: String },
    Call { id: String, call_id: String, name: String, arguments: String },
}

/// Frames of a responses stream.
pub(crate) struct ResponsesEncoder {
    envelope: Envelope,
    echo: Echo,
    sequence_number: usize,
    open: Option<Open>,
    output: Vec<Value>,
    ending: Option<Ending>,
}

impl ResponsesEncoder {
    pub(crate) fn new(envelope: Envelope, echo: Echo) -> ResponsesEncoder {
        ResponsesEncoder { envelope, echo, sequence_number: 0, open: None, output: Vec::new(), ending: None }
    }

    fn frame(&mut self, kind: &str, mut data: Value, out: &mut String) {
        let mut frame = json!({"type": kind, "sequence_number": self.sequence_number});
        self.sequence_number += 1;
        if let (Some(frame), Some(data)) = (frame.as_object_mut(), data.as_object_mut()) {
            frame.append(data);
        }
        event_frame(out, &frame);
    }

    fn response_frame(&mut self, kind: &str, status: &str, usage: Option<&Usage>, out: &mut String) {
        let response = response_json(&self.envelope, &self.echo, status, &self.output, usage);
        self.frame(kind, json!({"response": response}), out);
    }

    fn close(&mut self, out: &mut String) {
        let index = self.output.len();
        let item = match self.open.take() {
            None => return,
            Some(Open::Reasoning { id, text }) => {
                let data = json!({"item_id": id, "output_index": index, "content_index": 0, "text": text});
                self.frame("response.reasoning_text.done", data, out);
                reasoning_item(&id, &text)
            }
            Some(Open::Message { id, text }) => {
                let place = json!({"item_id": id, "output_index": index, "content_index": 0});
                let mut done = place.clone();
                done["text"] = json!(text);
                done["logprobs"] = json!([]);
                self.frame("response.output_text.done", done, out);
                let mut part = place;
                part["part"] = text_part(&text);
                self.frame("response.content_part.done", part, out);
                message_item(&id, "completed", json!([text_part(&text)]))
            }
            Some(Open::Call { id, call_id, name, arguments }) => {
                let done = json!({"item_id": id, "output_index": index, "name": name, "arguments": arguments});
                self.frame("response.function_call_arguments.done", done, out);
                call_item(&id, &call_id, "completed", &name, &arguments)
            }
        };
        self.frame("response.output_item.done", json!({"output_index": index, "item": item}), out);
        self.output.push(item);
    }

    fn thinking(&mut self, text: &str, out: &mut String) {
        if !matches!(self.open, Some(Open::Reasoning { .. })) {
            self.close(out);
            let index = self.output.len();
            let id = call_id("rs_");
            let item = json!({"id": id, "type": "reasoning", "summary": [], "content": []});
            self.frame("response.output_item.added", json!({"output_index": index, "item": item}), out);
            self.open = Some(Open::Reasoning { id, text: String::new() });
        }
        let index = self.output.len();
        if let Some(Open::Reasoning { id, text: all }) = &mut self.open {
            all.push_str(text);
            let data = json!({"item_id": id, "output_index": index, "content_index": 0, "delta": text});
            self.frame("response.reasoning_text.delta", data, out);
        }
    }

    fn text(&mut self, text: &str, out: &mut String) {
        if !matches!(self.open, Some(Open::Message { .. })) {
            self.close(out);
            let index = self.output.len();
            let id = call_id("msg_");
            let item = message_item(&id, "in_progress", json!([]));
            self.frame("response.output_item.added", json!({"output_index": index, "item": item}), out);
            let part = json!({"item_id": id, "output_index": index, "content_index": 0, "part": text_part("")});
            self.frame("response.content_part.added", part, out);
            self.open = Some(Open::Message { id, text: String::new() });
        }
        let index = self.output.len();
        if let Some(Open::Message { id, text: all }) = &mut self.open {
            all.push_str(text);
            let place =
                json!({"item_id": id, "output_index": index, "content_index": 0, "delta": text, "logprobs": []});
            self.frame("response.output_text.delta", place, out);
        }
    }

    fn call_start(&mut self, name: &str, out: &mut String) {
        self.close(out);
        let index = self.output.len();
        let (id, call) = (call_id("fc_"), call_id("call_"));
        let added = call_item(&id, &call, "in_progress", name, "");
        self.frame("response.output_item.added", json!({"output_index": index, "item": added}), out);
        self.open = Some(Open::Call { id, call_id: call, name: name.to_owned(), arguments: String::new() });
    }

    fn call_arguments(&mut self, text: &str, out: &mut String) {
        let index = self.output.len();
        if let Some(Open::Call { id, arguments, .. }) = &mut self.open {
            arguments.push_str(text);
            let delta = json!({"item_id": id, "output_index": index, "delta": text});
            self.frame("response.function_call_arguments.delta", delta, out);
        }
    }
}

impl StreamEncoder for ResponsesEncoder {
    fn started(&mut self, _usage: &Usage, out: &mut String) {
        self.response_frame("response.created", "in_progress", None, out);
        self.response_frame("response.in_progress", "in_progress", None, out);
    }

    fn delta(&mut self, _choice: usize, delta: &Delta, out: &mut String) {
        match delta {
            Delta::Thinking(text) => self.thinking(text, out),
            Delta::Text { text, .. } if text.is_empty() => {}
            Delta::Text { text, .. } => self.text(text, out),
            Delta::CallStart { name, .. } => self.call_start(name, out),
            Delta::CallArguments { text, .. } => self.call_arguments(text, out),
            Delta::Call(_) => self.close(out),
        }
    }

    fn ended(&mut self, _choice: usize, ending: &Ending, _: Option<&Finished>, _: &Usage, out: &mut String) {
        // A call that was cut off is not done, and nobody is told that it is.
        if !matches!(self.open, Some(Open::Call { .. })) {
            self.close(out);
        }
        self.ending = Some(ending.clone());
    }

    fn done(&mut self, usage: &Usage, _timings: &Timings, out: &mut String) {
        let status = status(self.ending.as_ref());
        self.response_frame(&format!("response.{status}"), status, Some(usage), out);
    }

    fn failed(&mut self, error: &ApiError, out: &mut String) {
        let mut response = response_json(&self.envelope, &self.echo, "failed", &self.output, None);
        // The SDK knows a closed set of codes here; the message says what it was.
        response["error"] = json!({"code": "server_error", "message": error.message});
        self.frame("response.failed", json!({"response": response}), out);
    }
}

/// The whole answer at once.
pub(crate) async fn respond_at_once(
    mut job: Job,
    envelope: &Envelope,
    echo: &Echo,
) -> Result<Response<Body>, ApiError> {
    let answers = collect(&mut job, 1).await?;
    let mut output = Vec::new();
    let mut ending = None;
    for answer in &answers {
        if !answer.thinking.is_empty() {
            output.push(reasoning_item(&call_id("rs_"), &answer.thinking));
        }
        if !answer.text.is_empty() {
            output.push(message_item(&call_id("msg_"), "completed", json!([text_part(&answer.text)])));
        }
        for call in &answer.calls {
            let arguments = call.arguments_json();
            output.push(call_item(&call_id("fc_"), &call_id("call_"), "completed", &call.name, &arguments));
        }
        ending = answer.ending.as_ref();
    }
    let body = response_json(envelope, echo, status(ending), &output, Some(&job.usage));
    Ok(json_response(StatusCode::OK, &body))
}
