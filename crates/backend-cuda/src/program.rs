//! The operations of a step as values, so that a step can be looked at before it is launched.

use moellon_ops::{
    Add, Argmax, AttendGqa, AttendMla, Cache, Embed, GateUp, GatherRows, IndexScore, IndexTopk, LayerNorm, LinearHeads,
    MoeDown, MoeGateUp, RmsNorm, Rope, RopeTable, Route, Sample, Tensor, Weight,
};

/// One operation of the seam with its arguments.
#[derive(Debug, Clone)]
pub(crate) enum Op {
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
