//! The operations, one file each: contract, `validate`, `bytes`, reference, conformance cases.

mod activation;
mod add;
mod argmax;
mod attend_gqa;
mod attend_mla;
mod embed;
mod gate_up;
mod gather_rows;
mod index_score;
mod index_topk;
mod kv_store;
mod layer_norm;
mod linear;
mod linear_heads;
mod moe_down;
mod moe_gate_up;
mod rms_norm;
mod rope;
mod route;
pub mod sample;

pub use activation::Activation;
pub use add::Add;
pub use argmax::Argmax;
pub use attend_gqa::AttendGqa;
pub use attend_mla::{AttendMla, IndexSet};
pub use embed::Embed;
pub use gate_up::GateUp;
pub use gather_rows::GatherRows;
pub use index_score::IndexScore;
pub use index_topk::IndexTopk;
pub use kv_store::KvStore;
pub use layer_norm::LayerNorm;
pub use linear::Linear;
pub use linear_heads::LinearHeads;
pub use moe_down::MoeDown;
pub use moe_gate_up::MoeGateUp;
pub use rms_norm::RmsNorm;
pub use rope::{Rope, RopePairs, RopeTable};
pub use route::{Route, Scoring};
pub use sample::{Draw, Sample};

use crate::conformance::Case;

/// The conformance cases of every operation.
pub fn all_cases() -> Vec<Case> {
    [
        embed::cases(),
        rope::cases(),
        rms_norm::cases(),
        layer_norm::cases(),
        linear::cases(),
        linear_heads::cases(),
        kv_store::cases(),
        attend_gqa::cases(),
        attend_mla::cases(),
        index_score::cases(),
        index_topk::cases(),
        route::cases(),
        moe_gate_up::cases(),
        moe_down::cases(),
        gate_up::cases(),
        add::cases(),
        gather_rows::cases(),
        argmax::cases(),
        sample::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
