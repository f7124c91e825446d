//! `moellon serve`: the model behind OpenAI's and Anthropic's protocols.

use crate::cli::{CacheChoice, ServeOptions, ThinkingChoice};
use crate::model_source::ModelSource;
use crate::{backend, load, run, table};
use anyhow::{Context as _, Result};
use moellon_engine::{
    DiskCacheOptions, Engine, EngineHandle, EngineOptions, Event, EventReceiver, Request, RequestError,
};
use moellon_model::DecoderOptions;
use moellon_model::account::cache_bytes_per_token;
use moellon_ops::CacheDtype;
use moellon_serve::{
    EventSource, EventStream, Generator, GeneratorStats, GrammarConstraints, ServedModel, ThinkingPolicy,
    detect_tool_call_format,
};
use moellon_text::{ChatTemplate, ThinkingFormat};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Slots of a cache block.
const BLOCK_SIZE: usize = 32;

/// Runs the command.
pub fn run(options: &ServeOptions) -> Result<()> {
    let directory = options.model.model.as_deref();
    let source = ModelSource::open(directory)?;
    let tokenizer = source.tokenizer(directory)?;
    let template = source.chat_template(directory, &tokenizer)?;
    let sizes = sizes(options, &source)?;
    let mut backend = backend::create(&options.device, options.activations)?;
    let device = backend.caps().device.clone();
    let (decoder, _) = load::load_sized(&source, sizes, backend.as_mut())?;
    let trunk = decoder.weights().account.trunk();
    let (weights_bytes, bytes_per_token) = (trunk.size_bytes, trunk.bytes_per_token);
    let disk_cache = match &options.disk_cache {
        None => None,
        Some(dir) => Some(DiskCacheOptions {
            dir: dir.clone(),
            max_bytes: options.disk_cache_gb.saturating_mul(1_000_000_000),
            model_identity: source.checkpoint.identity(),
        }),
    };
    let engine_options = EngineOptions { max_waiting: options.max_waiting, disk_cache, ..EngineOptions::default() };
    let handle = EngineHandle::spawn(Engine::new(decoder, backend, engine_options)?)?;
    let constraints = GrammarConstraints::new(Arc::clone(&tokenizer), source.config.vocab_size)
        .map_err(|reason| anyhow::anyhow!("constraints: {reason}"))?;
    let name = options.name.clone().unwrap_or_else(|| source.api_name());
    let model = ServedModel {
        name: name.clone(),
        aliases: options.alias.clone(),
        tool_call_format: template.as_ref().and_then(|(_, text)| detect_tool_call_format(text)),
        template: template.map(|(template, _): (ChatTemplate, String)| Arc::new(template)),
        thinking_format: ThinkingFormat::default(),
        stop_token_ids: source.stop_ids(&tokenizer),
        context_length: sizes.max_context,
        vocab_size: source.config.vocab_size,
        default_sampling: run::default_sampling(&source),
        constraints: Some(Arc::new(constraints)),
        source: source.name.clone(),
        device,
        tokenizer,
    };
    let serve_options = moellon_serve::ServeOptions {
        address: SocketAddr::new(options.host, options.port),
        api_keys: api_keys(options)?,
        allowed_hosts: options.allowed_host.clone(),
        allowed_origins: options.allowed_origin.clone(),
        drain: Duration::from_secs(options.drain),
        thinking: match options.thinking {
            ThinkingChoice::Template => ThinkingPolicy::Template,
            ThinkingChoice::On => ThinkingPolicy::On,
            ThinkingChoice::Off => ThinkingPolicy::Off,
            ThinkingChoice::Auto => ThinkingPolicy::Auto,
        },
        ..moellon_serve::ServeOptions::default()
    };
    let cache_bytes = cache_bytes_per_token(&source.config, sizes.cache_dtype) * (sizes.num_blocks * BLOCK_SIZE) as u64;
    eprintln!(
        "{name} on http://{}, context {}, cache {} for {} tokens",
        serve_options.address,
        sizes.max_context,
        table::bytes(cache_bytes as f64),
        sizes.num_blocks * BLOCK_SIZE
    );
    let drain = serve_options.drain;
    let generator = EngineGenerator { handle: handle.clone(), weights_bytes, bytes_per_token };
    let served = moellon_serve::run(serve_options, model, Arc::new(generator));
    handle.shutdown(drain);
    Ok(served?)
}

fn sizes(options: &ServeOptions, source: &ModelSource) -> Result<DecoderOptions> {
    let longest = source.config.max_position_embeddings;
    let max_context = options.context.unwrap_or(longest.min(32_768));
    anyhow::ensure!(
        (2..=longest).contains(&max_context),
        "--context is {max_context}, expected 2 to {longest}, what the model was made for"
    );
    anyhow::ensure!(
        (1..=1024).contains(&options.max_sequences),
        "--max-sequences is {}, expected 1 to 1024",
        options.max_sequences
    );
    let cache_dtype = match options.cache {
        CacheChoice::F32 => CacheDtype::F32,
        CacheChoice::Bf16 => CacheDtype::Bf16,
    };
    // By default room for four contexts of full length; short ones share it.
    let blocks_of_context = max_context.div_ceil(BLOCK_SIZE);
    let num_blocks = match options.cache_gb {
        None => 4 * blocks_of_context,
        Some(gb) => {
            let block_bytes = cache_bytes_per_token(&source.config, cache_dtype) as f64 * BLOCK_SIZE as f64;
            let blocks = (gb * 1e9 / block_bytes) as usize;
            anyhow::ensure!(
                blocks >= blocks_of_context,
                "--cache-gb is {gb}, expected at least {:.3} for one context of {max_context}",
                blocks_of_context as f64 * block_bytes / 1e9
            );
            blocks
        }
    };
    Ok(DecoderOptions {
        max_batch_tokens: options.max_batch_tokens.max(options.max_sequences),
        max_sequences: options.max_sequences,
        max_logit_rows: options.max_batch_tokens.max(options.max_sequences),
        max_context,
        block_size: BLOCK_SIZE,
        num_blocks,
        cache_dtype,
    })
}

fn api_keys(options: &ServeOptions) -> Result<Vec<String>> {
    let mut keys = options.api_key.clone();
    if let Some(file) = &options.api_key_file {
        let text = std::fs::read_to_string(file).with_context(|| format!("--api-key-file {}", file.display()))?;
        keys.extend(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned));
    }
    Ok(keys)
}

/// The engine behind the server's own trait, with what is known of its model.
struct EngineGenerator {
    handle: EngineHandle,
    weights_bytes: u64,
    /// Bytes of weights that one token reads at batch 1.
    bytes_per_token: f64,
}

impl Generator for EngineGenerator {
    fn submit(&self, request: Request) -> Result<EventStream, RequestError> {
        Ok(Box::new(Events(self.handle.submit(request)?)))
    }

    fn stats(&self) -> GeneratorStats {
        let stats = self.handle.stats();
        GeneratorStats {
            running: stats.running,
            waiting: stats.waiting,
            steps: stats.steps,
            since_last_step: stats.since_progress,
            failed: stats.failures_in_a_row > 0,
            restarts: stats.restarts,
            cache_used_bytes: stats.used_bytes(),
            cache_reusable_bytes: stats.reusable_bytes(),
            cache_total_bytes: stats.total_bytes(),
            prefix_queried_tokens: stats.prefix_queried_tokens,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            preemptions: stats.preemptions,
            admission_rejects: stats.rejected,
            weights_bytes: self.weights_bytes,
            bytes_read_per_token: Some(self.bytes_per_token),
            ..GeneratorStats::default()
        }
    }
}

/// Dropping it cancels the request, as dropping the receiver does.
struct Events(EventReceiver);

impl EventSource for Events {
    fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.0.poll_recv(context)
    }
}
