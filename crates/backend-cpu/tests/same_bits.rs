//! One step's worth of operations gives the same bits at every level and on any number of threads. Latent attention and the indexer's
//! scores by tile registers, with activations of 8 bits, have bits of their own, which no batch and no number of threads changes.

use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_ops::conformance::{random_matrices, views};
use moellon_ops::{
    Activation, AttendGqa, AttendMla, Backend, Cache, CacheDtype, ElementType, ExpertsSource, GateUp, IndexScore,
    IndexSet, KvStore, Linear, LinearHeads, MoeDown, MoeGateUp, Paging, Result, RmsNorm, Tensor, Weight, WeightSource,
};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{ScaleDtype, WeightFormat};

const TOKENS: usize = 5;
const HIDDEN: usize = 256;
const AFFINE: WeightFormat = WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::Bf16 };

fn floats(backend: &mut CpuBackend, seed: u64, rows: usize, cols: usize) -> Result<Tensor> {
    let tensor = backend.alloc("test", ElementType::F32, rows * cols)?.tensor(rows, cols);
    backend.write_f32(tensor, &SplitMix64::new(seed).normals(rows * cols, 1.0))?;
    Ok(tensor)
}

fn integers(backend: &mut CpuBackend, rows: usize, values: &[u32]) -> Result<Tensor> {
    let tensor = backend.alloc("test", ElementType::U32, values.len())?.tensor(rows, values.len() / rows);
    backend.write_u32(tensor, values)?;
    Ok(tensor)
}

fn weight(
    backend: &mut CpuBackend,
    seed: u64,
    format: WeightFormat,
    [count, rows, cols]: [usize; 3],
) -> Result<Weight> {
    let matrices = random_matrices(seed, format, count, rows, cols);
    backend.load_weight(&WeightSource { name: "test", matrices: &views(&matrices), bias: None })
}

/// Outputs of every kind of kernel, as bits.
fn step(options: CpuOptions) -> Result<Vec<u32>> {
    let backend = &mut CpuBackend::new(options)?;
    let x = floats(backend, 1, TOKENS, HIDDEN)?;
    let mut outputs = Vec::new();
    // Norm with a residual, then products in several formats at once.
    let (normed, delta, gain) =
        (floats(backend, 0, TOKENS, HIDDEN)?, floats(backend, 2, TOKENS, HIDDEN)?, floats(backend, 3, 1, HIDDEN)?);
    backend.rms_norm(&RmsNorm { x, delta: Some(delta), weight: gain, eps: 1e-5, out: normed })?;
    outputs.push(normed);
    let mut parts = Vec::new();
    for (i, format) in [AFFINE, WeightFormat::Bf16, WeightFormat::Nvfp4, WeightFormat::Mxfp8].into_iter().enumerate() {
        let rows = 100 + 70 * i;
        parts.push((weight(backend, 10 + i as u64, format, [1, rows, HIDDEN])?, floats(backend, 0, TOKENS, rows)?));
    }
    backend.linear(&Linear { x: normed, parts: &parts })?;
    outputs.extend(parts.iter().map(|(_, out)| *out));
    let heads = weight(backend, 20, WeightFormat::Bf16, [4, 48, 64])?;
    let out = floats(backend, 0, TOKENS, 4 * 48)?;
    backend.linear_heads(&LinearHeads { x: normed, x_head_stride: 64, weight: heads, out })?;
    outputs.push(out);
    // Attention, both kinds, over one cache of 300 positions.
    let (width, slots) = (2 * 2 * 40, 320);
    let positions = [3, 17, 128, 200, 299];
    let paging = Paging {
        positions: integers(backend, 1, &positions)?,
        sequences: integers(backend, 1, &[0; TOKENS])?,
        block_table: integers(backend, 1, &[4, 2, 0, 1, 3])?,
        block_size: 64,
        max_context: 300,
    };
    let cache = backend.alloc_cache("test", CacheDtype::Bf16, slots, width)?;
    let rows = floats(backend, 30, slots, width)?;
    let all: Vec<u32> = (0..slots as u32).collect();
    let slots = integers(backend, 1, &all)?;
    backend.kv_store(&KvStore { parts: &[rows], slots, cache })?;
    let (q, out) = (floats(backend, 31, TOKENS, 6 * 40)?, floats(backend, 0, TOKENS, 6 * 40)?);
    let (num_heads, num_kv_heads, head_dim, scale) = (6, 2, 40, 0.16);
    backend.attend_gqa(&AttendGqa {
        q,
        cache,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        window: Some(150),
        sinks: None,
        paging,
        out,
    })?;
    outputs.push(out);
    let (q_latent, q_rope) = (floats(backend, 32, TOKENS, 9 * 128)?, floats(backend, 33, TOKENS, 9 * 32)?);
    let out = floats(backend, 0, TOKENS, 9 * 128)?;
    backend.attend_mla(&AttendMla {
        q_latent,
        q_rope,
        q_rope_head_stride: 32,
        cache,
        num_heads: 9,
        kv_lora_rank: 128,
        qk_rope_head_dim: 32,
        scale: 0.08,
        index: None,
        paging,
        out,
    })?;
    outputs.push(out);
    // Experts and a dense feed-forward.
    let (gate, up) =
        (random_matrices(40, AFFINE, 6, 128, HIDDEN), random_matrices(41, WeightFormat::Nvfp4, 6, 128, HIDDEN));
    let down = random_matrices(42, AFFINE, 6, HIDDEN, 128);
    let experts = backend.load_experts(&ExpertsSource {
        name: "test",
        gate: &views(&gate),
        up: &views(&up),
        down: &views(&down),
        biases: None,
    })?;
    let ids = integers(backend, TOKENS, &[0, 5, 1, 4, 3, 0, 5, 0, 2, 1])?;
    let (h, weights) = (floats(backend, 0, TOKENS, 2 * 128)?, floats(backend, 43, TOKENS, 2)?);
    let out = floats(backend, 44, TOKENS, HIDDEN)?;
    backend.moe_gate_up(&MoeGateUp { x: normed, experts, ids, activation: Activation::SwiGlu, out: h })?;
    backend.moe_down(&MoeDown { h, experts, ids, weights, plus: Some(out), out })?;
    outputs.extend([h, out]);
    let (gate, up) = (weight(backend, 50, AFFINE, [1, 130, HIDDEN])?, weight(backend, 51, AFFINE, [1, 130, HIDDEN])?);
    let out = floats(backend, 0, TOKENS, 130)?;
    let activation = Activation::ClampedSwiGlu { alpha: 1.702, limit: 7.0 };
    backend.gate_up(&GateUp { x: normed, gate, up, activation, out })?;
    outputs.push(out);
    let mut bits = Vec::new();
    for output in outputs {
        let mut values = vec![0.0; output.rows * output.cols];
        backend.read_f32(output, &mut values)?;
        assert!(values.iter().all(|v| v.is_finite()));
        bits.extend(values.iter().map(|v| v.to_bits()));
    }
    Ok(bits)
}

#[test]
fn levels_and_threads_do_not_change_a_bit() {
    for activation in [ActivationMode::Exact, ActivationMode::Int8] {
        let options = CpuOptions { threads: Some(1), level: Some(CpuLevel::Portable), activation, pin: false };
        let expected = step(options).unwrap();
        for level in CpuLevel::available() {
            for threads in [1, 2, 3, 8] {
                let actual = step(CpuOptions { threads: Some(threads), level: Some(level), ..options }).unwrap();
                assert!(actual == expected, "{activation:?} at {level} on {threads} threads");
            }
        }
    }
}

/// Positions of the tokens of [`long_attention`].
const POSITIONS: [u32; 12] = [1411, 5, 511, 512, 513, 1023, 1024, 700, 1200, 1300, 1400, 64];

/// Attention of the tokens `rows` (of a dozen, at these positions of one sequence) of both kinds, latent attention with `heads` heads, and
/// scores of an indexer with as many, as bits: `[token][output]`.
fn long_attention(options: CpuOptions, rows: &[usize], heads: usize) -> Result<Vec<Vec<u32>>> {
    const CHOSEN: usize = 900;
    let backend = &mut CpuBackend::new(options)?;
    let (width, slots) = (2 * 2 * 24, 1472);
    let cache: Cache = backend.alloc_cache("test", CacheDtype::Bf16, slots, width)?;
    let keys = floats(backend, 60, slots, width)?;
    let all: Vec<u32> = (0..slots as u32).collect();
    let all = integers(backend, 1, &all)?;
    backend.kv_store(&KvStore { parts: &[keys], slots: all, cache })?;
    let tokens = rows.len();
    let positions: Vec<u32> = rows.iter().map(|row| POSITIONS[*row]).collect();
    let blocks: Vec<u32> = (0..slots as u32 / 64).map(|block| block * 5 % (slots as u32 / 64)).collect();
    let paging = Paging {
        positions: integers(backend, 1, &positions)?,
        sequences: integers(backend, 1, &vec![0; tokens])?,
        block_table: integers(backend, 1, &blocks)?,
        block_size: 64,
        max_context: slots,
    };
    let mut of_rows = |seed: u64, cols: usize| -> Result<Tensor> {
        let values: Vec<f32> = rows.iter().flat_map(|r| SplitMix64::new(seed + *r as u64).normals(cols, 1.0)).collect();
        let tensor = backend.alloc("test", ElementType::F32, values.len())?.tensor(tokens, cols);
        backend.write_f32(tensor, &values)?;
        Ok(tensor)
    };
    let (q, gqa) = (of_rows(100, 10 * 24)?, of_rows(0, 10 * 24)?);
    let (q_latent, q_rope) = (of_rows(200, heads * 64)?, of_rows(300, heads * 32)?);
    let (mla, sparse) = (of_rows(0, heads * 64)?, of_rows(0, heads * 64)?);
    let (q_index, weights, scores) = (of_rows(400, heads * width)?, of_rows(500, heads)?, of_rows(0, slots)?);
    // Every token's chosen positions: all, or every other one from the last on.
    let counts: Vec<u32> = positions.iter().map(|p| (p + 1).min(CHOSEN as u32).min(p / 2 + 1)).collect();
    let ids: Vec<u32> = positions
        .iter()
        .zip(&counts)
        .flat_map(|(p, count)| (0..CHOSEN as u32).map(move |i| p % 2 + 2 * i.min(count - 1)))
        .collect();
    let index = Some(IndexSet { ids: integers(backend, tokens, &ids)?, counts: integers(backend, 1, &counts)? });
    let sinks = floats(backend, 61, 1, 10)?;
    let (num_heads, num_kv_heads, head_dim, scale) = (10, 2, 24, 0.2);
    let (window, sinks) = (Some(1350), Some(sinks));
    backend.attend_gqa(&AttendGqa {
        q,
        cache,
        num_heads,
        num_kv_heads,
        head_dim,
        scale,
        window,
        sinks,
        paging,
        out: gqa,
    })?;
    for (index, out) in [(None, mla), (index, sparse)] {
        backend.attend_mla(&AttendMla {
            q_latent,
            q_rope,
            q_rope_head_stride: 32,
            cache,
            num_heads: heads,
            kv_lora_rank: 64,
            qk_rope_head_dim: 32,
            scale: 0.1,
            index,
            paging,
            out,
        })?;
    }
    backend.index_score(&IndexScore {
        q: q_index,
        weights,
        cache,
        num_heads: heads,
        head_dim: width,
        scale: 0.1,
        paging,
        scores,
    })?;
    let mut bits = vec![Vec::new(); tokens];
    let mut values = vec![0.0; tokens * slots];
    backend.read_f32(scores, &mut values)?;
    for ((bits, row), position) in bits.iter_mut().zip(values.chunks_exact(slots)).zip(&positions) {
        // Nothing is written behind a token's own position.
        bits.extend(row[..=*position as usize].iter().map(|v| v.to_bits()));
    }
    for output in [gqa, mla, sparse] {
        let mut values = vec![0.0; output.rows * output.cols];
        backend.read_f32(output, &mut values)?;
        assert!(values.iter().all(|v| v.is_finite()));
        for (bits, row) in bits.iter_mut().zip(values.chunks_exact(output.cols)) {
            bits.extend(row.iter().map(|v| v.to_bits()));
        }
    }
    Ok(bits)
}

#[test]
fn parts_of_long_contexts_do_not_change_a_bit() {
    let options = CpuOptions { threads: Some(1), level: Some(CpuLevel::Portable), ..CpuOptions::default() };
    let batch: Vec<usize> = (0..12).collect();
    let expected = long_attention(options, &batch, 9).unwrap();
    for level in CpuLevel::available() {
        // Few tokens and many threads: a part of a context is a unit; a dozen tokens and few threads: all parts are one's.
        for (threads, rows) in
            [(1, &batch[..1]), (2, &batch[..]), (2, &batch[..1]), (3, &batch[2..4]), (7, &batch[..3])]
        {
            let options = CpuOptions { threads: Some(threads), level: Some(level), ..options };
            let actual = long_attention(options, rows, 9).unwrap();
            for (actual, row) in actual.iter().zip(rows) {
                assert!(actual == &expected[*row], "token {row} of {} at {level} on {threads} threads", rows.len());
            }
        }
    }
}

/// Heads that tile registers take, as many as fit a tile and more: a level's bits are its own only if it has such registers, and there no
/// batch and no number of threads changes them.
#[test]
fn tile_registers_do_not_change_a_bit_between_batches() {
    let options = CpuOptions { activation: ActivationMode::Int8, threads: Some(1), ..CpuOptions::default() };
    let batch: Vec<usize> = (0..12).collect();
    for heads in [16, 48] {
        let portable = CpuOptions { level: Some(CpuLevel::Portable), ..options };
        let portable = long_attention(portable, &batch, heads).unwrap();
        for level in CpuLevel::available() {
            let options = CpuOptions { level: Some(level), ..options };
            let expected = long_attention(options, &batch, heads).unwrap();
            if level == CpuLevel::Avx512Amx {
                for (row, (expected, portable)) in expected.iter().zip(&portable).enumerate() {
                    for (a, b) in expected.iter().zip(portable) {
                        let (a, b) = (f32::from_bits(*a), f32::from_bits(*b));
                        assert!((a - b).abs() < 5e-5 * b.abs().max(1.0), "token {row}, {heads} heads: {a} and {b}");
                    }
                }
            } else {
                assert!(expected == portable, "{level}, {heads} heads");
            }
            for (threads, rows) in [
                (1, &batch[..1]),
                (2, &batch[..]),
                (2, &batch[..1]),
                (3, &batch[2..4]),
                (7, &batch[..3]),
                (1, &batch[5..6]),
            ] {
                let options = CpuOptions { threads: Some(threads), ..options };
                let actual = long_attention(options, rows, heads).unwrap();
                for (actual, row) in actual.iter().zip(rows) {
                    let same = actual == &expected[*row];
                    assert!(same, "token {row} of {} at {level} on {threads} threads, {heads} heads", rows.len());
                }
            }
        }
        // Exact activations: floats at every level.
        let exact = CpuOptions { activation: ActivationMode::Exact, ..options };
        assert!(long_attention(exact, &batch, heads).unwrap() == portable, "exact, {heads} heads");
    }
}
