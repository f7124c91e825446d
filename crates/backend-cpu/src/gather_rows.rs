//! [`moellon_ops::GatherRows`].
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use moellon_ops::{GatherRows, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &GatherRows) -> Result<()> {
    let (x, rows, out) = (backend.memory.floats(op.x), backend.memory.integers(op.rows), backend.memory.floats(op.out));
    backend.run_rows(out.rows, out.cols, |range| {
        for i in range {
            // SAFETY: rows of `out` are this thread's; nobody writes the others.
            unsafe { out.part_mut(i, 0, out.cols).copy_from_slice(x.row(rows.row(0)[i] as usize)) };
        }
    });
    Ok(())
}
