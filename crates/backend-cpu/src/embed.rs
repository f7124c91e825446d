//! [`moellon_ops::Embed`]: rows of a packed table, decoded.
//!
//! `unsafe`: threads write disjoint parts of the output.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::layout::BLOCK_COLS;
use moellon_ops::{Embed, Error, Result};
use moellon_tensor::pool::partition;

/// Columns that one thread decodes at least: below that the work is shorter than waking a thread.
const COLS_PER_UNIT: usize = 8 * BLOCK_COLS;

pub(crate) fn run(backend: &mut CpuBackend, op: &Embed) -> Result<()> {
    let table = &backend.weights[op.table.id as usize].packed;
    let (ids, out) = (backend.memory.integers(op.token_ids), backend.memory.floats(op.out));
    // SAFETY: nobody writes the ids.
    let ids = unsafe { ids.row(0) };
    if let Some(id) = ids.iter().find(|id| **id as usize >= op.table.rows) {
        return Err(Error::Contract {
            op: "embed",
            what: "token id".to_owned(),
            found: id.to_string(),
            expected: format!("below {}", op.table.rows),
        });
    }
    let cols = op.table.cols;
    let units_per_row = cols.div_ceil(COLS_PER_UNIT);
    backend.pool.run(|index, num_threads| {
        for unit in partition(ids.len() * units_per_row, num_threads, index, 1) {
            let (t, first) = (unit / units_per_row, unit % units_per_row * COLS_PER_UNIT);
            let range = first..(first + COLS_PER_UNIT).min(cols);
            // SAFETY: units are different parts of the output.
            let part = unsafe { out.part_mut(t, first, range.len()) };
            table.unpack_columns(0, ids[t] as usize, range, part);
        }
    });
    Ok(())
}
