//! Steps of the CUDA back end: SHAPE FORMAT ROUNDS BATCH.. prints tok/s of each batch.
#![allow(clippy::print_stdout, reason = "a program")]
use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions};
use moellon_ops::*;
use moellon_tensor::rng::SplitMix64;
use std::time::Instant;

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let rounds: usize = words[2].parse()?;
    let batches: Vec<usize> = words[3..].iter().map(|n| n.parse().unwrap()).collect();
    let most = *batches.iter().max().unwrap();
    let config = preset(&words[0])?;
    let plan = FormatPlan::parse(&words[1]).ok_or(FormatPlan::NAMES)?;
    let (context, block) = (128, 64);
    let blocks = (context + 1usize).div_ceil(block);
    let options =
        CudaOptions { kernels: std::env::var_os("MOELLON_CUDA_KERNELS").map(Into::into), ..CudaOptions::default() };
    let mut backend = CudaBackend::new(&options)?;
    let start = Instant::now();
    let weights = Weights::load(&config, &Synthetic::new(&config, plan, 1), &mut backend, &mut |_| {})?;
    println!("loaded in {:.1} s", start.elapsed().as_secs_f64());
    let options = DecoderOptions {
        max_batch_tokens: most,
        max_sequences: most,
        max_logit_rows: most,
        max_context: context + 1,
        block_size: block,
        num_blocks: most * blocks,
        cache_dtype: CacheDtype::Bf16,
    };
    let mut decoder = Decoder::new(config, weights, options, &mut backend)?;
    decoder.fill_caches(1, &mut backend)?;
    let chosen = backend.alloc("chosen tokens", ElementType::U32, most)?;
    let mut rng = SplitMix64::new(7);
    for batch_size in batches {
        let mut seconds = Vec::new();
        for round in 0..rounds + 4 {
            let mut batch = Batch::default();
            for s in 0..batch_size {
                let table: Vec<u32> = (0..blocks).map(|b| (s * blocks + b) as u32).collect();
                batch.push_sequence(
                    &[rng.below(decoder.config().vocab_size) as u32],
                    context,
                    &table,
                    block,
                    LogitRows::Last,
                );
            }
            let start = Instant::now();
            let logits = decoder.forward(&batch, &mut backend)?;
            greedy(logits, chosen.tensor(batch_size, 1), &mut backend)?;
            if round >= 4 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        seconds.sort_by(f64::total_cmp);
        let m = seconds[seconds.len() / 2];
        println!(
            "batch {batch_size}: {:.3} ms ({:.3}-{:.3}), {:.1} tok/s",
            m * 1e3,
            seconds[seconds.len() / 4] * 1e3,
            seconds[seconds.len() * 3 / 4] * 1e3,
            batch_size as f64 / m
        );
    }
    Ok(())
}
