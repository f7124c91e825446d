//! The model that is served: everything but its weights.

use crate::generator::ConstraintCompiler;
use moellon_engine::SamplingParams;
use moellon_text::{ChatTemplate, ThinkingFormat, Tokenizer, ToolCallFormat};
use std::sync::Arc;

/// The model that is served.
#[derive(Clone)]
pub struct ServedModel {
    /// Its name in the APIs.
    pub name: String,
    /// Other names that clients may use. One that ends in `*` stands for all names that begin so.
    pub aliases: Vec<String>,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat template; without one, only the legacy completions work.
    pub template: Option<Arc<ChatTemplate>>,
    /// How it writes tool calls: [`detect_tool_call_format`].
    pub tool_call_format: Option<ToolCallFormat>,
    /// Markers of its thoughts, where the tokenizer has them.
    pub thinking_format: ThinkingFormat,
    /// Tokens that end a generation.
    pub stop_token_ids: Vec<u32>,
    /// Tokens that a prompt and its answer may have together.
    pub context_length: usize,
    /// Rows of the model's output, at least the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Sampling where a request says nothing: flags over `generation_config.json`. Its seed does not count.
    pub default_sampling: SamplingParams,
    /// Seed of requests that give none; without it, each gets one of its own.
    pub default_seed: Option<u64>,
    /// Longest answer of requests that give no limit; without it, to the end of the context.
    pub default_max_tokens: Option<usize>,
    /// Makes constraints; without it, requests for structured output get 400.
    pub constraints: Option<Arc<dyn ConstraintCompiler>>,
    /// Directory or repository that the model was loaded from, for routers.
    pub source: String,
    /// What computes it, for people: `CPU avx512, 16 threads`.
    pub device: String,
}

impl ServedModel {
    /// Whether a request's `model` means this model. Only names are compared: a request never names a file.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        let matches = |alias: &String| match alias.strip_suffix('*') {
            Some(prefix) => name.starts_with(prefix),
            None => alias == name,
        };
        name == self.name || self.aliases.iter().any(matches)
    }
}

/// How a model writes tool calls, from the source of its chat template. The markers are unmistakable; `None` where there
/// are none.
pub fn detect_tool_call_format(template_source: &str) -> Option<ToolCallFormat> {
    // Most specific first: Qwen3-Coder's template has `<tool_call>` as well.
    let markers = [
        ("<|channel|>", ToolCallFormat::Harmony),
        ("<arg_key>", ToolCallFormat::Glm),
        ("<function=", ToolCallFormat::QwenCoder),
        ("｜DSML｜", ToolCallFormat::DeepSeekDsml),
        ("<｜tool▁calls▁begin｜>", ToolCallFormat::DeepSeek),
        ("<tool_call>", ToolCallFormat::Hermes),
    ];
    markers.iter().find(|(marker, _)| template_source.contains(marker)).map(|(_, format)| *format)
}
