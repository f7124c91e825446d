//! FP8 blocks: E4M3 codes with one f32 scale per tile (the layout of DeepSeek-V3 and GLM FP8 checkpoints).

use crate::minifloat::{E4M3_MAX, e4m3_from_f32};
use crate::{OwnedMatrix, ScaleDtype};

/// Encodes every tile with `scale = amax / 448` (1 for a tile of zeros). The last tiles may be partial.
pub(super) fn encode(values: &[f32], [block_rows, block_cols]: [usize; 2], matrix: &mut OwnedMatrix) {
    let (rows, cols) = (matrix.rows, matrix.cols);
    let blocks_per_row = cols.div_ceil(block_cols);
    for first_row in (0..rows).step_by(block_rows) {
        for first_col in (0..cols).step_by(block_cols) {
            let tile_rows = first_row..(first_row + block_rows).min(rows);
            let tile_cols = first_col..(first_col + block_cols).min(cols);
            let tile = tile_rows.flat_map(|row| tile_cols.clone().map(move |col| row * cols + col));
            let amax = tile.clone().fold(0.0, |amax: f32, at| amax.max(values[at].abs()));
            let scale = if amax == 0.0 { 1.0 } else { amax / E4M3_MAX };
            ScaleDtype::F32.write(
                scale,
                &mut matrix.scales,
                first_row / block_rows * blocks_per_row + first_col / block_cols,
            );
            tile.for_each(|at| matrix.codes[at] = e4m3_from_f32(values[at] / scale));
        }
    }
}
