//! Floor 3 of Moellon: one configurable Mixture-of-Experts decoder.
//!
//! An architecture is data: a parser from `config.json` to a [`ModelConfig`] ([`arch`]). The forward pass is code and
//! the same for all of them ([`Decoder`]): embed; for each layer norm, attention, norm, feed-forward; final norm; head.
//! It appends [`moellon_ops`] operations to whatever back end it is given and knows none of them by name.
//!
//! | file | concept |
//! |---|---|
//! | `config.rs` | [`ModelConfig`]: every number of a model, with its meaning |
//! | `arch/` | one parser an architecture |
//! | `weights.rs` | handles of all weights, loaded and checked against the config |
//! | `provider.rs`, `synthetic/` | where weights come from: a checkpoint, or random ones of exact shapes |
//! | `decoder.rs` | one step: [`Batch`] in, logits out |
//! | `attention_mla.rs`, `attention_gqa.rs`, `indexer.rs`, `ffn.rs` | the parts of a layer |
//! | `mtp.rs`, `draft_precision.rs` | the multi-token-prediction layer, and cheaper weights for it |
//! | `eagle.rs` | EAGLE-3 heads: a drafting layer of their own checkpoint |
//! | `layer_pass.rs` | one part at a time, for models larger than memory |
//! | `account.rs` | parameters and bytes per token, by component |
//! | `tap.rs` | a hook to look at values inside a step |

pub mod account;
pub mod arch;
mod attention_gqa;
mod attention_mla;
pub mod batch;
pub mod config;
pub mod decoder;
pub mod draft_precision;
pub mod eagle;
pub mod error;
mod ffn;
mod fields;
mod forward;
mod indexer;
pub mod layer_pass;
pub mod mtp;
pub mod provider;
pub mod rope;
pub mod session;
pub mod synthetic;
pub mod tap;
pub mod weights;
mod workspace;

pub use account::Account;
pub use batch::Batch;
pub use config::ModelConfig;
pub use decoder::{Decoder, DecoderOptions};
pub use eagle::{Eagle, EagleConfig};
pub use error::{Error, Result};
pub use layer_pass::LayerPass;
pub use session::Session;
pub use tap::{Tap, TapPoint};
