//! [`moellon_ops::AttendGqa`]. Units of work are up to four query heads of one key head and token; neighbouring units
//! of a thread share a pass over the cache rows.
//!
//! `unsafe`: threads write disjoint heads of the output.
#![allow(unsafe_code)]

use crate::attention::{CHUNK, Heads, KeysAndValues, attend_chunk, heads_floats};
use crate::backend::CpuBackend;
use crate::paged::Pages;
use moellon_ops::{AttendGqa, Result};
use moellon_tensor::pool::partition;

/// Query heads of a unit.
const UNIT_HEADS: usize = 4;

pub(crate) fn run(backend: &mut CpuBackend, op: &AttendGqa) -> Result<()> {
    let level = backend.level;
    let (head_dim, group) = (op.head_dim, op.num_heads / op.num_kv_heads);
    let pages = Pages::new(&backend.memory, &op.paging);
    let (q, out) = (backend.memory.floats(op.q), backend.memory.floats(op.out));
    let sinks = op.sinks.map(|sinks| backend.memory.floats(sinks));
    let rows = backend.memory.cache(&op.cache);
    let scratch = backend.scratch.per_thread(backend.pool.num_threads(), heads_floats(group, head_dim, head_dim));
    // Units of one key head and token, then of the next key head.
    let units_per_key_head = group.div_ceil(UNIT_HEADS);
    let num_units = op.q.rows * op.num_kv_heads * units_per_key_head;
    backend.pool.run(|index, num_threads| {
        // SAFETY: each thread takes its own part.
        let space = unsafe { scratch.part(index) };
        let mut units = partition(num_units, num_threads, index, 1);
        while !units.is_empty() {
            let (key_head_of_batch, first_unit) = (units.start / units_per_key_head, units.start % units_per_key_head);
            let count = units.len().min(units_per_key_head - first_unit);
            units.start += count;
            let (t, key_head) = (key_head_of_batch / op.num_kv_heads, key_head_of_batch % op.num_kv_heads);
            let first_head = key_head * group + first_unit * UNIT_HEADS;
            let end_head = (first_head + count * UNIT_HEADS).min((key_head + 1) * group);
            let shared = KeysAndValues {
                rows,
                key_at: key_head * head_dim,
                key_dim: head_dim,
                value_at: (op.num_kv_heads + key_head) * head_dim,
                value_dim: head_dim,
            };
            // SAFETY: nobody writes queries and sinks.
            let (query, sinks) = unsafe { (q.row(t), sinks.as_ref().map(|s| &s.row(0)[first_head..end_head])) };
            let mut heads = Heads::new(space, end_head - first_head, [head_dim; 2], sinks);
            for head in first_head..end_head {
                heads.query_mut(head - first_head, head_dim).copy_from_slice(&query[head * head_dim..][..head_dim]);
            }
            let (position, blocks) = (pages.position(t), pages.blocks(t));
            let first = op.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let mut slots = [0; CHUNK];
            for start in (first..=position).step_by(CHUNK) {
                let slots = &mut slots[..CHUNK.min(position + 1 - start)];
                for (i, slot) in slots.iter_mut().enumerate() {
                    *slot = pages.slot(blocks, start + i);
                }
                attend_chunk(level, &shared, op.scale, &mut heads, slots);
            }
            for head in first_head..end_head {
                // SAFETY: units are different heads.
                heads.write_average(head - first_head, unsafe { out.part_mut(t, head * head_dim, head_dim) });
            }
        }
    });
    Ok(())
}
