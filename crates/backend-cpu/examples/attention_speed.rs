//! Time of latent attention and of the indexer's scores for one token of GLM-5.2's shape, by level and context: for work on
//! kernels, where `moellon bench` is too coarse.
//!
//! ```text
//! cargo run --release -p moellon-backend-cpu --example attention_speed -- [LEVEL..] [ROWS..]
//! ```
//!
//! Levels (`avx512-vnni`, `avx512-amx`, ..) are measured in turns, pass by pass; without one the machine's best is. Every operation
//! has a cache of its own among those of half a gigabyte, so that its rows come from memory, as in a step.

#![allow(clippy::print_stdout, reason = "a program")]

use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_ops::{AttendMla, Backend, Cache, CacheDtype, ElementType, IndexScore, IndexSet, KvStore, Paging, Tensor};
use moellon_tensor::rng::SplitMix64;
use std::time::Instant;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

const HEADS: usize = 64;
const RANK: usize = 512;
const ROPE: usize = 64;
/// The indexer's.
const INDEX_HEADS: usize = 32;
const INDEX_DIM: usize = 128;
/// Positions that sparse attention chooses.
const CHOSEN: usize = 2048;
const SLOTS: usize = 8192;
const CACHES: usize = 48;
const CONTEXTS: [usize; 3] = [128, 2048, 8192];
const PASSES: usize = 9;

fn main() -> Outcome<()> {
    // The main thread is not kept on a core; steps of an engine run on one that is.
    std::thread::spawn(|| run().map_err(|error| error.to_string())).join().expect("errors are returned")?;
    Ok(())
}

fn run() -> Outcome<()> {
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let mut levels: Vec<CpuLevel> = CpuLevel::available().filter(|l| wanted.iter().any(|w| w == l.name())).collect();
    if levels.is_empty() {
        levels.push(CpuLevel::detect());
    }
    let mut rows: Vec<usize> = wanted.iter().filter_map(|word| word.parse().ok()).collect();
    if rows.is_empty() {
        rows.push(1);
    }
    for rows in rows {
        let mut benches = Vec::new();
        for level in &levels {
            benches.push(Bench::new(*level, rows)?);
        }
        for context in CONTEXTS {
            // `[operation][level]`: microseconds.
            let mut times = vec![vec![Vec::new(); levels.len()]; 2];
            for pass in 0..=PASSES {
                for (level, bench) in benches.iter_mut().enumerate() {
                    for (operation, times) in times.iter_mut().enumerate() {
                        let time = bench.pass(operation, context)?;
                        if pass > 0 {
                            times[level].push(time);
                        }
                    }
                }
            }
            for (name, times) in ["attention", "indexer"].iter().zip(&mut times) {
                for (level, times) in levels.iter().zip(times) {
                    times.sort_by(f64::total_cmp);
                    let (fastest, median, slowest) = (times[0], times[PASSES / 2], times[PASSES - 1]);
                    println!(
                        "{name:9} {rows:3} rows {context:5} positions {:12} {median:8.1} us ({fastest:.1} to {slowest:.1})",
                        level.name()
                    );
                }
            }
        }
    }
    Ok(())
}

struct Bench {
    backend: CpuBackend,
    rows: usize,
    caches: Vec<[Cache; 2]>,
    q: [Tensor; 3],
    weights: Tensor,
    block_table: Tensor,
    out: [Tensor; 2],
}

impl Bench {
    fn new(level: CpuLevel, rows: usize) -> Outcome<Self> {
        let options = CpuOptions { level: Some(level), activation: ActivationMode::Int8, pin: true, threads: None };
        let mut backend = CpuBackend::new(options)?;
        let all: Vec<u32> = (0..SLOTS as u32).collect();
        let slots = integers(&mut backend, 1, &all)?;
        let store = |backend: &mut CpuBackend, parts: &[Tensor]| -> Outcome<Cache> {
            let cache = backend.alloc_cache("bench", CacheDtype::Bf16, SLOTS, parts[0].cols)?;
            backend.kv_store(&KvStore { parts, slots, cache })?;
            Ok(cache)
        };
        let [latents, keys] = [floats(&mut backend, SLOTS, RANK + ROPE)?, floats(&mut backend, SLOTS, INDEX_DIM)?];
        let mut caches = Vec::new();
        for _ in 0..CACHES {
            caches.push([store(&mut backend, &[latents])?, store(&mut backend, &[keys])?]);
        }
        let mut of_rows = |cols| floats(&mut backend, rows, cols);
        let q = [of_rows(HEADS * RANK)?, of_rows(HEADS * ROPE)?, of_rows(INDEX_HEADS * INDEX_DIM)?];
        let (weights, out) = (of_rows(INDEX_HEADS)?, [of_rows(HEADS * RANK)?, of_rows(SLOTS)?]);
        let block_table = integers(&mut backend, 1, &[0])?;
        Ok(Bench { backend, rows, caches, q, weights, block_table, out })
    }

    /// Microseconds of operation `operation` with each cache, on average; the newest row has `context` positions.
    fn pass(&mut self, operation: usize, context: usize) -> Outcome<f64> {
        let positions: Vec<u32> = (0..self.rows).map(|row| (context - self.rows + row) as u32).collect();
        let mut random = SplitMix64::new(3);
        let counts: Vec<u32> = positions.iter().map(|p| (p + 1).min(CHOSEN as u32)).collect();
        let mut ids = Vec::new();
        for (position, count) in positions.iter().zip(&counts) {
            // One of as many neighbours each time: in order, and anywhere.
            let each = (position + 1) / count;
            ids.extend((0..CHOSEN as u32).map(|i| i.min(count - 1) * each + (random.below(each as usize)) as u32));
        }
        let backend = &mut self.backend;
        let paging = Paging {
            positions: integers(backend, 1, &positions)?,
            sequences: integers(backend, 1, &vec![0; self.rows])?,
            block_table: self.block_table,
            block_size: SLOTS,
            max_context: context,
        };
        let index = IndexSet { ids: integers(backend, self.rows, &ids)?, counts: integers(backend, 1, &counts)? };
        let start = Instant::now();
        for [latents, keys] in &self.caches {
            if operation == 0 {
                backend.attend_mla(&AttendMla {
                    q_latent: self.q[0],
                    q_rope: self.q[1],
                    q_rope_head_stride: ROPE,
                    cache: *latents,
                    num_heads: HEADS,
                    kv_lora_rank: RANK,
                    qk_rope_head_dim: ROPE,
                    scale: 0.07,
                    index: Some(index),
                    paging,
                    out: self.out[0],
                })?;
            } else {
                backend.index_score(&IndexScore {
                    q: self.q[2],
                    weights: self.weights,
                    cache: *keys,
                    num_heads: INDEX_HEADS,
                    head_dim: INDEX_DIM,
                    scale: 0.09,
                    paging,
                    scores: self.out[1],
                })?;
            }
        }
        let time = start.elapsed().as_secs_f64() * 1e6 / self.caches.len() as f64;
        for tensor in [paging.positions, paging.sequences, index.ids, index.counts] {
            backend.free(tensor.buffer);
        }
        Ok(time)
    }
}

fn integers(backend: &mut CpuBackend, rows: usize, values: &[u32]) -> Outcome<Tensor> {
    let tensor = backend.alloc("bench", ElementType::U32, values.len())?.tensor(rows, values.len() / rows);
    backend.write_u32(tensor, values)?;
    Ok(tensor)
}

fn floats(backend: &mut CpuBackend, rows: usize, cols: usize) -> Outcome<Tensor> {
    let tensor = backend.alloc("bench", ElementType::F32, rows * cols)?.tensor(rows, cols);
    backend.write_f32(tensor, &SplitMix64::new(cols as u64).normals(rows * cols, 1.0))?;
    Ok(tensor)
}
