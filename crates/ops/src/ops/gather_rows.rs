//! Picks the rows that need logits.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, floats, normal_rows, upload, upload_ids, zeros};
use crate::reference::Memory;

/// `out[i] = x[rows[i]]`.
#[derive(Debug, Clone, Copy)]
pub struct GatherRows {
    /// `[num_tokens, features]`.
    pub x: Tensor,
    /// `[1, num_rows]` u32, each below `num_tokens` (the caller checks).
    pub rows: Tensor,
    /// `[num_rows, features]`, another buffer than `x`.
    pub out: Tensor,
}

impl GatherRows {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        self.x.check_f32("gather_rows", "x", [self.x.rows, self.x.cols])?;
        self.rows.check_u32("gather_rows", "rows", [1, self.rows.cols])?;
        self.out.check_f32("gather_rows", "out", [self.rows.cols, self.x.cols])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.out.rows * self.out.cols * 8) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let x = memory.rows(self.x);
        let picked: Vec<Vec<f32>> = memory.ids(self.rows)[0].iter().map(|r| x[*r as usize].clone()).collect();
        memory.set_rows(self.out, &picked);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let order = [6u32, 0, 3];
    vec![Case::new(
        "gather_rows",
        "some rows, out of order",
        order.len(),
        Tolerance::exact(1),
        move |backend, picked| {
            let x = upload(backend, &normal_rows(6, 7, 33), &[0, 1, 2, 3, 4, 5, 6])?;
            let rows = upload_ids(backend, &[picked.iter().map(|r| order[*r]).collect()])?;
            let out = zeros(backend, picked.len(), 33)?;
            backend.gather_rows(&GatherRows { x, rows, out })?;
            Ok(vec![floats(backend, "out", out)?])
        },
    )]
}
