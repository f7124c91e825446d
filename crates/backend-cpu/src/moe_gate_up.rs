//! [`moellon_ops::MoeGateUp`]: gate and up of the chosen experts. Each distinct expert of the batch is read once, as one
//! sequential stream of alternating gate and up tiles, for all of its rows.
//!
//! `unsafe`: threads write disjoint columns of the output.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::gate_up::{Half, gate_up_tiles};
use crate::linear::{results_are_written, write_tile};
use crate::prepare::RowSource;
use crate::work::{Item, tile_cost};
use moellon_ops::{MoeGateUp, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &MoeGateUp) -> Result<()> {
    let (level, mode) = (backend.level, backend.mode);
    let loaded = &backend.experts[op.experts.id as usize];
    let pairs = &loaded.gate_up;
    let (gate_map, up_map) = (&pairs.gate, &pairs.up);
    let forms = [gate_map, up_map].map(|map| mode.row_form(&map.layout));
    let (top_k, width) = (op.ids.cols, op.experts.intermediate_size);
    backend.lists.build("moe_gate_up", &backend.memory.integers(op.ids), op.experts.num_experts)?;
    let lists = &backend.lists;
    let source = RowSource::rows(&backend.memory.floats(op.x));
    let prepared = backend.space.prepare(level, source, forms.into_iter()).map_err(crate::backend::no_memory)?;
    let out = backend.memory.floats(op.out);
    let tile_bytes = gate_map.layout.tile_bytes + up_map.layout.tile_bytes;
    backend.items.clear();
    backend.items.extend(lists.active().iter().map(|expert| {
        let num_rows = lists.tokens(*expert as usize).len();
        Item { tiles: gate_map.tiles, tile_cost: tile_cost(tile_bytes, 2 * op.x.cols, num_rows) }
    }));
    backend.queues.fill_for_items(&backend.items, backend.pool.num_threads());
    let (pool, items, queues) = (&backend.pool, &backend.items, &backend.queues);
    pool.run(|index, num_threads| {
        if prepared.needs_fill() {
            // SAFETY: `x` is not the output; the barrier stands between this and the reads.
            unsafe { prepared.fill(level, index, num_threads) };
            pool.barrier();
        }
        // SAFETY: filled before the barrier.
        let rows = forms.map(|form| unsafe { prepared.rows(form) });
        queues.share(items, index, |item, tiles| {
            let expert = lists.active()[item] as usize;
            let (tokens, pairs_of_expert) = (lists.tokens(expert), lists.pairs(expert));
            let bias = |which: usize| loaded.biases.as_ref().map(|b| &b[which]);
            let half = |map, which: usize| Half {
                weights: (&pairs.bytes[..], map),
                bias: bias(which),
                rows: rows[which].with_ids(tokens),
            };
            let (gate, up) = (half(gate_map, 0), half(up_map, 1));
            gate_up_tiles((level, mode), &gate, &up, expert, tiles, op.activation, |tile, i, values| {
                let pair = pairs_of_expert[i] as usize;
                // SAFETY: tiles of an expert are shared out, and no two experts have the same pair.
                unsafe { write_tile(&out, pair / top_k, pair % top_k * width, width, tile, values) };
            });
        });
        results_are_written();
    });
    Ok(())
}
