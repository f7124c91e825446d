//! Floor 4 of Moellon: what turns logits into sequences. The engine knows counts, blocks and tokens; no tensor shapes.

pub mod sampler;

pub use sampler::{Sampler, SamplingParams, SettingError};
