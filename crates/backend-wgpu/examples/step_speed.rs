//! Times recorded steps of a synthetic model without the rest of the program: `step_speed [SHAPE [FORMAT [BATCHES]]]`.
#![allow(clippy::print_stdout)]

use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions};
use moellon_ops::{Backend, CacheDtype, ElementType, Stage, StepTimes};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const CONTEXT: usize = 128;
const BLOCK: usize = 64;
const STEPS: usize = 40;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let argument = |i: usize, default: &str| arguments.get(i).cloned().unwrap_or_else(|| default.to_owned());
    let (shape, format) = (argument(1, "glm-5.2-77:layers=12"), argument(2, "affine-4"));
    let batches: Vec<usize> = argument(3, "1,8").split(',').map(|n| n.parse().expect("a batch is a number")).collect();
    let largest = batches.iter().copied().max().expect("a batch");
    let config = preset(&shape).expect("preset is known");
    let mut backend = WgpuBackend::new(&WgpuOptions::default()).expect("an adapter");
    println!("{}: {:?}", backend.caps().device, backend.self_test());
    let plan = FormatPlan::parse(&format).expect("format is known");
    let started = Instant::now();
    let weights =
        Weights::load(&config, &Synthetic::new(&config, plan, 1), &mut backend, &mut |_| {}).expect("weights load");
    let (kernels, compiling) = backend.compiled();
    println!("loaded in {:.1} s, {kernels} kernels compiled in {compiling:.1?}", started.elapsed().as_secs_f64());
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
    println!("read bandwidth {:.0} GB/s", backend.measure_read().expect("measured").unwrap_or(0.0) / 1e9);
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
                samples.push(started.elapsed().as_secs_f64() / STEPS as f64);
            }
        }
        samples.sort_by(f64::total_cmp);
        let times: Vec<StepTimes> =
            (0..8).filter_map(|_| decoder.forward_timed(&next(), &mut backend).expect("step runs")).collect();
        let mean = |of: &dyn Fn(&StepTimes) -> f64| times.iter().map(of).sum::<f64>() / times.len().max(1) as f64;
        println!(
            "batch {batch}: {:.1} tok/s, {:.3} ms a step, {:.3} on the device's clock",
            batch as f64 / samples[2],
            samples[2] * 1e3,
            mean(&|t| t.step) * 1e3
        );
        let mut kernels = BTreeMap::new();
        for (name, grid, seconds) in backend.time_kernels().expect("kernels run") {
            let entry: &mut (usize, f64) = kernels.entry((name, grid)).or_default();
            *entry = (entry.0 + 1, entry.1 + seconds);
        }
        for ((name, grid), (count, seconds)) in kernels {
            println!("    {count:>4} x {name:<36} {grid:?} {:8.1} us each", seconds * 1e6 / count as f64);
        }
        for (i, stage) in Stage::ALL.iter().enumerate() {
            let seconds = mean(&|t| t.stages[i]);
            if seconds > 0.0 {
                println!("  {:<18} {:8.1} us", stage.name(), seconds * 1e6);
            }
        }
    }
}
