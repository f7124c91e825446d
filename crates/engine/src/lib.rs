//! Floor 4 of Moellon: what turns logits into sequences. The engine knows counts, blocks and tokens; no tensor shapes.

pub mod request;
pub mod sampler;

pub use request::{
    CacheMiss, Event, FinishReason, Finished, Request, RequestError, SampledToken, Started, ThinkingBudget,
};
pub use sampler::{Sampler, SamplingParams, SettingError};
