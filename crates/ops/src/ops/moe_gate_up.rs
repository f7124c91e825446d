//! Gate and up projections of the routed experts: gather, dequantize, multiply, activate. With [`crate::MoeDown`] half of a
//! model's bytes.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{
    Case, Tolerance, all_formats, floats, load_random_experts, normal_rows, upload, upload_ids, zeros,
};
use crate::error::expect_eq;
use crate::ops::Activation;
use crate::reference::Memory;
use crate::weight::Experts;
use moellon_tensor::WeightFormat;

/// `out[t, i] = f(x[t] gate[ids[t, i]]ᵀ, x[t] up[ids[t, i]]ᵀ)`. Each *distinct* expert of the batch is read once.
#[derive(Debug, Clone, Copy)]
pub struct MoeGateUp {
    /// `[num_tokens, hidden_size]`.
    pub x: Tensor,
    /// The layer's experts.
    pub experts: Experts,
    /// `[num_tokens, top_k]` u32, different within a row and below `num_experts` ([`crate::Route`] made them).
    pub ids: Tensor,
    /// The function `f`.
    pub activation: Activation,
    /// `[num_tokens, top_k * intermediate_size]`.
    pub out: Tensor,
}

impl MoeGateUp {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "moe_gate_up";
        self.x.check_f32(op, "x", [self.x.rows, self.experts.hidden_size])?;
        self.ids.check_u32(op, "ids", [self.x.rows, self.ids.cols])?;
        expect_eq(op, "whether there are experts to choose", self.ids.cols <= self.experts.num_experts, true)?;
        self.out.check_f32(op, "out", [self.x.rows, self.ids.cols * self.experts.intermediate_size])
    }

    /// Bytes that must be moved when the batch chose `distinct_experts` different experts.
    pub fn bytes(&self, distinct_experts: usize) -> u64 {
        distinct_experts as u64 * self.experts.gate_up_bytes()
            + (self.x.rows * (self.x.cols + self.out.cols) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (x, ids) = (memory.rows(self.x), memory.ids(self.ids));
        let expert = |x: &[f32], id: u32| {
            let (gate, up) = memory.expert_gate_up(&self.experts, id as usize, x);
            gate.iter().zip(&up).map(|(g, u)| self.activation.apply(*g, *u)).collect::<Vec<f32>>()
        };
        let out: Vec<Vec<f32>> =
            x.iter().zip(&ids).map(|(x, ids)| ids.iter().flat_map(|id| expert(x, *id)).collect()).collect();
        memory.set_rows(self.out, &out);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str, format: WeightFormat, choices: Vec<Vec<u32>>, biased: bool| {
        let activation =
            if biased { Activation::ClampedSwiGlu { alpha: 1.702, limit: 7.0 } } else { Activation::SwiGlu };
        let (num_experts, intermediate, hidden) = (5, 128, 128);
        let tokens = choices.len();
        Case::new(
            "moe_gate_up",
            format!("{format}, {name}"),
            tokens,
            Tolerance::product(hidden, format, 4),
            move |backend, picked| {
                let experts = load_random_experts(backend, 34, format, [num_experts, intermediate, hidden], biased)?;
                let chosen: Vec<Vec<u32>> = picked.iter().map(|r| choices[*r].clone()).collect();
                let top_k = chosen[0].len();
                let ids = upload_ids(backend, &chosen)?;
                let x = upload(backend, &normal_rows(35, tokens, hidden), picked)?;
                let out = zeros(backend, picked.len(), top_k * intermediate)?;
                backend.moe_gate_up(&MoeGateUp { x, experts, ids, activation, out })?;
                Ok(vec![floats(backend, "out", out)?])
            },
        )
    };
    let mut cases = Vec::new();
    for format in all_formats() {
        cases.push(case("one token", format, vec![vec![4, 0]], false));
        cases.push(case("shared and empty experts", format, vec![vec![0, 1], vec![3, 0], vec![1, 3]], true));
    }
    cases.push(case("all tokens on one expert", WeightFormat::Nvfp4, vec![vec![2]; 11], false));
    cases
}
