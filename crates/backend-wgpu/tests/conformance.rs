//! Every operation against its reference, on whatever adapter there is (in CI lavapipe, a CPU that plays a GPU). Without one the tests
//! say that they did not run.
#![allow(clippy::print_stderr)] // A skipped test says so.

use moellon_backend_wgpu::{WgpuBackend, WgpuOptions};
use moellon_ops::conformance::{Case, run_cases};
use moellon_ops::{Backend, all_cases};
use std::time::Instant;

/// Runs the cases that `picked` picks. Compiling kernels takes longer than running them, so the tests share out the formats.
fn run(options: &WgpuOptions, picked: impl Fn(&Case) -> bool) {
    let started = Instant::now();
    let mut backend = match WgpuBackend::new(options) {
        Ok(backend) => backend,
        Err(error) => {
            eprintln!("SKIP conformance of the wgpu back end: {error}");
            return;
        }
    };
    let cases = all_cases().into_iter().filter(picked).collect();
    let report = run_cases(&mut backend, cases);
    report.assert_passed();
    let (device, compiled) = (&backend.caps().device, backend.compiled());
    eprintln!(
        "{} cases passed on {device} in {:.1} s; {} kernels were compiled in {:.1} s",
        report.passed,
        started.elapsed().as_secs_f64(),
        compiled.0,
        compiled.1.as_secs_f64()
    );
}

fn is_affine(case: &Case) -> bool {
    case.name.contains("affine")
}

#[test]
fn operations_on_affine_weights() {
    run(&WgpuOptions::default(), is_affine);
}

#[test]
fn operations_on_other_weights_and_on_none() {
    run(&WgpuOptions::default(), |case| !is_affine(case));
}

/// Adapters may flush binary16 subnormals; then FP4 and FP8 codes are decoded with integers.
#[test]
fn small_codes_without_half_subnormals() {
    // Weights in memory of the adapter's own, as on a discrete GPU.
    let options = WgpuOptions { without_half_subnormals: true, without_shared_memory: true, ..WgpuOptions::default() };
    let small = ["nvfp4", "mxfp4", "mxfp8", "fp8"];
    run(&options, |case| {
        let of_format = small.iter().any(|format| case.name.starts_with(format));
        of_format && (case.op == "linear_heads" || case.op == "embed")
    });
}

/// Metal has no instruction for products of bytes: there affine weights are multiplied as floats. Nor has it Vulkan's commands.
#[test]
fn affine_weights_without_integer_products() {
    let options = WgpuOptions { without_integer_products: true, without_vulkan: true, ..WgpuOptions::default() };
    run(&options, |case| is_affine(case) && (case.op == "linear_heads" || case.op == "moe_down"));
}

/// The kernel for prompts, by cooperative matrices or what stands in their place: its rows have the bits that they have alone.
#[test]
fn affine_weights_by_tiles() {
    let options = WgpuOptions { few_rows_by_tiles: true, ..WgpuOptions::default() };
    let products = ["linear", "linear_heads", "gate_up", "moe_gate_up", "moe_down"];
    run(&options, |case| is_affine(case) && products.contains(&case.op));
}
