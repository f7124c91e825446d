//! Rates of the weight kernels beside the read bandwidth of the same minute:
//!
//!     cargo run --release -p moellon-backend-cpu --example bench_kernels [-- <part of a format's name> ...]
//!
//! Passes over a working set of half a gigabyte or more alternate with passes that only read; a line has the fastest of
//! both (other programs only ever slow them down) and, as `median`, the share of the medians. `steal` is the share of
//! processor time that the host took away: ignore lines above 2 %.
#![allow(clippy::print_stdout)] // A command-line tool prints.

use moellon_backend_cpu::bandwidth::ReadProbe;
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuOptions};
use moellon_ops::conformance::random_matrices;
use moellon_ops::{
    Activation, Backend, ElementType, Experts, ExpertsSource, Linear, MoeDown, MoeGateUp, Tensor, Weight, WeightSource,
};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{MatrixView, ScaleDtype, WeightFormat};
use std::time::Instant;

/// Far beyond the caches.
const WORKING_SET_BYTES: u64 = 512 << 20;
const PASSES: usize = 15;
/// Rows and columns of a linear layer.
const LINEAR: [usize; 2] = [2048, 4096];
/// Qwen3-30B-A3B: experts, width, hidden size, experts a token.
const EXPERTS: [usize; 4] = [128, 768, 2048, 8];

fn main() -> Result<(), String> {
    // Not on the main thread, which is never pinned.
    std::thread::spawn(|| run().map_err(|e| e.to_string())).join().map_err(|_| "the bench panicked".to_owned())?
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let filters: Vec<String> = std::env::args().skip(1).collect();
    let mut backend = CpuBackend::new(CpuOptions { pin: true, ..CpuOptions::default() })?;
    println!("{}, barrier {:?}", backend.caps().device, backend.pool().barrier_latency());
    println!(
        "{:34} {:>5} {:>9} {:>9} {:>7} {:>7} {:>9} {:>7}",
        "kernel", "rows", "us", "GB/s", "share", "median", "GOP/s", "steal"
    );
    for format in formats() {
        if !filters.is_empty() && !filters.iter().any(|f| format.to_string().contains(f.as_str())) {
            continue;
        }
        let weights = load_linear(&mut backend, format)?;
        for rows in [1, 2, 4, 8, 64] {
            bench_linear(&mut backend, format, &weights, rows)?;
        }
        let experts = load_experts(&mut backend, format)?;
        for rows in [1, 2, 4, 8, 64] {
            bench_experts(&mut backend, format, &experts, rows)?;
        }
        // Weights have no `free`: a new back end for the next format.
        backend = CpuBackend::new(CpuOptions { pin: true, activation: ActivationMode::Int8, ..CpuOptions::default() })?;
    }
    Ok(())
}

fn formats() -> Vec<WeightFormat> {
    let affine = |bits| WeightFormat::Affine { bits, group: 64, scale: ScaleDtype::Bf16 };
    let mut formats: Vec<WeightFormat> = [2, 3, 4, 5, 6, 8].map(affine).to_vec();
    formats.extend([WeightFormat::Nvfp4, WeightFormat::Mxfp4, WeightFormat::Mxfp8]);
    formats.extend([
        WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 },
        WeightFormat::Bf16,
        WeightFormat::F16,
    ]);
    formats
}

fn load_linear(backend: &mut CpuBackend, format: WeightFormat) -> Result<Vec<Weight>, Box<dyn std::error::Error>> {
    let [rows, cols] = LINEAR;
    let matrix = random_matrices(1, format, 1, rows, cols).remove(0);
    let count = WORKING_SET_BYTES.div_ceil(format.matrix_bytes(rows, cols));
    let source = WeightSource { name: "bench", matrices: &[matrix.view()], bias: None };
    (0..count).map(|_| Ok(backend.load_weight(&source)?)).collect()
}

fn tensor(backend: &mut CpuBackend, rows: usize, cols: usize) -> Result<Tensor, moellon_ops::Error> {
    let tensor = backend.alloc("bench", ElementType::F32, rows * cols)?.tensor(rows, cols);
    let mut rng = SplitMix64::new(cols as u64);
    backend.write_f32(tensor, &rng.normals(rows * cols, 1.0))?;
    Ok(tensor)
}

fn bench_linear(
    backend: &mut CpuBackend,
    format: WeightFormat,
    weights: &[Weight],
    rows: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let x = tensor(backend, rows, LINEAR[1])?;
    let out = tensor(backend, rows, LINEAR[0])?;
    let parts: Vec<(Weight, Tensor)> = weights.iter().map(|w| (*w, out)).collect();
    // Parts write the same output one after the other; with one part a call each is an operation of its own.
    let calls: Vec<Linear<'_>> = parts.iter().map(|part| Linear { x, parts: std::slice::from_ref(part) }).collect();
    let bytes: u64 = weights.iter().map(Weight::size_bytes).sum();
    let ops = 2.0 * (weights.len() * LINEAR[0] * LINEAR[1] * rows) as f64;
    report(backend, &format!("linear {format}"), rows, weights.len(), bytes, ops, |backend| {
        for call in &calls {
            backend.linear(call)?;
        }
        Ok(())
    })?;
    backend.free(x.buffer);
    backend.free(out.buffer);
    Ok(())
}

fn load_experts(backend: &mut CpuBackend, format: WeightFormat) -> Result<Vec<Experts>, Box<dyn std::error::Error>> {
    let [num_experts, width, hidden, _] = EXPERTS;
    let up = random_matrices(1, format, 1, width, hidden).remove(0);
    let down = random_matrices(2, format, 1, hidden, width).remove(0);
    let list = |view| -> Vec<MatrixView<'_>> { vec![view; num_experts] };
    let (gate, down) = (list(up.view()), list(down.view()));
    let source = ExpertsSource { name: "bench", gate: &gate, up: &gate, down: &down, biases: None };
    let bytes = num_experts as u64 * (2 * format.matrix_bytes(width, hidden) + format.matrix_bytes(hidden, width));
    (0..WORKING_SET_BYTES.div_ceil(bytes).max(2)).map(|_| Ok(backend.load_experts(&source)?)).collect()
}

fn bench_experts(
    backend: &mut CpuBackend,
    format: WeightFormat,
    layers: &[Experts],
    rows: usize,
) -> Result<(), Box<dyn std::error::Error>> {
    let [num_experts, width, hidden, top_k] = EXPERTS;
    let x = tensor(backend, rows, hidden)?;
    let (h, out) = (tensor(backend, rows, top_k * width)?, tensor(backend, rows, hidden)?);
    let weights = tensor(backend, rows, top_k)?;
    // Different random experts in each of 16 draws, so that no draw finds its experts in a cache.
    let mut rng = SplitMix64::new(9);
    let mut draws = Vec::new();
    let mut distinct = 0;
    for _ in 0..16 {
        let mut ids = Vec::new();
        for _ in 0..rows {
            let mut row: Vec<u32> = Vec::new();
            while row.len() < top_k {
                let id = rng.below(num_experts) as u32;
                if !row.contains(&id) {
                    row.push(id);
                }
            }
            ids.extend(row);
        }
        let tensor = backend.alloc("bench", ElementType::U32, rows * top_k)?.tensor(rows, top_k);
        backend.write_u32(tensor, &ids)?;
        ids.sort_unstable();
        ids.dedup();
        distinct += ids.len();
        draws.push(tensor);
    }
    let bytes = distinct as u64 * (layers[0].gate_up_bytes() + layers[0].down_bytes());
    let ops = 2.0 * (draws.len() * rows * top_k * 3 * width * hidden) as f64;
    report(backend, &format!("experts {format}"), rows, draws.len(), bytes, ops, |backend| {
        for (i, ids) in draws.iter().enumerate() {
            let (experts, ids) = (layers[i % layers.len()], *ids);
            backend.moe_gate_up(&MoeGateUp { x, experts, ids, activation: Activation::SwiGlu, out: h })?;
            backend.moe_down(&MoeDown { h, experts, ids, weights, plus: None, out })?;
        }
        Ok(())
    })
}

/// Runs passes of `calls` calls that move `bytes` in all, and prints a line.
fn report(
    backend: &mut CpuBackend,
    name: &str,
    rows: usize,
    calls: usize,
    bytes: u64,
    ops: f64,
    mut pass: impl FnMut(&mut CpuBackend) -> moellon_ops::Result<()>,
) -> Result<(), Box<dyn std::error::Error>> {
    let probe = ReadProbe::new(256 << 20)?;
    let (steal_before, total_before) = steal_and_total();
    pass(backend)?;
    let (mut rates, mut read_rates) = (Vec::new(), Vec::new());
    for _ in 0..PASSES {
        read_rates.push(probe.pass(backend.pool()));
        let start = Instant::now();
        pass(backend)?;
        rates.push(bytes as f64 / start.elapsed().as_secs_f64() / 1e9);
    }
    rates.sort_unstable_by(f64::total_cmp);
    read_rates.sort_unstable_by(f64::total_cmp);
    let (steal, total) = steal_and_total();
    let steal = (steal - steal_before) as f64 / (total - total_before).max(1) as f64;
    let (best, best_read) = (rates[PASSES - 1], read_rates[PASSES - 1]);
    println!(
        "{name:34} {rows:>5} {:>9.1} {best:>9.2} {:>6.1}% {:>6.1}% {:>9.1} {:>6.1}%",
        bytes as f64 / best / 1e3 / calls as f64,
        100.0 * best / best_read,
        100.0 * rates[PASSES / 2] / read_rates[PASSES / 2],
        ops / bytes as f64 * best,
        100.0 * steal,
    );
    Ok(())
}

/// Ticks that the host took away, and all ticks, since the system started; zeros where there is no such file.
fn steal_and_total() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let ticks: Vec<u64> =
        text.lines().next().unwrap_or("").split_whitespace().skip(1).filter_map(|t| t.parse().ok()).collect();
    (ticks.get(7).copied().unwrap_or(0), ticks.iter().take(8).sum())
}
