//! The portable GPU back end: every operation of the seam in WGSL, for Metal, Vulkan and DX12 through wgpu.
//!
//! | file | what |
//! |---|---|
//! | `device` | adapters, limits, self-test, memory, pipelines; what the driver says is an error, never a panic |
//! | `stream` | dispatches, in order: waiting, submitted, recorded, replayed |
//! | `kernels` | which files of `kernels/` make which kernel, and the parts that are written out for a weight format |
//! | `weights` | weights on the device: as they lie in the checkpoint, in buffers that the adapter can bind |
//! | `translate` | kernels as Metal sees them, for CI |
//! | `backend` | the operations: which kernel, which grid |
//!
//! Activations are f32 and so are all products and sums: the results are those of the CPU's exact mode but for the order of summation.
//! Nothing depends on the size of a subgroup. `kernels/common.wgsl` has the conventions, `kernels/product.wgsl` says how weights are
//! streamed.

mod backend;
mod device;
mod kernels;
mod stream;
mod translate;
mod weights;

pub use backend::{WgpuBackend, WgpuOptions};
pub use device::{AdapterChoice, AdapterKind, AdapterReport, SelfTest, adapters, self_test};
pub use kernels::kernel_sources;
pub use translate::metal;
