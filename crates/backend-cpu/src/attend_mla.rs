//! [`moellon_ops::AttendMla`]: latent attention is grouped-query attention with one key head whose values are the first
//! part of its keys.
//!
//! `unsafe`: reads queries and index sets.
#![allow(unsafe_code)]

use crate::attend::Attend;
use crate::attention::KeysAndValues;
use crate::backend::CpuBackend;
use crate::chunk_rows::tiles_fit;
use crate::paged::Pages;
use moellon_ops::{AttendMla, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &AttendMla) -> Result<()> {
    let (rank, rope_dim) = (op.kv_lora_rank, op.qk_rope_head_dim);
    let (q_latent, q_rope) = (backend.memory.floats(op.q_latent), backend.memory.floats(op.q_rope));
    let index_set = op.index.map(|set| (backend.memory.integers(set.ids), backend.memory.integers(set.counts)));
    let rows = backend.memory.cache(&op.cache);
    let shared = KeysAndValues { rows, key_at: 0, key_dim: rank + rope_dim, value_at: 0, value_dim: rank };
    let tiles = tiles_fit(backend.level, backend.mode, &shared, op.num_heads);
    let attend = Attend {
        level: backend.level,
        scale: op.scale,
        num_tokens: op.q_latent.rows,
        num_key_heads: 1,
        heads_per_key: op.num_heads,
        dims: [rank + rope_dim, rank],
        pages: Pages::new(&backend.memory, &op.paging),
        window: None,
        sinks: None,
        keys: |_| shared,
        // SAFETY: nobody writes index sets.
        chosen: |t| index_set.as_ref().map(|(ids, counts)| unsafe { &ids.row(t)[..counts.row(0)[t] as usize] }),
        write_query: |token, head, to: &mut [f32]| {
            let (latent, rope) = to.split_at_mut(rank);
            // SAFETY: nobody writes queries.
            unsafe {
                latent.copy_from_slice(&q_latent.row(token)[head * rank..][..rank]);
                rope.copy_from_slice(&q_rope.row(token)[head * op.q_rope_head_stride..][..rope_dim]);
            }
        },
        tiles,
        out: backend.memory.floats(op.out),
    };
    attend.run(&backend.pool, &mut backend.scratch, &mut backend.queues);
    Ok(())
}
