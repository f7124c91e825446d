//! The tools of a request, as far as parsing needs them: which argument is text.

use serde_json::Value;

use super::literal;
use crate::error::Error;

/// Name and parameters of an offered tool.
#[derive(Debug, Clone, PartialEq)]
pub struct ToolSchema {
    name: String,
    /// JSON schema of the arguments object.
    parameters: Value,
}

impl ToolSchema {
    /// A tool with the JSON schema of its arguments.
    pub fn new(name: &str, parameters: Value) -> ToolSchema {
        ToolSchema { name: name.to_owned(), parameters }
    }

    /// Reads the `tools` of an OpenAI request: `{"type": "function", "function": {"name", "parameters"}}`, or the inner
    /// object alone. Tools of other types are skipped: they are no functions.
    ///
    /// # Errors
    /// [`Error::Setting`] when it is not a list, or a function has no name.
    pub fn from_openai(tools: &Value) -> Result<Vec<ToolSchema>, Error> {
        let fail = |reason: String| Error::Setting { setting: "tools", reason };
        let list = tools.as_array().ok_or_else(|| fail("found no list, expected a list of tools".to_owned()))?;
        let mut schemas = Vec::new();
        for (index, tool) in list.iter().enumerate() {
            if tool["type"].as_str().is_some_and(|kind| kind != "function") {
                continue;
            }
            let function = tool.get("function").unwrap_or(tool);
            let name = function["name"].as_str().filter(|name| !name.is_empty());
            let name = name.ok_or_else(|| fail(format!("tool {index} has no name, expected a non-empty string")))?;
            // The Responses and Anthropic protocols say `input_schema`.
            let parameters = function.get("parameters").or_else(|| function.get("input_schema"));
            schemas.push(ToolSchema::new(name, parameters.cloned().unwrap_or(Value::Null)));
        }
        Ok(schemas)
    }

    /// The tool's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The JSON schema of the arguments; null when there is none.
    pub fn parameters(&self) -> &Value {
        &self.parameters
    }

    /// Whether the argument can only be text: then it is never read as JSON, so that `"007"` stays a string.
    fn is_text(&self, argument: &str) -> bool {
        fn only_text(schema: &Value) -> bool {
            match &schema["type"] {
                Value::String(kind) => kind == "string",
                Value::Array(kinds) => {
                    kinds.iter().any(|kind| kind == "string")
                        && kinds.iter().all(|kind| kind == "string" || kind == "null")
                }
                _ => match schema.get("enum").or_else(|| schema.get("anyOf")).or_else(|| schema.get("oneOf")) {
                    Some(Value::Array(options)) if !options.is_empty() => {
                        options.iter().all(|option| option.is_string() || only_text(option))
                    }
                    _ => false,
                },
            }
        }
        only_text(&self.parameters["properties"][argument])
    }

    fn allows_null(&self, argument: &str) -> bool {
        let schema = &self.parameters["properties"][argument];
        schema["nullable"] == Value::Bool(true)
            || schema["type"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind == "null"))
    }
}

/// Whether [`read_argument`] gives the text itself, whatever it is.
pub(super) fn streams_as_text(tools: &[ToolSchema], tool: &str, argument: &str) -> bool {
    let schema = tools.iter().find(|schema| schema.name == tool);
    schema.is_some_and(|schema| schema.is_text(argument) && !schema.allows_null(argument))
}

/// An argument that was written as bare text: text if the schema says so, else JSON, else a Python literal, else text.
pub(super) fn read_argument(tools: &[ToolSchema], tool: &str, argument: &str, text: &str) -> Value {
    let schema = tools.iter().find(|schema| schema.name == tool);
    if schema.is_some_and(|schema| schema.is_text(argument)) {
        let is_null = text == "null" && schema.is_some_and(|schema| schema.allows_null(argument));
        return if is_null { Value::Null } else { Value::String(text.to_owned()) };
    }
    let trimmed = text.trim();
    serde_json::from_str(trimmed)
        .ok()
        .or_else(|| literal::parse(trimmed))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}
