//! Golden models on the portable GPU back end, on whatever adapter there is (in CI lavapipe). One test, because compiling kernels
//! takes longer than all of the models.
#![allow(clippy::print_stderr)] // A skipped test says so.

mod golden_support;

use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_ops::Backend;

#[test]
fn golden_models() {
    let mut backend = match WgpuBackend::new(&WgpuOptions::default()) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP golden models on the wgpu back end: {error}");
            return;
        }
    };
    golden_support::assert_prefill_and_recorded_decoding(&mut backend);
    // A processor that plays the GPU takes two minutes for all of them.
    let stride = if backend.caps().device.contains("llvmpipe") { 4 } else { 1 };
    golden_support::quantized::assert_every_format(stride, &mut backend);
}
