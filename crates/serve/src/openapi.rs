//! `/openapi.json`: the routes and the fields that matter, for tools that read such documents. What it calls legal is meant to
//! be answered: names of models, ids of tokens and limits are those of this server.

use crate::model::ServedModel;
use crate::options::RequestLimits;
use serde_json::{Map, Value, json};

/// The document of a server of this model.
pub(crate) fn document(model: &ServedModel, limits: &RequestLimits) -> Value {
    let served = Served { model, limits };
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
    let unload =
        json!({"summary": "Give the model's memory back until the next request", "responses": responses(false)});
    paths.insert("/models/unload".to_owned(), json!({"post": unload}));
    let cancel = json!({"summary": "End a request in work", "parameters": id, "responses": responses(false)});
    paths.insert("/moellon/requests/{id}".to_owned(), json!({"delete": cancel}));
    let posts = [
        ("/v1/chat/completions", "OpenAI chat", served.chat_schema(), true),
        ("/v1/completions", "OpenAI legacy completions", served.completion_schema(), true),
        ("/v1/responses", "OpenAI responses", served.responses_schema(), true),
        ("/v1/messages", "Anthropic messages", served.messages_schema(true), true),
        ("/v1/messages/count_tokens", "Prompt tokens of Anthropic messages", served.messages_schema(false), false),
        ("/tokenize", "Text to token ids", tokenize_schema(), false),
        ("/detokenize", "Token ids to text", served.detokenize_schema(), false),
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

/// What is served, and with which limits.
struct Served<'a> {
    model: &'a ServedModel,
    limits: &'a RequestLimits,
}

impl Served<'_> {
    /// The names that a request may call the model by.
    fn names(&self) -> Value {
        let (families, exact): (Vec<&String>, Vec<&String>) =
            self.model.aliases.iter().partition(|alias| alias.ends_with('*'));
        let mut names: Vec<Value> = [&self.model.name].into_iter().chain(exact).map(|name| json!(name)).collect();
        names.push(Value::Null);
        let mut any = vec![json!({"enum": names})];
        // A family is told by how its names begin.
        any.extend(families.iter().map(|alias| {
            let literal: String = alias.trim_end_matches('*').chars().flat_map(escaped).collect();
            json!({"type": "string", "pattern": format!("^{literal}")})
        }));
        json!({"anyOf": any})
    }

    fn token_id(&self) -> Value {
        json!({"type": "integer", "minimum": 0, "maximum": self.model.vocab_size - 1})
    }

    /// `n` and `best_of`.
    fn choices(&self) -> Value {
        json!({"type": ["integer", "null"], "minimum": 1, "maximum": self.limits.max_choices})
    }

    fn top_logprobs(&self) -> Value {
        json!({"type": ["integer", "null"], "minimum": 0, "maximum": self.limits.max_top_logprobs})
    }

    /// Sampling fields of all protocols. A null is the same as a missing field.
    fn settings(&self) -> Value {
        json!({
            "model": self.names(),
            "temperature": {"type": ["number", "null"], "minimum": 0, "maximum": MAX_F32},
            "top_p": {"type": ["number", "null"], "minimum": MIN_POSITIVE, "maximum": 1},
            "top_k": {"type": ["integer", "null"], "minimum": -1, "maximum": MAX_WHOLE},
            "min_p": {"type": ["number", "null"], "minimum": 0, "maximum": 1},
            "repetition_penalty": {"type": ["number", "null"], "minimum": MIN_POSITIVE, "maximum": MAX_F32},
            "frequency_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
            "presence_penalty": {"type": ["number", "null"], "minimum": -2, "maximum": 2},
            "seed": {"type": ["integer", "null"], "minimum": i64::MIN, "maximum": u64::MAX},
            "stream": {"type": ["boolean", "null"]},
            "stop_token_ids": {
                "type": ["array", "null"],
                "items": self.token_id(),
                "maxItems": self.limits.max_stop_strings,
            },
            "ignore_eos": {"type": ["boolean", "null"]},
            "min_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_WHOLE},
            "cache_salt": {"type": ["string", "null"]},
        })
    }

    fn object(&self, required: &[&str], more: Value) -> Value {
        let mut properties = self.settings();
        if let (Some(properties), Some(more)) = (properties.as_object_mut(), more.as_object()) {
            properties.extend(more.clone());
        }
        json!({"type": "object", "required": required, "properties": properties})
    }

    fn chat_schema(&self) -> Value {
        let function = json!({
            "type": "object",
            "required": ["name"],
            "properties": {
                "name": tool_name(),
                "description": {"type": "string"},
                "parameters": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
        });
        let tool = json!({
            "type": "object",
            "required": ["type", "function"],
            "properties": {"type": {"const": "function"}, "function": function},
        });
        let named = json!({
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": tool_name()}},
            },
        });
        let schema = json!({
            "type": "object",
            "required": ["name", "schema"],
            "properties": {"name": {"type": "string"}, "schema": {"type": ["object", "boolean"]}},
        });
        let of_type =
            |name: &str| json!({"type": "object", "required": ["type"], "properties": {"type": {"const": name}}});
        let mut with_schema = of_type("json_schema");
        with_schema["required"] = json!(["type", "json_schema"]);
        with_schema["properties"]["json_schema"] = schema;
        let response_format =
            json!({"anyOf": [of_type("text"), of_type("json_object"), with_schema, {"type": "null"}]});
        let more = json!({
            "messages": conversation(&["system", "developer", "user", "assistant"]),
            "tools": {"type": ["array", "null"], "items": tool},
            "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required", null]}, named]},
            "parallel_tool_calls": {"type": ["boolean", "null"]},
            "max_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_WHOLE},
            "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_WHOLE},
            "n": self.choices(),
            "best_of": self.choices(),
            "stop": stop(),
            "logit_bias": logit_bias(),
            "logprobs": {"type": ["boolean", "null"]},
            "top_logprobs": self.top_logprobs(),
            "response_format": response_format,
            "structured_outputs": {"type": ["object", "null"]},
            "stream_options": stream_options(),
            "reasoning_effort": {"enum": ["none", "minimal", "low", "medium", "high", "xhigh", "max", null]},
            "thinking_token_budget": {"type": ["integer", "null"], "minimum": -1},
            "chat_template_kwargs": {"type": ["object", "null"]},
        });
        self.object(&["messages"], more)
    }

    fn completion_schema(&self) -> Value {
        let more = json!({
            "prompt": {"anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": self.token_id(), "minItems": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1, "maxItems": self.limits.max_prompts},
            ]},
            "max_tokens": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_WHOLE},
            "n": self.choices(),
            "best_of": self.choices(),
            "echo": {"type": ["boolean", "null"]},
            "logprobs": self.top_logprobs(),
            "stop": stop(),
            "logit_bias": logit_bias(),
            "stream_options": stream_options(),
        });
        self.object(&["prompt"], more)
    }

    fn responses_schema(&self) -> Value {
        let tool = json!({
            "type": "object",
            "required": ["type", "name"],
            "properties": {
                "type": {"const": "function"},
                "name": tool_name(),
                "description": {"type": "string"},
                "parameters": {"type": "object"},
                "strict": {"type": ["boolean", "null"]},
            },
        });
        let more = json!({
            "input": {"anyOf": [{"type": "string"}, conversation(&["system", "developer", "user"])]},
            "instructions": {"type": ["string", "null"]},
            "max_output_tokens": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_WHOLE},
            "tools": {"type": ["array", "null"], "items": tool},
            "tool_choice": {"enum": ["none", "auto", null]},
            "parallel_tool_calls": {"type": ["boolean", "null"]},
            "reasoning": {"type": ["object", "null"]},
            "text": {"type": ["object", "null"]},
        });
        self.object(&["input"], more)
    }

    fn messages_schema(&self, needs_max_tokens: bool) -> Value {
        let tool = json!({
            "type": "object",
            "required": ["name", "input_schema"],
            "properties": {"name": tool_name(), "description": {"type": "string"}, "input_schema": {"type": "object"}},
        });
        let more = json!({
            "messages": conversation(&["user", "assistant"]),
            "system": text_or_parts(),
            "max_tokens": {"type": "integer", "minimum": 1, "maximum": MAX_WHOLE},
            "stop_sequences": {"type": ["array", "null"], "items": stop_string(), "maxItems": 64},
            "tools": {"type": ["array", "null"], "items": tool},
            "tool_choice": {
                "type": ["object", "null"],
                "required": ["type"],
                "properties": {"type": {"enum": ["auto", "any", "none"]}},
            },
            "thinking": {"type": ["object", "null"]},
            "output_config": {"type": ["object", "null"]},
        });
        let required: &[&str] = if needs_max_tokens { &["messages", "max_tokens"] } else { &["messages"] };
        self.object(required, more)
    }

    fn detokenize_schema(&self) -> Value {
        let tokens = json!({"type": "array", "items": self.token_id()});
        json!({"type": "object", "required": ["tokens"], "properties": {"tokens": tokens}})
    }
}

/// A character of a name within a regular expression.
fn escaped(character: char) -> impl Iterator<Item = char> {
    let is_plain = character.is_ascii_alphanumeric() || matches!(character, '-' | '_' | '/');
    (!is_plain).then_some('\\').into_iter().chain([character])
}

/// Largest number of a sampling setting.
const MAX_F32: f64 = f32::MAX as f64;

/// Smallest of one that must not be 0, with room for rounding.
const MIN_POSITIVE: f64 = 1e-6;

/// Whole numbers up to this are exact in every JSON reader.
const MAX_WHOLE: u64 = 1 << 53;

fn text_or_parts() -> Value {
    let part = json!({
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    });
    json!({"anyOf": [{"type": "string"}, {"type": "array", "items": part, "minItems": 1}]})
}

/// Messages of text. Those with tool calls and their results are not described: what they need depends on one another.
fn conversation(roles: &[&str]) -> Value {
    let message = json!({
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"enum": roles}, "content": text_or_parts()},
    });
    json!({"type": "array", "minItems": 1, "items": message})
}

fn tool_name() -> Value {
    json!({"type": "string", "pattern": "^[A-Za-z0-9_.:/-]{1,256}$"})
}

fn stop_string() -> Value {
    json!({"type": "string", "minLength": 1, "maxLength": 1024})
}

fn stop() -> Value {
    json!({"anyOf": [stop_string(), {"type": "array", "items": stop_string(), "maxItems": 64}, {"type": "null"}]})
}

fn logit_bias() -> Value {
    json!({
        "type": ["object", "null"],
        "propertyNames": {"pattern": "^[0-9]{1,3}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    })
}

fn stream_options() -> Value {
    json!({"type": ["object", "null"], "properties": {"include_usage": {"type": ["boolean", "null"]}}})
}

fn tokenize_schema() -> Value {
    let properties = json!({
        "prompt": {"type": "string"},
        "content": {"type": "string"},
        "messages": conversation(&["system", "user", "assistant"]),
        "add_special_tokens": {"type": ["boolean", "null"]},
    });
    json!({"type": "object", "properties": properties})
}
