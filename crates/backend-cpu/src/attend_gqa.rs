//! [`moellon_ops::AttendGqa`].
//!
//! `unsafe`: reads the queries, and sinks.
#![allow(unsafe_code)]

use crate::attend::Attend;
use crate::attention::KeysAndValues;
use crate::backend::CpuBackend;
use crate::paged::Pages;
use moellon_ops::{AttendGqa, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &AttendGqa) -> Result<()> {
    let head_dim = op.head_dim;
    let q = backend.memory.floats(op.q);
    let sinks = op.sinks.map(|sinks| backend.memory.floats(sinks));
    let rows = backend.memory.cache(&op.cache);
    let attend = Attend {
        level: backend.level,
        scale: op.scale,
        num_tokens: op.q.rows,
        num_key_heads: op.num_kv_heads,
        heads_per_key: op.num_heads / op.num_kv_heads,
        dims: [head_dim; 2],
        pages: Pages::new(&backend.memory, &op.paging),
        window: op.window,
        // SAFETY: nobody writes sinks.
        sinks: sinks.as_ref().map(|sinks| unsafe { sinks.row(0) }),
        keys: |key_head| KeysAndValues {
            rows,
            key_at: key_head * head_dim,
            key_dim: head_dim,
            value_at: (op.num_kv_heads + key_head) * head_dim,
            value_dim: head_dim,
        },
        chosen: |_| None,
        write_query: |token, head, to: &mut [f32]| {
            // SAFETY: nobody writes queries.
            to.copy_from_slice(unsafe { &q.row(token)[head * head_dim..][..head_dim] });
        },
        tiles: false,
        out: backend.memory.floats(op.out),
    };
    attend.run(&backend.pool, &mut backend.scratch, &mut backend.queues);
    Ok(())
}
