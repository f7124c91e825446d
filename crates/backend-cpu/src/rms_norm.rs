//! [`moellon_ops::RmsNorm`].
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::norms::{add_row, rms_norm_row};
use moellon_ops::{Result, RmsNorm};

pub(crate) fn run(backend: &mut CpuBackend, op: &RmsNorm) -> Result<()> {
    let level = backend.level;
    let (x, out, weight) =
        (backend.memory.floats(op.x), backend.memory.floats(op.out), backend.memory.floats(op.weight));
    let delta = op.delta.map(|delta| backend.memory.floats(delta));
    let cols = x.cols;
    backend.run_rows(x.rows, cols, |rows| {
        for row in rows {
            // SAFETY: rows of `x` and `out` are this thread's; nobody writes the others.
            unsafe {
                if let Some(delta) = &delta {
                    add_row(level, x.pointer(row), delta.pointer(row), cols);
                }
                rms_norm_row(level, x.pointer(row), weight.pointer(0), out.pointer(row), cols, op.eps);
            }
        }
    });
    Ok(())
}
