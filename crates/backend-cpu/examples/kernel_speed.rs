//! Speed of one linear layer by format and number of rows, beside the read bandwidth of the same seconds: for work on
//! kernels, where `moellon bench` is too coarse.
//!
//! ```text
//! cargo run --release -p moellon-backend-cpu --example kernel_speed -- [FORMAT..] [LEVEL..] [ROWS..]
//! ```
//!
//! Levels (`avx2`, `avx512-amx`, ..) are measured interleaved, pass by pass; without one the machine's best is.
//!
//! The layer is copied until it fills 1 GiB, so that rows of one read memory; GB/s counts the packed bytes once a pass,
//! GMAC/s the products.

#![allow(clippy::print_stdout, reason = "a program")]

use moellon_backend_cpu::bandwidth::ReadProbe;
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuLevel, CpuOptions};
use moellon_ops::{Backend, ElementType, Linear, Weight, WeightSource};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{OwnedMatrix, ScaleDtype, WeightFormat};
use std::time::Instant;

const SHAPE: [usize; 2] = [8192, 2048];
/// Beyond the caches, a shared one of half a gigabyte too.
const SIZE_BYTES: usize = 1 << 30;
const PASSES: usize = 8;
/// Rows that are measured unless others are asked for.
const ROWS: [usize; 11] = [1, 2, 3, 4, 6, 8, 12, 16, 32, 128, 512];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The main thread is not kept on a core; steps of an engine run on one that is.
    std::thread::spawn(|| run().map_err(|error| error.to_string())).join().expect("errors are returned")?;
    Ok(())
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let affine = |bits| WeightFormat::Affine { bits, group: 64, scale: ScaleDtype::Bf16 };
    let formats = [
        ("affine-2", affine(2)),
        ("affine-3", affine(3)),
        ("affine-4", affine(4)),
        ("affine-6", affine(6)),
        ("affine-8", affine(8)),
        ("nvfp4", WeightFormat::Nvfp4),
        ("mxfp4", WeightFormat::Mxfp4),
        ("bf16", WeightFormat::Bf16),
    ];
    let wanted: Vec<String> = std::env::args().skip(1).collect();
    let asked = |name: &str| wanted.iter().any(|w| w == name);
    let mut levels: Vec<CpuLevel> = CpuLevel::available().filter(|level| asked(level.name())).collect();
    if levels.is_empty() {
        levels.push(CpuLevel::detect());
    }
    let any_format = formats.iter().any(|(name, _)| asked(name));
    let mut rows: Vec<usize> = wanted.iter().filter_map(|word| word.parse().ok()).collect();
    if rows.is_empty() {
        rows.extend(ROWS);
    }
    for (name, format) in formats {
        if !any_format || asked(name) {
            measure(name, format, &levels, &rows)?;
        }
    }
    Ok(())
}

/// A back end at one level, with the layer's copies.
struct Loaded {
    level: CpuLevel,
    backend: CpuBackend,
    weights: Vec<Weight>,
}

fn load(level: CpuLevel, name: &str, matrix: &OwnedMatrix) -> Result<Loaded, Box<dyn std::error::Error>> {
    let options = CpuOptions { threads: None, pin: true, level: Some(level), activation: ActivationMode::Int8 };
    let mut backend = CpuBackend::new(options)?;
    let view = [matrix.view()];
    let mut weights: Vec<Weight> = Vec::new();
    while weights.iter().map(Weight::size_bytes).sum::<u64>() < SIZE_BYTES as u64 {
        weights.push(backend.load_weight(&WeightSource { name, matrices: &view, bias: None })?);
    }
    Ok(Loaded { level, backend, weights })
}

fn measure(
    name: &str,
    format: WeightFormat,
    levels: &[CpuLevel],
    rows: &[usize],
) -> Result<(), Box<dyn std::error::Error>> {
    let probe = ReadProbe::new(SIZE_BYTES)?;
    let matrix = OwnedMatrix::random(format, SHAPE, 0.02, 1)?;
    let mut loaded = Vec::new();
    for level in levels {
        loaded.push(load(*level, name, &matrix)?);
    }
    for &rows in rows {
        let mut tensors = Vec::new();
        for Loaded { backend, .. } in &mut loaded {
            let x = backend.alloc("x", ElementType::F32, rows * SHAPE[1])?.tensor(rows, SHAPE[1]);
            let out = backend.alloc("out", ElementType::F32, rows * SHAPE[0])?.tensor(rows, SHAPE[0]);
            backend.write_f32(x, &SplitMix64::new(3).normals(rows * SHAPE[1], 1.0))?;
            tensors.push((x, out));
        }
        // Many rows are bound by arithmetic: a part of the copies is enough.
        let used = loaded[0].weights.len().div_ceil(1 + rows / 8);
        let mut reads = Vec::new();
        let mut seconds = vec![Vec::new(); loaded.len()];
        for pass in 0..PASSES {
            reads.push(probe.pass(loaded[0].backend.pool()));
            for ((Loaded { backend, weights, .. }, (x, out)), seconds) in
                loaded.iter_mut().zip(&tensors).zip(&mut seconds)
            {
                let start = Instant::now();
                for weight in &weights[..used] {
                    backend.linear(&Linear { x: *x, parts: &[(*weight, *out)] })?;
                }
                if pass > 0 {
                    seconds.push(start.elapsed().as_secs_f64());
                }
            }
        }
        reads.sort_unstable_by(f64::total_cmp);
        let read = reads[reads.len() / 2];
        for ((Loaded { level, backend, weights }, (x, out)), seconds) in
            loaded.iter_mut().zip(tensors).zip(&mut seconds)
        {
            seconds.sort_unstable_by(f64::total_cmp);
            let seconds = seconds[seconds.len() / 2];
            let gb_per_s = weights[..used].iter().map(Weight::size_bytes).sum::<u64>() as f64 / seconds / 1e9;
            let macs = (used * rows * SHAPE[0] * SHAPE[1]) as f64 / seconds / 1e9;
            println!(
                "{name:9} {level} rows {rows:4}: {gb_per_s:6.2} GB/s ({:3.0} % of {read:.1}), {macs:6.1} GMAC/s",
                100.0 * gb_per_s / read
            );
            backend.free(x.buffer);
            backend.free(out.buffer);
        }
    }
    Ok(())
}
