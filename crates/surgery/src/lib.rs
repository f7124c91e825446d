//! Floor 5 of Moellon: the tool that makes demolished models, and says how good they are.
//!
//! | step | file | what |
//! |---|---|---|
//! | calibrate | `calibrate.rs`, `stream.rs`, `observe.rs`, `stats.rs` | texts through a model, a layer at a time |
//! | prune | `prune.rs` | fewer experts, by their saliency |
//! | recalibrate | `recalibrate.rs`, `router_fit.rs` | routers fitted to the experts that are left |
//! | plan | `plan.rs`, `sensitivity.rs`, `allocate.rs` | which module gets how many bits |
//! | quantize | `quantize.rs`, `encoder.rs`, `search_*.rs`, `feedback.rs` | other formats, module by module |
//! | compare | `compare.rs`, `distance.rs`, `picture.rs` | how far predictions are from another model's |
//!
//! A model's weights are listed by the model itself (`inventory.rs`); products are written in MLX's layout (`layout.rs`),
//! under a temporary name and with a journal, so that a killed run goes on (`product.rs`), and carry a receipt and a model
//! card (`report.rs`). Nothing here names a back end: the caller hands in what makes one.

pub mod allocate;
pub mod calibrate;
pub mod compare;
pub mod distance;
pub mod encoder;
pub mod error;
pub mod feedback;
pub mod formats;
mod importance;
pub mod inventory;
mod layout;
mod linear_algebra;
mod observe;
pub mod picture;
pub mod plan;
mod product;
mod progress;
pub mod prune;
pub mod quantize;
pub mod recalibrate;
pub mod report;
mod router_fit;
mod search_affine;
mod search_float;
pub mod sensitivity;
mod simd;
pub mod stats;
pub mod stream;

pub use error::{Error, Result};
pub use plan::Plan;
pub use progress::Progress;
pub use quantize::Source;
pub use stats::Stats;
