//! [`moellon_ops::Route`]: a few hundred logits a row, so the reference's scalar code is fast enough (2 us a row), and
//! its choices are the reference's to the bit.
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::CpuBackend;
use moellon_ops::{Result, Route};

pub(crate) fn run(backend: &mut CpuBackend, op: &Route) -> Result<()> {
    let (logits, weights) = (backend.memory.floats(op.logits), backend.memory.floats(op.weights));
    let (ids, bias) = (backend.memory.integers(op.ids), op.correction_bias.map(|b| backend.memory.floats(b)));
    backend.run_rows(logits.rows, logits.cols * 16, |rows| {
        for t in rows {
            // SAFETY: nobody writes logits and bias; rows of the outputs are this thread's.
            unsafe {
                let (chosen, chosen_weights) = op.route_row(logits.row(t), bias.as_ref().map(|b| b.row(0)));
                ids.row_mut(t).copy_from_slice(&chosen);
                weights.part_mut(t, 0, chosen_weights.len()).copy_from_slice(&chosen_weights);
            }
        }
    });
    Ok(())
}
