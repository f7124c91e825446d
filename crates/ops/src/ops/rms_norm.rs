//! Root-mean-square norm, with the residual addition that usually stands before it.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, floats, normal_rows, upload, upload_row, zeros};
use crate::reference::{Memory, dot};

/// `x += delta` (if there is one), then `out = x / sqrt(mean(x²) + eps) * weight`, row by row.
/// Heads are normed by splitting rows first ([`Tensor::split_rows`]).
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// `[num_rows, features]`; updated where there is a `delta`.
    pub x: Tensor,
    /// `[num_rows, features]`, added to `x` first.
    pub delta: Option<Tensor>,
    /// `[1, features]`.
    pub weight: Tensor,
    /// Added to the mean of squares.
    pub eps: f32,
    /// `[num_rows, features]`; may be `x` itself where there is no `delta`.
    pub out: Tensor,
}

impl RmsNorm {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let shape = [self.x.rows, self.x.cols];
        self.x.check_f32("rms_norm", "x", shape)?;
        if let Some(delta) = self.delta {
            delta.check_f32("rms_norm", "delta", shape)?;
        }
        self.weight.check_f32("rms_norm", "weight", [1, self.x.cols])?;
        self.out.check_f32("rms_norm", "out", shape)
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        let passes = if self.delta.is_some() { 16 } else { 8 };
        (self.x.rows * self.x.cols * passes + self.x.cols * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let mut x = memory.rows(self.x);
        if let Some(delta) = self.delta {
            for (x, delta) in x.iter_mut().flatten().zip(memory.rows(delta).iter().flatten()) {
                *x += delta;
            }
            memory.set_rows(self.x, &x);
        }
        let weight = memory.row(self.weight);
        for row in &mut x {
            let inverse = 1.0 / (dot(row, row) / row.len() as f64 + f64::from(self.eps)).sqrt();
            for (x, w) in row.iter_mut().zip(&weight) {
                *x = (f64::from(*x) * inverse) as f32 * w;
            }
        }
        memory.set_rows(self.out, &x);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |rows: usize, cols: usize, with_delta: bool| {
        let name = format!("{rows}x{cols}{}", if with_delta { " with residual" } else { "" });
        Case::new("rms_norm", name, rows, Tolerance::exact(cols), move |backend, picked| {
            let x = upload(backend, &normal_rows(1, rows, cols), picked)?;
            let delta = if with_delta { Some(upload(backend, &normal_rows(2, rows, cols), picked)?) } else { None };
            let weight = upload_row(backend, &normal_rows(3, 1, cols)[0])?;
            let out = zeros(backend, picked.len(), cols)?;
            backend.rms_norm(&RmsNorm { x, delta, weight, eps: 1e-5, out })?;
            Ok(vec![floats(backend, "out", out)?, floats(backend, "x", x)?])
        })
    };
    let into_columns =
        Case::new("rms_norm", "into the right half of wider rows", 3, Tolerance::exact(40), |backend, picked| {
            let x = upload(backend, &normal_rows(1, 3, 40), picked)?;
            let weight = upload_row(backend, &normal_rows(3, 1, 40)[0])?;
            let wide = zeros(backend, picked.len(), 80)?;
            backend.rms_norm(&RmsNorm { x, delta: None, weight, eps: 1e-6, out: wide.columns(40, 40) })?;
            Ok(vec![floats(backend, "out", wide)?])
        });
    vec![case(1, 64, false), case(5, 33, true), case(2, 6144, true), case(7, 1, false), into_columns]
}
