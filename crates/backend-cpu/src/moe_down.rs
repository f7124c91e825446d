//! [`moellon_ops::MoeDown`]: down of the chosen experts and their weighted sum.
//!
//! Threads take pieces of the output's columns, so every expert is read once, in as many pieces, and sums need no second
//! buffer. A row adds up its experts in ascending order, whatever else is in the batch.
//!
//! `unsafe`: threads write disjoint columns of the output; a SIMD kernel.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::layout::TILE_ROWS;
use crate::memory::Floats;
use crate::prepare::RowSource;
use crate::product::{fetch_starts, multiply};
use crate::simd::{Kernel, Level, Simd};
use crate::weights::Bias;
use moellon_ops::{MoeDown, Result};
use moellon_tensor::pool::partition;

/// Tiles of a piece, at least: each expert is read in runs of this length. Runs of 16 took 5 % longer (scratch runs).
const PIECE_TILES: usize = 32;
/// Choices from which on pieces are as large as threads allow: every piece reads the activations of all of them.
const MANY_PAIRS: usize = 256;

/// `out[tokens[i]] += weights[i] * values[i]`, 16 columns each.
struct AddWeighted<'a> {
    values: &'a [[f32; TILE_ROWS]],
    tokens: &'a [u32],
    weights: &'a [f32],
    /// The columns in the first row of the output.
    out: *mut f32,
    /// Floats between two rows.
    stride: usize,
}

impl Kernel for AddWeighted<'_> {
    type Args = AddWeighted<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &AddWeighted<'static>) {
        for ((values, token), weight) in args.values.iter().zip(args.tokens).zip(args.weights) {
            // SAFETY: the output has these rows and columns.
            unsafe {
                let to = args.out.add(*token as usize * args.stride);
                // Two roundings, as everywhere: a fused one would give other bits.
                let product = s.mul(s.splat(*weight), s.load(values.as_ptr()));
                s.store(s.add(s.load(to), product), to);
            }
        }
    }
}

/// Adds the results `values` of tile `tile` (with the bias of an expert, if there is one) to the rows of `out` that `to` has the numbers and
/// weights of.
///
/// # Safety
/// Nobody else reads or writes the tile's columns of `out`.
///
/// # Panics
/// If a row is not there.
unsafe fn add_weighted(
    level: Level,
    values: &[[f32; TILE_ROWS]],
    (tokens, weights): (&[u32], &[f32]),
    bias: Option<(&Bias, usize)>,
    out: &Floats,
    tile: usize,
) {
    let first = tile * TILE_ROWS;
    let num_cols = (out.cols - first).min(TILE_ROWS);
    if bias.is_none() && num_cols == TILE_ROWS {
        assert!(tokens.iter().all(|token| (*token as usize) < out.rows), "tokens below {}", out.rows);
        let args = AddWeighted { values, tokens, weights, out: out.pointer(0).wrapping_add(first), stride: out.stride };
        // SAFETY: rows and columns were checked; the kernel keeps no reference, so the lifetime may be called static.
        unsafe {
            level.call::<AddWeighted<'static>>(&std::mem::transmute::<AddWeighted<'_>, AddWeighted<'static>>(args))
        };
        return;
    }
    for ((values, token), weight) in values.iter().zip(tokens).zip(weights) {
        let mut values = *values;
        if let Some((bias, expert)) = bias {
            bias.add_to(expert, tile, &mut values);
        }
        // SAFETY: the caller's promise.
        let sum = unsafe { out.part_mut(*token as usize, first, num_cols) };
        for (sum, value) in sum.iter_mut().zip(&values) {
            *sum += weight * value;
        }
    }
}

pub(crate) fn run(backend: &mut CpuBackend, op: &MoeDown) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let loaded = &backend.experts[op.experts.id as usize];
    let packed = &loaded.down;
    let map = &packed.map;
    let form = mode.row_form(&map.layout);
    let (top_k, hidden_size) = (op.ids.cols, op.experts.hidden_size);
    backend.lists.build("moe_down", &backend.memory.integers(op.ids), op.experts.num_experts)?;
    backend.lists.gather_weights(&backend.memory.floats(op.weights));
    let lists = &backend.lists;
    // Rows of an expert side by side: kernels for many rows step from one to the next.
    let source = RowSource::parts(&backend.memory.floats(op.h), top_k).in_order(lists.all_pairs());
    let prepared = backend.space.prepare(level, source, std::iter::once(form)).map_err(crate::backend::no_memory)?;
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
                let bias = loaded.biases.as_ref().map(|biases| (&biases[2], expert));
                multiply(
                    level,
                    mode,
                    (&packed.bytes, map),
                    expert,
                    tiles.clone(),
                    &rows.with_ids(prepared.ids(lists.places(expert))),
                    |tile, i, values| {
                        let chosen = i..i + values.len();
                        let to = (&lists.tokens(expert)[chosen.clone()], &lists.weights(expert)[chosen]);
                        // SAFETY: the columns are this thread's.
                        unsafe { add_weighted(level, values, to, bias, &out, tile) };
                    },
                );
            }
        }
    });
    Ok(())
}
