//! [`moellon_ops::AttendMla`]: latent attention is grouped-query attention with one key head whose values are the first
//! part of its keys. Units of work are up to four heads of one token.
//!
//! `unsafe`: threads write disjoint heads of the output.
#![allow(unsafe_code)]

use crate::attention::{CHUNK, Heads, KeysAndValues, attend_chunk, heads_floats};
use crate::backend::CpuBackend;
use crate::paged::Pages;
use moellon_ops::{AttendMla, Result};
use moellon_tensor::pool::partition;

/// Heads of a unit.
const UNIT_HEADS: usize = 4;

pub(crate) fn run(backend: &mut CpuBackend, op: &AttendMla) -> Result<()> {
    let level = backend.level;
    let (rank, rope_dim) = (op.kv_lora_rank, op.qk_rope_head_dim);
    let pages = Pages::new(&backend.memory, &op.paging);
    let (q_latent, q_rope) = (backend.memory.floats(op.q_latent), backend.memory.floats(op.q_rope));
    let out = backend.memory.floats(op.out);
    let index_set = op.index.map(|set| (backend.memory.integers(set.ids), backend.memory.integers(set.counts)));
    let rows = backend.memory.cache(&op.cache);
    let shared = KeysAndValues { rows, key_at: 0, key_dim: rank + rope_dim, value_at: 0, value_dim: rank };
    let floats = heads_floats(op.num_heads, shared.key_dim, rank);
    let scratch = backend.scratch.per_thread(backend.pool.num_threads(), floats);
    let units_per_token = op.num_heads.div_ceil(UNIT_HEADS);
    backend.pool.run(|index, num_threads| {
        // SAFETY: each thread takes its own part.
        let space = unsafe { scratch.part(index) };
        let mut units = partition(op.q_latent.rows * units_per_token, num_threads, index, 1);
        while !units.is_empty() {
            let (t, first_unit) = (units.start / units_per_token, units.start % units_per_token);
            let count = units.len().min(units_per_token - first_unit);
            units.start += count;
            let first_head = first_unit * UNIT_HEADS;
            let end_head = (first_head + count * UNIT_HEADS).min(op.num_heads);
            let mut heads = Heads::new(space, end_head - first_head, [shared.key_dim, rank], None);
            // SAFETY: nobody writes the queries.
            let (latents, ropes) = unsafe { (q_latent.row(t), q_rope.row(t)) };
            for head in first_head..end_head {
                let (latent, rope) = heads.query_mut(head - first_head, shared.key_dim).split_at_mut(rank);
                latent.copy_from_slice(&latents[head * rank..][..rank]);
                rope.copy_from_slice(&ropes[head * op.q_rope_head_stride..][..rope_dim]);
            }
            let blocks = pages.blocks(t);
            // SAFETY: nobody writes the index set.
            let chosen = index_set.as_ref().map(|(ids, counts)| unsafe { &ids.row(t)[..counts.row(0)[t] as usize] });
            let num_keys = chosen.map_or(pages.position(t) + 1, <[u32]>::len);
            let mut slots = [0; CHUNK];
            for start in (0..num_keys).step_by(CHUNK) {
                let slots = &mut slots[..CHUNK.min(num_keys - start)];
                for (i, slot) in slots.iter_mut().enumerate() {
                    let position = chosen.map_or(start + i, |chosen| chosen[start + i] as usize);
                    *slot = pages.slot(blocks, position);
                }
                attend_chunk(level, &shared, op.scale, &mut heads, slots);
            }
            for head in first_head..end_head {
                // SAFETY: units are different heads.
                heads.write_average(head - first_head, unsafe { out.part_mut(t, head * rank, rank) });
            }
        }
    });
    Ok(())
}
