//! Speed of one linear layer by format and number of rows, beside the read bandwidth of the same seconds: for work on
//! kernels, where `moellon bench` is too coarse.
//!
//! ```text
//! cargo run --release -p moellon-backend-cpu --example kernel_speed -- [FORMAT..]
//! ```
//!
//! The layer is copied until it fills 256 MB, so that rows of one read memory; GB/s counts the packed bytes once a pass,
//! GMAC/s the products.

#![allow(clippy::print_stdout, reason = "a program")]

use moellon_backend_cpu::bandwidth::ReadProbe;
use moellon_backend_cpu::{ActivationMode, CpuBackend, CpuOptions};
use moellon_ops::{Backend, ElementType, Linear, WeightSource};
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{OwnedMatrix, ScaleDtype, WeightFormat};
use std::time::Instant;

const SHAPE: [usize; 2] = [2048, 2048];
const SIZE_BYTES: usize = 256 << 20;

fn main() -> Result<(), Box<dyn std::error::Error>> {
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
    for (name, format) in formats {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            measure(name, format)?;
        }
    }
    Ok(())
}

fn measure(name: &str, format: WeightFormat) -> Result<(), Box<dyn std::error::Error>> {
    let options = CpuOptions { threads: None, pin: true, level: None, activation: ActivationMode::Int8 };
    let mut backend = CpuBackend::new(options)?;
    let probe = ReadProbe::new(SIZE_BYTES)?;
    let matrix = OwnedMatrix::random(format, SHAPE, 0.02, 1)?;
    let view = [matrix.view()];
    let mut weights = Vec::new();
    let mut bytes = 0;
    while bytes < SIZE_BYTES as u64 {
        let weight = backend.load_weight(&WeightSource { name, matrices: &view, bias: None })?;
        bytes += weight.size_bytes();
        weights.push(weight);
    }
    for rows in [1, 2, 3, 4, 8, 16, 32, 128, 512] {
        let x = backend.alloc("x", ElementType::F32, rows * SHAPE[1])?.tensor(rows, SHAPE[1]);
        let out = backend.alloc("out", ElementType::F32, rows * SHAPE[0])?.tensor(rows, SHAPE[0]);
        backend.write_f32(x, &SplitMix64::new(3).normals(rows * SHAPE[1], 1.0))?;
        // Many rows are bound by arithmetic: a part of the copies is enough.
        let used = &weights[..weights.len().div_ceil(1 + rows / 8)];
        let (mut seconds, mut reads) = (Vec::new(), Vec::new());
        for pass in 0..8 {
            reads.push(probe.pass(backend.pool()));
            let start = Instant::now();
            for weight in used {
                backend.linear(&Linear { x, parts: &[(*weight, out)] })?;
            }
            if pass > 0 {
                seconds.push(start.elapsed().as_secs_f64());
            }
        }
        seconds.sort_unstable_by(f64::total_cmp);
        reads.sort_unstable_by(f64::total_cmp);
        let (seconds, read) = (seconds[seconds.len() / 2], reads[reads.len() / 2]);
        let gb_per_s = used.iter().map(|w| w.size_bytes()).sum::<u64>() as f64 / seconds / 1e9;
        let macs = (used.len() * rows * SHAPE[0] * SHAPE[1]) as f64 / seconds / 1e9;
        println!(
            "{name:9} rows {rows:4}: {gb_per_s:6.2} GB/s ({:3.0} % of {read:.1}), {macs:6.1} GMAC/s",
            100.0 * gb_per_s / read
        );
        backend.free(x.buffer);
        backend.free(out.buffer);
    }
    Ok(())
}
