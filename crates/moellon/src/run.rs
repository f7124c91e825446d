//! `moellon run`: one prompt, standard input, or a chat.

use crate::chat::{Conversation, Prompt};
use crate::cli::{RunOptions, SamplingOptions};
use crate::generate::{Generation, Generator, TextOptions};
use crate::load::{self, LoadTime, Mtp};
use crate::model_source::ModelSource;
use crate::{backend, speculation, table};
use anyhow::{Context, Result};
use moellon_engine::{EngineOptions, SamplingParams};
use moellon_text::{ChatTemplate, StopStrings, StopTokens, ThinkingPiece};
use serde_json::json;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{IsTerminal, Read, Write};

/// Positions reserved where neither the flag nor the model asks for less.
const DEFAULT_CONTEXT: usize = 8192;

/// Runs the command.
pub fn run(options: &RunOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let source = ModelSource::open(directory)?;
    let tokenizer = source.tokenizer(directory)?;
    let sampling = sampling(&options.sampling, &source, source.config.vocab_size)?;
    let template =
        if options.raw { None } else { source.chat_template(directory, &tokenizer)?.map(|(template, _)| template) };
    anyhow::ensure!(
        options.raw || template.is_some(),
        "{}: no chat_template.jinja; use --raw for plain continuation",
        source.name
    );
    let longest = source.config.max_position_embeddings;
    let context = options.context.unwrap_or(DEFAULT_CONTEXT.min(longest));
    anyhow::ensure!(
        (2..=longest).contains(&context),
        "--context is {context}, expected 2 to {longest}, what the model was made for"
    );
    let mut backend = backend::create(&options.device, options.activations)?;
    let (decoder, load_time) = load::load(
        &source,
        context,
        options.cache,
        Mtp::ForDrafts(options.speculation.draft_vocab.0),
        backend.as_mut(),
    )?;
    let device = backend.caps().device.clone();
    let identity = source.checkpoint.identity();
    let engine_options = EngineOptions::default();
    let engine = speculation::engine(decoder, backend, &options.speculation, &identity, &tokenizer, engine_options)?;
    let generator = Generator::new(engine, tokenizer);
    let stop_ids = source.stop_ids(&generator.tokenizer);
    let mut run = Run { options, source, template, sampling, stop_ids, generator, load_time, device };
    match (&options.prompt, std::io::stdin().is_terminal()) {
        (Some(prompt), _) => run.one(prompt),
        (None, true) => run.chat(),
        (None, false) => {
            let mut prompt = String::new();
            std::io::stdin().read_to_string(&mut prompt).context("standard input")?;
            run.one(&prompt)
        }
    }
}

struct Run<'a> {
    options: &'a RunOptions,
    source: ModelSource,
    template: Option<ChatTemplate>,
    sampling: SamplingParams,
    stop_ids: Vec<u32>,
    generator: Generator,
    load_time: LoadTime,
    device: String,
}

impl Run<'_> {
    fn one(&mut self, prompt: &str) -> Result<()> {
        let mut conversation = Conversation::new(self.options.system.as_deref(), !self.options.no_think);
        conversation.user(prompt);
        let rendered = match &self.template {
            Some(template) => conversation.render(template, &self.generator.tokenizer)?,
            None => Prompt { ids: self.generator.tokenizer.encode(prompt, true)?, thinking: None },
        };
        let generation = self.answer(rendered)?;
        if self.options.json {
            println!("{}", self.report(&generation));
        } else {
            self.summary(&generation);
        }
        Ok(())
    }

    fn chat(&mut self) -> Result<()> {
        eprintln!("{}. End with an empty line or ctrl-D.", self.source.name);
        let mut conversation = Conversation::new(self.options.system.as_deref(), !self.options.no_think);
        loop {
            eprint!("> ");
            std::io::stderr().flush()?;
            let mut line = String::new();
            if std::io::stdin().read_line(&mut line)? == 0 || line.trim().is_empty() {
                return Ok(());
            }
            conversation.user(line.trim_end_matches(['\r', '\n']));
            let rendered = match &self.template {
                Some(template) => conversation.render(template, &self.generator.tokenizer)?,
                None => Prompt { ids: self.generator.tokenizer.encode(&line, true)?, thinking: None },
            };
            let generation = self.answer(rendered)?;
            self.summary(&generation);
            conversation.assistant(&generation.thinking, &generation.answer);
        }
    }

    /// Generates and streams: the answer to standard output, the thinking to standard error, so that a pipe gets the answer.
    fn answer(&mut self, prompt: Prompt) -> Result<Generation> {
        let text = TextOptions {
            stop_tokens: StopTokens::new(self.stop_ids.iter().copied()),
            stop_strings: StopStrings::new(&self.options.stop)?,
            thinking: prompt.thinking,
            max_tokens: self.options.max_tokens.unwrap_or(usize::MAX),
        };
        let quiet = self.options.json;
        let dim = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        let mut emit = |piece: &ThinkingPiece| -> Result<()> {
            match piece {
                _ if quiet => {}
                ThinkingPiece::Thinking(text) if dim => eprint!("\u{1b}[2m{text}\u{1b}[0m"),
                ThinkingPiece::Thinking(text) => eprint!("{text}"),
                ThinkingPiece::Answer(text) => {
                    let mut stdout = std::io::stdout().lock();
                    stdout.write_all(text.as_bytes())?;
                    stdout.flush()?;
                }
            }
            Ok(())
        };
        let generation = self.generator.generate(&prompt.ids, self.sampling.clone(), text, &mut emit)?;
        if !quiet {
            println!();
        }
        Ok(generation)
    }

    fn summary(&mut self, generation: &Generation) {
        let t = &generation.timings;
        let cached = if t.cached_tokens > 0 { format!(" (+{} cached)", t.cached_tokens) } else { String::new() };
        let speculation = self.generator.engine.stats().speculation.as_ref().and_then(speculation::summary);
        let speculation = speculation.map_or_else(String::new, |text| format!(" ({text})"));
        eprintln!(
            "\nprompt {} tokens{cached}, {:.1} tok/s; decode {} tokens, {:.1} tok/s{speculation}; {}; loaded {} in {:.2} s; {}",
            t.prompt_tokens,
            t.prompt_tok_per_s(),
            t.decoded_tokens,
            t.decode_tok_per_s(),
            generation.finish_reason.name(),
            table::bytes(self.load_time.bytes as f64),
            self.load_time.elapsed.as_secs_f64(),
            self.device,
        );
    }

    fn report(&mut self, generation: &Generation) -> serde_json::Value {
        let t = &generation.timings;
        let speculation = self.generator.engine.stats().speculation.map(|stats| {
            json!({
                "drafts": stats.all().drafts,
                "draft_tokens": stats.all().draft_tokens,
                "accepted_tokens": stats.all().accepted_tokens,
                "ngram_draft_tokens": stats.suffix.draft_tokens,
                "ngram_accepted_tokens": stats.suffix.accepted_tokens,
                "head_draft_tokens": stats.head.draft_tokens,
                "head_accepted_tokens": stats.head.accepted_tokens,
                "head_by_depth": stats.head_by_depth,
                "head_rows": stats.head_rows,
                "sequence_steps": stats.sequence_steps,
                "draft_seconds": stats.draft_seconds,
                "saved_seconds": stats.saved_seconds,
                "step_cost": stats.step_cost,
                "draft_cost": stats.draft_cost,
            })
        });
        json!({
            "speculation": speculation,
            "model": self.source.name,
            "device": self.device,
            "text": generation.answer,
            "thinking": generation.thinking,
            "token_ids": generation.token_ids,
            "finish_reason": generation.finish_reason.name(),
            "seed": self.sampling.seed,
            "prompt_tokens": t.prompt_tokens,
            "cached_tokens": t.cached_tokens,
            "completion_tokens": t.decoded_tokens,
            "prompt_ms": t.prompt.as_secs_f64() * 1e3,
            "prompt_tok_s": t.prompt_tok_per_s(),
            "decode_ms": t.decode.as_secs_f64() * 1e3,
            "decode_tok_s": t.decode_tok_per_s(),
            "load_ms": self.load_time.elapsed.as_secs_f64() * 1e3,
        })
    }
}

/// Flags over what `generation_config.json` says. Without `--seed`, the seed is the time.
pub fn sampling(flags: &SamplingOptions, source: &ModelSource, vocab_size: usize) -> Result<SamplingParams> {
    let default = default_sampling(source);
    let params = SamplingParams {
        temperature: flags.temperature.unwrap_or(default.temperature),
        top_p: flags.top_p.unwrap_or(default.top_p),
        top_k: flags.top_k.unwrap_or(default.top_k),
        min_p: flags.min_p.unwrap_or(default.min_p),
        repetition_penalty: flags.repetition_penalty.unwrap_or(default.repetition_penalty),
        presence_penalty: flags.presence_penalty.unwrap_or(default.presence_penalty),
        frequency_penalty: flags.frequency_penalty.unwrap_or(default.frequency_penalty),
        // From the process's random keys.
        seed: flags.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()),
        ..default
    };
    params.validate(vocab_size)?;
    Ok(params)
}

/// What `generation_config.json` says, over greedy.
fn default_sampling(source: &ModelSource) -> SamplingParams {
    let samples = source.generation_config.get("do_sample").and_then(serde_json::Value::as_bool).unwrap_or(true);
    let configured = |key: &str| source.generation_number(key).filter(|_| samples).map(|x| x as f32);
    SamplingParams {
        temperature: configured("temperature").unwrap_or(0.0),
        top_p: configured("top_p").unwrap_or(1.0),
        top_k: configured("top_k").map_or(0, |k| k as usize),
        min_p: configured("min_p").unwrap_or(0.0),
        repetition_penalty: configured("repetition_penalty").unwrap_or(1.0),
        ..SamplingParams::default()
    }
}
