//! Residual addition.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, floats, normal_rows, upload};
use crate::reference::Memory;

/// `x += y`.
#[derive(Debug, Clone, Copy)]
pub struct Add {
    /// `[num_tokens, features]`, updated.
    pub x: Tensor,
    /// `[num_tokens, features]`.
    pub y: Tensor,
}

impl Add {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        self.x.check_f32("add", "x", [self.x.rows, self.x.cols])?;
        self.y.check_f32("add", "y", [self.x.rows, self.x.cols])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.x.rows * self.x.cols * 12) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (mut x, y) = (memory.rows(self.x), memory.rows(self.y));
        for (x, y) in x.iter_mut().flatten().zip(y.iter().flatten()) {
            *x += y;
        }
        memory.set_rows(self.x, &x);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |rows: usize, cols: usize| {
        Case::new("add", format!("{rows}x{cols}"), rows, Tolerance::exact(1), move |backend, picked| {
            let x = upload(backend, &normal_rows(1, rows, cols), picked)?;
            let y = upload(backend, &normal_rows(2, rows, cols), picked)?;
            backend.add(&Add { x, y })?;
            Ok(vec![floats(backend, "x", x)?])
        })
    };
    vec![case(1, 64), case(3, 1), case(5, 100)]
}
