//! The parts of `tokenizer_config.json` that matter here: special tokens by role, and embedded chat templates.

use serde_json::{Map, Value};

use crate::error::Error;

const CONFIG_FILE: &str = "tokenizer_config.json";

/// Settings of `tokenizer_config.json`.
#[derive(Debug, Clone, Default)]
pub struct TokenizerConfig {
    /// Role (`bos_token`, `eos_token`, `pad_token`, ...) and the token's text, in file order.
    special_tokens: Vec<(String, String)>,
    /// Name (`default`, `tool_use`, ...) and source of the embedded chat templates.
    chat_templates: Vec<(String, String)>,
    add_bos_token: Option<bool>,
}

impl TokenizerConfig {
    /// Reads the content of `tokenizer_config.json`. Unknown keys are ignored: the file is written by many programs.
    ///
    /// # Errors
    /// [`Error::TokenizerFile`] when it is not a JSON object, or a token or template in it is not text.
    pub fn from_bytes(json: &[u8]) -> Result<TokenizerConfig, Error> {
        let fail = |reason: String| Error::TokenizerFile { file: CONFIG_FILE, reason };
        let object: Map<String, Value> = serde_json::from_slice(json).map_err(|error| fail(error.to_string()))?;
        let mut config = TokenizerConfig {
            add_bos_token: object.get("add_bos_token").and_then(Value::as_bool),
            ..TokenizerConfig::default()
        };
        for (key, value) in &object {
            // `add_bos_token` and the like are switches.
            if key.ends_with("_token") && !value.is_boolean() && !value.is_null() {
                let text = value.as_str().or_else(|| value["content"].as_str());
                let text = text.ok_or_else(|| {
                    fail(format!("{key}: found {value}, expected a string or an object with a string `content`"))
                })?;
                config.special_tokens.push((key.clone(), text.to_owned()));
            }
        }
        match object.get("chat_template") {
            None | Some(Value::Null) => {}
            Some(Value::String(source)) => config.chat_templates.push(("default".to_owned(), source.clone())),
            Some(Value::Array(list)) => {
                for item in list {
                    match (item["name"].as_str(), item["template"].as_str()) {
                        (Some(name), Some(source)) => {
                            config.chat_templates.push((name.to_owned(), source.to_owned()));
                        }
                        _ => {
                            return Err(fail(
                                "chat_template: found a list item without the strings `name` and `template`".to_owned(),
                            ));
                        }
                    }
                }
            }
            Some(_) => return Err(fail("chat_template: expected a string or a list of named templates".to_owned())),
        }
        Ok(config)
    }

    /// The text of the special token with this role, such as `eos_token`.
    pub fn special_token(&self, role: &str) -> Option<&str> {
        self.special_tokens.iter().find(|(name, _)| name == role).map(|(_, text)| text.as_str())
    }

    /// All special tokens: role and text. Templates see them as variables.
    pub fn special_tokens(&self) -> &[(String, String)] {
        &self.special_tokens
    }

    /// The embedded chat template with this name; `default` when the file has a single one. Newer models ship
    /// `chat_template.jinja` instead.
    pub fn chat_template(&self, name: &str) -> Option<&str> {
        self.chat_templates.iter().find(|(found, _)| found == name).map(|(_, source)| source.as_str())
    }

    /// Whether plain completions begin with the BOS token, if the file says.
    pub fn add_bos_token(&self) -> Option<bool> {
        self.add_bos_token
    }
}
