//! [`moellon_ops::Argmax`]: the largest value first (branch-free, so it vectorises), then where it stands first.
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use moellon_ops::{Argmax, Result};

pub(crate) fn run(backend: &mut CpuBackend, op: &Argmax) -> Result<()> {
    let (logits, out) = (backend.memory.floats(op.logits), backend.memory.integers(op.out));
    backend.run_rows(logits.rows, logits.cols, |rows| {
        for t in rows {
            // SAFETY: rows of `out` are this thread's; nobody writes the logits.
            unsafe { out.row_mut(t)[0] = first_largest(logits.row(t)) as u32 };
        }
    });
    Ok(())
}

fn first_largest(values: &[f32]) -> usize {
    let mut lanes = [f32::NEG_INFINITY; 16];
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    values.iter().position(|value| *value == largest).unwrap_or(0)
}
