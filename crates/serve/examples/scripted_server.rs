//! A server that replays answers: what the client tests run against. `scripted_server ADDRESS MODEL_FOLDER`.
//!
//! Until a tool's result is there it calls a tool: the first that runs commands, with the command that MOELLON_SCRIPT names,
//! else the first of all. Otherwise it says a few words, or many, slowly, when a long story is asked for.

use moellon_engine::{Request, SamplingParams};
use moellon_serve::scripted::{ScriptedAnswer, ScriptedGenerator};
use moellon_serve::{GrammarConstraints, ServeOptions, ServedModel, detect_tool_call_format, run};
use moellon_text::{ChatTemplate, ThinkingFormat, Tokenizer};
use serde_json::Value;
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
        default_seed: None,
        default_max_tokens: None,
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
    if asked.contains("a long story") {
        let token_time = Duration::from_millis(15);
        return ScriptedAnswer {
            token_time,
            ..ScriptedAnswer::text(format!("{thought}{}", "Once upon a time. ".repeat(500)))
        };
    }
    let text = match (prompt.contains("<tools>"), asked.contains("<tool_response>")) {
        (true, false) => call(prompt),
        (true, true) => "The tool said so.".to_owned(),
        (false, _) => "Hello from the script.".to_owned(),
    };
    ScriptedAnswer { token_time: Duration::from_millis(2), ..ScriptedAnswer::text(format!("{thought}{text}")) }
}

/// What a tool that runs commands calls its argument, in the agents that are tested.
const COMMAND_NAMES: [&str; 2] = ["command", "cmd"];

/// A call in GLM's form: of the first tool that takes a command, if there is one to run, else of the first tool.
fn call(prompt: &str) -> String {
    let lines = prompt.lines().filter(|line| line.starts_with("{\"name\""));
    let tools: Vec<Value> = lines.filter_map(|line| serde_json::from_str(line).ok()).collect();
    let command = std::env::var("MOELLON_SCRIPT").ok();
    let takes_command =
        |tool: &&Value| COMMAND_NAMES.iter().any(|name| tool["parameters"]["properties"][name].is_object());
    let found = command.as_ref().and_then(|_| tools.iter().find(takes_command));
    let Some(tool) = found.or(tools.first()) else { return "No tool.".to_owned() };
    let mut call = format!("<tool_call>{}", tool["name"].as_str().unwrap_or("unknown"));
    let is_required =
        |name: &str| tool["parameters"]["required"].as_array().is_some_and(|r| r.iter().any(|n| n == name));
    for (name, property) in tool["parameters"]["properties"].as_object().into_iter().flatten() {
        let kind = property["type"].as_str();
        let value = match (&command, kind) {
            (Some(command), Some("array")) if COMMAND_NAMES.contains(&name.as_str()) => {
                serde_json::json!(["bash", "-lc", command]).to_string()
            }
            (Some(command), _) if COMMAND_NAMES.contains(&name.as_str()) => command.clone(),
            // An agent's optional arguments change what it does; a test's tool gets all of them.
            (Some(_), _) if !is_required(name) => continue,
            (_, Some("integer" | "number")) => "7".to_owned(),
            (_, Some("boolean")) => "false".to_owned(),
            (_, Some("array")) => "[]".to_owned(),
            _ => "Paris".to_owned(),
        };
        call.push_str(&format!("<arg_key>{name}</arg_key><arg_value>{value}</arg_value>"));
    }
    call.push_str("</tool_call>");
    call
}
