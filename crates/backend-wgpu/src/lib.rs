//! The portable GPU back end: every operation of the seam in WGSL, for Metal, Vulkan and DX12 through wgpu.
//!
//! | file | what |
//! |---|---|
//! | `device` | adapters, limits, self-test, memory, pipelines; what the driver says is an error, never a panic |
//! | `inputs` | small buffers of numbers, written by the host before every step, in one copy that is encoded ahead |
//! | `stream` | dispatches, in order: waiting, submitted, recorded, replayed |
//! | `vulkan` | the Vulkan below wgpu, where it is: kernels, and commands that are recorded once |
//! | `kernels` | which files of `kernels/` make which kernel, and the parts that are written out for a weight format |
//! | `weights` | weights on the device: as they lie in the checkpoint, in buffers that the adapter can bind |
//! | `translate` | kernels as Metal sees them, for CI |
//! | `backend` | the operations: which kernel, which grid; what a step's operations write for each other |
//!
//! Activations are f32. Products are sums of f32, or, where codes of weights are integers and the adapter multiplies four bytes in an
//! instruction, of integers of 22 bits and a power of two for 32 columns: either way the results are those of the CPU's exact mode but
//! for rounding. Nothing depends on the size of a subgroup: where any 32 invocations in a row can exchange values, which the self-test
//! finds out, sums go through registers, else through workgroup memory. Where cooperative matrices sum integers exactly they multiply
//! heads of prompts: digits of activations and codes are f16 numbers there, and a row has the bits that it has alone.
//! `kernels/common.wgsl` has the conventions, `kernels/product.wgsl` says how weights are
//! streamed.

mod backend;
mod device;
mod inputs;
mod kernels;
mod stream;
mod translate;
#[cfg_attr(not(any(windows, target_os = "linux", target_os = "android")), path = "no_vulkan.rs")]
mod vulkan;
mod weights;

pub use backend::{WgpuBackend, WgpuOptions};
pub use device::{AdapterChoice, AdapterKind, AdapterReport, SelfTest, adapters, self_test};
pub use kernels::{cooperative_sources, kernel_sources};
pub use translate::{metal, vulkan};
