//! The best scale of a group of minifloat codes (NVFP4, MXFP4, MXFP8): every stored scale near the one that maps the
//! largest magnitude to the largest code is tried (NVIDIA's scale sweep), scored by the weighted squared error.

use crate::simd::{LANES, round_even, sum_lanes};
use moellon_tensor::minifloat::{
    E2M1, E2M1_MAX, E4M3, E4M3_WITHOUT_NAN, E8M0, e2m1_from_f32, e4m3_from_f32, e8m0_at_least,
};

/// Which codes a group holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FloatCode {
    /// 4 bits.
    E2m1,
    /// 8 bits.
    E4m3,
}

impl FloatCode {
    /// The nearest code of `value` (already divided by the scale).
    pub(crate) fn encode(self, value: f32) -> u8 {
        match self {
            FloatCode::E2m1 => e2m1_from_f32(value),
            FloatCode::E4m3 => e4m3_from_f32(value),
        }
    }

    /// The value of a code.
    pub(crate) fn decode(self, code: u8) -> f32 {
        match self {
            FloatCode::E2m1 => E2M1[usize::from(code & 15)],
            FloatCode::E4m3 => E4M3[usize::from(code)],
        }
    }
}

/// The nearest E2M1 magnitude of `magnitude`.
#[inline(always)]
fn nearest_e2m1(magnitude: f32) -> f32 {
    let fine = round_even(magnitude * 2.0) * 0.5;
    let middle = round_even(magnitude);
    let coarse = round_even(magnitude.min(6.0) * 0.5) * 2.0;
    let upper = if magnitude < 4.0 { middle } else { coarse };
    if magnitude < 2.0 { fine } else { upper }
}

/// Weighted squared error of a group of E2M1 codes at `scale`; `values` and `weights` of whole vectors.
#[inline(always)]
fn e2m1_error(values: &[f32], weights: &[f32], scale: f32) -> f64 {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut error = [0.0f32; LANES];
    for (values, weights) in values.as_chunks::<LANES>().0.iter().zip(weights.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            let magnitude = values[lane].abs();
            let difference = magnitude - nearest_e2m1((magnitude * inverse).min(1e6)) * scale;
            error[lane] += weights[lane] * difference * difference;
        }
    }
    sum_lanes(&error)
}

fn e4m3_error(values: &[f32], weights: &[f32], scale: f32) -> f64 {
    let inverse = 1.0 / scale;
    values
        .iter()
        .zip(weights)
        .map(|(&value, &weight)| {
            let difference = value - E4M3[usize::from(e4m3_from_f32(value * inverse))] * scale;
            f64::from(weight) * f64::from(difference) * f64::from(difference)
        })
        .sum()
}

fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |amax, value| amax.max(value.abs()))
}

/// The best E4M3 scale code of an NVFP4 group of 16, given the matrix's global scale.
#[inline(always)]
pub(crate) fn search_nvfp4(values: &[f32], weights: &[f32], global_scale: f32) -> u8 {
    let base = e4m3_from_f32(amax(values) / E2M1_MAX / global_scale);
    // Six below clip up to half of the range away, eight above leave the top codes unused.
    let candidates = base.saturating_sub(6).max(1)..=base.saturating_add(8).min(0x7E);
    let mut best = (f64::INFINITY, base);
    for code in candidates {
        let scale = E4M3_WITHOUT_NAN[usize::from(code)] * global_scale;
        let error = e2m1_error(values, weights, scale);
        if error < best.0 {
            best = (error, code);
        }
    }
    best.1
}

/// The best E8M0 scale code of an MX group of 32.
#[inline(always)]
pub(crate) fn search_mx(values: &[f32], weights: &[f32], codes: FloatCode) -> u8 {
    let largest = match codes {
        FloatCode::E2m1 => E2M1_MAX,
        FloatCode::E4m3 => moellon_tensor::minifloat::E4M3_MAX,
    };
    let base = e8m0_at_least(amax(values) / largest);
    let mut best = (f64::INFINITY, base);
    for code in base.saturating_sub(2)..=base {
        let scale = E8M0[usize::from(code)];
        let error = match codes {
            FloatCode::E2m1 => e2m1_error(values, weights, scale),
            FloatCode::E4m3 => e4m3_error(values, weights, scale),
        };
        if error < best.0 {
            best = (error, code);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vector_rounding_is_the_codec_s() {
        let mut value = 0.0f32;
        while value < 9.0 {
            let codec = E2M1[usize::from(e2m1_from_f32(value))];
            // At ties both are equally near.
            assert_eq!((value - nearest_e2m1(value)).abs(), (value - codec).abs(), "{value}");
            value += 1.0 / 128.0;
        }
    }

    #[test]
    fn no_other_scale_is_better() {
        let values: Vec<f32> = (0..16).map(|i| ((i * 7 % 16) as f32 - 7.3) * 0.011).collect();
        let weights: Vec<f32> = (0..16).map(|i| 1.0 + (i * 5 % 7) as f32).collect();
        let found = search_nvfp4(&values, &weights, 1e-3);
        let error = |code: u8| e2m1_error(&values, &weights, E4M3_WITHOUT_NAN[usize::from(code)] * 1e-3);
        for code in 1..0x7F {
            assert!(error(found) <= error(code), "{found} against {code}");
        }
    }
}
