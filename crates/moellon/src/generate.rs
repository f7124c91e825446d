//! Generates one answer: prompt ids in, pieces of text out, until a stop.

use anyhow::Result;
use moellon_engine::{Engine, Event, Request, SamplingParams};
use moellon_text::{Detokenizer, StopStrings, StopTokens, ThinkingPiece, ThinkingSplitter, Tokenizer};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or stop string.
    Stop,
    /// The token limit or the end of the context.
    Length,
}

impl FinishReason {
    /// The name that OpenAI's API uses.
    pub fn name(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
        }
    }
}

/// A finished generation.
#[derive(Debug, Clone)]
pub struct Generation {
    pub thinking: String,
    pub answer: String,
    /// All generated ids, a stop token included.
    pub token_ids: Vec<u32>,
    pub finish_reason: FinishReason,
    pub timings: Timings,
}

/// Where the time went.
#[derive(Debug, Clone, Copy)]
pub struct Timings {
    /// Prompt tokens that were computed (not found cached).
    pub prompt_tokens: usize,
    /// Prompt tokens that were cached from earlier turns.
    pub cached_tokens: usize,
    pub prompt: Duration,
    /// Tokens generated.
    pub decoded_tokens: usize,
    /// Time between the first generated token and the last.
    pub decode: Duration,
}

impl Timings {
    /// Prompt tokens a second.
    pub fn prompt_tok_per_s(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt.as_secs_f64().max(1e-9)
    }

    /// Steps a second after the first token, which the prompt's step gave.
    pub fn decode_tok_per_s(&self) -> f64 {
        self.decoded_tokens.saturating_sub(1) as f64 / self.decode.as_secs_f64().max(1e-9)
    }
}

/// What ends a generation and how its text is split.
pub struct TextOptions {
    pub stop_tokens: StopTokens,
    pub stop_strings: StopStrings,
    /// `None` where the model does not think.
    pub thinking: Option<ThinkingSplitter>,
    pub max_tokens: usize,
}

/// An engine with one request at a time; its prefix cache serves the next prompt as far as it agrees.
pub struct Generator {
    pub engine: Engine,
    pub tokenizer: Arc<Tokenizer>,
}

impl Generator {
    /// Nothing is cached yet.
    pub fn new(engine: Engine, tokenizer: Arc<Tokenizer>) -> Self {
        Generator { engine, tokenizer }
    }

    /// Generates an answer to `prompt`, giving pieces of text to `emit` as they come.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampling: SamplingParams,
        options: TextOptions,
        emit: &mut dyn FnMut(&ThinkingPiece) -> Result<()>,
    ) -> Result<Generation> {
        let max_context = self.engine.limits().max_context;
        anyhow::ensure!(!prompt.is_empty(), "the prompt has no tokens");
        anyhow::ensure!(
            prompt.len() < max_context,
            "the prompt has {} tokens, expected fewer than the context of {max_context} (--context)",
            prompt.len()
        );
        // The first token comes of the prompt's own step, so there is always one.
        let max_tokens = options.max_tokens.max(1);
        let started = Instant::now();
        let mut receiver = self.engine.submit(Request {
            id: "run".to_owned(),
            prompt: prompt.to_vec(),
            sampling,
            max_tokens,
            min_tokens: 0,
            stop_token_ids: options.stop_tokens.ids().to_vec(),
            logprobs: None,
            prompt_logprobs: false,
            constraint: None,
            thinking_budget: None,
            cache_salt: None,
        })?;
        let mut text = TextStream::new(Detokenizer::continuing(Arc::clone(&self.tokenizer), true), options);
        let mut token_ids = Vec::new();
        let (mut cached_tokens, mut first_token) = (0, None);
        let finish_reason = 'answer: loop {
            let Some(event) = receiver.try_recv() else {
                self.engine.step()?;
                continue;
            };
            match event {
                Event::Started(started) => cached_tokens = started.cached_tokens,
                Event::Prefill { .. } => {}
                Event::Tokens(tokens) => {
                    first_token.get_or_insert_with(Instant::now);
                    for token in tokens {
                        token_ids.push(token.id);
                        if text.push(token.id, emit)? {
                            break 'answer FinishReason::Stop;
                        }
                    }
                }
                Event::Finished(_) => break FinishReason::Length,
                Event::Failed(error) => return Err(error.into()),
            }
        };
        let ended = Instant::now();
        let first_token = first_token.unwrap_or(ended);
        text.finish(emit)?;
        let timings = Timings {
            prompt_tokens: prompt.len() - cached_tokens,
            cached_tokens,
            prompt: first_token - started,
            decoded_tokens: token_ids.len(),
            decode: ended - first_token,
        };
        Ok(Generation { thinking: text.thinking, answer: text.answer, token_ids, finish_reason, timings })
    }
}

/// Tokens to pieces of text: detokenizer, stop strings, thinking splitter, in this order.
struct TextStream {
    detokenizer: Detokenizer,
    options: TextOptions,
    thinking: String,
    answer: String,
}

impl TextStream {
    fn new(detokenizer: Detokenizer, options: TextOptions) -> Self {
        TextStream { detokenizer, options, thinking: String::new(), answer: String::new() }
    }

    /// Takes a token; `true` if it ends the generation.
    fn push(&mut self, token: u32, emit: &mut dyn FnMut(&ThinkingPiece) -> Result<()>) -> Result<bool> {
        if self.options.stop_tokens.contains(token) {
            return Ok(true);
        }
        let chunk = self.detokenizer.push(token).to_owned();
        let outcome = self.options.stop_strings.push(&chunk);
        self.split(&outcome.text, emit)?;
        Ok(outcome.matched.is_some())
    }

    fn finish(&mut self, emit: &mut dyn FnMut(&ThinkingPiece) -> Result<()>) -> Result<()> {
        let rest = self.detokenizer.finish().to_owned();
        let mut text = self.options.stop_strings.push(&rest).text;
        text.push_str(&self.options.stop_strings.finish());
        self.split(&text, emit)?;
        if let Some(splitter) = &mut self.options.thinking {
            let pieces = splitter.finish();
            self.emit(pieces, emit)?;
        }
        Ok(())
    }

    fn split(&mut self, text: &str, emit: &mut dyn FnMut(&ThinkingPiece) -> Result<()>) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let pieces = match &mut self.options.thinking {
            Some(splitter) => splitter.push(text),
            None => vec![ThinkingPiece::Answer(text.to_owned())],
        };
        self.emit(pieces, emit)
    }

    fn emit(&mut self, pieces: Vec<ThinkingPiece>, emit: &mut dyn FnMut(&ThinkingPiece) -> Result<()>) -> Result<()> {
        for piece in pieces {
            match &piece {
                ThinkingPiece::Thinking(text) => self.thinking.push_str(text),
                ThinkingPiece::Answer(text) => self.answer.push_str(text),
            }
            emit(&piece)?;
        }
        Ok(())
    }
}
