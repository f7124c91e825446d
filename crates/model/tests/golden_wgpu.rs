//! Golden models on the portable GPU back end, on whatever adapter there is (in CI lavapipe). One test, because compiling kernels
//! takes longer than all of the models.
#![allow(clippy::print_stderr)] // A skipped test says so.

mod golden_support;

use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};

#[test]
fn prefill_and_recorded_decoding_match() {
    let mut backend = match WgpuBackend::new(&WgpuOptions::default()) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP golden models on the wgpu back end: {error}");
            return;
        }
    };
    golden_support::assert_prefill_and_recorded_decoding(&mut backend);
}
