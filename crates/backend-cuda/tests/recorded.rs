//! A step of one row is launched in three ways: operation by operation, with operations fused, and as a recorded graph. All
//! give the same bits. Without a GPU the tests say that they did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::config::ModelConfig;
use moellon_model::mtp::{MtpHidden, MtpStep};
use moellon_model::session::read_logits;
use moellon_model::synthetic::{FormatPlan, Synthetic, preset};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::CacheDtype;

const FORMATS: [&str; 12] = [
    "affine-2", "affine-3", "affine-4", "affine-5", "affine-6", "affine-8", "nvfp4", "mxfp4", "mxfp8", "fp8", "bf16",
    "q3a4",
];

/// The words of an environment variable, for tools under which everything takes an hour; without it, all.
fn chosen(variable: &str, all: &[&'static str]) -> Vec<&'static str> {
    let wanted = std::env::var(variable).ok();
    let is_wanted = |name: &&&str| wanted.as_ref().is_none_or(|wanted| wanted.split(',').any(|word| word == **name));
    let chosen: Vec<&str> = all.iter().filter(is_wanted).copied().collect();
    assert!(!chosen.is_empty(), "{variable} is {wanted:?}, expected some of {all:?}");
    chosen
}

fn open() -> Option<CudaBackend> {
    let options =
        CudaOptions { kernels: std::env::var_os("MOELLON_CUDA_KERNELS").map(Into::into), ..CudaOptions::default() };
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

/// Tokens that depend on the sequence.
fn tokens_of(sequence: usize, count: usize, vocab_size: usize) -> Vec<u32> {
    (0..count).map(|i| ((i * i * 7 + i * 3 + sequence * 101 + 1) % vocab_size) as u32).collect()
}

/// Steps of several rows: a row of each of several sequences, and rows that follow each other in one sequence. Each row has the bits of a
/// step of its own, in every way that the step is launched.
fn assert_rows_same(name: &str, config: &ModelConfig, format: &str, counts: &[usize], backend: &mut CudaBackend) {
    const BLOCK: usize = 32;
    let plan = FormatPlan::parse(format).expect("format is known");
    let weights = Weights::load(config, &Synthetic::new(config, plan, 5), backend, &mut |_| {}).expect("weights load");
    let options = DecoderOptions {
        block_size: BLOCK,
        num_blocks: 36,
        max_sequences: 32,
        ..DecoderOptions::single_sequence(128, 128, CacheDtype::Bf16)
    };
    let mut decoder = Decoder::new(config.clone(), weights, options, backend).expect("decoder fits");
    let mut run = |batch: &Batch, recorded: bool, backend: &mut CudaBackend| {
        let logits =
            if recorded { decoder.forward(batch, backend) } else { decoder.forward_tapped(batch, backend, None) };
        bits(&read_logits(logits.expect("step runs"), backend).expect("logits come back"))
    };
    for &count in counts {
        // (tokens, position, block table) of each row.
        let apart: Vec<_> = (0..count).map(|s| (tokens_of(s, 4 + s % 5, config.vocab_size), vec![s as u32])).collect();
        let chain = tokens_of(40, 6 + count, config.vocab_size);
        let table: Vec<u32> = (32..36).collect();
        let (mut expected_apart, mut expected_chain) = (Vec::new(), Vec::new());
        let mut joint = Batch::default();
        for (tokens, table) in &apart {
            let last = tokens.len() - 1;
            let mut prompt = Batch::default();
            prompt.push_sequence(&tokens[..last], 0, table, BLOCK, LogitRows::Last);
            run(&prompt, false, backend);
            let mut alone = Batch::default();
            alone.push_sequence(&tokens[last..], last, table, BLOCK, LogitRows::Last);
            expected_apart.extend(run(&alone, false, backend));
            joint.push_sequence(&tokens[last..], last, table, BLOCK, LogitRows::Last);
        }
        let mut prompt = Batch::default();
        prompt.push_sequence(&chain[..6], 0, &table, BLOCK, LogitRows::Last);
        run(&prompt, false, backend);
        for at in 6..chain.len() {
            let mut alone = Batch::default();
            alone.push_sequence(&chain[at..=at], at, &table, BLOCK, LogitRows::Last);
            expected_chain.extend(run(&alone, false, backend));
        }
        let mut verified = Batch::default();
        verified.push_sequence(&chain[6..], 6, &table, BLOCK, LogitRows::All);
        for (what, batch, expected) in [("sequences", &joint, &expected_apart), ("drafts", &verified, &expected_chain)]
        {
            for way in ["op by op", "seen", "fused", "recorded", "replayed"] {
                let found = run(batch, way != "op by op", backend);
                let wrong = found.iter().zip(expected).position(|(a, b)| a != b);
                assert!(
                    found.len() == expected.len() && wrong.is_none(),
                    "{name} {format}, {count} {what}: {way} differs from rows alone, first in row {:?}",
                    wrong.map(|w| w / config.vocab_size)
                );
            }
        }
    }
}

/// A prompt as a whole and in pieces of up to 32 rows, which other kernels compute: the same bits for every row.
fn assert_prompt_same(name: &str, config: &ModelConfig, format: &str, rows: usize, backend: &mut CudaBackend) {
    const PIECE: usize = 32;
    let plan = FormatPlan::parse(format).expect("format is known");
    let weights = Weights::load(config, &Synthetic::new(config, plan, 7), backend, &mut |_| {}).expect("weights load");
    let options = DecoderOptions::single_sequence(rows, rows, CacheDtype::Bf16);
    let mut decoder = Decoder::new(config.clone(), weights, options, backend).expect("decoder fits");
    let table: Vec<u32> = (0..options.num_blocks as u32).collect();
    let tokens = tokens_of(9, rows, config.vocab_size);
    let mut logits_of = |first: usize, last: usize, backend: &mut CudaBackend| {
        let mut batch = Batch::default();
        batch.push_sequence(&tokens[first..last], first, &table, options.block_size, LogitRows::All);
        let logits = decoder.forward_tapped(&batch, backend, None).expect("prompt runs");
        bits(&read_logits(logits, backend).expect("logits come back"))
    };
    let whole = logits_of(0, rows, backend);
    for first in (0..rows).step_by(PIECE) {
        let last = rows.min(first + PIECE);
        let piece = logits_of(first, last, backend);
        let expected = &whole[first * config.vocab_size..last * config.vocab_size];
        let wrong = piece.iter().zip(expected).position(|(a, b)| a != b);
        assert!(
            wrong.is_none(),
            "{name} {format}, a prompt of {rows}: row {:?} differs from the same row among few",
            wrong.map(|w| first + w / config.vocab_size)
        );
    }
}

/// The bundled model's shape, three layers of it.
fn bundled_config() -> ModelConfig {
    let json = include_bytes!("../../../models/moellon-tiny/config.json");
    let mut config = arch::parse(&serde_json::from_slice(json).expect("config is JSON")).expect("config is legal");
    config.num_mtp_layers = 0;
    config.layers.truncate(3);
    config
}

/// Steps of the MTP layer are recorded as the trunk's are: each way of launching one gives the bits of the first, operation by operation.
#[test]
fn mtp_steps_of_the_bundled_shape() {
    let Some(mut backend) = open() else { return };
    let config = ModelConfig { num_mtp_layers: 1, ..bundled_config() };
    for format in ["affine-4", "nvfp4", "bf16"] {
        let plan = FormatPlan::parse(format).expect("format is known");
        let provider = Synthetic::new(&config, plan, 5);
        let weights = Weights::load(&config, &provider, &mut backend, &mut |_| {}).expect("weights load");
        let options = DecoderOptions::single_sequence(128, 64, CacheDtype::Bf16);
        let mut decoder = Decoder::new(config.clone(), weights, options, &mut backend).expect("decoder fits");
        let table: Vec<u32> = (0..options.num_blocks as u32).collect();
        for rows in [1, 3, 8] {
            let tokens = tokens_of(rows, rows + 1, config.vocab_size);
            let batch_of = |tokens: &[u32]| {
                let mut batch = Batch::default();
                batch.push_sequence(tokens, 0, &table, options.block_size, LogitRows::All);
                batch
            };
            let hidden_rows: Vec<u32> = (0..rows as u32).collect();
            let mut expected = None;
            for way in ["op by op", "fused", "recorded", "replayed"] {
                decoder.forward_tapped(&batch_of(&tokens[..rows]), &mut backend, None).expect("the trunk runs");
                let batch = batch_of(&tokens[1..]);
                let step = MtpStep {
                    batch: &batch,
                    hidden_rows: &hidden_rows,
                    hidden: MtpHidden::Trunk,
                    share_index_of: None,
                };
                let logits = decoder.forward_mtp(&step, &mut backend).expect("the MTP layer runs");
                let found = bits(&read_logits(logits, &mut backend).expect("logits come back"));
                let expected = expected.get_or_insert_with(|| found.clone());
                assert!(found == *expected, "{format}, {rows} rows: {way} differs from the first run");
            }
        }
    }
}

#[test]
fn rows_of_the_bundled_shape_in_every_format() {
    let Some(mut backend) = open() else { return };
    let config = bundled_config();
    let counts = chosen("MOELLON_TEST_ROWS", &["2", "7", "13", "32"]);
    let counts: Vec<usize> = counts.iter().map(|count| count.parse().expect("it is a number")).collect();
    for format in chosen("MOELLON_TEST_FORMATS", &FORMATS) {
        assert_rows_same("bundled", &config, format, &counts, &mut backend);
    }
}

#[test]
fn rows_of_published_shapes() {
    let Some(mut backend) = open() else { return };
    for (shape, formats) in [
        ("qwen3-30b-a3b:layers=1,vocab=4096", &["affine-4", "nvfp4"][..]),
        // A vocabulary whose product takes two row tiles at a time.
        ("glm-5.2-77:layers=1,vocab=33000", &["affine-4", "q3a4"][..]),
        ("gpt-oss-20b:layers=1,vocab=4096", &["mxfp4"][..]),
        ("deepseek-v3:layers=1,vocab=4096", &["affine-4"][..]),
    ] {
        let config = preset(shape).expect("preset is known");
        for format in formats {
            assert_rows_same(shape, &config, format, &[2, 4, 7, 16, 32], &mut backend);
        }
    }
}

#[test]
fn bundled_shape_in_every_format() {
    let Some(mut backend) = open() else { return };
    let config = bundled_config();
    for format in chosen("MOELLON_TEST_FORMATS", &FORMATS) {
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

/// A row of latent attention whose heads are one kernel, in every format: contexts of one part of keys and of several, whose last part has one key and 32.
#[test]
fn heads_of_a_row_in_every_format() {
    let Some(mut backend) = open() else { return };
    let config = preset("glm-5.2-77:layers=1,vocab=512").expect("preset is known");
    for format in chosen("MOELLON_TEST_FORMATS", &FORMATS) {
        assert_same("heads", &config, format, &[1, 31, 32, 255], &mut backend);
    }
}

/// Products of many rows and attention of a prompt's rows have kernels of their own.
#[test]
fn prompts_have_the_bits_of_few_rows() {
    let Some(mut backend) = open() else { return };
    let bundled = bundled_config();
    for format in chosen("MOELLON_TEST_FORMATS", &FORMATS) {
        assert_prompt_same("bundled", &bundled, format, 133, &mut backend);
    }
    // Latent attention whose parts are one tile of keys, then two (beyond 1024), then chosen keys (beyond 2048).
    for (shape, format, rows) in [
        ("glm-5.2-77:layers=1,vocab=512", "affine-4", 200),
        ("glm-5.2-77:layers=1,vocab=512", "q3a4", 2130),
        ("deepseek-v3:layers=1,vocab=512", "affine-4", 100),
        ("qwen3-30b-a3b:layers=1,vocab=512", "affine-4", 200),
    ] {
        assert_prompt_same(shape, &preset(shape).expect("preset is known"), format, rows, &mut backend);
    }
}
