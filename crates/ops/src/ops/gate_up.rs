//! Gate and up projections of a dense feed-forward or shared expert, with the activation.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, all_formats, floats, load_random, normal_rows, upload, zeros};
use crate::error::expect_eq;
use crate::ops::Activation;
use crate::reference::Memory;
use crate::weight::Weight;

/// `out = f(x gateᵀ, x upᵀ)`.
#[derive(Debug, Clone, Copy)]
pub struct GateUp {
    /// `[num_tokens, hidden_size]`.
    pub x: Tensor,
    /// `[intermediate_size, hidden_size]`.
    pub gate: Weight,
    /// `[intermediate_size, hidden_size]`.
    pub up: Weight,
    /// The function `f`.
    pub activation: Activation,
    /// `[num_tokens, intermediate_size]`.
    pub out: Tensor,
}

impl GateUp {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "gate_up";
        self.x.check_f32(op, "x", [self.x.rows, self.x.cols])?;
        let shape = |w: &Weight| [w.count, w.rows, w.cols];
        expect_eq(op, "shape of gate", shape(&self.gate), [1, self.gate.rows, self.x.cols])?;
        expect_eq(op, "shape of up", shape(&self.up), shape(&self.gate))?;
        self.out.check_f32(op, "out", [self.x.rows, self.gate.rows])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        self.gate.size_bytes() + self.up.size_bytes() + (self.x.rows * (self.x.cols + self.out.cols) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let row = |x: &Vec<f32>| {
            let (gate, up) = (memory.apply(&self.gate, 0, x), memory.apply(&self.up, 0, x));
            gate.iter().zip(&up).map(|(g, u)| self.activation.apply(*g, *u)).collect()
        };
        let out: Vec<Vec<f32>> = memory.rows(self.x).iter().map(row).collect();
        memory.set_rows(self.out, &out);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    all_formats()
        .into_iter()
        .map(|format| {
            Case::new("gate_up", format.to_string(), 3, Tolerance::product(128, format, 4), move |backend, picked| {
                let gate = load_random(backend, 31, format, [1, 40, 128], None)?;
                let up = load_random(backend, 32, format, [1, 40, 128], None)?;
                let x = upload(backend, &normal_rows(33, 3, 128), picked)?;
                let out = zeros(backend, picked.len(), 40)?;
                backend.gate_up(&GateUp { x, gate, up, activation: Activation::SwiGlu, out })?;
                Ok(vec![floats(backend, "out", out)?])
            })
        })
        .collect()
}
