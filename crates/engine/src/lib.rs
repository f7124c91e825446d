//! Floor 4 of Moellon: what turns logits into sequences. The engine knows counts, blocks and tokens; no tensor shapes.
//!
//! | file | concept |
//! |---|---|
//! | `request.rs` | what is asked and answered: [`Request`], [`Event`] |
//! | `thread.rs` | [`EngineHandle`]: one thread owns the engine, others send it requests |
//! | `engine.rs` | [`Engine::step`]: admit, propose, plan, forward, choose, commit |
//! | `speculate/` | drafts: who makes them, which are worth a row |
//! | `scheduler.rs` | who runs how many tokens in a step |
//! | `sequence.rs` | one request on its way |
//! | `kv_pool.rs` | cache blocks and who holds them |
//! | `prefix_cache.rs`, `disk_cache.rs` | prefixes that need not be computed again |
//! | `sampler.rs`, `device_draws.rs`, `thinking.rs` | logits to a token, on the host and on the device; the thinking budget |

mod block_rows;
mod device_draws;
pub mod disk_cache;
pub mod engine;
pub mod events;
pub mod kv_pool;
pub mod prefix_cache;
pub mod request;
pub mod sampler;
pub mod scheduler;
mod sequence;
pub mod speculate;
pub mod stats;
mod thinking;
pub mod thread;

pub use disk_cache::{DiskCacheError, DiskCacheOptions, DiskCacheStats};
pub use engine::{Engine, EngineError, EngineOptions, RequestLimits};
pub use events::{CancelHandle, EventReceiver};
pub use request::{
    CacheMiss, Event, FinishReason, Finished, PromptScore, Request, RequestError, SampledToken, Started, ThinkingBudget,
};
pub use sampler::{PickError, Sampler, SamplingParams, SettingError};
pub use speculate::{CostCurve, Drafter, Policy, Replay, SpeculationOptions, SpeculationStats};
pub use stats::{CountedStep, EngineStats};
pub use thread::EngineHandle;
