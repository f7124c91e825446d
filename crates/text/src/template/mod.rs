//! Chat templates: a conversation and its tools as one text, byte for byte what jinja2 writes for transformers.
//!
//! minijinja runs the template. This module adds what transformers adds (`tojson`, `raise_exception`,
//! `strftime_now`, loop controls, `trim_blocks`, `lstrip_blocks`, `generation` blocks), makes values print as in Python, and
//! stops templates that would eat the machine.

mod clock;
mod functions;
mod limits;
mod python;
mod rewrite;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Serde, Value};
use minijinja::{AutoEscape, Environment, ErrorKind, UndefinedBehavior};
use serde_json::{Map, Value as Json};

pub use self::clock::Clock;
use self::limits::LimitReached;
pub use self::limits::TemplateLimits;
use crate::error::Error;

const TEMPLATE_NAME: &str = "chat_template";

/// Variables that [`ChatTemplate::render`] sets itself, besides the special tokens.
const RESERVED: [&str; 3] = ["messages", "tools", "add_generation_prompt"];

/// What a template is given.
#[derive(Debug, Clone, Copy)]
pub struct RenderInput<'a> {
    /// The conversation: a list of objects with `role`, `content`, `tool_calls` and so on.
    pub messages: &'a Json,
    /// The tools on offer: a list of JSON schemas; `None` is Python's None.
    pub tools: Option<&'a Json>,
    /// Whether to end with the beginning of the assistant's next turn.
    pub add_generation_prompt: bool,
    /// Further variables, such as `enable_thinking`, `reasoning_effort`, `clear_thinking`, `documents`.
    pub kwargs: &'a Map<String, Json>,
}

/// A compiled chat template. Cheap to share behind an `Arc`; rendering takes `&self`.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: Vec<(String, String)>,
    limits: TemplateLimits,
}

impl ChatTemplate {
    /// Compiles a template (`chat_template.jinja`) with default limits and the system's clock.
    ///
    /// `special_tokens` are pairs such as `("bos_token", "<s>")`:
    /// [`TokenizerConfig::special_tokens`](crate::TokenizerConfig::special_tokens).
    ///
    /// # Errors
    /// [`Error::Template`] with the line and what is wrong there.
    pub fn new(source: &str, special_tokens: &[(String, String)]) -> Result<ChatTemplate, Error> {
        ChatTemplate::with_settings(source, special_tokens, TemplateLimits::default(), Clock::System)
    }

    /// Compiles a template with limits and a clock of the caller's.
    ///
    /// # Errors
    /// [`Error::Template`] with the line and what is wrong there.
    pub fn with_settings(
        source: &str,
        special_tokens: &[(String, String)],
        limits: TemplateLimits,
        clock: Clock,
    ) -> Result<ChatTemplate, Error> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| to_error(&error))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_debug(false);
        environment.set_fuel(Some(limits.max_instructions));
        environment.set_recursion_limit(limits.max_recursion);
        environment.set_formatter(move |out, state, value| {
            let formatted;
            let text = match value.as_str() {
                Some(text) => text,
                None => {
                    formatted = python::to_str(value, limits.max_output_bytes)?;
                    &formatted
                }
            };
            limits.charge(state, text.len() as u64)?;
            out.write_str(text).map_err(minijinja::Error::from)
        });
        functions::install(&mut environment, limits, clock);
        let prepared = rewrite::rewrite(source)
            .map_err(|refused| Error::Template { line: refused.line, message: refused.reason })?;
        for source in [prepared.plain, prepared.guarded] {
            environment.add_template_owned(TEMPLATE_NAME, source).map_err(|error| to_error(&error))?;
        }
        Ok(ChatTemplate { environment, special_tokens: special_tokens.to_vec(), limits })
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`Error::TemplateRaised`] when the template refuses the conversation, [`Error::TemplateLimit`] when it uses up
    /// a limit, [`Error::TemplateInput`] when a keyword names a reserved variable, and [`Error::Template`] for every
    /// other failure, with its line.
    pub fn render(&self, input: &RenderInput<'_>) -> Result<String, Error> {
        let mut variables: Vec<(String, Value)> = Vec::new();
        for (name, text) in &self.special_tokens {
            variables.push((name.clone(), Value::from(text.as_str())));
        }
        // transformers always passes `documents`; a template may test it against none.
        variables.push(("documents".to_owned(), Value::from(())));
        for (name, value) in input.kwargs {
            let is_special_token = self.special_tokens.iter().any(|(special, _)| special == name);
            if is_special_token || RESERVED.contains(&name.as_str()) || name.starts_with("__") {
                return Err(Error::TemplateInput {
                    name: name.clone(),
                    reason: "found a reserved name, expected a variable of the template such as enable_thinking"
                        .to_owned(),
                });
            }
            variables.retain(|(existing, _)| existing != name);
            variables.push((name.clone(), Value::from(Serde(value))));
        }
        if !input.messages.is_array() {
            return Err(Error::TemplateInput {
                name: "messages".to_owned(),
                reason: format!("found {}, expected a list", json_type(input.messages)),
            });
        }
        variables.push(("messages".to_owned(), Value::from(Serde(input.messages))));
        variables.push(("tools".to_owned(), input.tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)))));
        variables.push(("add_generation_prompt".to_owned(), Value::from(input.add_generation_prompt)));

        let template = self.environment.get_template(TEMPLATE_NAME).map_err(|error| to_error(&error))?;
        let mut output = LimitedOutput { bytes: Vec::new(), limit: self.limits.max_output_bytes, was_refused: false };
        let rendered = template.render_captured_to(Value::from_pairs(variables), &mut output).map(|_| ());
        rendered.map_err(|error| match (error.kind(), output.was_refused) {
            (ErrorKind::OutOfFuel, _) => Error::TemplateLimit {
                line: error.line().unwrap_or(0),
                what: "instructions",
                limit: self.limits.max_instructions,
            },
            (ErrorKind::WriteFailure, true) => Error::TemplateLimit {
                line: error.line().unwrap_or(0),
                what: "output bytes",
                limit: self.limits.max_output_bytes,
            },
            _ => to_error(&error),
        })?;
        String::from_utf8(output.bytes)
            .map_err(|error| Error::Template { line: 0, message: format!("wrote bytes that are not UTF-8: {error}") })
    }
}

fn json_type(value: &Json) -> &'static str {
    match value {
        Json::Null => "null",
        Json::Bool(_) => "a boolean",
        Json::Number(_) => "a number",
        Json::String(_) => "a string",
        Json::Array(_) => "a list",
        Json::Object(_) => "an object",
    }
}

/// Collects the prompt up to a limit.
struct LimitedOutput {
    bytes: Vec<u8>,
    limit: u64,
    /// A write would have gone past the limit.
    was_refused: bool,
}

impl std::io::Write for LimitedOutput {
    fn write(&mut self, chunk: &[u8]) -> std::io::Result<usize> {
        if (self.bytes.len() + chunk.len()) as u64 > self.limit {
            self.was_refused = true;
            return Err(std::io::Error::other("the prompt is too long"));
        }
        self.bytes.extend_from_slice(chunk);
        Ok(chunk.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A minijinja error as ours: looks for our own errors in its chain of sources.
fn to_error(error: &minijinja::Error) -> Error {
    let mut line = error.line().unwrap_or(0);
    let mut message = describe(error);
    let mut source: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(raised) = inner.downcast_ref::<functions::Raised>() {
            return Error::TemplateRaised { line, message: raised.0.clone() };
        }
        if let Some(limit) = inner.downcast_ref::<LimitReached>() {
            return Error::TemplateLimit { line, what: limit.what, limit: limit.limit };
        }
        if let Some(inner) = inner.downcast_ref::<minijinja::Error>() {
            line = inner.line().unwrap_or(line);
            message = describe(inner);
        }
        source = inner.source();
    }
    Error::Template { line, message }
}

/// Kind and detail of an error, without our names for operators' helpers.
fn describe(error: &minijinja::Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}
