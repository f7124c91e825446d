//! A step of one row is launched in three ways: operation by operation, with operations fused, and as a recorded graph. All
//! give the same bits. Without a GPU the tests say that they did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::config::ModelConfig;
use moellon_model::session::read_logits;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::CacheDtype;

const FORMATS: [&str; 12] = [
    "affine-2", "affine-3", "affine-4", "affine-5", "affine-6", "affine-8", "nvfp4", "mxfp4", "mxfp8", "fp8", "bf16",
    "q3a4",
];

fn open() -> Option<CudaBackend> {
    let options = CudaOptions { ordinal: 0, kernels: std::env::var_os("MOELLON_CUDA_KERNELS").map(Into::into) };
    CudaBackend::new(&options).map_err(|error| eprintln!("SKIP recorded steps of the CUDA back end: {error}")).ok()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Prefills `context` tokens and decodes one more in every way.
fn assert_same(name: &str, config: &ModelConfig, format: &str, contexts: &[usize], backend: &mut CudaBackend) {
    let plan = FormatPlan::parse(format).expect("format is known");
    let weights = Weights::load(config, &Synthetic::new(config, plan, 3), backend, &mut |_| {}).expect("weights load");
    let options =
        DecoderOptions { block_size: 32, num_blocks: 8, ..DecoderOptions::single_sequence(256, 256, CacheDtype::Bf16) };
    let table: Vec<u32> = (0..8).collect();
    let mut decoder = Decoder::new(config.clone(), weights, options, backend).expect("decoder fits");
    for &context in contexts {
        let tokens: Vec<u32> = (0..=context).map(|i| ((i * i * 7 + i * 3 + 1) % config.vocab_size) as u32).collect();
        let batch = |first: usize, tokens: &[u32]| {
            let mut batch = Batch::default();
            batch.push_sequence(tokens, first, &table, 32, LogitRows::Last);
            batch
        };
        decoder.forward_tapped(&batch(0, &tokens[..context]), backend, None).expect("prefill runs");
        let next = batch(context, &tokens[context..]);
        let logits = decoder.forward_tapped(&next, backend, None).expect("step runs");
        let expected = read_logits(logits, backend).expect("logits come back");
        assert!(expected.iter().all(|x| x.is_finite()), "{name} {format}: a logit is not finite");
        for run in ["op by op", "fused", "recorded", "replayed", "replayed again"] {
            let logits = decoder.forward(&next, backend).expect("step runs");
            let found = read_logits(logits, backend).expect("logits come back");
            let worst = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(bits(&found) == bits(&expected), "{name} {format} after {context}: {run} differs by {worst}");
        }
    }
}

#[test]
fn bundled_shape_in_every_format() {
    let Some(mut backend) = open() else { return };
    let json = include_bytes!("../../../models/moellon-tiny/config.json");
    let mut config = arch::parse(&serde_json::from_slice(json).expect("config is JSON")).expect("config is legal");
    config.num_mtp_layers = 0;
    config.layers.truncate(3);
    for format in FORMATS {
        // index_topk is 64: below it, and above.
        assert_same("bundled", &config, format, &[7, 80], &mut backend);
    }
}

#[test]
fn published_shapes() {
    let Some(mut backend) = open() else { return };
    for (shape, formats) in [
        ("qwen3-30b-a3b:layers=2,vocab=4096", &["affine-4", "nvfp4"][..]),
        ("glm-5.2-77:layers=2,vocab=4096", &["affine-4", "q3a4", "nvfp4"][..]),
        ("gpt-oss-20b:layers=2,vocab=4096", &["mxfp4"][..]),
        ("deepseek-v3:layers=1,vocab=4096", &["affine-4"][..]),
    ] {
        let config = preset(shape).expect("preset is known");
        for format in formats {
            assert_same(shape, &config, format, &[3, 150], &mut backend);
        }
    }
}
