//! The CUDA back end: every operation of the seam as kernels of our own, for NVIDIA GPUs.
//!
//! | file | what |
//! |---|---|
//! | `driver` | the driver behind a safe surface: context, stream, memory, kernels, graphs |
//! | `kernels` | the compiled kernels, found by compute capability, or compiled by `nvrtc` where there are none |
//! | `weights` | how weights lie on the device |
//! | `loader` | copying them there and repacking them, piece by piece |
//! | `buffers` | device buffers and their bfloat16 twins |
//! | `backend` | memory, weights and caches; the operations: which kernel, which grid; steps, recorded and replayed |
//!
//! Kernels are CUDA C++ in `kernels/`; `packed.cuh` says how quantized weights lie in memory and why, `matmul.cu` and, for one row,
//! `decode.cu`, for a few `few.cu`, for a prompt `prompt.cu` how they are multiplied. Activations are f32; products with quantized weights round them to bfloat16 (what these models were trained
//! with) and sum in f32 on the tensor cores. Plain weights are multiplied in f32.

mod args;
mod backend;
mod buffers;
mod driver;
mod kernels;
mod loader;
mod nvrtc;
mod weights;

pub use backend::{CudaBackend, CudaOptions};
