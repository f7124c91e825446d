//! [`moellon_ops::Argmax`]: the largest value and whether there is a NaN first (branch-free, so it vectorises), then where
//! it stands.
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
    let (mut lanes, mut is_nan) = ([f32::NEG_INFINITY; 16], [false; 16]);
    let (chunks, rest) = values.as_chunks::<16>();
    for chunk in chunks {
        for ((lane, is_nan), value) in lanes.iter_mut().zip(&mut is_nan).zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
            *is_nan |= value.is_nan();
        }
    }
    let found = if is_nan.contains(&true) || rest.iter().any(|value| value.is_nan()) {
        values.iter().position(|value| value.is_nan())
    } else {
        let largest = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
        values.iter().position(|value| *value == largest)
    };
    found.unwrap_or(0)
}
