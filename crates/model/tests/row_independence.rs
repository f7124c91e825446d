//! A sequence's logits do not depend on what shares its steps: alone, with strangers of other lengths, prefilled whole or
//! in chunks, bit for bit. Lossless speculation, prefix reuse and reproducible answers stand on this.

mod golden_support;

use golden_support::{Golden, fixtures};
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::read_logits;
use moellon_model::synthetic::{FormatPlan, Synthetic};
use moellon_model::weights::Weights;
use moellon_model::{Decoder, DecoderOptions, arch};
use moellon_ops::{Backend, CacheDtype};
use std::ops::Range;

/// Blocks of each sequence.
const BLOCKS: usize = 4;
/// Sequences that share steps, at most.
const SEQUENCES: usize = 16;

/// Token ids of sequence `sequence`, `len` of them.
fn tokens(sequence: usize, len: usize, vocab_size: usize) -> Vec<u32> {
    (0..len).map(|i| ((sequence * 31 + i * i * 7 + i * 3 + 1) % vocab_size) as u32).collect()
}

fn table(sequence: usize) -> Vec<u32> {
    (0..BLOCKS).map(|b| (sequence * BLOCKS + (b + sequence) % BLOCKS) as u32).collect()
}

/// One step over `(sequence, first position, tokens)`; the last token's logits of each.
fn step(parts: &[(usize, usize, &[u32])], decoder: &mut Decoder, backend: &mut dyn Backend) -> Vec<Vec<u32>> {
    let block_size = decoder.options().block_size;
    let mut batch = Batch::default();
    for (sequence, first, tokens) in parts {
        batch.push_sequence(tokens, *first, &table(*sequence), block_size, LogitRows::Last);
    }
    let logits = decoder.forward(&batch, backend).expect("step runs");
    let vocab_size = logits.cols;
    let host = read_logits(logits, backend).expect("logits come back");
    host.chunks(vocab_size).map(|row| row.iter().map(|x| x.to_bits()).collect()).collect()
}

/// Compares every way to compute three sequences of different lengths (the model sees sparse and dense contexts at once).
fn assert_independent(name: &str, lengths: [usize; 3], mut decoder: Decoder, backend: &mut dyn Backend) {
    let vocab_size = decoder.config().vocab_size;
    let prompts = [0, 1, 2].map(|s| tokens(s, lengths[s], vocab_size));
    let next = [0, 1, 2].map(|s| tokens(s + 9, 1, vocab_size));
    // Alone, whole.
    let alone: Vec<Vec<u32>> = (0..3).map(|s| step(&[(s, 0, &prompts[s])], &mut decoder, backend).remove(0)).collect();
    let alone_next: Vec<Vec<u32>> =
        (0..3).map(|s| step(&[(s, lengths[s], &next[s])], &mut decoder, backend).remove(0)).collect();
    // Together, whole.
    let together = step(&[(0, 0, &prompts[0]), (1, 0, &prompts[1]), (2, 0, &prompts[2])], &mut decoder, backend);
    let decoded =
        step(&[(2, lengths[2], &next[2]), (0, lengths[0], &next[0]), (1, lengths[1], &next[1])], &mut decoder, backend);
    for s in 0..3 {
        assert!(together[s] == alone[s], "{name}: prefill of sequence {s} changes with its batch");
        assert!(decoded[(s + 1) % 3] == alone_next[s], "{name}: decode of sequence {s} changes with its batch");
    }
    // A chunk of one prompt beside decodes of the others.
    let (head, tail) = prompts[2].split_at(lengths[2] / 2);
    step(&[(2, 0, head)], &mut decoder, backend);
    let mixed =
        step(&[(0, lengths[0], &next[0]), (2, head.len(), tail), (1, lengths[1], &next[1])], &mut decoder, backend);
    assert!(
        mixed == [&alone_next[0][..], &alone[2][..], &alone_next[1][..]],
        "{name}: a chunk beside decodes changes them"
    );
}

/// Decodes a token of each of [`SEQUENCES`] sequences of different lengths alone, and in batches of every size from 2 on
/// with changing strangers.
fn assert_independent_in_batches(name: &str, lengths: Range<usize>, mut decoder: Decoder, backend: &mut dyn Backend) {
    let vocab_size = decoder.config().vocab_size;
    let length = |s: usize| lengths.start + s * 5 % lengths.len();
    let next: Vec<Vec<u32>> = (0..SEQUENCES).map(|s| tokens(s + 3, 1, vocab_size)).collect();
    let mut alone = Vec::new();
    for (s, next) in next.iter().enumerate() {
        step(&[(s, 0, &tokens(s, length(s), vocab_size))], &mut decoder, backend);
        alone.push(step(&[(s, length(s), next)], &mut decoder, backend).remove(0));
    }
    for size in 2..=SEQUENCES {
        // Others in another order each time: 7 and 16 have no common factor.
        let members: Vec<usize> = (0..size).map(|i| (size * 3 + i * 7) % SEQUENCES).collect();
        let parts: Vec<_> = members.iter().map(|&s| (s, length(s), &next[s][..])).collect();
        let together = step(&parts, &mut decoder, backend);
        for (s, together) in members.iter().zip(&together) {
            assert!(*together == alone[*s], "{name}: decode of sequence {s} changes in a batch of {size}: {members:?}");
        }
    }
}

fn cpu(level: CpuLevel, activation: ActivationMode) -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(1), level: Some(level), activation, pin: false })
        .expect("an available level starts")
}

#[test]
fn golden_models_on_every_level() {
    for name in fixtures() {
        let golden = Golden::open(&name);
        for level in CpuLevel::available() {
            let mut backend = cpu(level, ActivationMode::Exact);
            let sizes = DecoderOptions::single_sequence(128, 64, CacheDtype::F32);
            let sizes = DecoderOptions { max_sequences: SEQUENCES, block_size: 8, num_blocks: 64, ..sizes };
            let sizes = DecoderOptions { max_logit_rows: SEQUENCES, ..sizes };
            let name = format!("{name}, {}", level.name());
            assert_independent(&name, [3, 11, 29], golden.decoder_for(sizes, &mut backend), &mut backend);
            assert_independent_in_batches(&name, 1..24, golden.decoder_for(sizes, &mut backend), &mut backend);
        }
    }
}

/// Every format that weights come in.
const FORMATS: [&str; 12] = [
    "affine-2", "affine-3", "affine-4", "affine-5", "affine-6", "affine-8", "nvfp4", "mxfp4", "mxfp8", "fp8", "bf16",
    "q3a4",
];

/// Three layers of the bundled model's shape with random weights of a format, and room for [`SEQUENCES`] sequences.
fn synthetic(format: &str, backend: &mut dyn Backend) -> Decoder {
    let json = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/moellon-tiny/config.json"))
        .expect("bundled model");
    let mut config = arch::parse(&serde_json::from_slice(&json).expect("config is JSON")).expect("config is legal");
    config.num_mtp_layers = 0;
    config.layers.truncate(3);
    config.vocab_size = 512;
    let plan = FormatPlan::parse(format).expect("format is known");
    let weights =
        Weights::load(&config, &Synthetic::new(&config, plan, 3), backend, &mut |_| {}).expect("weights load");
    let options = DecoderOptions {
        max_sequences: SEQUENCES,
        max_logit_rows: SEQUENCES,
        block_size: 32,
        num_blocks: SEQUENCES * BLOCKS,
        ..DecoderOptions::single_sequence(128, 160, CacheDtype::Bf16)
    };
    Decoder::new(config, weights, options, backend).expect("decoder fits")
}

#[test]
fn every_format_on_the_best_level() {
    for format in FORMATS {
        for activation in [ActivationMode::Int8, ActivationMode::Exact] {
            let mut backend = cpu(CpuLevel::detect(), activation);
            let decoder = synthetic(format, &mut backend);
            // index_topk is 64: one context below it, one that crosses it, one far above.
            assert_independent(&format!("{format}, {activation:?}"), [7, 64, 80], decoder, &mut backend);
        }
    }
}

#[test]
fn every_format_and_level_in_batches_of_up_to_16() {
    for format in FORMATS {
        for level in CpuLevel::available() {
            let mut backend = cpu(level, ActivationMode::Int8);
            let decoder = synthetic(format, &mut backend);
            // Short ones, for the slowest levels: the test above has contexts on both sides of index_topk.
            let name = format!("{format}, {}", level.name());
            assert_independent_in_batches(&name, 1..10, decoder, &mut backend);
        }
    }
}
