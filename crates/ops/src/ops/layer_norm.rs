//! Layer norm with a bias: the key norm of DeepSeek's and GLM's sparse-attention indexer.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, floats, normal_rows, upload, upload_row, zeros};
use crate::reference::Memory;

/// `out = (x - mean) / sqrt(variance + eps) * weight + bias`, row by row.
#[derive(Debug, Clone, Copy)]
pub struct LayerNorm {
    /// `[num_rows, features]`.
    pub x: Tensor,
    /// `[1, features]`.
    pub weight: Tensor,
    /// `[1, features]`.
    pub bias: Tensor,
    /// Added to the variance.
    pub eps: f32,
    /// `[num_rows, features]`; may be `x` itself.
    pub out: Tensor,
}

impl LayerNorm {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let shape = [self.x.rows, self.x.cols];
        self.x.check_f32("layer_norm", "x", shape)?;
        self.weight.check_f32("layer_norm", "weight", [1, self.x.cols])?;
        self.bias.check_f32("layer_norm", "bias", [1, self.x.cols])?;
        self.out.check_f32("layer_norm", "out", shape)
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        ((self.x.rows + 1) * self.x.cols * 8) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (weight, bias) = (memory.row(self.weight), memory.row(self.bias));
        let mut x = memory.rows(self.x);
        for row in &mut x {
            let n = row.len() as f64;
            let mean = row.iter().map(|x| f64::from(*x)).sum::<f64>() / n;
            let variance = row.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / n;
            let inverse = 1.0 / (variance + f64::from(self.eps)).sqrt();
            for (i, x) in row.iter_mut().enumerate() {
                *x = ((f64::from(*x) - mean) * inverse * f64::from(weight[i]) + f64::from(bias[i])) as f32;
            }
        }
        memory.set_rows(self.out, &x);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |rows: usize, cols: usize| {
        Case::new("layer_norm", format!("{rows}x{cols}"), rows, Tolerance::exact(cols), move |backend, picked| {
            let x = upload(backend, &normal_rows(1, rows, cols), picked)?;
            let weight = upload_row(backend, &normal_rows(3, 1, cols)[0])?;
            let bias = upload_row(backend, &normal_rows(4, 1, cols)[0])?;
            let out = zeros(backend, picked.len(), cols)?;
            backend.layer_norm(&LayerNorm { x, weight, bias, eps: 1e-6, out })?;
            Ok(vec![floats(backend, "out", out)?])
        })
    };
    vec![case(1, 128), case(4, 33)]
}
