//! From a conversation to prompt tokens, and to what must be known to read the answer.

use crate::chat_request::{ChatRequest, ToolChoice};
use crate::error::{ApiError, ErrorKind};
use crate::generator::{Grammar, ToolCallGrammar};
use crate::job::Plan;
use crate::model::ServedModel;
use crate::options::{ServeOptions, ThinkingPolicy};
use crate::pipeline::PipelineSettings;
use moellon_engine::ThinkingBudget;
use moellon_text::constraint::{Constraint, ConstraintError, Deferred};
use moellon_text::{ChatTemplate, Error as TextError, RenderInput, ThinkingStart, ToolCallFormat, ToolSchema};
use serde_json::{Map, Value, json};

/// Renders and tokenizes a conversation and compiles its grammar. Takes milliseconds to seconds: not for async threads.
pub(crate) fn plan_chat(request: &ChatRequest, model: &ServedModel, options: &ServeOptions) -> Result<Plan, ApiError> {
    let Some(template) = &model.template else {
        return Err(ApiError::unsupported("messages", "chatting with a model that has no chat template"));
    };
    let prompt = render(request, template, model, options)?;
    let ids = tokenize(&prompt, model, options, "messages")?;
    let tools = if request.tool_choice == ToolChoice::None { &[] } else { request.tools.as_slice() };
    let schemas = ToolSchema::from_openai(&Value::Array(tools.to_vec()))
        .map_err(|error| ApiError::new(ErrorKind::InvalidRequest, error.to_string()).with_param("tools"))?;
    let is_harmony = model.tool_call_format == Some(ToolCallFormat::Harmony);
    let thinking = if is_harmony { None } else { thinking_start(&prompt, model) };
    let tool_calls = match model.tool_call_format {
        Some(format) if is_harmony || !tools.is_empty() => Some((format, schemas.clone())),
        Some(_) | None => None,
    };
    if !tools.is_empty() && model.tool_call_format.is_none() {
        return Err(ApiError::unsupported("tools", "calling tools with this model"));
    }
    let constraints = compile(request, &schemas, thinking, model)?;
    let thinking_budget = thinking_budget(request, thinking, model, options)?;
    Ok(Plan {
        prompt: ids,
        prompt_param: "messages",
        settings: request.settings.clone(),
        constraints,
        thinking_budget,
        prompt_logprobs: false,
        pipeline: PipelineSettings {
            thinking,
            tool_calls,
            parallel_tool_calls: request.parallel_tool_calls,
            stream_calls: false,
            keep_special: false,
        },
        warnings: request.warnings.clone(),
    })
}

/// Token ids of a rendered prompt.
pub(crate) fn tokenize(
    text: &str,
    model: &ServedModel,
    options: &ServeOptions,
    param: &str,
) -> Result<Vec<u32>, ApiError> {
    let ids = match options.trust_special_tokens {
        true => model.tokenizer.encode(text, false),
        false => model.tokenizer.encode_defused(text),
    };
    let ids = ids.map_err(|error| ApiError::new(ErrorKind::InvalidRequest, error.to_string()).with_param(param))?;
    if ids.is_empty() {
        return Err(ApiError::field(param, "a prompt without tokens", "at least one token"));
    }
    Ok(ids)
}

/// The text of the prompt.
pub(crate) fn render(
    request: &ChatRequest,
    template: &ChatTemplate,
    model: &ServedModel,
    options: &ServeOptions,
) -> Result<String, ApiError> {
    let messages = defused(&request.messages, model, options);
    let kwargs = variables(request, options);
    let tools = (!request.tools.is_empty() && request.tool_choice != ToolChoice::None)
        .then(|| Value::Array(request.tools.clone()));
    let render = |messages: Vec<Value>| {
        let messages = Value::Array(messages);
        let input =
            RenderInput { messages: &messages, tools: tools.as_ref(), add_generation_prompt: true, kwargs: &kwargs };
        template.render(&input)
    };
    let result = match render(messages.clone()) {
        // Some templates want the system message first and only once; agents send them anywhere.
        Err(error @ TextError::TemplateRaised { .. }) => match without_late_system_messages(messages) {
            Some(folded) => render(folded),
            None => Err(error),
        },
        result => result,
    };
    result.map_err(|error| {
        let param = match &error {
            TextError::TemplateInput { name, .. } => format!("chat_template_kwargs.{name}"),
            _ => "messages".to_owned(),
        };
        ApiError::new(ErrorKind::InvalidRequest, error.to_string()).with_param(&param).with_code("template_error")
    })
}

/// The template's variables: the request's own, and thinking in the words of the common templates.
fn variables(request: &ChatRequest, options: &ServeOptions) -> Map<String, Value> {
    let mut kwargs = request.template_kwargs.clone();
    let enabled = request.thinking.enabled.or(match options.thinking {
        // An effort asks for thinking.
        _ if request.thinking.effort.is_some() || request.thinking.budget.is_some() => Some(true),
        ThinkingPolicy::Template => None,
        ThinkingPolicy::On => Some(true),
        ThinkingPolicy::Off => Some(false),
        ThinkingPolicy::Auto => is_trivial(request).then_some(false),
    });
    if let Some(enabled) = enabled {
        // GLM and Qwen say enable_thinking, DeepSeek says thinking.
        for name in ["enable_thinking", "thinking"] {
            kwargs.entry(name).or_insert(json!(enabled));
        }
    }
    if let Some(effort) = &request.thinking.effort {
        kwargs.entry("reasoning_effort").or_insert(json!(effort));
    }
    kwargs
}

/// Whether a step needs no thought of its own, by what can be seen without a model: a tool's result that is no failure
/// mostly leads to the next call of a plan that was thought out before, and where a call, a choice or a pattern is
/// prescribed, or a few tokens are all that is wanted, there is little to think about.
fn is_trivial(request: &ChatRequest) -> bool {
    /// A thought alone is longer.
    const FEW_TOKENS: usize = 64;
    let result = request.messages.last().filter(|message| message["role"] == "tool");
    let text = result.map(|message| message["content"].as_str().unwrap_or_default().trim_start());
    let is_prescribed = matches!(request.tool_choice, ToolChoice::Named(_))
        || matches!(request.grammar, Some(Grammar::Choice(_) | Grammar::Regex(_)));
    let is_short = request.settings.max_tokens.is_some_and(|max_tokens| max_tokens <= FEW_TOKENS);
    is_prescribed || is_short || text.is_some_and(|text| !says_failure(text))
}

/// Whether a tool's result speaks of a failure where tools do: in its first words, or in its last, as test runners. "0 failed"
/// and "no errors" do not.
fn says_failure(result: &str) -> bool {
    const ENDS_CHARS: usize = 80;
    const WORDS: [&str; 7] = ["error", "failed", "failure", "traceback", "panicked", "exception", "not found"];
    let text = result.trim().to_lowercase();
    let head: String = text.chars().take(ENDS_CHARS).collect();
    let skipped = text.chars().count().saturating_sub(ENDS_CHARS);
    let tail: String = text.chars().skip(skipped).collect();
    let counts_none = |before: &str| {
        let last = before.trim_end().rsplit(|c: char| !c.is_alphanumeric()).next();
        matches!(last, Some("0" | "no" | "without"))
    };
    let says = |part: &str, word: &str| part.match_indices(word).any(|(at, _)| !counts_none(&part[..at]));
    WORDS.iter().any(|word| says(&head, word) || says(&tail, word))
}

/// Messages whose texts cannot name special tokens. The assistant's own are left: templates look for `</think>` in them.
fn defused(messages: &[Value], model: &ServedModel, options: &ServeOptions) -> Vec<Value> {
    let mut messages = messages.to_vec();
    if options.trust_special_tokens {
        return messages;
    }
    for message in messages.iter_mut().filter(|message| message["role"] != "assistant") {
        if let Some(Value::String(text)) = message.get_mut("content") {
            *text = model.tokenizer.defuse(text);
        }
    }
    messages
}

/// System messages after the first message become a part of the next user message. `None` if there are none.
fn without_late_system_messages(messages: Vec<Value>) -> Option<Vec<Value>> {
    let is_system = |message: &Value| message["role"] == "system";
    let late = messages.iter().skip(1).any(is_system);
    if !late {
        return None;
    }
    let mut folded: Vec<Value> = Vec::new();
    let mut waiting: Vec<String> = Vec::new();
    for (index, mut message) in messages.into_iter().enumerate() {
        let text = message["content"].as_str().unwrap_or_default().to_owned();
        if index > 0 && is_system(&message) {
            waiting.push(text);
        } else {
            if message["role"] == "user" && !waiting.is_empty() {
                waiting.push(text);
                message["content"] = json!(std::mem::take(&mut waiting).join("\n\n"));
            }
            folded.push(message);
        }
    }
    if !waiting.is_empty() {
        folded.push(json!({"role": "user", "content": waiting.join("\n\n")}));
    }
    Some(folded)
}

/// Where the answer begins, where the model can think.
fn thinking_start(prompt: &str, model: &ServedModel) -> Option<ThinkingStart> {
    let format = &model.thinking_format;
    model.tokenizer.id_of(&format.open)?;
    let is_inside = prompt.trim_end().ends_with(&format.open);
    Some(if is_inside { ThinkingStart::Inside } else { ThinkingStart::Outside })
}

/// The constraint of every answer that is generated, if any is needed.
fn compile(
    request: &ChatRequest,
    schemas: &[ToolSchema],
    thinking: Option<ThinkingStart>,
    model: &ServedModel,
) -> Result<Vec<Box<dyn Constraint>>, ApiError> {
    let (grammar, param) = match tool_grammar(request, schemas, model) {
        Some(grammar) => (Grammar::ToolCalls(grammar), "tool_choice"),
        None => match &request.grammar {
            // Its thoughts come in messages of their own, and so does the answer.
            Some(grammar) if model.tool_call_format == Some(ToolCallFormat::Harmony) => {
                (Grammar::InHarmony(Box::new(grammar.clone())), "response_format")
            }
            Some(grammar) => (grammar.clone(), "response_format"),
            None => return Ok(Vec::new()),
        },
    };
    let Some(compiler) = &model.constraints else {
        return Err(ApiError::unsupported(param, "constrained output in this build"));
    };
    let mut constraints = Vec::new();
    for _ in 0..request.settings.candidates {
        let constraint = compiler.compile(&grammar).map_err(|error| {
            let message = format!("{param}: {error}");
            match error {
                ConstraintError::Busy { .. } => ApiError::new(ErrorKind::Unavailable, message)
                    .with_param(param)
                    .with_code("grammar_compiler_busy")
                    .retry_after(1),
                _ => ApiError::new(ErrorKind::InvalidRequest, message).with_param(param).with_code("invalid_schema"),
            }
        })?;
        let close_id = model.tokenizer.id_of(&model.thinking_format.close);
        constraints.push(match (thinking, close_id) {
            // The thought is free; what follows it is not.
            (Some(ThinkingStart::Inside), Some(close_id)) => {
                Box::new(Deferred::new(constraint, close_id)) as Box<dyn Constraint>
            }
            _ => constraint,
        });
    }
    Ok(constraints)
}

/// The grammar of the calls that must come, or that must be well-formed if they come.
fn tool_grammar(request: &ChatRequest, schemas: &[ToolSchema], model: &ServedModel) -> Option<ToolCallGrammar> {
    let format = model.tool_call_format?;
    let (tools, required) = match &request.tool_choice {
        ToolChoice::None => return None,
        ToolChoice::Named(name) => (schemas.iter().filter(|s| s.name() == name).cloned().collect(), true),
        ToolChoice::Required => (schemas.to_vec(), true),
        // A free choice is constrained only where a tool asks for it, nothing else is constrained and there is a
        // compiler: without one the calls are parsed, and the choice was the model's anyway.
        ToolChoice::Auto => {
            let is_strict = request.tools.iter().any(|tool| tool["function"]["strict"] == json!(true));
            if !is_strict || request.grammar.is_some() || model.constraints.is_none() {
                return None;
            }
            (schemas.to_vec(), false)
        }
    };
    Some(ToolCallGrammar { format, tools, required, parallel: request.parallel_tool_calls })
}

fn thinking_budget(
    request: &ChatRequest,
    thinking: Option<ThinkingStart>,
    model: &ServedModel,
    options: &ServeOptions,
) -> Result<Option<ThinkingBudget>, ApiError> {
    let of_effort = |effort: &String| {
        let budget = options.effort_budgets.iter().find(|(name, _)| name == effort);
        budget.map(|(_, max_tokens)| *max_tokens)
    };
    let asked = request.thinking.budget;
    let Some(max_tokens) = asked.or(request.thinking.effort.as_ref().and_then(of_effort)) else { return Ok(None) };
    let format = &model.thinking_format;
    let ids = (model.tokenizer.id_of(&format.open), model.tokenizer.id_of(&format.close));
    match (thinking, ids) {
        (Some(start), (Some(open_token_id), Some(close_token_id))) => Ok(Some(ThinkingBudget {
            max_tokens,
            starts_inside: start == ThinkingStart::Inside,
            open_token_id,
            close_token_id,
            end_token_ids: vec![close_token_id],
        })),
        _ if asked.is_some() => {
            Err(ApiError::unsupported("thinking_token_budget", "a thinking budget with this model"))
        }
        _ => Ok(None),
    }
}
