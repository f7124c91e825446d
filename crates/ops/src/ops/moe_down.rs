//! Down projection of the routed experts and the weighted sum over them.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{
    Case, Tolerance, all_formats, floats, load_random_experts, normal_rows, upload, upload_ids, zeros,
};
use crate::reference::Memory;
use crate::weight::Experts;
use moellon_tensor::WeightFormat;

/// `out[t] = plus[t] + Σ_i weights[t, i] * (h[t, i] down[ids[t, i]]ᵀ + bias)`, summed in an order
/// that depends on the row alone. Each *distinct*
/// expert of the batch is read once.
#[derive(Debug, Clone, Copy)]
pub struct MoeDown {
    /// `[num_tokens, top_k * intermediate_size]` from [`crate::MoeGateUp`].
    pub h: Tensor,
    /// The layer's experts.
    pub experts: Experts,
    /// `[num_tokens, top_k]` u32.
    pub ids: Tensor,
    /// `[num_tokens, top_k]`.
    pub weights: Tensor,
    /// `[num_tokens, hidden_size]`: the shared expert's output.
    pub plus: Option<Tensor>,
    /// `[num_tokens, hidden_size]`; may be `plus` itself.
    pub out: Tensor,
}

impl MoeDown {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "moe_down";
        let (num_tokens, top_k) = (self.h.rows, self.ids.cols);
        self.h.check_f32(op, "h", [num_tokens, top_k * self.experts.intermediate_size])?;
        self.ids.check_u32(op, "ids", [num_tokens, top_k])?;
        self.weights.check_f32(op, "weights", [num_tokens, top_k])?;
        if let Some(plus) = self.plus {
            plus.check_f32(op, "plus", [num_tokens, self.experts.hidden_size])?;
        }
        self.out.check_f32(op, "out", [num_tokens, self.experts.hidden_size])
    }

    /// Bytes that must be moved when the batch chose `distinct_experts` different experts.
    pub fn bytes(&self, distinct_experts: usize) -> u64 {
        distinct_experts as u64 * self.experts.down_bytes() + (self.h.rows * (self.h.cols + self.out.cols) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (h, ids, weights) = (memory.rows(self.h), memory.ids(self.ids), memory.rows(self.weights));
        let plus = self.plus.map(|p| memory.rows(p));
        let mut out = Vec::new();
        for t in 0..h.len() {
            let mut sum: Vec<f64> = match &plus {
                Some(plus) => plus[t].iter().map(|x| f64::from(*x)).collect(),
                None => vec![0.0; self.experts.hidden_size],
            };
            for (i, id) in ids[t].iter().enumerate() {
                let x = &h[t][i * self.experts.intermediate_size..][..self.experts.intermediate_size];
                for (sum, y) in sum.iter_mut().zip(memory.expert_down(&self.experts, *id as usize, x)) {
                    *sum += f64::from(weights[t][i]) * f64::from(y);
                }
            }
            out.push(sum.into_iter().map(|s| s as f32).collect());
        }
        memory.set_rows(self.out, &out);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str, format: WeightFormat, intermediate: usize, choices: Vec<Vec<u32>>, biased: bool| {
        let (num_experts, hidden) = (5, 80);
        let tokens = choices.len();
        // FP8 blocks and odd groups want whole groups in every matrix, gate and up included.
        let hidden = if format.is_quantized() { 128 } else { hidden };
        Case::new(
            "moe_down",
            format!("{format}, {name}"),
            tokens,
            Tolerance::product(intermediate, format, 2),
            move |backend, picked| {
                let experts = load_random_experts(backend, 36, format, [num_experts, intermediate, hidden], biased)?;
                let chosen: Vec<Vec<u32>> = picked.iter().map(|r| choices[*r].clone()).collect();
                let top_k = chosen[0].len();
                let ids = upload_ids(backend, &chosen)?;
                let h = upload(backend, &normal_rows(37, tokens, top_k * intermediate), picked)?;
                let weights = upload(backend, &normal_rows(38, tokens, top_k), picked)?;
                let plus = if biased { None } else { Some(upload(backend, &normal_rows(39, tokens, hidden), picked)?) };
                let out = zeros(backend, picked.len(), hidden)?;
                backend.moe_down(&MoeDown { h, experts, ids, weights, plus, out })?;
                Ok(vec![floats(backend, "out", out)?])
            },
        )
    };
    let mut cases = Vec::new();
    for format in all_formats() {
        cases.push(case("one token", format, 128, vec![vec![4, 0]], false));
        cases.push(case("shared and empty experts", format, 128, vec![vec![0, 1], vec![3, 0], vec![1, 3]], true));
        // Slots that neither start nor end at whole vectors, which formats without groups along a row may have.
        if format.validate(18).is_ok() {
            cases.push(case("odd width", format, 18, vec![vec![0, 1], vec![3, 0], vec![1, 3]], false));
        }
    }
    cases.push(case("all tokens on one expert", WeightFormat::Nvfp4, 128, vec![vec![2]; 11], false));
    cases
}
