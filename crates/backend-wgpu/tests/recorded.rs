//! A step is launched in two ways: operation by operation, and as a whole, recorded with operations fused and replayed. Both give the same
//! bits, and so do rows alone and together. Without an adapter the tests say that they did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

use moellon_backend_wgpu::{AdapterKind, WgpuBackend, WgpuOptions, adapters};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::config::ModelConfig;
use moellon_model::session::read_logits;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::CacheDtype;

/// The first two of these where the adapter is a CPU, which compiles kernels for longer than it runs them.
const FORMATS: [&str; 12] = [
    "affine-4", "nvfp4", "affine-2", "affine-3", "affine-5", "affine-6", "affine-8", "mxfp4", "mxfp8", "fp8", "bf16",
    "q3a4",
];

fn open() -> Option<WgpuBackend> {
    open_with(&WgpuOptions::default())
}

fn open_with(options: &WgpuOptions) -> Option<WgpuBackend> {
    let opened = WgpuBackend::new(options);
    opened.map_err(|error| eprintln!("SKIP recorded steps of the wgpu back end: {error}")).ok()
}

fn is_software() -> bool {
    adapters().first().is_none_or(|adapter| adapter.kind == AdapterKind::Software)
}

const SEQUENCES: usize = 3;
const BLOCK: usize = 32;

/// Prefills contexts of several sequences and decodes one more token of each, alone and together, in every way.
fn assert_same(name: &str, config: &ModelConfig, format: &str, contexts: &[usize], backend: &mut WgpuBackend) {
    let plan = FormatPlan::parse(format).expect("format is known");
    let weights = Weights::load(config, &Synthetic::new(config, plan, 3), backend, &mut |_| {}).expect("weights load");
    let options = DecoderOptions {
        block_size: BLOCK,
        num_blocks: 8 * SEQUENCES,
        max_sequences: SEQUENCES,
        ..DecoderOptions::single_sequence(256, 256, CacheDtype::Bf16)
    };
    let tables: Vec<Vec<u32>> = (0..SEQUENCES).map(|s| (8 * s as u32..8 * s as u32 + 8).collect()).collect();
    let mut decoder = Decoder::new(config.clone(), weights, options, backend).expect("decoder fits");
    let compiled = backend.compiled().0;
    for &context in contexts {
        let token = |s: usize, i: usize| ((i * i * 7 + i * 3 + s * 11 + 1) % config.vocab_size) as u32;
        let mut together = Batch::default();
        let mut alone = Vec::new();
        for (s, table) in tables.iter().enumerate() {
            let tokens: Vec<u32> = (0..=context).map(|i| token(s, i)).collect();
            let mut prompt = Batch::default();
            prompt.push_sequence(&tokens[..context], 0, table, BLOCK, LogitRows::Last);
            decoder.forward_tapped(&prompt, backend, None).expect("prefill runs");
            let mut next = Batch::default();
            next.push_sequence(&tokens[context..], context, table, BLOCK, LogitRows::Last);
            let logits = decoder.forward_tapped(&next, backend, None).expect("step runs");
            let expected = read_logits(logits, backend).expect("logits come back");
            assert!(expected.iter().all(|x| x.is_finite()), "{name} {format}: a logit is not finite");
            for run in ["recorded", "replayed", "replayed again"] {
                let logits = decoder.forward(&next, backend).expect("step runs");
                assert_bits(&expected, &read_logits(logits, backend).expect("logits come back"), name, format, run);
            }
            together.push_sequence(&tokens[context..], context, table, BLOCK, LogitRows::Last);
            alone.extend(expected);
        }
        for run in ["several rows, recorded", "several rows, replayed"] {
            let logits = decoder.forward(&together, backend).expect("step runs");
            assert_bits(&alone, &read_logits(logits, backend).expect("logits come back"), name, format, run);
        }
        let logits = decoder.forward_tapped(&together, backend, None).expect("step runs");
        let found = read_logits(logits, backend).expect("logits come back");
        assert_bits(&alone, &found, name, format, "several rows, operation by operation");
    }
    assert_eq!(backend.compiled().0, compiled, "{name} {format}: kernels compiled while steps ran");
}

fn assert_bits(expected: &[f32], found: &[f32], name: &str, format: &str, run: &str) {
    let differs = expected.iter().zip(found).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(differs, None, "{name} {format}: {run}: first logit that differs");
}

fn bundled_shape() -> ModelConfig {
    let json = include_bytes!("../../../models/moellon-tiny/config.json");
    let mut config = arch::parse(&serde_json::from_slice(json).expect("config is JSON")).expect("config is legal");
    config.num_mtp_layers = 0;
    config.layers.truncate(3);
    config
}

/// Adapters may not have as many bindings as the kernels that do several operations at once.
#[test]
fn bundled_shape_with_few_bindings() {
    let options = WgpuOptions { without_many_bindings: true, ..WgpuOptions::default() };
    let Some(mut backend) = open_with(&options) else { return };
    assert_same("bundled, few bindings", &bundled_shape(), FORMATS[0], &[7, 80], &mut backend);
}

/// Metal and DX12 have wgpu's own commands.
#[test]
fn bundled_shape_by_wgpus_commands() {
    let options = WgpuOptions { without_vulkan: true, ..WgpuOptions::default() };
    let Some(mut backend) = open_with(&options) else { return };
    assert_same("bundled, wgpu's commands", &bundled_shape(), FORMATS[0], &[7, 80], &mut backend);
}

/// Routers of several workgroups: the one that is done last chooses, out of what the others wrote.
#[test]
fn a_router_of_several_workgroups() {
    let Some(mut backend) = open() else { return };
    let mut config = bundled_shape();
    config.moe.num_experts = 300;
    assert_same("300 experts", &config, FORMATS[0], &[7, 80], &mut backend);
}

/// Several rows by the kernel for prompts, each alone by the others: what writes a step's activations must write the rows that tiles are made of.
#[test]
fn bundled_shape_by_tiles() {
    let options = WgpuOptions { few_rows_by_tiles: true, ..WgpuOptions::default() };
    let Some(mut backend) = open_with(&options) else { return };
    assert_same("bundled, by tiles", &bundled_shape(), "affine-4", &[7, 80], &mut backend);
}

#[test]
fn bundled_shape_in_every_format() {
    let Some(mut backend) = open() else { return };
    let config = bundled_shape();
    let formats = if is_software() { &FORMATS[..2] } else { &FORMATS[..] };
    for format in formats {
        // index_topk is 64: below it, and above.
        assert_same("bundled", &config, format, &[7, 80], &mut backend);
    }
}

#[test]
fn published_shapes() {
    let Some(mut backend) = open() else { return };
    if is_software() {
        eprintln!("SKIP published shapes: the adapter is a CPU");
        return;
    }
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

/// What was compiled is on disk for the next run, and what does not belong there is no reason to fail.
#[test]
fn compiled_kernels_are_kept_on_disk() {
    let folder = std::env::temp_dir().join(format!("moellon-kernels-{}", std::process::id()));
    let options = WgpuOptions { cache_folder: Some(folder.clone()), ..WgpuOptions::default() };
    let open = || WgpuBackend::new(&options);
    if let Err(error) = open() {
        eprintln!("SKIP the cache of compiled kernels: {error}");
        return;
    }
    let files = || -> Vec<std::path::PathBuf> {
        let entries = std::fs::read_dir(&folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let kept = files();
    if kept.is_empty() {
        eprintln!("SKIP the cache of compiled kernels: this API has none");
        return;
    }
    assert_eq!(kept.len(), 1, "one file an adapter: {kept:?}");
    // Lavapipe's is a header and nothing else: drivers decide what they keep.
    let written = std::fs::read(&kept[0]).expect("it is there");
    assert!(written.len() >= 32, "{} bytes are less than a header", written.len());
    let garbage = b"not what a driver wrote";
    std::fs::write(&kept[0], garbage).expect("it can be written");
    open().expect("garbage is dropped");
    assert_eq!(files(), kept);
    assert_ne!(std::fs::read(&kept[0]).expect("it is there"), garbage);
    std::fs::remove_dir_all(&folder).expect("it can be removed");
}
