//! From numbers to packed bits by rounding to nearest, exactly as the CPU back end of MLX 0.32.4 does for the formats
//! it has (the golden vectors are its output). Better searches stand above this; they reuse the row encoders.

mod affine;
mod block;
mod scaled_float;

use crate::{Error, OwnedMatrix, Result, ScaleDtype, WeightFormat};

/// `E4M3_MAX * E2M1_MAX`: what MLX and ModelOpt divide a tensor's largest magnitude by to get its NVFP4 global scale.
pub const NVFP4_RANGE: f32 = 2688.0;

/// The f32 factor of a whole NVFP4 matrix. Other formats have none.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GlobalScale {
    /// No factor. The E4M3 scales underflow on small weights: 3 dB worse at a standard deviation of 0.007 than at 1.
    Off,
    /// From the largest magnitude of the matrix.
    FromValues,
    /// From this largest magnitude (MLX's `global_scale`), e.g. one that fused gate and up matrices share.
    FromAmax(f32),
}

/// How to encode.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EncodeOptions {
    /// The type that MLX would hold the values in. Its MX and NVFP4 encoders round every step to it; F32 is best.
    pub arithmetic: ScaleDtype,
    /// The NVFP4 global scale.
    pub global_scale: GlobalScale,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        EncodeOptions { arithmetic: ScaleDtype::F32, global_scale: GlobalScale::FromValues }
    }
}

/// Encodes `values` (`[rows, cols]`, row-major).
///
/// # Errors
/// If the shape is not legal in `format`, `values` has another length, or a value is NaN or infinite (with its place).
pub fn encode_matrix(
    format: WeightFormat,
    [rows, cols]: [usize; 2],
    values: &[f32],
    options: EncodeOptions,
) -> Result<OwnedMatrix> {
    if rows.checked_mul(cols) != Some(values.len()) {
        return Err(Error::mismatch("values to encode", values.len(), format!("{rows} rows of {cols} columns")));
    }
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        let (row, group) = (at / cols, at % cols);
        return Err(Error::NotFinite { what: "value to encode", found: values[at].to_string(), row, group });
    }
    let mut matrix = OwnedMatrix::zeroed(format, [rows, cols])?;
    let rows_of_values = || values.chunks_exact(cols.max(1)).enumerate();
    match format {
        WeightFormat::F32 => matrix = OwnedMatrix::plain(ScaleDtype::F32, [rows, cols], values),
        WeightFormat::F16 => matrix = OwnedMatrix::plain(ScaleDtype::F16, [rows, cols], values),
        WeightFormat::Bf16 => matrix = OwnedMatrix::plain(ScaleDtype::Bf16, [rows, cols], values),
        WeightFormat::Fp8Block { block_rows, block_cols } => {
            block::encode(values, [block_rows as usize, block_cols as usize], &mut matrix);
        }
        WeightFormat::Affine { bits, group, scale } => {
            for (row, values) in rows_of_values() {
                let (codes, scales, offsets) = row_parts(&mut matrix, row);
                affine::encode_row(values, bits as usize, group as usize, scale, codes, scales, offsets);
            }
        }
        WeightFormat::Mxfp4 | WeightFormat::Mxfp8 => {
            for (row, values) in rows_of_values() {
                let (codes, scales, _) = row_parts(&mut matrix, row);
                scaled_float::encode_mx_row(values, format.code_bits(), options.arithmetic, codes, scales);
            }
        }
        WeightFormat::Nvfp4 => {
            let amax = nvfp4_amax(options.global_scale, values);
            matrix.global_scale = amax.map_or(1.0, |amax| amax / NVFP4_RANGE);
            for (row, values) in rows_of_values() {
                let (codes, scales, _) = row_parts(&mut matrix, row);
                scaled_float::encode_nvfp4_row(values, amax, options.arithmetic, codes, scales);
            }
        }
    }
    Ok(matrix)
}

/// The magnitude that the global scale stands for; `None` for no global scale (also for a matrix of zeros).
fn nvfp4_amax(global_scale: GlobalScale, values: &[f32]) -> Option<f32> {
    let amax = match global_scale {
        GlobalScale::Off => return None,
        GlobalScale::FromAmax(amax) => amax,
        GlobalScale::FromValues => values.iter().fold(0.0, |amax: f32, value| amax.max(value.abs())),
    };
    (amax != 0.0).then_some(amax)
}

/// Codes, scales and offsets of one row.
fn row_parts(matrix: &mut OwnedMatrix, row: usize) -> (&mut [u8], &mut [u8], &mut [u8]) {
    let code_bytes = matrix.format.code_row_bytes(matrix.cols);
    let scale_bytes = matrix.format.scales_per_row(matrix.cols) * matrix.format.scale_bytes();
    let offset_bytes = if matrix.format.has_offsets() { scale_bytes } else { 0 };
    (
        &mut matrix.codes[row * code_bytes..][..code_bytes],
        &mut matrix.scales[row * scale_bytes..][..scale_bytes],
        &mut matrix.offsets[row * offset_bytes..][..offset_bytes],
    )
}
