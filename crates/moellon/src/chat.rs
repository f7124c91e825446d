//! A conversation and how it becomes prompt ids.

use anyhow::{Context, Result};
use moellon_text::{ChatTemplate, RenderInput, ThinkingFormat, ThinkingSplitter, ThinkingStart, Tokenizer};
use serde_json::{Map, Value, json};

/// Turns so far.
pub struct Conversation {
    messages: Vec<Value>,
    enable_thinking: bool,
}

/// A rendered conversation.
pub struct Prompt {
    pub ids: Vec<u32>,
    /// How the answer's thinking is split off, where the model thinks.
    pub thinking: Option<ThinkingSplitter>,
}

impl Conversation {
    /// An empty one.
    pub fn new(system: Option<&str>, enable_thinking: bool) -> Self {
        let messages = system.map(|text| json!({"role": "system", "content": text})).into_iter().collect();
        Conversation { messages, enable_thinking }
    }

    /// Appends what the user says.
    pub fn user(&mut self, text: &str) {
        self.messages.push(json!({"role": "user", "content": text}));
    }

    /// Appends what the model answered.
    pub fn assistant(&mut self, thinking: &str, answer: &str) {
        let mut message = json!({"role": "assistant", "content": answer});
        if !thinking.is_empty() {
            message["reasoning_content"] = json!(thinking);
        }
        self.messages.push(message);
    }

    /// Renders the conversation up to the beginning of the assistant's turn.
    pub fn render(&self, template: &ChatTemplate, tokenizer: &Tokenizer) -> Result<Prompt> {
        let mut kwargs = Map::new();
        kwargs.insert("enable_thinking".to_owned(), json!(self.enable_thinking));
        let messages = Value::Array(self.messages.clone());
        let input = RenderInput { messages: &messages, tools: None, add_generation_prompt: true, kwargs: &kwargs };
        let text = template.render(&input).context("the chat template")?;
        Ok(Prompt { ids: tokenizer.encode(&text, false)?, thinking: splitter(&text, tokenizer)? })
    }
}

/// The splitter for an answer to `prompt`: inside a thought where the prompt ends in an open one.
fn splitter(prompt: &str, tokenizer: &Tokenizer) -> Result<Option<ThinkingSplitter>> {
    let format = ThinkingFormat::default();
    if tokenizer.id_of(&format.open).is_none() {
        return Ok(None);
    }
    let start = if prompt.trim_end().ends_with(&format.open) { ThinkingStart::Inside } else { ThinkingStart::Outside };
    Ok(Some(ThinkingSplitter::new(format, start)?))
}
