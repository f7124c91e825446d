//! Qwen3 and Hermes: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`.

use serde_json::Value;

use super::block::BlockFormat;
use super::schema::ToolSchema;
use super::{ParsedCall, arguments_object, ends_in_json_string};

pub(super) const FORMAT: BlockFormat =
    BlockFormat { open: "<tool_call>", close: "</tool_call>", is_inside_value: ends_in_json_string, parse };

pub(super) fn parse(body: &str, _tools: &[ToolSchema]) -> Result<Vec<ParsedCall>, String> {
    let value: Value =
        serde_json::from_str(body.trim()).map_err(|error| format!("found a body that is not JSON: {error}"))?;
    let Value::Object(mut call) = value else {
        return Err(format!("found {value:.80}, expected a JSON object with name and arguments"));
    };
    // Some models keep the OpenAI wrapping that they saw in the tool's description.
    if let Some(Value::Object(inner)) = call.remove("function") {
        call = inner;
    }
    let name = match call.remove("name") {
        Some(Value::String(name)) if !name.is_empty() => name,
        other => return Err(format!("found name {}, expected a non-empty string", other.unwrap_or_default())),
    };
    let arguments = call.remove("arguments").or_else(|| call.remove("parameters")).unwrap_or(Value::Null);
    Ok(vec![ParsedCall { name, arguments: arguments_object(arguments)? }])
}
