//! One hook to look at values inside a step: golden tests, calibration and debugging use it; without one it costs nothing.

use crate::Result;
use moellon_ops::{Backend, Tensor};

/// Where in a step a [`Tap`] is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TapPoint {
    /// Residual stream before layer `.0`, `[num_tokens, hidden_size]`; `.0 == num_layers` is the stack's output.
    Hidden(usize),
    /// Output of attention of layer `.0`, after the output projection, `[num_tokens, hidden_size]`.
    AttentionOutput(usize),
    /// Index set of layer `.0`: `[num_tokens, index_topk]` u32 and `[1, num_tokens]` u32. Only where the set was needed.
    IndexSet(usize),
    /// Input of the experts of layer `.0` `[num_tokens, hidden_size]`, chosen ids and weights `[num_tokens, top_k]`, and
    /// the activated products `[num_tokens, top_k * moe_intermediate_size]` that the down projections read.
    Experts(usize),
    /// Post-norm hidden states `[num_tokens, hidden_size]`, what the head and the MTP layer read.
    FinalHidden,
}

/// Sees tensors of a step as they are made.
pub trait Tap {
    /// Called at every point of every step. The tensors hold their values until the next operation.
    ///
    /// # Errors
    /// Whatever the tap's own reads return; the step stops.
    fn at(&mut self, point: TapPoint, tensors: &[Tensor], backend: &mut dyn Backend) -> Result<()>;
}
