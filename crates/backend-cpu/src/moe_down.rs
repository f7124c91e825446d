//! [`moellon_ops::MoeDown`]: down of the chosen experts and their weighted sum.
//!
//! Threads take pieces of the output's columns, so every expert is read once, in as many pieces, and sums need no second
//! buffer. A row adds up its experts in ascending order, whatever else is in the batch.
//!
//! `unsafe`: threads write disjoint columns of the output.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::layout::TILE_ROWS;
use crate::prepare::RowSource;
use crate::product::{fetch_starts, multiply};
use moellon_ops::{MoeDown, Result};
use moellon_tensor::pool::partition;

/// Tiles of a piece, at least: each expert is read in runs of this length. Runs of 16 took 5 % longer (scratch runs).
const PIECE_TILES: usize = 32;
/// Choices from which on pieces are as large as threads allow: every piece reads the activations of all of them.
const MANY_PAIRS: usize = 256;

pub(crate) fn run(backend: &mut CpuBackend, op: &MoeDown) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let loaded = &backend.experts[op.experts.id as usize];
    let packed = &loaded.down;
    let map = &packed.map;
    let form = mode.row_form(map.layout.coding);
    let (top_k, hidden_size) = (op.ids.cols, op.experts.hidden_size);
    backend.lists.build("moe_down", &backend.memory.integers(op.ids), op.experts.num_experts)?;
    let lists = &backend.lists;
    // Rows of an expert side by side: kernels for many rows step from one to the next.
    let source = RowSource::parts(&backend.memory.floats(op.h), top_k).in_order(lists.all_pairs());
    let prepared = backend.space.prepare(level, source, std::iter::once(form)).map_err(crate::backend::no_memory)?;
    let weights = backend.memory.floats(op.weights);
    let plus = op.plus.filter(|plus| *plus != op.out).map(|plus| backend.memory.floats(plus));
    let starts_as_plus = op.plus == Some(op.out);
    let out = backend.memory.floats(op.out);
    let num_threads = backend.pool.num_threads();
    let num_pieces = if lists.all_pairs().len() < MANY_PAIRS { map.tiles / PIECE_TILES } else { 2 * num_threads };
    let num_pieces = num_pieces.max(num_threads);
    backend.queues.fill(num_pieces, num_threads);
    let (pool, queues) = (&backend.pool, &backend.queues);
    pool.run(|index, num_threads| {
        if prepared.needs_fill() {
            // SAFETY: `h` is not the output; the barrier stands between this and the reads.
            unsafe { prepared.fill(level, index, num_threads) };
            pool.barrier();
        }
        // SAFETY: filled before the barrier.
        let rows = unsafe { prepared.rows(form) };
        while let Some(piece) = queues.take(index) {
            let tiles = partition(map.tiles, num_pieces, piece, 1);
            let (first, end) = (tiles.start * TILE_ROWS, (tiles.end * TILE_ROWS).min(hidden_size));
            if tiles.is_empty() {
                continue;
            }
            for t in 0..out.rows {
                // SAFETY: this piece is columns `first..end` of every row of `out`, and this thread took it.
                let sum = unsafe { out.part_mut(t, first, end - first) };
                match &plus {
                    // SAFETY: nobody writes `plus`.
                    Some(plus) => sum.copy_from_slice(unsafe { &plus.row(t)[first..end] }),
                    None if starts_as_plus => {}
                    None => sum.fill(0.0),
                }
            }
            for (number, expert) in lists.active().iter().enumerate() {
                let expert = *expert as usize;
                if let Some(next) = lists.active().get(number + 1)
                    && lists.all_pairs().len() < MANY_PAIRS
                {
                    let next = *next as usize;
                    fetch_starts(level, mode, (&packed.bytes, map), next, tiles.clone(), lists.pairs(next).len());
                }
                let pairs = lists.pairs(expert);
                multiply(
                    level,
                    mode,
                    (&packed.bytes, map),
                    expert,
                    tiles.clone(),
                    &rows.with_ids(prepared.ids(lists.places(expert))),
                    |tile, i, values| {
                        let pair = pairs[i] as usize;
                        let mut values = *values;
                        if let Some(biases) = &loaded.biases {
                            biases[2].add_to(expert, tile, &mut values);
                        }
                        let first = tile * TILE_ROWS;
                        // SAFETY: nobody writes `weights`; the columns are this thread's.
                        let (weight, sum) = unsafe {
                            let sum = out.part_mut(pair / top_k, first, (hidden_size - first).min(TILE_ROWS));
                            (weights.row(pair / top_k)[pair % top_k], sum)
                        };
                        for (sum, value) in sum.iter_mut().zip(&values) {
                            *sum += weight * value;
                        }
                    },
                );
            }
        }
    });
    Ok(())
}
