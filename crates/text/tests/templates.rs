//! Chat templates against jinja2: the goldens were written by `make_template_goldens.py`.

use moellon_text::{ChatTemplate, Clock, Error, RenderInput, TemplateLimits};
use serde_json::{Value, json};

/// 2025-02-28 23:59:58 UTC, the generator's NOW.
const CLOCK: Clock = Clock::Fixed(1_740_787_198);

fn special_tokens() -> Vec<(String, String)> {
    [("bos_token", "<｜begin▁of▁sentence｜>"), ("eos_token", "<｜end▁of▁sentence｜>")]
        .map(|(role, text)| (role.to_owned(), text.to_owned()))
        .to_vec()
}

fn compile(source: &str) -> Result<ChatTemplate, Error> {
    ChatTemplate::with_settings(source, &special_tokens(), TemplateLimits::default(), CLOCK)
}

/// Renders a source with no messages and these variables.
fn render(source: &str, variables: &Value) -> Result<String, Error> {
    let template = ChatTemplate::with_settings(source, &[], TemplateLimits::default(), CLOCK)?;
    let messages = json!([]);
    let kwargs = variables.as_object().expect("variables are an object");
    template.render(&RenderInput { messages: &messages, tools: None, add_generation_prompt: false, kwargs })
}

/// Compares one outcome; returns a description of the difference.
fn difference(expected: &Value, actual: &Result<String, Error>) -> Option<String> {
    match (expected["text"].as_str(), expected["raised"].as_str(), actual) {
        (Some(expected), _, Ok(actual)) if expected == actual => None,
        (Some(expected), _, actual) => Some(format!("expected {expected:?}\n     got {actual:?}")),
        (None, Some(message), Err(Error::TemplateRaised { message: actual, .. })) if message == actual => None,
        (None, Some(message), actual) => Some(format!("expected raise_exception({message:?})\n     got {actual:?}")),
        (None, None, Err(Error::Template { .. })) => None,
        (None, None, actual) => Some(format!("expected error {}\n     got {actual:?}", expected["error"])),
    }
}

fn check_template(name: &str, source: &str, goldens: &str) {
    let inputs: Value = serde_json::from_str(include_str!("goldens/conversations.json")).unwrap();
    let goldens: Value = serde_json::from_str(goldens).unwrap();
    let template = compile(source).unwrap();
    let mut differences = Vec::new();
    for input in inputs.as_array().unwrap() {
        let case = input["name"].as_str().unwrap();
        let actual = template.render(&RenderInput {
            messages: &input["messages"],
            tools: Some(&input["tools"]).filter(|tools| !tools.is_null()),
            add_generation_prompt: input["add_generation_prompt"].as_bool().unwrap(),
            kwargs: input["kwargs"].as_object().unwrap(),
        });
        if let Some(text) = difference(&goldens[case], &actual) {
            differences.push(format!("{name}/{case}: {text}"));
        }
    }
    assert!(differences.is_empty(), "{} differences\n{}", differences.len(), differences.join("\n"));
}

macro_rules! template_tests {
    ($($name:ident),*) => {$(
        #[test]
        fn $name() {
            check_template(
                stringify!($name),
                include_str!(concat!("templates/", stringify!($name), ".jinja")),
                include_str!(concat!("goldens/", stringify!($name), ".json")),
            );
        }
    )*};
}
template_tests!(glm, qwen3, qwen3_coder, deepseek, gpt_oss, generation);

#[test]
fn snippets_match_jinja2() {
    let goldens: Value = serde_json::from_str(include_str!("goldens/snippets.json")).unwrap();
    let mut differences = Vec::new();
    for snippet in goldens["snippets"].as_array().unwrap() {
        let source = snippet["source"].as_str().unwrap();
        if let Some(text) = difference(snippet, &render(source, &goldens["values"])) {
            differences.push(format!("{source}\n{text}"));
        }
    }
    assert!(differences.is_empty(), "{} differences\n{}", differences.len(), differences.join("\n"));
}
