//! [`moellon_ops::LinearHeads`]: one matrix a head.
//!
//! `unsafe`: threads write disjoint columns of the output.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::linear::{results_are_written, write_rows};
use crate::prepare::RowSource;
use crate::product::multiply;
use crate::work::{Item, tile_cost};
use moellon_ops::{LinearHeads, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &LinearHeads) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let loaded = &backend.weights[op.weight.id as usize];
    let map = &loaded.packed.map;
    let form = mode.row_form(&map.layout);
    let num_tokens = op.x.rows;
    let source = RowSource::heads(&backend.memory.floats(op.x), op.weight.count, op.x_head_stride, op.weight.cols);
    let prepared = backend.space.prepare(level, source, std::iter::once(form)).map_err(crate::backend::no_memory)?;
    let out = backend.memory.floats(op.out);
    let item = Item { tiles: map.tiles, tile_cost: tile_cost(map.layout.tile_bytes, map.layout.cols, num_tokens) };
    backend.items.clear();
    backend.items.resize(op.weight.count, item);
    backend.queues.fill_for_items(&backend.items, backend.pool.num_threads());
    let (pool, items, queues) = (&backend.pool, &backend.items, &backend.queues);
    pool.run(|index, num_threads| {
        if prepared.needs_fill() {
            // SAFETY: `x` is not the output; the barrier stands between this and the reads.
            unsafe { prepared.fill(level, index, num_threads) };
            pool.barrier();
        }
        // SAFETY: filled before the barrier.
        let rows = unsafe { prepared.rows(form) };
        queues.share(items, index, |head, tiles| {
            let rows = rows.with_ids(prepared.ids(head * num_tokens..(head + 1) * num_tokens));
            multiply(level, mode, (&loaded.packed.bytes, map), head, tiles, &rows, |tile, first, values| {
                let (cols, bias) = ([head * map.rows, map.rows], (loaded.bias.as_ref(), head));
                // SAFETY: tiles are shared out, and heads have different columns.
                unsafe { write_rows(&out, first, cols, tile, values, bias) };
            });
        });
        results_are_written();
    });
    Ok(())
}
