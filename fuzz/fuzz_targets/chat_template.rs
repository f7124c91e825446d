//! Any text as a chat template, compiled and rendered under small limits.

#![no_main]

use libfuzzer_sys::fuzz_target;
use moellon_text::{ChatTemplate, Clock, RenderInput, TemplateLimits};
use serde_json::{Map, json};

const LIMITS: TemplateLimits =
    TemplateLimits { max_output_bytes: 1 << 16, max_work_bytes: 1 << 20, max_instructions: 20_000, max_recursion: 100 };

fuzz_target!(|source: &str| {
    let special_tokens = [("bos_token".to_owned(), "<s>".to_owned())];
    let Ok(template) = ChatTemplate::with_settings(source, &special_tokens, LIMITS, Clock::System) else { return };
    let messages = json!([
        { "role": "system", "content": "s" },
        { "role": "user", "content": "u" },
        { "role": "assistant", "content": null, "tool_calls": [{ "function": { "name": "f", "arguments": { "x": 1 } } }] },
        { "role": "tool", "content": [{ "type": "text", "text": "t" }] },
    ]);
    let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": {} } }]);
    let input =
        RenderInput { messages: &messages, tools: Some(&tools), add_generation_prompt: true, kwargs: &Map::new() };
    if let Ok(text) = template.render(&input) {
        assert!(text.len() as u64 <= LIMITS.max_output_bytes);
    }
});
