//! MXFP4, MXFP8 and NVFP4: minifloat codes with a minifloat scale per group.

use crate::ScaleDtype;
use crate::bits::pack_row;
use crate::encode::NVFP4_RANGE;
use crate::minifloat::{E2M1, E2M1_MAX, E4M3_MAX, E4M3_WITHOUT_NAN, E8M0, e2m1_from_f32, e4m3_from_f32, e8m0_at_least};

/// Encodes one MXFP4 (`bits` = 4) or MXFP8 (8) row. The scale is the smallest power of two that keeps the group in
/// range, the rule of MLX from 0.32.2 on (pull request #4353).
pub(super) fn encode_mx_row(values: &[f32], bits: usize, arithmetic: ScaleDtype, codes: &mut [u8], scales: &mut [u8]) {
    let largest = if bits == 4 { E2M1_MAX } else { E4M3_MAX };
    let mut unpacked = vec![0; values.len()];
    for ((values, codes), scale_code) in values.chunks_exact(32).zip(unpacked.chunks_exact_mut(32)).zip(scales) {
        *scale_code = e8m0_at_least(arithmetic.round(amax(values) / largest));
        let scale = arithmetic.round(E8M0[*scale_code as usize]);
        for (code, &value) in codes.iter_mut().zip(values) {
            let scaled = arithmetic.round(value / scale);
            *code = if bits == 4 { nearest_e2m1(scaled, arithmetic) } else { e4m3_from_f32(scaled) };
        }
    }
    pack_row(&unpacked, bits, codes);
}

/// Encodes one NVFP4 row; `tensor_amax` is the magnitude that the global scale maps to the top of the range.
pub(super) fn encode_nvfp4_row(
    values: &[f32],
    tensor_amax: Option<f32>,
    arithmetic: ScaleDtype,
    codes: &mut [u8],
    scales: &mut [u8],
) {
    let inverse_global = tensor_amax.map_or(1.0, |amax| NVFP4_RANGE / amax);
    let mut unpacked = vec![0; values.len()];
    for ((values, codes), scale_code) in values.chunks_exact(16).zip(unpacked.chunks_exact_mut(16)).zip(scales) {
        *scale_code = e4m3_from_f32(arithmetic.round(amax(values) / E2M1_MAX) * inverse_global);
        let scale = E4M3_WITHOUT_NAN[*scale_code as usize];
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = nearest_e2m1(arithmetic.round(value / scale) * inverse_global, ScaleDtype::F32);
        }
    }
    pack_row(&unpacked, 4, codes);
}

fn amax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |amax, value| amax.max(value.abs()))
}

/// The first minimum of `|value - E2M1|`, the differences rounded to `arithmetic`, as MLX searches it. Up to twice the
/// largest code the differences that matter are exact (Sterbenz), so the midpoints decide; beyond (a scale that
/// saturated or underflowed to zero) the search is made as it stands, and infinity and NaN come out as code 0.
fn nearest_e2m1(value: f32, arithmetic: ScaleDtype) -> u8 {
    if value.abs() <= 2.0 * E2M1_MAX {
        return e2m1_from_f32(value);
    }
    let mut best = (f32::INFINITY, 0);
    for (code, &entry) in E2M1.iter().enumerate() {
        let distance = arithmetic.round(value - entry).abs();
        if distance < best.0 {
            best = (distance, code as u8);
        }
    }
    best.1
}
