//! Rejects weights that hold a NaN or an infinity, with the place where it stands.

use crate::{Error, MatrixView, Result, ScaleDtype, WeightFormat};

impl MatrixView<'_> {
    /// Checks that the matrix decodes to finite numbers: plain floats, scales, offsets, the global scale, and codes
    /// where a code can be NaN. E4M3 `0x7F` (NaN to the specification, 480 to MLX) is rejected in codes and scales of
    /// every format: no quantizer writes it. Reads the whole matrix only for plain floats, FP8 blocks and MXFP8.
    ///
    /// # Errors
    /// [`Error::NotFinite`] with the part, the value, the row and the column (plain floats and codes) or group.
    pub fn check_finite(&self) -> Result<()> {
        if !self.global_scale.is_finite() {
            return Err(not_finite("global scale", self.global_scale, 0, 0));
        }
        for row in 0..self.rows {
            match self.format {
                WeightFormat::F32 => check_floats("weight", ScaleDtype::F32, self.codes.row(row), row)?,
                WeightFormat::F16 => check_floats("weight", ScaleDtype::F16, self.codes.row(row), row)?,
                WeightFormat::Bf16 => check_floats("weight", ScaleDtype::Bf16, self.codes.row(row), row)?,
                WeightFormat::Fp8Block { block_rows, .. } => {
                    check_e4m3("codes", self.codes.row(row), row)?;
                    if row == 0 || (self.first_block_row + row).is_multiple_of(block_rows as usize) {
                        check_floats("scales", ScaleDtype::F32, self.scale_row(row), row)?;
                    }
                }
                WeightFormat::Affine { scale, .. } => {
                    check_floats("scales", scale, self.scale_row(row), row)?;
                    check_floats("offsets", scale, self.offsets.row(row), row)?;
                }
                WeightFormat::Mxfp4 => check_e8m0(self.scale_row(row), row)?,
                WeightFormat::Mxfp8 => {
                    check_e8m0(self.scale_row(row), row)?;
                    check_e4m3("codes", self.codes.row(row), row)?;
                }
                WeightFormat::Nvfp4 => check_e4m3("scales", self.scale_row(row), row)?,
            }
        }
        Ok(())
    }
}

fn not_finite(what: &'static str, found: impl ToString, row: usize, group: usize) -> Error {
    Error::NotFinite { what, found: found.to_string(), row, group }
}

/// Whether every magnitude is below that of infinity.
fn all_below<const BYTES: usize, T: Ord + Copy + Default>(
    bytes: &[u8],
    infinity: T,
    magnitude: impl Fn([u8; BYTES]) -> T,
) -> bool {
    // The largest magnitude of the row: branch-free, so it vectorises; positions are searched only on failure.
    bytes.as_chunks().0.iter().fold(T::default(), |largest, &element| largest.max(magnitude(element))) < infinity
}

/// Floats of a row; NaN and infinity are the magnitudes from that of infinity on.
fn check_floats(what: &'static str, dtype: ScaleDtype, bytes: &[u8], row: usize) -> Result<()> {
    let all_finite = match dtype {
        ScaleDtype::F32 => all_below(bytes, 0x7F80_0000u32, |b| u32::from_le_bytes(b) & 0x7FFF_FFFF),
        ScaleDtype::F16 => all_below(bytes, 0x7C00u16, |b| u16::from_le_bytes(b) & 0x7FFF),
        ScaleDtype::Bf16 => all_below(bytes, 0x7F80u16, |b| u16::from_le_bytes(b) & 0x7FFF),
    };
    if all_finite {
        return Ok(());
    }
    let at = (0..bytes.len() / dtype.size_bytes())
        .find(|&at| !dtype.read(bytes, at).is_finite())
        .expect("the exponent test found one");
    Err(not_finite(what, dtype.read(bytes, at), row, at))
}

fn check_e4m3(what: &'static str, codes: &[u8], row: usize) -> Result<()> {
    // The fold is branch-free and vectorises; `position` alone does not.
    if codes.iter().fold(false, |any, &code| any | (code & 0x7F == 0x7F)) {
        let at = codes.iter().position(|&code| code & 0x7F == 0x7F).expect("the fold found one");
        return Err(not_finite(what, format!("E4M3 NaN {:#04x}", codes[at]), row, at));
    }
    Ok(())
}

fn check_e8m0(codes: &[u8], row: usize) -> Result<()> {
    match codes.iter().position(|&code| code == 255) {
        Some(at) => Err(not_finite("scales", "E8M0 NaN 0xff", row, at)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_nan_is_found_with_its_place() {
        let message = |view: MatrixView<'_>| view.check_finite().expect_err("there is a NaN").to_string();
        let f32s: Vec<u8> = [1.0, 2.0, 3.0, f32::INFINITY].iter().flat_map(|v: &f32| v.to_le_bytes()).collect();
        let view = MatrixView::new("w", WeightFormat::F32, [2, 2], &f32s, &[], &[]).unwrap();
        assert_eq!(message(view), "weight has inf at row 1, column group 1");

        let halves = |bits: u16| [0u16, 0, 0, bits].iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
        let f16s = halves(0x7E00);
        assert!(message(MatrixView::new("w", WeightFormat::F16, [1, 4], &f16s, &[], &[]).unwrap()).contains("NaN"));
        let bf16s = halves(0xFF80);
        assert!(message(MatrixView::new("w", WeightFormat::Bf16, [1, 4], &bf16s, &[], &[]).unwrap()).contains("-inf"));

        let fp8 = WeightFormat::Fp8Block { block_rows: 2, block_cols: 2 };
        let scales = 1f32.to_le_bytes();
        let view = MatrixView::new("w", fp8, [2, 2], &[0, 1, 0xFF, 3], &scales, &[]).unwrap();
        assert_eq!(message(view), "codes has E4M3 NaN 0xff at row 1, column group 0");
        let nan = f32::NAN.to_le_bytes();
        assert!(message(MatrixView::new("w", fp8, [2, 2], &[0; 4], &nan, &[]).unwrap()).starts_with("scales has NaN"));

        let codes = [0; 16];
        let view = MatrixView::new("w", WeightFormat::Mxfp4, [1, 32], &codes, &[255], &[]).unwrap();
        assert!(message(view).contains("E8M0 NaN 0xff"));
        let view = MatrixView::new("w", WeightFormat::Nvfp4, [1, 32], &codes, &[1, 0x7F], &[]).unwrap();
        assert!(message(view).contains("E4M3 NaN 0x7f at row 0, column group 1"));
        let view = MatrixView::new("w", WeightFormat::Nvfp4, [1, 32], &codes, &[1, 1], &[]).unwrap();
        assert!(message(view.with_global_scale(f32::NAN)).contains("global scale has NaN"));
        assert_eq!(view.check_finite(), Ok(()));
    }
}
