//! [`moellon_ops::Add`].
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::norms::add_row;
use moellon_ops::{Add, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &Add) -> Result<()> {
    let level = backend.level;
    let (x, y) = (backend.memory.floats(op.x), backend.memory.floats(op.y));
    backend.run_rows(x.rows, x.cols, |rows| {
        for row in rows {
            // SAFETY: rows of `x` are this thread's; nobody writes `y`.
            unsafe { add_row(level, x.pointer(row), y.pointer(row), x.cols) };
        }
    });
    Ok(())
}
