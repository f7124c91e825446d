//! Random weights straight in their packed form, at the speed of memory: for benchmarks of shapes whose checkpoints are
//! not at hand. Encoding random floats instead takes a hundred times as long.
//!
//! Weights are uniform over the format's codes and symmetric around zero: one-sided codes would give all rows a common
//! bias, which collapses a router's choices.

use crate::format::{ScaleDtype, WeightFormat};
use crate::minifloat::{E2M1, E4M3_WITHOUT_NAN};
use crate::rng::SplitMix64;
use crate::{OwnedMatrix, Result};

/// Scales differ from their mean by up to this part of it.
const SCALE_SPREAD: f32 = 0.25;

impl OwnedMatrix {
    /// A matrix of random codes and scales whose elements have a standard deviation of about `std`.
    ///
    /// # Errors
    /// As [`OwnedMatrix::zeroed`].
    pub fn random(format: WeightFormat, shape: [usize; 2], std: f32, seed: u64) -> Result<Self> {
        let mut matrix = OwnedMatrix::zeroed(format, shape)?;
        let rng = &mut SplitMix64::new(seed);
        match format {
            WeightFormat::F32 => fill_floats(rng, ScaleDtype::F32, std, &mut matrix.codes),
            WeightFormat::F16 => fill_floats(rng, ScaleDtype::F16, std, &mut matrix.codes),
            WeightFormat::Bf16 => fill_floats(rng, ScaleDtype::Bf16, std, &mut matrix.codes),
            WeightFormat::Affine { bits, scale, .. } => {
                fill_bytes(rng, &mut matrix.codes);
                let levels = (1u32 << bits) as f32;
                let mean = std / ((levels * levels - 1.0) / 12.0).sqrt();
                for at in 0..matrix.scales.len() / scale.size_bytes() {
                    // The middle code is zero, up to the rounding of the offset.
                    let value = scale.round(mean * spread(rng));
                    scale.write(value, &mut matrix.scales, at);
                    scale.write(-value * (levels - 1.0) / 2.0, &mut matrix.offsets, at);
                }
            }
            WeightFormat::Nvfp4 => {
                fill_bytes(rng, &mut matrix.codes);
                // E4M3 1.0 and its neighbours: 0.75 to 1.25.
                fill_from(rng, &mut matrix.scales, &[0x34, 0x36, 0x38, 0x39, 0x3a]);
                matrix.global_scale = std / root_mean_square(&E2M1);
            }
            WeightFormat::Mxfp4 => {
                fill_bytes(rng, &mut matrix.codes);
                matrix.scales.fill(exponent(std / root_mean_square(&E2M1)));
            }
            WeightFormat::Mxfp8 => {
                fill_from(rng, &mut matrix.codes, &uniform_e4m3());
                matrix.scales.fill(exponent(std * 3f32.sqrt() / 448.0));
            }
            WeightFormat::Fp8Block { .. } => {
                fill_from(rng, &mut matrix.codes, &uniform_e4m3());
                for at in 0..matrix.scales.len() / 4 {
                    ScaleDtype::F32.write(std * 3f32.sqrt() / 448.0 * spread(rng), &mut matrix.scales, at);
                }
            }
        }
        Ok(matrix)
    }
}

fn spread(rng: &mut SplitMix64) -> f32 {
    1.0 + SCALE_SPREAD * (2.0 * rng.next_f32() - 1.0)
}

fn root_mean_square(values: &[f32]) -> f32 {
    (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt()
}

/// The E8M0 code of the power of two nearest to `value` in its logarithm.
fn exponent(value: f32) -> u8 {
    (value.log2().round() as i32 + 127).clamp(0, 254) as u8
}

/// The E4M3 codes nearest to 256 equidistant values within +-448.
fn uniform_e4m3() -> [u8; 256] {
    std::array::from_fn(|i| {
        let value = (i as f32 - 127.5) / 127.5 * 448.0;
        let distance = |code: &u8| (E4M3_WITHOUT_NAN[usize::from(*code)] - value).abs();
        let codes = (0..=255u8).filter(|code| code & 0x7f != 0x7f);
        codes.min_by(|a, b| distance(a).total_cmp(&distance(b))).expect("there are codes")
    })
}

fn fill_bytes(rng: &mut SplitMix64, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&rng.next_u64().to_le_bytes()[..chunk.len()]);
    }
}

/// Draws every byte from `choices` (up to 256 of them).
fn fill_from(rng: &mut SplitMix64, bytes: &mut [u8], choices: &[u8]) {
    for chunk in bytes.chunks_mut(8) {
        for (byte, draw) in chunk.iter_mut().zip(rng.next_u64().to_le_bytes()) {
            *byte = choices[usize::from(draw) * choices.len() / 256];
        }
    }
}

/// Uniform floats.
fn fill_floats(rng: &mut SplitMix64, dtype: ScaleDtype, std: f32, bytes: &mut [u8]) {
    let step = std * 12f32.sqrt() / 65536.0;
    let size_bytes = dtype.size_bytes();
    for chunk in bytes.chunks_mut(4 * size_bytes) {
        let draw = rng.next_u64();
        for at in 0..chunk.len() / size_bytes {
            dtype.write(((draw >> (16 * at)) as u16 as f32 - 32767.5) * step, chunk, at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_the_deviation_asked_for_and_no_bias() {
        let affine = |bits, scale| WeightFormat::Affine { bits, group: 64, scale };
        let mut formats = vec![
            WeightFormat::F32,
            WeightFormat::F16,
            WeightFormat::Bf16,
            WeightFormat::Fp8Block { block_rows: 128, block_cols: 128 },
            WeightFormat::Mxfp4,
            WeightFormat::Mxfp8,
            WeightFormat::Nvfp4,
        ];
        formats.extend([2, 3, 4, 5, 6, 8].map(|bits| affine(bits, ScaleDtype::Bf16)));
        formats.push(affine(4, ScaleDtype::F16));
        let (rows, cols, std) = (96, 512, 0.02f32);
        for format in formats {
            let matrix = OwnedMatrix::random(format, [rows, cols], std, 7).unwrap();
            matrix.view().check_finite().unwrap();
            let mut row = vec![0.0; cols];
            let (mut sum, mut squares) = (0.0f64, 0.0f64);
            for r in 0..rows {
                matrix.view().decode_row(r, &mut row);
                sum += row.iter().map(|v| f64::from(*v)).sum::<f64>();
                squares += row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
            }
            let count = (rows * cols) as f64;
            let found = (squares / count).sqrt() / f64::from(std);
            // Powers of two as scales are off by up to the root of two.
            assert!((0.7..1.45).contains(&found), "{format}: {found} of the deviation");
            let mean = sum / count / f64::from(std);
            assert!(mean.abs() < 6.0 / count.sqrt(), "{format}: a mean of {mean} deviations");
            assert_ne!(matrix, OwnedMatrix::random(format, [rows, cols], std, 8).unwrap(), "{format}");
        }
    }
}
