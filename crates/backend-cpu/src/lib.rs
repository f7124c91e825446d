//! The CPU back end of Moellon: AVX-512, AVX2, NEON and portable kernels.
//!
//! | module | what |
//! |---|---|
//! | `layout`, `pack` | weights as tiles of 16 rows, each one sequential stream |
//! | `activations` | activation rows as f32 or as 8-bit integers |
//! | `product` | tiles times rows: where nearly all bytes of a step are read |
//! | `simd` | 16 lanes, whatever the processor has; all levels give the same bits |

#[cfg(target_endian = "big")]
compile_error!("weights are read as they lie in checkpoints, which are little-endian");

mod activations;
mod disjoint;
mod layout;
mod pack;
mod product;
mod simd;

pub use product::ActivationMode;
pub use simd::CpuLevel;
