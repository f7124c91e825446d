//! [`moellon_ops::Linear`]: products of one batch of activations with one or several weights.
//!
//! `unsafe`: threads write disjoint columns of the outputs.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::layout::TILE_ROWS;
use crate::memory::Floats;
use crate::prepare::RowSource;
use crate::product::{Sink, fetch_to_write, multiply};
use crate::weights::Bias;
use crate::work::{Item, tile_cost};
use moellon_ops::{Linear, Result};
use std::ops::Range;

/// Copies the outputs of a tile to its columns of row `row`, as far as they exist.
///
/// # Safety
/// Nobody else reads or writes these columns.
pub(crate) unsafe fn write_tile(
    out: &Floats,
    row: usize,
    first_col: usize,
    num_cols: usize,
    tile: usize,
    values: &[f32; TILE_ROWS],
) {
    let count = (num_cols - tile * TILE_ROWS).min(TILE_ROWS);
    // SAFETY: the caller's promise.
    let part = unsafe { out.part_mut(row, first_col + tile * TILE_ROWS, count) };
    match <&mut [f32; TILE_ROWS]>::try_from(&mut *part) {
        // A constant length: two or four stores.
        Ok(part) => *part = *values,
        Err(_) => part.copy_from_slice(&values[..count]),
    }
}

/// Columns `first_col..first_col + num_cols` of `out`, as tiles of a product.
pub(crate) struct Columns<'a> {
    out: &'a Floats,
    first_col: usize,
    num_cols: usize,
    /// A bias, and of which matrix.
    bias: (Option<&'a Bias>, usize),
}

impl<'a> Columns<'a> {
    /// As long as it lives,
    ///
    /// # Safety
    /// nobody else reads or writes these columns of tiles that it is given.
    pub(crate) unsafe fn new(
        out: &'a Floats,
        [first_col, num_cols]: [usize; 2],
        bias: (Option<&'a Bias>, usize),
    ) -> Self {
        Columns { out, first_col, num_cols, bias }
    }
}

impl Sink for Columns<'_> {
    /// Rows stand pages apart and were written a step ago, so each line would be waited for by all stores behind it, of which
    /// tile registers' kernels have many.
    #[inline]
    fn expect(&mut self, tile: usize, rows: Range<usize>) {
        for row in rows {
            fetch_to_write(self.out.pointer(row).wrapping_add(self.first_col + tile * TILE_ROWS).cast());
        }
    }

    #[inline]
    fn put(&mut self, tile: usize, first: usize, values: &[[f32; TILE_ROWS]]) {
        for (row, values) in (first..).zip(values) {
            let mut values = *values;
            if let (Some(bias), matrix) = self.bias {
                bias.add_to(matrix, tile, &mut values);
            }
            // SAFETY: `new`'s promise.
            unsafe { write_tile(self.out, row, self.first_col, self.num_cols, tile, &values) };
        }
    }
}

pub(crate) fn run(backend: &mut CpuBackend, op: &Linear<'_>) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let weights = &backend.weights;
    let weight = |part: usize| &weights[op.parts[part].0.id as usize];
    let form = |part: usize| mode.row_form(&weight(part).packed.map.layout);
    let source = RowSource::rows(&backend.memory.floats(op.x));
    let num_rows = source.num_rows();
    let prepared =
        backend.space.prepare(level, source, (0..op.parts.len()).map(form)).map_err(crate::backend::no_memory)?;
    backend.items.clear();
    backend.items.extend((0..op.parts.len()).map(|part| {
        let map = &weight(part).packed.map;
        Item { tiles: map.tiles, tile_cost: tile_cost(map.layout.tile_bytes, map.layout.cols, num_rows) }
    }));
    backend.queues.fill_for_items(&backend.items, backend.pool.num_threads());
    let (pool, memory, items, queues) = (&backend.pool, &backend.memory, &backend.items, &backend.queues);
    pool.run(|index, num_threads| {
        if prepared.needs_fill() {
            // SAFETY: `x` is not an output; the barrier stands between this and the reads.
            unsafe { prepared.fill(level, index, num_threads) };
            pool.barrier();
        }
        queues.share(items, index, |part, tiles| {
            let loaded = weight(part);
            let out = memory.floats(op.parts[part].1);
            // SAFETY: filled before the barrier.
            let rows = unsafe { prepared.rows(form(part)) };
            let packed = &loaded.packed;
            // SAFETY: tiles are shared out, and parts have different outputs.
            let columns = unsafe { Columns::new(&out, [0, packed.map.rows], (loaded.bias.as_ref(), 0)) };
            multiply(level, mode, (&packed.bytes, &packed.map), 0, tiles, &rows, columns);
        });
    });
    Ok(())
}
