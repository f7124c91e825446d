//! A server that replays answers: what the client tests run against. `scripted_server ADDRESS MODEL_FOLDER`.
//!
//! It calls the first offered tool until a tool's result is there, and otherwise says a few words.

use moellon_engine::{Request, SamplingParams};
use moellon_serve::scripted::{ScriptedAnswer, ScriptedGenerator};
use moellon_serve::{GrammarConstraints, ServeOptions, ServedModel, detect_tool_call_format, run};
use moellon_text::{ChatTemplate, ThinkingFormat, Tokenizer};
use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, address, folder] = arguments.as_slice() else {
        return Err("expected two arguments: ADDRESS MODEL_FOLDER".into());
    };
    let folder = PathBuf::from(folder);
    let tokenizer = Arc::new(Tokenizer::from_folder(&folder)?);
    let source = std::fs::read_to_string(folder.join("chat_template.jinja"))?;
    let stop = tokenizer.id_of("<|user|>").or(tokenizer.eos_id()).ok_or("the tokenizer has no stop token")?;
    let vocab_size = tokenizer.vocab_size();
    let model = ServedModel {
        name: "tiny".to_owned(),
        aliases: vec!["claude-*".to_owned(), "gpt-*".to_owned()],
        template: Some(Arc::new(ChatTemplate::new(&source, tokenizer.config().special_tokens())?)),
        tool_call_format: detect_tool_call_format(&source),
        thinking_format: ThinkingFormat::default(),
        stop_token_ids: vec![stop],
        context_length: 131_072,
        vocab_size,
        default_sampling: SamplingParams::default(),
        constraints: Some(Arc::new(GrammarConstraints::new(Arc::clone(&tokenizer), vocab_size)?)),
        source: folder.display().to_string(),
        device: "script".to_owned(),
        tokenizer: Arc::clone(&tokenizer),
    };
    let generator = Arc::new(ScriptedGenerator::new(tokenizer, answer));
    let api_keys = vec!["test-key".to_owned()];
    run(ServeOptions { address: address.parse()?, api_keys, ..ServeOptions::default() }, model, generator)?;
    Ok(())
}

fn answer(prompt: &str, _request: &Request) -> ScriptedAnswer {
    let thought = if prompt.ends_with("<think>") { "Let me think.</think>" } else { "" };
    let asked = prompt.rsplit("<|user|>").next().unwrap_or_default();
    let text = match (prompt.contains("<tools>"), asked.contains("<tool_response>")) {
        (true, false) => call_of_first_tool(prompt),
        (true, true) => "The tool said so.".to_owned(),
        (false, _) => "Hello from the script.".to_owned(),
    };
    ScriptedAnswer { token_time: Duration::from_millis(2), ..ScriptedAnswer::text(format!("{thought}{text}")) }
}

/// Calls the first tool, with a value for every string or number that it takes.
fn call_of_first_tool(prompt: &str) -> String {
    let line = prompt.lines().find(|line| line.starts_with("{\"name\""));
    let tool: serde_json::Value = line.and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    let mut call = format!("<tool_call>{}", tool["name"].as_str().unwrap_or("unknown"));
    for (name, property) in tool["parameters"]["properties"].as_object().into_iter().flatten() {
        let value = match property["type"].as_str() {
            Some("integer" | "number") => "7",
            Some("boolean") => "true",
            Some("array") => "[]",
            _ => "Paris",
        };
        call.push_str(&format!("<arg_key>{name}</arg_key><arg_value>{value}</arg_value>"));
    }
    call.push_str("</tool_call>");
    call
}
