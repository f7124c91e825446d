//! Every operation against its reference, at every level that this machine has, in both activation modes.

use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_ops::conformance::run_all;

fn run(level: CpuLevel, activation: ActivationMode, threads: usize) {
    let options = CpuOptions { threads: Some(threads), pin: false, level: Some(level), activation };
    let mut backend = CpuBackend::new(options).unwrap();
    let report = run_all(&mut backend);
    assert!(report.failures.is_empty(), "{level}, {activation:?}, {threads} threads: {:#?}", report.failures);
    report.assert_passed();
}

/// Levels to test. Portable kernels are the same code everywhere and run natively on x86-64; in an emulator of another
/// processor they would take most of the time.
fn levels() -> impl Iterator<Item = CpuLevel> {
    let best = CpuLevel::detect();
    CpuLevel::available()
        .filter(move |level| cfg!(target_arch = "x86_64") || *level != CpuLevel::Portable || best == CpuLevel::Portable)
}

#[test]
fn exact_activations() {
    for level in levels() {
        run(level, ActivationMode::Exact, 2);
    }
}

#[test]
fn int8_activations() {
    for level in levels() {
        run(level, ActivationMode::Int8, 2);
    }
}

#[test]
fn more_threads_than_tiles() {
    run(CpuLevel::detect(), ActivationMode::Int8, 7);
}

#[test]
fn one_thread() {
    run(CpuLevel::detect(), ActivationMode::Int8, 1);
}
