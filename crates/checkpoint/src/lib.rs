//! Checkpoints of Mixture-of-Experts models: sharded safetensors, memory-mapped, in the layouts of Hugging Face, MLX,
//! ModelOpt, compressed-tensors and gpt-oss.
//!
//! [`Checkpoint::open`] checks every header before anything is believed; [`Checkpoint::linear`],
//! [`Checkpoint::experts`] and [`Checkpoint::mla_kv_b`] give weights as [`moellon_tensor::MatrixView`]s into the map,
//! in whatever format the tensors have. Errors are one line and name the file, the tensor, the value found and the
//! value expected.

pub mod checkpoint;
mod declared;
mod error;
pub mod experts;
pub mod header;
mod identity;
pub mod index;
pub mod json_file;
mod linear;
mod mapped_file;
pub mod matrix;
pub mod mla;
mod packed_integers;
#[cfg(feature = "testing")]
pub mod testing;
mod vector;
pub mod writer;

pub use checkpoint::{Checkpoint, TensorView};
pub use error::{Error, Result};
pub use experts::Projection;
pub use matrix::Matrix;
pub use mla::{MlaKvB, MlaShape};
pub use writer::{TensorSpec, Writer, WriterOptions};
