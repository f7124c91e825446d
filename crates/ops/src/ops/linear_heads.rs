//! One matrix a head: absorbing MLA's key projection into the query, and un-absorbing its values.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, all_formats, floats, load_random, normal_rows, upload, zeros};
use crate::error::expect;
use crate::reference::Memory;
use crate::weight::Weight;
use moellon_tensor::WeightFormat;

/// `out[:, h] = x[:, h] W[h]ᵀ` for every head `h`. Head `h` of `x` is the columns
/// `[h * x_head_stride, h * x_head_stride + weight.cols)`; head `h` of `out` is `[h * weight.rows, (h + 1) * weight.rows)`.
#[derive(Debug, Clone, Copy)]
pub struct LinearHeads {
    /// `[num_tokens, >= (num_heads - 1) * x_head_stride + in_features]`.
    pub x: Tensor,
    /// Columns between the starts of two heads of `x`.
    pub x_head_stride: usize,
    /// `[num_heads, out_features, in_features]`.
    pub weight: Weight,
    /// `[num_tokens, num_heads * out_features]`.
    pub out: Tensor,
}

impl LinearHeads {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "linear_heads";
        self.x.check_f32(op, "x", [self.x.rows, self.x.cols])?;
        expect(
            op,
            self.x_head_stride >= self.weight.cols,
            "x_head_stride",
            self.x_head_stride,
            "at least the columns of the weight",
        )?;
        let needed = (self.weight.count - 1) * self.x_head_stride + self.weight.cols;
        expect(op, self.x.cols >= needed, "columns of x", self.x.cols, format_args!("at least {needed}"))?;
        self.out.check_f32(op, "out", [self.x.rows, self.weight.count * self.weight.rows])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        self.weight.size_bytes() + (self.x.rows * (self.weight.count * self.weight.cols + self.out.cols) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let head =
            |x: &[f32], h: usize| memory.apply(&self.weight, h, &x[h * self.x_head_stride..][..self.weight.cols]);
        let y: Vec<Vec<f32>> =
            memory.rows(self.x).iter().map(|x| (0..self.weight.count).flat_map(|h| head(x, h)).collect()).collect();
        memory.set_rows(self.out, &y);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |format: WeightFormat, cols: usize, stride: usize| {
        let name = if cols == 128 { format.to_string() } else { format!("{format}, odd heads") };
        Case::new("linear_heads", name, 3, Tolerance::product(cols, format, 1), move |backend, picked| {
            let weight = load_random(backend, 12, format, [3, 20, cols], None)?;
            let x = upload(backend, &normal_rows(13, 3, 3 * stride), picked)?;
            let out = zeros(backend, picked.len(), 60)?;
            backend.linear_heads(&LinearHeads { x, x_head_stride: stride, weight, out })?;
            Ok(vec![floats(backend, "out", out)?])
        })
    };
    // Heads that neither start nor end at whole vectors, which formats without groups along a row may have.
    let odd = all_formats().into_iter().filter(|format| format.validate(13).is_ok());
    all_formats()
        .into_iter()
        .map(|format| case(format, 128, 144))
        .chain(odd.map(|format| case(format, 13, 21)))
        .collect()
}
