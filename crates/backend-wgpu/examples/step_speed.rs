//! Times recorded steps of a synthetic model without the rest of the program, and each of their kernels by the adapter's clock:
//! `step_speed [SHAPE [FORMAT [BATCHES [PROMPTS]]]]`. A line of JSON a batch, and two for each length of a prompt: with cooperative
//! matrices where the adapter has them, and without.
#![allow(clippy::print_stdout, clippy::print_stderr)]

use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions};
use moellon_ops::profile::Profiler;
use moellon_ops::{Backend, CacheDtype, ElementType, Stage, StepTimes};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CONTEXT: usize = 128;
const BLOCK: usize = 64;
const STEPS: usize = 40;
const PROFILED: u64 = 4;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let argument = |i: usize, default: &str| arguments.get(i).cloned().unwrap_or_else(|| default.to_owned());
    let (shape, format) = (argument(1, "glm-5.2-77:layers=12"), argument(2, "affine-4"));
    let numbers = |text: String| -> Vec<usize> {
        text.split(',').filter(|n| !n.is_empty()).map(|n| n.parse().expect("a number")).collect()
    };
    let (batches, prompts) = (numbers(argument(3, "1,8")), numbers(argument(4, "")));
    if !batches.is_empty() {
        decode(&shape, &format, batches);
    }
    if !prompts.is_empty() {
        for without_matrices in [false, true] {
            prefill(&shape, &format, &prompts, without_matrices);
        }
    }
}

/// Kernels are compiled once for all back ends of this run, and the next.
fn options() -> WgpuOptions {
    WgpuOptions { cache_folder: Some(std::env::temp_dir().join("moellon-step-speed")), ..WgpuOptions::default() }
}

/// Prompts of one sequence, each alone in the cache.
fn prefill(shape: &str, format: &str, prompts: &[usize], without_matrices: bool) {
    const RUNS: usize = 7;
    let config = preset(shape).expect("preset is known");
    let mut backend = WgpuBackend::new(&WgpuOptions { without_matrices, ..options() }).expect("an adapter");
    let plan = FormatPlan::parse(format).expect("format is known");
    let weights =
        Weights::load(&config, &Synthetic::new(&config, plan, 1), &mut backend, &mut |_| {}).expect("weights load");
    let largest = prompts.iter().copied().max().expect("a prompt");
    let options = DecoderOptions {
        block_size: BLOCK,
        num_blocks: largest.div_ceil(BLOCK),
        ..DecoderOptions::single_sequence(largest, largest, CacheDtype::Bf16)
    };
    let vocab_size = config.vocab_size;
    let mut decoder = Decoder::new(config, weights, options, &mut backend).expect("decoder fits");
    let table: Vec<u32> = (0..largest.div_ceil(BLOCK) as u32).collect();
    for &length in prompts {
        let tokens: Vec<u32> = (0..length).map(|i| ((i * i * 7 + i * 3 + 1) % vocab_size) as u32).collect();
        let mut prompt = Batch::default();
        prompt.push_sequence(&tokens, 0, &table, BLOCK, LogitRows::Last);
        let mut samples = Vec::new();
        let mut logits = vec![0.0; vocab_size];
        for run in 0..=RUNS {
            let started = Instant::now();
            let last = decoder.forward_tapped(&prompt, &mut backend, None).expect("prompt runs");
            backend.read_f32(last, &mut logits).expect("logits come back");
            // The first one warms up.
            if run > 0 {
                samples.push(started.elapsed().as_secs_f64() * 1e3);
            }
        }
        let times = decoder.forward_timed(&prompt, &mut backend).expect("prompt runs").unwrap_or_default();
        let stages: Vec<Value> = Stage::ALL
            .iter()
            .zip(times.stages)
            .filter(|(_, seconds)| *seconds > 0.0)
            .map(|(stage, seconds)| json!({ "stage": stage.name(), "us": seconds * 1e6 }))
            .collect();
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let ms = sorted[RUNS / 2];
        let bits = logits.iter().fold(0u64, |hash, x| hash.wrapping_mul(31).wrapping_add(u64::from(x.to_bits())));
        println!(
            "{}",
            json!({
                "adapter": backend.caps().device, "shape": shape, "format": format, "prompt": length,
                "cooperative_matrices": backend.self_test().exact_matrices && !without_matrices,
                "tok_s": length as f64 * 1e3 / ms, "ms": ms, "runs_ms": samples, "device_ms": times.step * 1e3,
                "stages": stages, "kernels": kernels_of_last_step(&mut backend), "hash_of_logits": format!("{bits:016x}"),
            })
        );
    }
}

fn decode(shape: &str, format: &str, batches: Vec<usize>) {
    let largest = batches.iter().copied().max().expect("a batch");
    let config = preset(shape).expect("preset is known");
    let mut backend = WgpuBackend::new(&options()).expect("an adapter");
    eprintln!("{}: {:?}", backend.caps().device, backend.self_test());
    let plan = FormatPlan::parse(format).expect("format is known");
    let started = Instant::now();
    let weights =
        Weights::load(&config, &Synthetic::new(&config, plan, 1), &mut backend, &mut |_| {}).expect("weights load");
    let (kernels, compiling) = backend.compiled();
    eprintln!("loaded in {:.1} s, {kernels} kernels compiled in {compiling:.1?}", started.elapsed().as_secs_f64());
    let blocks = (CONTEXT + 1).div_ceil(BLOCK);
    let options = DecoderOptions {
        max_batch_tokens: largest,
        max_sequences: largest,
        max_logit_rows: largest,
        max_context: CONTEXT + 1,
        block_size: BLOCK,
        num_blocks: largest * blocks,
        cache_dtype: CacheDtype::Bf16,
    };
    let vocab_size = config.vocab_size;
    let mut decoder = Decoder::new(config, weights, options, &mut backend).expect("decoder fits");
    decoder.fill_caches(1, &mut backend).expect("caches are filled");
    let mut seed = 1usize;
    for batch in batches {
        let chosen = backend.alloc("chosen tokens", ElementType::U32, batch).expect("fits").tensor(batch, 1);
        let mut next = || {
            let mut tokens = Batch::default();
            for sequence in 0..batch {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let table: Vec<u32> = (0..blocks).map(|b| (sequence * blocks + b) as u32).collect();
                tokens.push_sequence(&[((seed >> 33) % vocab_size) as u32], CONTEXT, &table, BLOCK, LogitRows::Last);
            }
            tokens
        };
        let mut samples = Vec::new();
        // An idle adapter takes its time to clock up.
        let warm = Instant::now();
        while warm.elapsed() < Duration::from_secs(2) {
            let logits = decoder.forward(&next(), &mut backend).expect("step runs");
            greedy(logits, chosen, &mut backend).expect("tokens are chosen");
        }
        for window in 0..6 {
            let started = Instant::now();
            for _ in 0..STEPS {
                let logits = decoder.forward(&next(), &mut backend).expect("step runs");
                greedy(logits, chosen, &mut backend).expect("tokens are chosen");
            }
            // The first window records and warms up.
            if window > 0 {
                samples.push(started.elapsed().as_secs_f64() * 1e3 / STEPS as f64);
            }
        }
        let times: Vec<StepTimes> =
            (0..8).filter_map(|_| decoder.forward_timed(&next(), &mut backend).expect("step runs")).collect();
        let mean = |of: &dyn Fn(&StepTimes) -> f64| times.iter().map(of).sum::<f64>() / times.len().max(1) as f64;
        let device_ms = mean(&|t| t.step) * 1e3;
        let kernels = kernels_of_last_step(&mut backend);
        let read_gb_s = backend.measure_read().expect("measured").unwrap_or(0.0) / 1e9;
        // Bytes of other random tokens, operation by operation.
        let mut profiler = Profiler::new(&mut backend);
        for _ in 0..PROFILED {
            decoder.forward(&next(), &mut profiler).expect("step runs");
        }
        let profile = profiler.profile().clone();
        let bytes = profile.total_bytes() / PROFILED;
        let stages: Vec<_> = Stage::ALL
            .iter()
            .enumerate()
            .filter(|(_, stage)| profile.stage(**stage).operations > 0)
            .map(|(i, stage)| {
                let bytes = profile.stage(*stage).bytes / PROFILED;
                json!({ "stage": stage.name(), "us": mean(&|t| t.stages[i]) * 1e6, "bytes": bytes })
            })
            .collect();
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let step_ms = sorted[sorted.len() / 2];
        println!(
            "{}",
            json!({
                "adapter": backend.caps().device, "shape": shape, "format": format, "batch": batch, "context": CONTEXT,
                "tok_s": batch as f64 * 1e3 / step_ms, "step_ms": step_ms, "windows_ms": samples, "device_ms": device_ms,
                "bytes": bytes, "distinct_experts": profile.distinct_experts as f64 / profile.moe_layers.max(1) as f64,
                "read_gb_s": read_gb_s, "stages": stages, "kernels": kernels,
            })
        );
    }
}

/// Kernels that were launched with the same grid, together.
fn kernels_of_last_step(backend: &mut WgpuBackend) -> Vec<Value> {
    let mut kernels = BTreeMap::new();
    for (name, grid, seconds) in backend.time_kernels().expect("kernels run") {
        let entry: &mut (usize, f64) = kernels.entry((name, grid)).or_default();
        *entry = (entry.0 + 1, entry.1 + seconds);
    }
    let line = |((name, grid), (count, seconds)): ((Arc<str>, [u32; 3]), (usize, f64))| json!({ "kernel": &*name, "workgroups": grid, "launches": count, "us": seconds * 1e6 / count as f64 });
    kernels.into_iter().map(line).collect()
}
