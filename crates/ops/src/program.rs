//! The operations of a step as values, so that a back end that records steps can look at one before it launches it.

use crate::buffer::{Cache, Tensor};
use crate::weight::Weight;
use crate::{
    Add, Argmax, AttendGqa, AttendMla, Embed, GateUp, GatherRows, IndexScore, IndexTopk, LayerNorm, LinearHeads,
    MoeDown, MoeGateUp, RmsNorm, Rope, RopeTable, Route, Sample,
};

/// One operation of the seam with its arguments.
#[derive(Debug, Clone)]
#[allow(missing_docs)] // Each variant has the arguments of the operation of its name.
pub enum Op {
    Embed(Embed),
    RopeTable(RopeTable),
    RmsNorm(RmsNorm),
    LayerNorm(LayerNorm),
    Linear { x: Tensor, parts: Vec<(Weight, Tensor)> },
    LinearHeads(LinearHeads),
    Rope(Rope),
    KvStore { parts: Vec<Tensor>, slots: Tensor, cache: Cache },
    AttendGqa(AttendGqa),
    AttendMla(AttendMla),
    IndexScore(IndexScore),
    IndexTopk(IndexTopk),
    Route(Route),
    MoeGateUp(MoeGateUp),
    MoeDown(MoeDown),
    GateUp(GateUp),
    Add(Add),
    GatherRows(GatherRows),
    Argmax(Argmax),
    Sample(Sample),
}

impl Op {
    /// The activations that it reads, those of its views that it may also write included.
    pub fn reads(&self) -> Vec<Tensor> {
        match self {
            Op::Embed(op) => vec![op.token_ids],
            Op::RopeTable(op) => vec![op.positions, op.inverse_frequencies],
            Op::RmsNorm(op) => [Some(op.x), op.delta, Some(op.weight)].into_iter().flatten().collect(),
            Op::LayerNorm(op) => vec![op.x, op.weight, op.bias],
            Op::Linear { x, .. } => vec![*x],
            Op::LinearHeads(op) => vec![op.x],
            Op::Rope(op) => vec![op.x, op.table],
            Op::KvStore { parts, slots, .. } => parts.iter().copied().chain([*slots]).collect(),
            Op::AttendGqa(op) => {
                let paging = [op.paging.positions, op.paging.sequences, op.paging.block_table];
                [op.q].into_iter().chain(op.sinks).chain(paging).collect()
            }
            Op::AttendMla(op) => {
                let paging = [op.paging.positions, op.paging.sequences, op.paging.block_table];
                let index = op.index.map(|index| [index.ids, index.counts]);
                [op.q_latent, op.q_rope].into_iter().chain(paging).chain(index.into_iter().flatten()).collect()
            }
            Op::IndexScore(op) => {
                vec![op.q, op.weights, op.paging.positions, op.paging.sequences, op.paging.block_table]
            }
            Op::IndexTopk(op) => vec![op.scores, op.positions],
            Op::Route(op) => [Some(op.logits), op.correction_bias].into_iter().flatten().collect(),
            Op::MoeGateUp(op) => vec![op.x, op.ids],
            Op::MoeDown(op) => [Some(op.h), Some(op.ids), Some(op.weights), op.plus].into_iter().flatten().collect(),
            Op::GateUp(op) => vec![op.x],
            Op::Add(op) => vec![op.x, op.y],
            Op::GatherRows(op) => vec![op.x, op.rows],
            Op::Argmax(op) => vec![op.logits],
            Op::Sample(op) => vec![op.logits, op.draws],
        }
    }
}
