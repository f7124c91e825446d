//! Golden models on CUDA. Without a GPU the test says that it did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

mod golden_support;

use moellon_backend_cuda::{CudaBackend, CudaOptions};

#[test]
fn golden_models() {
    let options =
        CudaOptions { kernels: std::env::var_os("MOELLON_CUDA_KERNELS").map(Into::into), ..CudaOptions::default() };
    let mut backend = match CudaBackend::new(&options) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP golden models on the CUDA back end: {error}");
            return;
        }
    };
    golden_support::assert_prefill_and_recorded_decoding(&mut backend);
    golden_support::quantized::assert_every_format(1, &mut backend);
}
