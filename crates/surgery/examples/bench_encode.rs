//! Speed and quality of the encoders on matrices of GLM-5.2's experts: heavy-tailed weights, correlated inputs with a few
//! strong channels. Prints one JSON object. `bench/surgery.py layers` makes a receipt of it.
//!
//! Inputs are of two kinds. `causes`: half of every channel is a mixture of 64 hidden causes, half is its own; nearly as
//! little correlation as there can be. `measured`: the spectrum that the correlations of the bundled model's expert inputs
//! have, stretched to this width, in a random basis.
#![allow(clippy::print_stdout, reason = "a program that prints")]

use moellon_surgery::encoder::{EncoderOptions, Importance, Method, encode};
use moellon_surgery::feedback::{Feedback, second_moments, shrink};
use moellon_surgery::formats;
use moellon_tensor::rng::SplitMix64;
use moellon_tensor::{OwnedMatrix, ScaleDtype};
use serde_json::{Value, json};
use std::time::Instant;

/// Tokens that outputs are compared on.
const HELD_OUT: usize = 512;
/// Rows whose outputs are compared.
const COMPARED_ROWS: usize = 48;
const FORMATS: [&str; 7] = ["affine-2", "affine-3-g128", "affine-3", "affine-4", "affine-5", "nvfp4", "mxfp4"];

/// A matrix, its inputs, and how many tokens it is calibrated with.
struct Case {
    matrix: &'static str,
    /// As many rows as two cores do in a moment: gate_proj and up_proj have 2048, down_proj 6144.
    shape: [usize; 2],
    inputs: Inputs,
    tokens: usize,
    formats: &'static [&'static str],
}

#[derive(Clone, Copy)]
enum Inputs {
    Causes,
    Measured,
}

fn main() {
    let gate = |inputs, tokens, formats| Case { matrix: "gate_proj", shape: [512, 6144], inputs, tokens, formats };
    let down = |inputs, tokens, formats| Case { matrix: "down_proj", shape: [1536, 2048], inputs, tokens, formats };
    // A whole calibration goes through the layer's one matrix of moments for gate and up; a down projection sees the tokens
    // of its expert.
    let cases = [
        gate(Inputs::Causes, 4096, &FORMATS[..]),
        gate(Inputs::Causes, 24576, &["affine-3", "affine-4"]),
        gate(Inputs::Measured, 4096, &["affine-3", "affine-4"]),
        gate(Inputs::Measured, 24576, &["affine-3", "affine-4", "nvfp4"]),
        down(Inputs::Causes, 4096, &FORMATS[..]),
        down(Inputs::Measured, 4096, &["affine-3", "affine-4", "nvfp4"]),
    ];
    let results: Vec<Value> = cases.iter().flat_map(measure).collect();
    println!(
        "{}",
        json!({ "threads": std::thread::available_parallelism().map_or(1, usize::from), "results": results })
    );
}

fn measure(case: &Case) -> Vec<Value> {
    let [rows, cols] = case.shape;
    let mut rng = SplitMix64::new(cols as u64);
    let source = weights(&mut rng, case.shape);
    let channels = channel_scales(&mut rng, cols);
    let model = InputModel::new(&mut rng, case.inputs, channels);
    let calibration = model.draw(&mut rng, case.tokens);
    let held_out = model.draw(&mut rng, HELD_OUT);
    let started = Instant::now();
    let mut moments = second_moments(&calibration, cols);
    let moments_s = started.elapsed().as_secs_f64();
    let input_sq: Vec<f32> = (0..cols).map(|c| moments[c * cols + c]).collect();
    let started = Instant::now();
    shrink(&mut moments, &input_sq, case.tokens as u32);
    let feedback = Feedback::new(&moments, cols, 0.01).expect("damped moments are positive definite");
    let factor_s = started.elapsed().as_secs_f64();
    let mut results = Vec::new();
    for format_name in case.formats {
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
                "matrix": case.matrix,
                "cols": cols,
                "inputs": match case.inputs { Inputs::Causes => "causes", Inputs::Measured => "measured" },
                "tokens": case.tokens,
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
    results
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

/// Eigenvalues of the correlation matrix of the inputs of the bundled model's experts (mean over its layers), by rank: the
/// value at each share of the ranks, to be interpolated.
const SPECTRUM: [(f32, f32); 17] = [
    (0.002, 36.3),
    (0.006, 9.47),
    (0.010, 7.13),
    (0.014, 6.16),
    (0.021, 4.79),
    (0.033, 3.81),
    (0.049, 3.10),
    (0.072, 2.45),
    (0.104, 1.93),
    (0.158, 1.47),
    (0.236, 1.05),
    (0.354, 0.707),
    (0.502, 0.466),
    (0.666, 0.311),
    (0.822, 0.212),
    (0.939, 0.150),
    (0.998, 0.0149),
];

/// Where inputs come from.
struct InputModel {
    /// `[cols]`
    channels: Vec<f32>,
    kind: Kind,
}

enum Kind {
    /// `[64, cols]`
    Causes(Vec<f32>),
    /// Strengths of directions, and rounds of signs and a shuffle that make a random rotation with Hadamard transforms.
    Measured { strengths: Vec<f32>, rounds: Vec<(Vec<f32>, Vec<u32>)> },
}

impl InputModel {
    fn new(rng: &mut SplitMix64, inputs: Inputs, channels: Vec<f32>) -> Self {
        let cols = channels.len();
        let kind = match inputs {
            Inputs::Causes => Kind::Causes(rng.normals(64 * cols, 0.125)),
            Inputs::Measured => {
                let strengths = (0..cols).map(|i| spectrum((i as f32 + 0.5) / cols as f32).sqrt()).collect();
                let rounds = (0..3)
                    .map(|_| {
                        let signs = (0..cols).map(|_| if rng.below(2) == 0 { 1.0 } else { -1.0 }).collect();
                        let mut order: Vec<u32> = (0..cols as u32).collect();
                        (1..cols).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
                        (signs, order)
                    })
                    .collect();
                Kind::Measured { strengths, rounds }
            }
        };
        InputModel { channels, kind }
    }

    /// Rows `[tokens, cols]`.
    fn draw(&self, rng: &mut SplitMix64, tokens: usize) -> Vec<f32> {
        let cols = self.channels.len();
        let mut rows = Vec::with_capacity(tokens * cols);
        for _ in 0..tokens {
            let mut row = match &self.kind {
                Kind::Causes(mix) => {
                    let causes = rng.normals(64, 1.0);
                    let mut row = rng.normals(cols, 1.0);
                    for (cause, mix) in causes.iter().zip(mix.chunks_exact(cols)) {
                        row.iter_mut().zip(mix).for_each(|(x, m)| *x += cause * m);
                    }
                    row
                }
                Kind::Measured { strengths, rounds } => {
                    let mut row = rng.normals(cols, 1.0);
                    row.iter_mut().zip(strengths).for_each(|(x, s)| *x *= s);
                    for (signs, order) in rounds {
                        row = order.iter().map(|&from| row[from as usize] * signs[from as usize]).collect();
                        row.chunks_exact_mut(2048).for_each(hadamard);
                    }
                    row
                }
            };
            row.iter_mut().zip(&self.channels).for_each(|(x, scale)| *x *= scale);
            rows.append(&mut row);
        }
        rows
    }
}

fn spectrum(share: f32) -> f32 {
    let after = SPECTRUM.iter().position(|(at, _)| *at >= share).unwrap_or(SPECTRUM.len() - 1).max(1);
    let ((x0, y0), (x1, y1)) = (SPECTRUM[after - 1], SPECTRUM[after]);
    (y0.ln() + (y1.ln() - y0.ln()) * ((share - x0) / (x1 - x0)).clamp(0.0, 1.0)).exp()
}

/// The orthonormal Hadamard transform of a power of two of values.
fn hadamard(values: &mut [f32]) {
    let mut half = 1;
    while half < values.len() {
        for block in values.chunks_exact_mut(2 * half) {
            let (a, b) = block.split_at_mut(half);
            a.iter_mut().zip(b).for_each(|(a, b)| (*a, *b) = (*a + *b, *a - *b));
        }
        half *= 2;
    }
    let scale = (values.len() as f32).sqrt().recip();
    values.iter_mut().for_each(|value| *value *= scale);
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
