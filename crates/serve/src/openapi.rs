//! `/openapi.json`: the routes and the fields that matter, for tools that read such documents.

use serde_json::{Map, Value, json};

/// The document.
pub(crate) fn document() -> Value {
    let mut paths = Map::new();
    let gets = [
        ("/health", "Whether tokens come"),
        ("/ready", "Whether new requests are welcome"),
        ("/metrics", "Counters in Prometheus' text form"),
        ("/v1/models", "The served model"),
        ("/server_info", "For routers"),
        ("/get_server_info", "For routers"),
        ("/model_info", "For routers"),
        ("/get_model_info", "For routers"),
        ("/version", "The version"),
        ("/v1/loads", "How busy it is"),
        ("/loads", "How busy it is, under the name that some routers ask for"),
        ("/openapi.json", "This document"),
        ("/moellon/status", "What the page shows"),
    ];
    for (path, summary) in gets {
        paths.insert(path.to_owned(), json!({"get": {"summary": summary, "responses": responses(false)}}));
    }
    let id = json!([{"name": "id", "in": "path", "required": true, "schema": {"type": "string"}}]);
    let model = json!({"summary": "The served model", "parameters": id, "responses": responses(false)});
    paths.insert("/v1/models/{id}".to_owned(), json!({"get": model}));
    let cancel = json!({"summary": "End a request in work", "parameters": id, "responses": responses(false)});
    paths.insert("/moellon/requests/{id}".to_owned(), json!({"delete": cancel}));
    let posts = [
        ("/v1/chat/completions", "OpenAI chat", chat_schema(), true),
        ("/v1/completions", "OpenAI legacy completions", completion_schema(), true),
        ("/v1/responses", "OpenAI responses", responses_schema(), true),
        ("/v1/messages", "Anthropic messages", messages_schema(true), true),
        ("/v1/messages/count_tokens", "Prompt tokens of Anthropic messages", messages_schema(false), false),
        ("/tokenize", "Text to token ids", tokenize_schema(), false),
        ("/detokenize", "Token ids to text", detokenize_schema(), false),
    ];
    for (path, summary, schema, streams) in posts {
        let body = json!({"required": true, "content": {"application/json": {"schema": schema}}});
        let post = json!({"summary": summary, "requestBody": body, "responses": responses(streams)});
        paths.insert(path.to_owned(), json!({"post": post}));
    }
    json!({
        "openapi": "3.1.0",
        "info": {"title": "Moellon", "version": env!("CARGO_PKG_VERSION")},
        "paths": paths,
        "components": {"securitySchemes": {
            "bearer": {"type": "http", "scheme": "bearer"},
            "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }},
        "security": [{}, {"bearer": []}, {"key": []}],
    })
}

fn responses(streams: bool) -> Value {
    let mut content = json!({"application/json": {}});
    if streams {
        content["text/event-stream"] = json!({});
    }
    json!({
        "200": {"description": "The answer", "content": content},
        "default": {"description": "An error", "content": {"application/json": {}}},
    })
}

/// Sampling fields of all protocols. A null is the same as a missing field.
fn settings() -> Value {
    json!({
        "model": {"type": ["string", "null"]},
        "temperature": {"type": ["number", "null"], "minimum": 0},
        "top_p": {"type": ["number", "null"], "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": ["integer", "null"], "minimum": -1},
        "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
        "repetition_penalty": {"type": ["number", "null"], "exclusiveMinimum": 0},
        "frequency_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
        "presence_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
        "seed": {"type": ["integer", "null"]},
        "stream": {"type": ["boolean", "null"]},
        "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
        "ignore_eos": {"type": ["boolean", "null"]},
        "min_tokens": {"type": ["integer", "null"], "minimum": 0},
        "cache_salt": {"type": ["string", "null"]},
    })
}

fn object(required: &[&str], more: Value) -> Value {
    let mut properties = settings();
    if let (Some(properties), Some(more)) = (properties.as_object_mut(), more.as_object()) {
        properties.extend(more.clone());
    }
    json!({"type": "object", "required": required, "properties": properties})
}

fn list_of_objects() -> Value {
    json!({"type": "array", "minItems": 1, "items": {"type": "object"}})
}

fn chat_schema() -> Value {
    let more = json!({
        "messages": list_of_objects(),
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {},
        "parallel_tool_calls": {"type": ["boolean", "null"]},
        "max_tokens": {"type": ["integer", "null"], "minimum": 1},
        "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 8},
        "stop": {},
        "logit_bias": {"type": ["object", "null"]},
        "logprobs": {"type": ["boolean", "null"]},
        "top_logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        "response_format": {"type": ["object", "null"]},
        "structured_outputs": {"type": ["object", "null"]},
        "stream_options": {"type": ["object", "null"]},
        "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", null]},
        "thinking_token_budget": {"type": ["integer", "null"], "minimum": -1},
        "chat_template_kwargs": {"type": ["object", "null"]},
    });
    object(&["messages"], more)
}

fn completion_schema() -> Value {
    let more = json!({
        "prompt": {"type": ["string", "array"]},
        "max_tokens": {"type": ["integer", "null"], "minimum": 0},
        "n": {"type": ["integer", "null"], "minimum": 1, "maximum": 8},
        "echo": {"type": ["boolean", "null"]},
        "logprobs": {"type": ["integer", "null"], "minimum": 0, "maximum": 20},
        "stop": {},
        "logit_bias": {"type": ["object", "null"]},
        "stream_options": {"type": ["object", "null"]},
    });
    object(&["prompt"], more)
}

fn responses_schema() -> Value {
    let more = json!({
        "input": {"type": ["string", "array"]},
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {},
        "parallel_tool_calls": {"type": ["boolean", "null"]},
        "reasoning": {"type": ["object", "null"]},
        "text": {"type": ["object", "null"]},
    });
    object(&["input"], more)
}

fn messages_schema(needs_max_tokens: bool) -> Value {
    let more = json!({
        "messages": list_of_objects(),
        "system": {"type": ["string", "array", "null"]},
        "max_tokens": {"type": ["integer", "null"], "minimum": 1},
        "stop_sequences": {"type": ["array", "null"], "items": {"type": "string", "minLength": 1}},
        "tools": {"type": ["array", "null"], "items": {"type": "object"}},
        "tool_choice": {"type": ["object", "null"]},
        "thinking": {"type": ["object", "null"]},
        "output_config": {"type": ["object", "null"]},
    });
    let required: &[&str] = if needs_max_tokens { &["messages", "max_tokens"] } else { &["messages"] };
    object(required, more)
}

fn tokenize_schema() -> Value {
    let properties = json!({
        "prompt": {"type": "string"},
        "content": {"type": "string"},
        "messages": list_of_objects(),
        "add_special_tokens": {"type": ["boolean", "null"]},
    });
    json!({"type": "object", "properties": properties})
}

fn detokenize_schema() -> Value {
    let tokens = json!({"type": "array", "items": {"type": "integer", "minimum": 0}});
    json!({"type": "object", "required": ["tokens"], "properties": {"tokens": tokens}})
}
