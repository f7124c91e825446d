//! MLX affine: unsigned codes with a scale and an offset per group.

use crate::ScaleDtype;
use crate::bits::pack_row;

/// The scale and offset of one group in f32, before they are rounded to their stored type, as MLX picks them: the edge
/// with the larger magnitude and zero fall exactly on the grid. Scales are often negative.
pub(super) fn grid(values: &[f32], bits: usize) -> (f32, f32) {
    const SMALLEST_SCALE: f32 = 1e-7;
    let (min, max) =
        values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &value| (min.min(value), max.max(value)));
    if bits == 1 {
        return ((max - min).max(SMALLEST_SCALE), min);
    }
    let steps = ((1 << bits) - 1) as f32;
    let edge_is_min = min.abs() > max.abs();
    let width = ((max - min) / steps).max(SMALLEST_SCALE);
    let (scale, edge) = if edge_is_min { (width, min) } else { (-width, max) };
    let edge_code = (edge / scale).round_ties_even();
    if edge_code == 0.0 { (scale, 0.0) } else { (edge / edge_code, edge) }
}

/// Encodes one row: codes from the unrounded grid, then scale and offset rounded to `dtype`.
pub(super) fn encode_row(
    values: &[f32],
    bits: usize,
    group: usize,
    dtype: ScaleDtype,
    codes: &mut [u8],
    scales: &mut [u8],
    offsets: &mut [u8],
) {
    let largest = ((1 << bits) - 1) as f32;
    let mut unpacked = vec![0; values.len()];
    for (at, (values, codes)) in values.chunks_exact(group).zip(unpacked.chunks_exact_mut(group)).enumerate() {
        let (scale, offset) = grid(values, bits);
        for (code, &value) in codes.iter_mut().zip(values) {
            *code = ((value - offset) / scale).round_ties_even().clamp(0.0, largest) as u8;
        }
        dtype.write(scale, scales, at);
        dtype.write(offset, offsets, at);
    }
    pack_row(&unpacked, bits, codes);
}
