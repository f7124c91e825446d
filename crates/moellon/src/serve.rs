//! `moellon serve`: the model behind OpenAI's and Anthropic's protocols.

use crate::cli::{CacheChoice, ServeOptions, ThinkingChoice};
use crate::model_source::ModelSource;
use crate::{backend, doctor, load, run, speculation, table};
use anyhow::{Context as _, Result};
use moellon_engine::{
    DiskCacheOptions, EngineHandle, EngineOptions, Event, EventReceiver, Request, RequestError, SpeculationStats,
};
use moellon_model::account::cache_bytes_per_token;
use moellon_model::synthetic::preset;
use moellon_model::{Decoder, DecoderOptions, ModelConfig};
use moellon_ops::{Backend, CacheDtype};
use moellon_serve::{
    EventSource, EventStream, Generator, GeneratorStats, GrammarConstraints, Resident, ServedModel, ThinkingPolicy,
    detect_tool_call_format,
};
use moellon_text::{ChatTemplate, ThinkingFormat, Tokenizer};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

/// Slots of a cache block.
const BLOCK_SIZE: usize = 32;

/// What is served, before its weights are on a device.
struct Source {
    model: ModelSource,
    /// What the decoder is made of: the checkpoint's numbers, or a preset's.
    config: ModelConfig,
    tokenizer: Arc<Tokenizer>,
    template: Option<(ChatTemplate, String)>,
    name: String,
    /// Names the weights: cached prefixes of others are of no use.
    identity: String,
}

impl Source {
    fn open(options: &ServeOptions) -> Result<Self> {
        let directory = options.model.model.as_deref();
        let model = ModelSource::open(directory)?;
        let tokenizer = model.tokenizer(directory)?;
        let template = match &options.chat_template {
            None => model.chat_template(directory, &tokenizer)?,
            Some(file) => Some(chat_template(file, &tokenizer)?),
        };
        let (config, name, identity) = match &options.synthetic {
            None => (model.config.clone(), model.api_name(), model.checkpoint.identity()),
            Some(spec) => {
                let config = preset(spec)?;
                tokenizer.check_vocab(config.vocab_size).with_context(|| format!("--synthetic {spec}"))?;
                (config, "synthetic".to_owned(), format!("synthetic {spec} {}", options.format))
            }
        };
        let name = options.name.clone().unwrap_or(name);
        Ok(Source { model, config, tokenizer, template, name, identity })
    }

    fn load(&self, options: &ServeOptions, sizes: DecoderOptions, backend: &mut dyn Backend) -> Result<Decoder> {
        /// Of random weights: the same at every start, so that cached prefixes stay usable.
        const SEED: u64 = 1;
        let mtp = load::Mtp::ForDrafts(options.speculation.draft_vocab.0);
        let (decoder, _) = match &options.synthetic {
            None => load::load_sized(&self.model, sizes, mtp, backend)?,
            Some(_) => load::load_synthetic(&self.config, &options.format, SEED, false, mtp, sizes, backend)?,
        };
        Ok(decoder)
    }
}

/// Makes the engine, at the start and after every unload.
struct Loader {
    options: ServeOptions,
    source: Source,
    sizes: DecoderOptions,
    /// Bytes a second that all threads together read, measured at the start.
    read_bandwidth: f64,
}

impl Loader {
    fn load(&self) -> Result<EngineGenerator> {
        let (options, source) = (&self.options, &self.source);
        let mut backend = backend::create(&options.device, options.activations)?;
        let device = backend.caps().device.clone();
        let decoder = source.load(options, self.sizes, backend.as_mut())?;
        let trunk = decoder.weights().account.trunk();
        let (weights_bytes, bytes_per_token) = (trunk.size_bytes, trunk.bytes_per_token);
        let disk_cache = options.disk_cache.as_ref().map(|dir| DiskCacheOptions {
            dir: dir.clone(),
            max_bytes: options.disk_cache_gb.saturating_mul(1_000_000_000),
            model_identity: source.identity.clone(),
        });
        let engine_options = EngineOptions {
            max_waiting: options.max_waiting,
            max_decode_slowdown: options.max_decode_slowdown,
            disk_cache,
            ..EngineOptions::default()
        };
        let (flags, tokenizer) = (&options.speculation, &source.tokenizer);
        let engine = speculation::engine(decoder, backend, flags, &source.identity, tokenizer, engine_options)?;
        let (handle, read_bandwidth) = (EngineHandle::spawn(engine)?, self.read_bandwidth);
        Ok(EngineGenerator { handle, device, weights_bytes, bytes_per_token, read_bandwidth })
    }
}

/// Runs the command.
pub fn run(options: ServeOptions) -> Result<()> {
    let mut source = Source::open(&options)?;
    let sizes = sizes(&options, &source.config)?;
    let default_sampling = run::sampling(&options.sampling, &source.model, source.config.vocab_size)?;
    anyhow::ensure!(options.max_tokens != Some(0), "--max-tokens is 0, expected at least 1");
    anyhow::ensure!(
        options.max_decode_slowdown >= 1.0 && options.max_decode_slowdown.is_finite(),
        "--max-decode-slowdown is {}, expected a number of at least 1",
        options.max_decode_slowdown
    );
    // Before the weights are there: it takes half a gigabyte for half a second.
    let read_bandwidth = doctor::measure_bandwidth(options.device.threads)?.gb_per_s * 1e9;
    let template = source.template.take();
    let loader = Arc::new(Loader { options, source, sizes, read_bandwidth });
    let (options, source) = (&loader.options, &loader.source);
    let generator = loader.load()?;
    let device = generator.device.clone();
    let constraints = GrammarConstraints::new(Arc::clone(&source.tokenizer), source.config.vocab_size)
        .map_err(|reason| anyhow::anyhow!("constraints: {reason}"))?;
    let name = source.name.clone();
    let stop_token_ids = source.model.stop_ids(&source.tokenizer);
    let cache_bytes = cache_bytes_per_token(&source.config, sizes.cache_dtype) * (sizes.num_blocks * BLOCK_SIZE) as u64;
    let model = ServedModel {
        name: name.clone(),
        aliases: options.alias.clone(),
        tool_call_format: template.as_ref().and_then(|(_, text)| detect_tool_call_format(text)),
        template: template.map(|(template, _)| Arc::new(template)),
        thinking_format: ThinkingFormat::default(),
        stop_token_ids,
        context_length: sizes.max_context,
        vocab_size: source.config.vocab_size,
        default_sampling,
        default_seed: options.sampling.seed,
        default_max_tokens: options.max_tokens,
        constraints: Some(Arc::new(constraints)),
        source: source.model.name.clone(),
        device,
        tokenizer: Arc::clone(&source.tokenizer),
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
    eprintln!(
        "{name} on http://{}, context {}, cache {} for {} tokens",
        serve_options.address,
        sizes.max_context,
        table::bytes(cache_bytes as f64),
        sizes.num_blocks * BLOCK_SIZE
    );
    let idle = options.idle_unload.map(Duration::from_secs);
    let max_waiting = options.max_waiting;
    let load = move || {
        let generator = loader.load().map_err(|error| format!("{error:#}"))?;
        Ok(Arc::new(generator) as Arc<dyn Generator>)
    };
    let resident = Arc::new(Resident::new(Arc::new(generator), load, idle, max_waiting)?);
    let served = moellon_serve::run(serve_options, model, Arc::clone(&resident) as Arc<dyn Generator>);
    resident.close();
    Ok(served?)
}

/// A template in a file, with its source.
fn chat_template(file: &Path, tokenizer: &Tokenizer) -> Result<(ChatTemplate, String)> {
    let context = || format!("--chat-template {}", file.display());
    let source = std::fs::read_to_string(file).with_context(context)?;
    let template = ChatTemplate::new(&source, tokenizer.config().special_tokens()).with_context(context)?;
    Ok((template, source))
}

fn sizes(options: &ServeOptions, config: &ModelConfig) -> Result<DecoderOptions> {
    let longest = config.max_position_embeddings;
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
            let block_bytes = cache_bytes_per_token(config, cache_dtype) as f64 * BLOCK_SIZE as f64;
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
    /// What computes, in words.
    device: String,
    weights_bytes: u64,
    /// Bytes of weights that one token reads at batch 1.
    bytes_per_token: f64,
    /// As in [`Loader`].
    read_bandwidth: f64,
}

impl Generator for EngineGenerator {
    fn submit(&self, request: Request) -> Result<EventStream, RequestError> {
        Ok(Box::new(Events(self.handle.submit(request)?)))
    }

    fn close(&self) {
        // Who is still in work had the server's drain time.
        self.handle.shutdown(Duration::ZERO);
    }

    fn stats(&self) -> GeneratorStats {
        let stats = self.handle.stats();
        let speculation = stats.speculation.as_ref().map(SpeculationStats::all).unwrap_or_default();
        GeneratorStats {
            drafts: speculation.drafts,
            draft_tokens: speculation.draft_tokens,
            accepted_draft_tokens: speculation.accepted_tokens,
            speculation_saved: stats.speculation.as_ref().map(|s| s.saved_seconds),
            draft_time: stats.speculation.as_ref().map_or(0.0, |s| s.draft_seconds),
            head_acceptance: stats.speculation.as_ref().map(|s| s.head_chance),
            running: stats.running,
            waiting: stats.waiting,
            steps: stats.steps,
            since_last_step: stats.since_progress,
            failed: stats.failures_in_a_row > 0 || !self.handle.is_running(),
            failures_in_a_row: stats.failures_in_a_row,
            restarts: stats.restarts,
            cache_used_bytes: stats.used_bytes(),
            cache_reusable_bytes: stats.reusable_bytes(),
            cache_total_bytes: stats.total_bytes(),
            prefix_queried_tokens: stats.prefix_queried_tokens,
            prefix_hit_tokens: stats.prefix_hit_tokens,
            disk_hit_tokens: stats.disk_hit_tokens,
            masks: stats.masks,
            mask_time: stats.mask_time,
            preemptions: stats.preemptions,
            admission_rejects: stats.rejected,
            unloaded: false,
            weights_bytes: self.weights_bytes,
            bytes_read_per_token: Some(self.bytes_per_token),
            bandwidth_fraction: stats.counted_step.map(|step| step.bytes_per_s() / self.read_bandwidth),
            experts_unique_per_step: stats.counted_step.and_then(|step| step.distinct_experts),
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
