//! Generates one answer: prompt ids in, pieces of text out, until a stop.

use anyhow::Result;
use moellon_engine::{Sampler, SamplingParams};
use moellon_model::session::read_logits;
use moellon_model::{Decoder, Session};
use moellon_ops::Backend;
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

/// A model with one sequence, whose cache serves the next prompt as far as it agrees.
pub struct Generator {
    pub decoder: Decoder,
    pub backend: Box<dyn Backend>,
    pub tokenizer: Arc<Tokenizer>,
    session: Session,
    /// The tokens that `session` has cached.
    cached_ids: Vec<u32>,
}

impl Generator {
    /// Nothing is cached yet.
    pub fn new(decoder: Decoder, backend: Box<dyn Backend>, tokenizer: Arc<Tokenizer>) -> Self {
        Generator { decoder, backend, tokenizer, session: Session::new(), cached_ids: Vec::new() }
    }

    /// Generates an answer to `prompt`, giving pieces of text to `emit` as they come.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        sampling: SamplingParams,
        options: TextOptions,
        emit: &mut dyn FnMut(&ThinkingPiece) -> Result<()>,
    ) -> Result<Generation> {
        let max_context = self.decoder.options().max_context;
        anyhow::ensure!(!prompt.is_empty(), "the prompt has no tokens");
        anyhow::ensure!(
            prompt.len() < max_context,
            "the prompt has {} tokens, expected fewer than the context of {max_context} (--context)",
            prompt.len()
        );
        // At least the last token is computed again: its logits are wanted.
        let agreed = prompt.iter().zip(&self.cached_ids).take_while(|(a, b)| a == b).count().min(prompt.len() - 1);
        self.session.truncate(agreed);
        self.cached_ids.truncate(agreed);
        let started = Instant::now();
        let mut logits = self.extend(&prompt[agreed..])?;
        let prompt_time = started.elapsed();
        let mut sampler = Sampler::new(sampling, prompt);
        let mut text = TextStream::new(Detokenizer::continuing(Arc::clone(&self.tokenizer), true), options);
        let decode_started = Instant::now();
        let mut token_ids = Vec::new();
        let finish_reason = loop {
            let token = sampler.pick(&logits);
            token_ids.push(token);
            if text.push(token, emit)? {
                break FinishReason::Stop;
            }
            if token_ids.len() >= text.options.max_tokens || self.cached_ids.len() + 1 >= max_context {
                break FinishReason::Length;
            }
            logits = self.extend(&[token])?;
        };
        let decode = decode_started.elapsed();
        text.finish(emit)?;
        let timings = Timings {
            prompt_tokens: prompt.len() - agreed,
            cached_tokens: agreed,
            prompt: prompt_time,
            decoded_tokens: token_ids.len(),
            decode,
        };
        Ok(Generation { thinking: text.thinking, answer: text.answer, token_ids, finish_reason, timings })
    }

    fn extend(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        let logits = self.session.extend(ids, &mut self.decoder, self.backend.as_mut())?;
        self.cached_ids.extend_from_slice(ids);
        Ok(read_logits(logits, self.backend.as_mut())?)
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
