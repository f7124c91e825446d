//! The CPU back end of Moellon: AVX-512, AVX2, NEON and portable kernels.
//!
//! | module | what |
//! |---|---|
//! | `backend` | [`CpuBackend`]: memory, weights, and one file an operation (`linear`, `moe_gate_up`, ..) |
//! | `layout`, `pack`, `weights` | weights as tiles of 16 rows, each one sequential stream |
//! | `activations`, `prepare` | activation rows as f32 or as 8-bit integers |
//! | `product` | tiles times rows: where nearly all bytes of a step are read |
//! | `attend`, `attention` | whose turn it is; scores, softmax and values over paged cache rows |
//! | `work`, `expert_lists` | who does what |
//! | `simd` | 16 lanes, whatever the processor has; all levels give the same bits (but see `attend_tiles`) |

#[cfg(target_endian = "big")]
compile_error!("weights are read as they lie in checkpoints, which are little-endian");

mod activations;
mod add;
mod argmax;
mod attend;
mod attend_gqa;
mod attend_mla;
#[cfg(target_arch = "x86_64")]
mod attend_tiles;
mod attention;
mod backend;
pub mod bandwidth;
mod chunk_rows;
mod disjoint;
mod embed;
mod expert_lists;
mod gate_up;
mod gather_rows;
mod index_score;
mod index_topk;
mod kv_store;
mod layer_norm;
mod layout;
mod linear;
mod linear_heads;
mod memory;
mod moe_down;
mod moe_gate_up;
mod norms;
mod pack;
mod paged;
mod prepare;
mod product;
mod rms_norm;
mod rope;
mod route;
mod scratch;
mod simd;
mod weights;
mod work;

pub use backend::{CpuBackend, CpuOptions};
pub use product::ActivationMode;
pub use simd::CpuLevel;
