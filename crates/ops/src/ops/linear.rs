//! Matrix products with weights, of any format.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, all_formats, floats, load_random, normal_rows, upload, zeros};
use crate::error::{expect, expect_eq};
use crate::reference::Memory;
use crate::weight::Weight;
use moellon_tensor::WeightFormat;

/// `out = x Wᵀ + bias` for one or several weights that share `x` (q_a, kv_a and the indexer's projections, say), so
/// that a back end can prepare the activations once and fill the device with all of them.
#[derive(Debug, Clone, Copy)]
pub struct Linear<'a> {
    /// `[num_tokens, in_features]`.
    pub x: Tensor,
    /// Weights `[out_features, in_features]` and their outputs `[num_tokens, out_features]`.
    pub parts: &'a [(Weight, Tensor)],
}

impl Linear<'_> {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        self.x.check_f32("linear", "x", [self.x.rows, self.x.cols])?;
        expect("linear", !self.parts.is_empty(), "number of parts", 0, "at least 1")?;
        for (weight, out) in self.parts {
            expect_eq("linear", "matrices of the weight", weight.count, 1)?;
            expect_eq("linear", "columns of the weight", weight.cols, self.x.cols)?;
            out.check_f32("linear", "out", [self.x.rows, weight.rows])?;
        }
        Ok(())
    }

    /// Bytes that must be moved: each weight once, whatever the number of rows.
    pub fn bytes(&self) -> u64 {
        let weights: u64 = self.parts.iter().map(|(w, _)| w.size_bytes()).sum();
        let outputs: usize = self.parts.iter().map(|(_, out)| out.cols).sum();
        weights + (self.x.rows * (self.x.cols + outputs) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let x = memory.rows(self.x);
        for (weight, out) in self.parts {
            let y: Vec<Vec<f32>> = x.iter().map(|x| memory.apply(weight, 0, x)).collect();
            memory.set_rows(*out, &y);
        }
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |format: WeightFormat, tokens: usize, out: usize, cols: usize, biased: bool| {
        let name = format!("{format}, {tokens} tokens, [{out}, {cols}]{}", if biased { ", bias" } else { "" });
        Case::new("linear", name, tokens, Tolerance::product(cols, format, 1), move |backend, picked| {
            let bias = biased.then(|| normal_rows(8, 1, out).remove(0));
            let weight = load_random(backend, 7, format, [1, out, cols], bias.as_deref())?;
            let x = upload(backend, &normal_rows(9, tokens, cols), picked)?;
            let y = zeros(backend, picked.len(), out)?;
            backend.linear(&Linear { x, parts: &[(weight, y)] })?;
            Ok(vec![floats(backend, "out", y)?])
        })
    };
    let mut cases = Vec::new();
    for format in all_formats() {
        // One token; odd rows; one past a tile of 16 rows; more tokens than any register block holds.
        cases.push(case(format, 1, 16, 128, false));
        cases.push(case(format, 3, 1, 256, false));
        cases.push(case(format, 5, 33, 384, true));
        cases.push(case(format, 17, 48, 128, false));
    }
    // Columns that are no multiple of anything: plain floats only.
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
        cases.push(case(format, 2, 19, 37, true));
    }
    cases.push(Case::new(
        "linear",
        "three weights of different formats share x",
        3,
        Tolerance::product(128, WeightFormat::Nvfp4, 1),
        |backend, picked| {
            let formats = [WeightFormat::Bf16, WeightFormat::Nvfp4, all_formats()[8]];
            let x = upload(backend, &normal_rows(10, 3, 128), picked)?;
            let mut parts = Vec::new();
            for (i, format) in formats.into_iter().enumerate() {
                let weight = load_random(backend, 11 + i as u64, format, [1, 16 * (i + 1) + i, 128], None)?;
                parts.push((weight, zeros(backend, picked.len(), weight.rows)?));
            }
            backend.linear(&Linear { x, parts: &parts })?;
            parts.iter().map(|(_, out)| floats(backend, "out", *out)).collect()
        },
    ));
    cases
}
