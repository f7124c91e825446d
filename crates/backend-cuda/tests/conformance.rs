//! Every operation against its reference, on the GPU. Without one the test says that it did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

use moellon_backend_cuda::{CudaBackend, CudaOptions};
use moellon_ops::conformance::run_all;

#[test]
fn every_operation() {
    // A developer's CUBINs, where the variable names a folder.
    let options =
        CudaOptions { kernels: std::env::var_os("MOELLON_CUDA_KERNELS").map(Into::into), ..CudaOptions::default() };
    let mut backend = match CudaBackend::new(&options) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP conformance of the CUDA back end: {error}");
            return;
        }
    };
    let report = run_all(&mut backend);
    report.assert_passed();
    eprintln!("{} cases passed", report.passed);
}
