//! Floor 2 of Moellon: the seam between models and back ends.
//!
//! A model appends fused operations to a back end; each operation is an argument struct over opaque handles. All nouns
//! are declared here, with their shapes:
//!
//! | noun | what | shape |
//! |---|---|---|
//! | [`Tensor`] | a view of a device buffer, 2-D | `[rows, cols]`, f32 or u32, row stride |
//! | [`Weight`] | one or several matrices of one shape and format, repacked by the back end | `[count, rows, cols]` |
//! | [`Experts`] | gate, up and down of every expert of a layer | `[num_experts, ..]` |
//! | [`Cache`] | key/value or latent rows, addressed by slot | `[num_slots, width]` |
//! | [`Paging`] | where each row of the batch finds its keys | positions, sequences, block table |
//!
//! Activations are f32 `[num_tokens, features]`; heads are column ranges. An operation has a `validate`, the `bytes` it
//! must move, a slow obvious `reference`, and conformance cases ([`conformance::run_all`]) that every back end passes.
//!
//! **Row independence.** What an operation writes to a row depends only on that row's inputs, never on the other rows
//! of the batch, bit for bit. Lossless speculation, prefix reuse and reproducible answers stand on this.

pub mod backend;
pub mod buffer;
pub mod conformance;
pub mod error;
mod forward;
pub mod ops;
pub mod profile;
pub mod program;
pub mod reference;
pub mod weight;

pub use backend::{ActivationPrecision, Backend, Caps, KernelTime, Stage, StepTimes};
pub use buffer::{Buffer, Cache, CacheDtype, ElementType, Paging, Tensor};
pub use error::{Error, Result};
pub use ops::*;
pub use weight::{Experts, ExpertsSource, Weight, WeightSource};
