//! [`moellon_ops::LayerNorm`].
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use crate::norms::layer_norm_row;
use moellon_ops::{LayerNorm, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &LayerNorm) -> Result<()> {
    let level = backend.level;
    let (x, out) = (backend.memory.floats(op.x), backend.memory.floats(op.out));
    let (weight, bias) = (backend.memory.floats(op.weight), backend.memory.floats(op.bias));
    backend.run_rows(x.rows, x.cols, |rows| {
        for row in rows {
            let parameters = [weight.pointer(0).cast_const(), bias.pointer(0).cast_const()];
            // SAFETY: rows of `out` are this thread's; nobody writes the others.
            unsafe { layer_norm_row(level, x.pointer(row), parameters, out.pointer(row), x.cols, op.eps) };
        }
    });
    Ok(())
}
