//! Tiny random models for the engine's tests.
#![allow(dead_code, reason = "every test file uses a part")]

pub(crate) mod drawing;
pub(crate) mod faulty;

use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuOptions};
use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_checkpoint::Checkpoint;
use moellon_engine::{Engine, EngineOptions, Event, EventReceiver, Request, SampledToken, SamplingParams};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::{Backend, CacheDtype};
use std::path::PathBuf;

/// Slots of a block in all tests.
pub(crate) const BLOCK: usize = 8;

/// Sizes of an engine under test.
#[derive(Clone)]
pub(crate) struct Sizes {
    pub(crate) fixture: &'static str,
    pub(crate) num_blocks: usize,
    pub(crate) max_context: usize,
    pub(crate) max_batch_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) options: EngineOptions,
}

impl Default for Sizes {
    fn default() -> Self {
        Sizes {
            fixture: "glm_moe_dsa",
            num_blocks: 32,
            max_context: 96,
            max_batch_tokens: 16,
            max_sequences: 4,
            options: EngineOptions::default(),
        }
    }
}

pub(crate) fn cpu() -> Box<dyn Backend> {
    let options = CpuOptions { threads: Some(1), level: None, activation: ActivationMode::Exact, pin: false };
    Box::new(CpuBackend::new(options).expect("the portable level starts everywhere"))
}

/// A CUDA device; `None`, said aloud, where there is none.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn cuda(what: &str) -> Option<Box<dyn Backend>> {
    // A developer's CUBINs, where the variable names a folder.
    let kernels = std::env::var_os("MOELLON_CUDA_KERNELS").map(Into::into);
    let options = CudaOptions { kernels, ..CudaOptions::default() };
    match CudaBackend::new(&options) {
        Ok(backend) => Some(Box::new(backend)),
        Err(error) => {
            eprintln!("SKIP {what} on the CUDA back end: {error}");
            None
        }
    }
}

/// A GPU through wgpu; `None`, said aloud, where there is none.
#[allow(clippy::print_stderr, reason = "a skipped test says so")]
pub(crate) fn wgpu(what: &str) -> Option<Box<dyn Backend>> {
    match WgpuBackend::new(&WgpuOptions::default()) {
        Ok(backend) => Some(Box::new(backend)),
        Err(error) => {
            eprintln!("SKIP {what} on the wgpu back end: {error}");
            None
        }
    }
}

impl Sizes {
    /// An engine on the CPU.
    pub(crate) fn engine(&self) -> Engine {
        self.engine_on(cpu())
    }

    /// An engine on a given back end.
    pub(crate) fn engine_on(&self, mut backend: Box<dyn Backend>) -> Engine {
        let decoder = self.decoder(backend.as_mut());
        Engine::new(decoder, backend, self.options.clone()).expect("the engine starts")
    }

    pub(crate) fn decoder(&self, backend: &mut dyn Backend) -> Decoder {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/golden").join(self.fixture);
        let checkpoint = Checkpoint::open(&dir).expect("fixture opens");
        let config = arch::parse(&checkpoint.config).expect("fixture's config is legal");
        let weights = Weights::load(&config, &checkpoint, backend, &mut |_| {}).expect("fixture's weights load");
        let options = DecoderOptions {
            max_batch_tokens: self.max_batch_tokens,
            max_sequences: self.max_sequences,
            max_logit_rows: self.max_batch_tokens,
            max_context: self.max_context,
            block_size: BLOCK,
            num_blocks: self.num_blocks,
            cache_dtype: CacheDtype::Bf16,
        };
        Decoder::new(config, weights, options, backend).expect("decoder fits")
    }
}

/// A greedy request.
pub(crate) fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request {
        id: format!("test of {} tokens", prompt.len()),
        prompt,
        sampling: SamplingParams::default(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        logprobs: None,
        prompt_logprobs: false,
        constraint: None,
        thinking_budget: None,
        cache_salt: None,
    }
}

/// `len` tokens that depend on `seed`.
pub(crate) fn prompt(seed: u32, len: usize) -> Vec<u32> {
    (0..len as u32).map(|i| (seed.wrapping_mul(7919).wrapping_add(i * i * 31 + i * 17 + 3)) % 60 + 1).collect()
}

/// Everything that a receiver holds.
pub(crate) fn drain(receiver: &mut EventReceiver) -> Vec<Event> {
    std::iter::from_fn(|| receiver.try_recv()).collect()
}

pub(crate) fn tokens_of(events: &[Event]) -> Vec<SampledToken> {
    let tokens = events.iter().filter_map(|event| if let Event::Tokens(tokens) = event { Some(tokens) } else { None });
    tokens.flatten().cloned().collect()
}

pub(crate) fn ids_of(events: &[Event]) -> Vec<u32> {
    tokens_of(events).into_iter().map(|token| token.id).collect()
}

/// Steps until nothing is left, checking after each that no block leaks.
pub(crate) fn run(engine: &mut Engine) {
    for _ in 0..10_000 {
        let worked = engine.step().expect("steps work");
        engine.check().expect("no block leaks");
        if !worked && engine.is_idle() {
            let stats = engine.stats();
            assert_eq!((stats.used_blocks, stats.running, stats.waiting), (0, 0, 0));
            return;
        }
    }
    panic!("the engine does not come to an end");
}

/// Runs one request alone.
pub(crate) fn run_one(engine: &mut Engine, request: Request) -> Vec<Event> {
    let mut receiver = engine.submit(request).expect("the request is legal");
    run(engine);
    drain(&mut receiver)
}
