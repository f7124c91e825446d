//! Speed and quality of the encoders on matrices of GLM-5.2's experts: heavy-tailed weights, correlated inputs with a few
//! strong channels. Prints one JSON object. `bench/surgery.py layers` makes a receipt of it.
#![allow(clippy::print_stdout, reason = "a program that prints")]

use moellon_surgery::encoder::{EncoderOptions, Importance, Method, encode};
use moellon_surgery::feedback::{Feedback, second_moments};
use moellon_surgery::formats;
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{OwnedMatrix, ScaleDtype};
use serde_json::json;
use std::time::Instant;

/// Tokens that the moments are made of, and tokens that the outputs are compared on.
const TOKENS: [usize; 2] = [4096, 512];
/// Rows whose outputs are compared.
const COMPARED_ROWS: usize = 48;

fn main() {
    let mut results = Vec::new();
    // gate_proj and up_proj are [2048, 6144], down_proj is [6144, 2048]: as many rows as two cores do in a moment.
    for (name, [rows, cols]) in [("gate_proj", [512, 6144]), ("down_proj", [1536, 2048])] {
        let mut rng = SplitMix64::new(cols as u64);
        let source = weights(&mut rng, [rows, cols]);
        let channels = channel_scales(&mut rng, cols);
        let mix = rng.normals(64 * cols, 0.125);
        let calibration = inputs(&mut rng, &channels, &mix, TOKENS[0]);
        let held_out = inputs(&mut rng, &channels, &mix, TOKENS[1]);
        let started = Instant::now();
        let moments = second_moments(&calibration, cols);
        let moments_s = started.elapsed().as_secs_f64();
        let input_sq: Vec<f32> = (0..cols).map(|c| moments[c * cols + c]).collect();
        let started = Instant::now();
        let feedback = Feedback::new(&moments, cols, 0.01).expect("damped moments are positive definite");
        let factor_s = started.elapsed().as_secs_f64();
        for format_name in ["affine-2", "affine-3-g128", "affine-3", "affine-4", "affine-5", "nvfp4", "mxfp4"] {
            let format = formats::parse(format_name).expect("a format");
            for (method, global) in [(Method::Rtn, false), (Method::Search, true), (Method::Gptq, true)] {
                let importance = match method {
                    Method::Rtn => Importance::default(),
                    Method::Search => Importance { input_sq: Some(&input_sq), ..Importance::default() },
                    Method::Gptq => {
                        Importance { input_sq: Some(&input_sq), feedback: Some(&feedback), column_scales: None }
                    }
                };
                let options = EncoderOptions { method, nvfp4_global_scale: global };
                let started = Instant::now();
                let encoded = encode(&source.view(), format, importance, options).expect("weights are finite");
                let elapsed = started.elapsed().as_secs_f64();
                results.push(json!({
                    "matrix": name,
                    "cols": cols,
                    "format": formats::name(format),
                    "bits_per_weight": format.bits_per_weight(),
                    "method": method.name(),
                    "weights_per_s": (rows * cols) as f64 / elapsed,
                    "output_snr_db": output_snr_db(&source, &encoded.matrix, &held_out),
                    "moments_s": moments_s,
                    "factor_s": factor_s,
                }));
            }
        }
    }
    println!(
        "{}",
        json!({ "threads": std::thread::available_parallelism().map_or(1, usize::from), "results": results })
    );
}

/// Student-t with five degrees of freedom times 0.012, in bf16.
fn weights(rng: &mut SplitMix64, [rows, cols]: [usize; 2]) -> OwnedMatrix {
    let values: Vec<f32> = (0..rows * cols)
        .map(|_| {
            let chi: f32 = (0..5).map(|_| rng.next_normal().powi(2)).sum::<f32>() / 5.0;
            0.012 * rng.next_normal() / chi.sqrt()
        })
        .collect();
    OwnedMatrix::plain(ScaleDtype::Bf16, [rows, cols], &values)
}

/// Log-normal strengths and eight hot channels.
fn channel_scales(rng: &mut SplitMix64, cols: usize) -> Vec<f32> {
    let mut scales: Vec<f32> = (0..cols).map(|_| (0.6 * rng.next_normal()).exp()).collect();
    for _ in 0..8 {
        let at = rng.below(cols);
        scales[at] *= 10.0;
    }
    scales
}

/// Rows that 64 hidden causes and noise of the same strength make.
fn inputs(rng: &mut SplitMix64, channels: &[f32], mix: &[f32], tokens: usize) -> Vec<f32> {
    let cols = channels.len();
    let mut rows = Vec::with_capacity(tokens * cols);
    for _ in 0..tokens {
        let causes = rng.normals(64, 1.0);
        let mut row = rng.normals(cols, 1.0);
        for (cause, mix) in causes.iter().zip(mix.chunks_exact(cols)) {
            row.iter_mut().zip(mix).for_each(|(x, m)| *x += cause * m);
        }
        rows.extend(row.iter().zip(channels).map(|(x, scale)| x * scale));
    }
    rows
}

/// Signal to noise of `x Wᵀ` over rows `x`.
fn output_snr_db(source: &OwnedMatrix, encoded: &OwnedMatrix, x: &[f32]) -> f64 {
    let cols = source.cols;
    let step = source.rows.div_ceil(COMPARED_ROWS);
    let (mut signal, mut noise) = (0.0, 0.0);
    let (mut values, mut found) = (vec![0.0; cols], vec![0.0; cols]);
    for row in (0..source.rows).step_by(step) {
        source.view().decode_row(row, &mut values);
        encoded.view().decode_row(row, &mut found);
        for token in x.chunks_exact(cols) {
            let (mut y, mut error) = (0.0f64, 0.0f64);
            for ((value, found), x) in values.iter().zip(&found).zip(token) {
                y += f64::from(value * x);
                error += f64::from((value - found) * x);
            }
            signal += y * y;
            noise += error * error;
        }
    }
    10.0 * (signal / noise).log10()
}
