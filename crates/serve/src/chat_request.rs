//! A conversation to answer, in one form for all protocols: messages and tools as OpenAI's chat protocol writes them.

use crate::error::ApiError;
use crate::fields::{Fields, shown};
use crate::generator::Grammar;
use crate::options::RequestLimits;
use crate::settings::Settings;
use serde_json::{Map, Value, json};

/// The line that Claude Code puts before its system prompt; its value changes between versions and, in some, between
/// turns, which would make every turn a cache miss.
const ATTRIBUTION_PREFIX: &str = "x-anthropic-billing-header:";
/// What stands in its place.
const ATTRIBUTION: &str = "x-anthropic-billing-header: none";

/// A conversation to answer.
#[derive(Debug, Clone)]
pub(crate) struct ChatRequest {
    /// Objects with `role` (system, user, assistant, tool), `content` (a string), `reasoning_content`, `tool_calls` (with
    /// arguments as objects) and `tool_call_id`.
    pub(crate) messages: Vec<Value>,
    /// Objects with `type: function` and `function: {name, description, parameters, strict}`.
    pub(crate) tools: Vec<Value>,
    pub(crate) tool_choice: ToolChoice,
    pub(crate) parallel_tool_calls: bool,
    /// `None`: free text.
    pub(crate) grammar: Option<Grammar>,
    pub(crate) thinking: ThinkingRequest,
    /// Variables for the template.
    pub(crate) template_kwargs: Map<String, Value>,
    pub(crate) settings: Settings,
    /// Things left out that do not change what was asked for; they go into a `warning` header.
    pub(crate) warnings: Vec<String>,
}

/// Whether and what tools must be called.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// As the model likes.
    Auto,
    /// None; they are not shown to the model.
    None,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

/// What a request says about thinking.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct ThinkingRequest {
    pub(crate) enabled: Option<bool>,
    pub(crate) effort: Option<String>,
    pub(crate) budget: Option<usize>,
}

impl ThinkingRequest {
    /// Takes an effort; `none` turns thinking off.
    pub(crate) fn set_effort(&mut self, param: &str, effort: &str) -> Result<(), ApiError> {
        const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];
        if !EFFORTS.contains(&effort) {
            let expected = "none, minimal, low, medium, high, xhigh or max";
            return Err(ApiError::field(param, shown(&json!(effort)), expected));
        }
        match effort {
            "none" => self.enabled = Some(false),
            _ => self.effort = Some(effort.to_owned()),
        }
        Ok(())
    }
}

/// The text of a message's content: a string, or a list of text parts, which are joined by newlines.
pub(crate) fn content_text(content: &Value, path: &str) -> Result<String, ApiError> {
    const TEXT_TYPES: [&str; 5] = ["text", "input_text", "output_text", "refusal", "summary_text"];
    let parts = match content {
        Value::Null => return Ok(String::new()),
        Value::String(text) => return Ok(text.clone()),
        Value::Array(parts) => parts,
        Value::Bool(_) | Value::Number(_) | Value::Object(_) => {
            return Err(ApiError::field(path, shown(content), "a string or a list of parts"));
        }
    };
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let path = format!("{path}[{index}]");
        if let Value::String(text) = part {
            texts.push(text.as_str());
            continue;
        }
        let Some(part) = part.as_object() else { return Err(ApiError::field(path, shown(part), "an object")) };
        let kind = part.get("type").and_then(Value::as_str).unwrap_or("text");
        if !TEXT_TYPES.contains(&kind) {
            return Err(ApiError::unsupported(format!("{path}.type"), &format!("content of type {kind:?}")));
        }
        let text = part.get("text").or_else(|| part.get("refusal")).and_then(Value::as_str);
        texts.push(text.ok_or_else(|| ApiError::field(format!("{path}.text"), "no string", "a string"))?);
    }
    Ok(texts.join("\n"))
}

/// A system text whose first line does not change from turn to turn.
pub(crate) fn stable_system_text(text: String) -> String {
    if !text.starts_with(ATTRIBUTION_PREFIX) {
        return text;
    }
    match text.split_once('\n') {
        Some((_, rest)) => format!("{ATTRIBUTION}\n{rest}"),
        None => ATTRIBUTION.to_owned(),
    }
}

/// A function to call, as messages of the history carry it. Arguments are an object for the template; a text that is
/// none (agents repeat what a model got wrong) stays visible under one key.
pub(crate) fn tool_call_message(id: &str, name: &str, arguments: &Value) -> Value {
    let arguments = match arguments {
        Value::Object(_) => arguments.clone(),
        Value::Null => json!({}),
        Value::String(text) if text.trim().is_empty() => json!({}),
        Value::String(text) => match serde_json::from_str::<Value>(text) {
            Ok(object @ Value::Object(_)) => object,
            _ => json!({"arguments": text}),
        },
        other => json!({"arguments": other}),
    };
    json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// A tool in OpenAI's form, checked.
pub(crate) fn tool(
    path: &str,
    name: &Value,
    description: Option<&Value>,
    parameters: Option<&Value>,
    strict: bool,
) -> Result<Value, ApiError> {
    let path_of_name = format!("{path}.name");
    let expected = "1 to 256 letters, digits or any of _ - . : /";
    let is_allowed = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
    let name = name.as_str().filter(|name| (1..=256).contains(&name.len()) && name.chars().all(is_allowed));
    let Some(name) = name else {
        return Err(ApiError::field(path_of_name, "another value", expected));
    };
    let mut function = json!({"name": name});
    match description {
        None | Some(Value::Null) => {}
        Some(text @ Value::String(_)) => function["description"] = text.clone(),
        Some(other) => return Err(ApiError::field(format!("{path}.description"), shown(other), "a string")),
    }
    match parameters {
        None | Some(Value::Null) => function["parameters"] = json!({"type": "object", "properties": {}}),
        Some(schema @ Value::Object(_)) => function["parameters"] = schema.clone(),
        Some(other) => return Err(ApiError::field(format!("{path}.parameters"), shown(other), "a JSON schema object")),
    }
    if strict {
        function["strict"] = json!(true);
    }
    Ok(json!({"type": "function", "function": function}))
}

/// The name of a tool made by [`tool`].
pub(crate) fn tool_name(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

/// Checks that a named tool is on offer and that there are tools where one must be called.
pub(crate) fn check_tool_choice(choice: &ToolChoice, tools: &[Value]) -> Result<(), ApiError> {
    match choice {
        ToolChoice::Auto | ToolChoice::None => Ok(()),
        ToolChoice::Required if tools.is_empty() => {
            Err(ApiError::field("tool_choice", "\"required\" without tools", "tools to choose from"))
        }
        ToolChoice::Required => Ok(()),
        ToolChoice::Named(name) if tools.iter().any(|tool| tool_name(tool) == name) => Ok(()),
        ToolChoice::Named(name) => {
            Err(ApiError::field("tool_choice", shown(&json!(name)), "the name of a tool in tools"))
        }
    }
}

/// Checks the number of something.
pub(crate) fn check_count(param: &str, what: &str, found: usize, most: usize) -> Result<(), ApiError> {
    if found <= most {
        return Ok(());
    }
    Err(ApiError::field(param, format!("{found} {what}"), &format!("at most {most}")))
}

/// A schema of a request, checked for size; its content is the compiler's matter.
pub(crate) fn schema_grammar(path: &str, schema: &Value, limits: &RequestLimits) -> Result<Grammar, ApiError> {
    let is_schema = schema.is_object() || schema.is_boolean();
    if !is_schema {
        return Err(ApiError::field(path, shown(schema), "a JSON schema object").with_code("invalid_schema"));
    }
    check_grammar_size(path, schema.to_string().len(), limits)?;
    Ok(Grammar::JsonSchema(schema.clone()))
}

/// Checks the size of a grammar.
pub(crate) fn check_grammar_size(path: &str, size_bytes: usize, limits: &RequestLimits) -> Result<(), ApiError> {
    if size_bytes <= limits.max_grammar_bytes {
        return Ok(());
    }
    let expected = format!("at most {} bytes", limits.max_grammar_bytes);
    Err(ApiError::field(path, format!("{size_bytes} bytes"), &expected).with_code("invalid_schema"))
}

/// `response_format` of chat, `text.format` of responses.
pub(crate) fn output_format(format: Fields<'_>, limits: &RequestLimits) -> Result<Option<Grammar>, ApiError> {
    let schema_path = format.path("json_schema.schema");
    match format.text("type")? {
        None | Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::JsonObject)),
        Some("json_schema") => match (format.get("json_schema"), format.get("schema")) {
            (Some(wrapped), _) => match wrapped.get("schema") {
                Some(schema) => schema_grammar(&schema_path, schema, limits).map(Some),
                None => Err(ApiError::field(schema_path, "nothing", "a JSON schema object")),
            },
            (None, Some(schema)) => schema_grammar(&format.path("schema"), schema, limits).map(Some),
            (None, None) => Err(ApiError::field(schema_path, "nothing", "a JSON schema object")),
        },
        Some(other) => {
            Err(ApiError::field(format.path("type"), shown(&json!(other)), "text, json_object or json_schema"))
        }
    }
}

/// `structured_outputs` of vLLM, and its older names at the top level.
pub(crate) fn structured_outputs(fields: Fields<'_>, limits: &RequestLimits) -> Result<Option<Grammar>, ApiError> {
    let mut found = None;
    let prefix = fields.path("structured_outputs.");
    let inner = fields.object("structured_outputs")?;
    let places = [(inner.map(|inner| Fields::inside(inner, &prefix)), ""), (Some(fields), "guided_")];
    for (place, guided) in places {
        let Some(place) = place else { continue };
        let name = |suffix: &str| format!("{guided}{suffix}");
        if let Some(schema) = place.get(&name("json")) {
            found = Some(schema_grammar(&place.path(&name("json")), schema, limits)?);
        }
        for (suffix, make) in [("regex", Grammar::Regex as fn(String) -> Grammar), ("grammar", Grammar::Lark)] {
            if let Some(text) = place.text(&name(suffix))? {
                check_grammar_size(&place.path(&name(suffix)), text.len(), limits)?;
                found = Some(make(text.to_owned()));
            }
        }
        if let Some(choices) = place.list(&name("choice"))? {
            let texts: Option<Vec<String>> = choices.iter().map(|choice| choice.as_str().map(str::to_owned)).collect();
            let texts = texts.filter(|texts| !texts.is_empty());
            let path = place.path(&name("choice"));
            let texts = texts.ok_or_else(|| ApiError::field(path.clone(), "another value", "a list of strings"))?;
            check_grammar_size(&path, texts.iter().map(String::len).sum(), limits)?;
            found = Some(Grammar::Choice(texts));
        }
        if place.flag(&name("json_object"))? == Some(true) {
            found = Some(Grammar::JsonObject);
        }
    }
    Ok(found)
}

/// Variables for the template; names that servers and templates need themselves are refused.
pub(crate) fn template_kwargs(fields: Fields<'_>) -> Result<Map<String, Value>, ApiError> {
    const REFUSED: [&str; 9] = [
        "tokenize",
        "messages",
        "tools",
        "conversation",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
    ];
    let kwargs = fields.object("chat_template_kwargs")?.cloned().unwrap_or_default();
    match kwargs.keys().find(|name| REFUSED.contains(&name.as_str())) {
        Some(name) => Err(ApiError::field(
            format!("chat_template_kwargs.{name}"),
            "a reserved name",
            "variables of the template such as enable_thinking",
        )),
        None => Ok(kwargs),
    }
}
