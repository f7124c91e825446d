//! [`moellon_ops::IndexScore`]. Units of work are chunks of positions of one token.
//!
//! `unsafe`: threads write disjoint columns of the scores.
#![allow(unsafe_code)]

use crate::attention::{CHUNK, KeysAndValues};
use crate::backend::CpuBackend;
use crate::chunk_rows::{ChunkRows, query_floats, tiles_fit};
use crate::paged::Pages;
use moellon_ops::{IndexScore, Result};
use moellon_tensor::pool::partition;

pub(crate) fn run(backend: &mut CpuBackend, op: &IndexScore) -> Result<()> {
    let level = backend.level;
    let (num_heads, head_dim) = (op.num_heads, op.head_dim);
    let pages = Pages::new(&backend.memory, &op.paging);
    let (q, weights) = (backend.memory.floats(op.q), backend.memory.floats(op.weights));
    let scores = backend.memory.floats(op.scores);
    let rows = backend.memory.cache(&op.cache);
    let shared = KeysAndValues { rows, key_at: 0, key_dim: head_dim, value_at: 0, value_dim: 0 };
    let tiles = tiles_fit(level, backend.mode, &shared, num_heads);
    let (stride, rows_floats) = (query_floats(head_dim, tiles), ChunkRows::num_floats(&shared, tiles, 0, false));
    let scratch = backend.scratch.per_thread(backend.pool.num_threads(), num_heads * stride + rows_floats);
    let units_per_token = op.paging.max_context.div_ceil(CHUNK);
    backend.pool.run(|index, num_threads| {
        #[cfg(target_arch = "x86_64")]
        let _tiles = crate::simd::amx::Use;
        // SAFETY: each thread takes its own part.
        let (queries, rows) = unsafe { scratch.part(index) }.split_at_mut(num_heads * stride);
        let mut rows = ChunkRows::new(&mut rows[..rows_floats], tiles);
        let mut token_of_queries = None;
        for unit in partition(op.q.rows * units_per_token, num_threads, index, 1) {
            let (t, start) = (unit / units_per_token, unit % units_per_token * CHUNK);
            let num_keys = pages.position(t) + 1;
            if start >= num_keys {
                continue;
            }
            // SAFETY: nobody writes queries and weights.
            let (query, weights) = unsafe { (q.row(t), weights.row(t)) };
            if token_of_queries != Some(t) {
                queries.fill(0.0);
                for (to, from) in queries.chunks_exact_mut(stride).zip(query.chunks_exact(head_dim)) {
                    to[..head_dim].copy_from_slice(from);
                }
                rows.pack_queries(level, &shared, queries);
                token_of_queries = Some(t);
            }
            let blocks = pages.blocks(t);
            let mut slots = [0; CHUNK];
            let slots = &mut slots[..CHUNK.min(num_keys - start)];
            for (i, slot) in slots.iter_mut().enumerate() {
                *slot = pages.slot(blocks, start + i);
            }
            // SAFETY: units are different columns.
            let out = unsafe { scores.part_mut(t, start, slots.len()) };
            rows.extend(level, &shared, slots, false);
            rows.index(level, &shared, op.scale, (queries, weights), slots, out);
        }
    });
    Ok(())
}
