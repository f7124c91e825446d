//! Floor 1 of Moellon: number types, weight formats and their codecs, host buffers and the thread pool.
//!
//! This is the only crate that knows how a weight's bits lie in a checkpoint. Everything above speaks of a
//! [`MatrixView`] (bytes of one matrix in its canonical layout, with its [`WeightFormat`]) and lets a back end
//! repack it into whatever streams best.

pub mod arena;
pub mod bits;
mod check_finite;
mod decode;
pub mod dtype;
pub mod encode;
pub mod error;
pub mod format;
pub mod matrix;
pub mod minifloat;
pub mod owned;
pub mod pool;
mod random;
pub mod rng;

pub use dtype::Dtype;
pub use error::{Error, Result};
pub use format::{ScaleDtype, WeightFormat};
pub use matrix::{MatrixView, Rows};
pub use owned::OwnedMatrix;
