//! From packed bits to numbers. This is the meaning of every weight format; kernels are tested against it.
//!
//! The engine's meaning ([`MatrixView::decode_row`]) is evaluated in f32, one rounding per operation, no fused
//! multiply-add:
//!
//! | format | value |
//! |---|---|
//! | f32, f16, bf16 | the value, times `global_scale` |
//! | FP8 block | `E4M3[code] * (scale * global_scale)` |
//! | affine | `(code * scale + offset)`, times `global_scale` |
//! | mxfp4, mxfp8, nvfp4 | `TABLE[code] * (TABLE[scale] * global_scale)` |
//!
//! A `global_scale` of 1 changes no bit. E4M3 codes and scales of the MLX formats read `0x7F` as 480, those of FP8
//! blocks as NaN; [`MatrixView::check_finite`] rejects both.
//!
//! MLX rounds to the array's type between the operations; [`MatrixView::decode_row_rounded`] reproduces its CPU back
//! end (0.32.4) bit for bit, which is what the golden vectors hold.

use crate::bits::unpack_codes;
use crate::minifloat::{E2M1, E4M3, E4M3_WITHOUT_NAN, E8M0};
use crate::{MatrixView, ScaleDtype, WeightFormat};
use std::ops::Range;

/// Columns that are decoded at a time: the largest MLX group, so that codes are staged on the stack.
const STAGE: usize = 128;

impl MatrixView<'_> {
    /// Decodes row `row` into `out` (`[cols]`), in f32 as the table above says.
    ///
    /// # Panics
    /// If `row` is not a row of the matrix or `out` has another length than `cols`.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has {} columns", self.cols);
        self.decode_block(row, 0..self.cols, out);
    }

    /// Decodes columns `cols` of row `row` into `out`; the same bits as in [`MatrixView::decode_row`].
    ///
    /// # Panics
    /// If the range is not inside the matrix or `out` has another length than the range.
    pub fn decode_block(&self, row: usize, cols: Range<usize>, out: &mut [f32]) {
        self.decode_with(row, cols, out, |value| value);
    }

    /// Decodes row `row` as MLX does on arrays of type `dtype`: every scale, product and sum rounded to that type.
    /// A matrix with a global scale is f32 in MLX whatever `dtype` says, and nothing is rounded.
    ///
    /// # Panics
    /// As [`MatrixView::decode_row`].
    pub fn decode_row_rounded(&self, row: usize, dtype: ScaleDtype, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols, "a row has {} columns", self.cols);
        if self.global_scale != 1.0 || dtype == ScaleDtype::F32 {
            self.decode_row(row, out);
        } else {
            self.decode_with(row, 0..self.cols, out, |value| dtype.round(value));
        }
    }

    /// The matrix in f32, row-major `[rows, cols]`. For references, tests and load-time conversions.
    pub fn decode_all(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.rows * self.cols];
        for (row, out) in values.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.decode_row(row, out);
        }
        values
    }

    fn decode_with(&self, row: usize, cols: Range<usize>, out: &mut [f32], round: impl Fn(f32) -> f32) {
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?} of a matrix with {}", self.cols);
        assert_eq!(out.len(), cols.len(), "room for {} columns", cols.len());
        let codes = self.codes.row(row);
        match self.format {
            WeightFormat::F32 => self.decode_plain(ScaleDtype::F32, codes, cols.start, out, round),
            WeightFormat::F16 => self.decode_plain(ScaleDtype::F16, codes, cols.start, out, round),
            WeightFormat::Bf16 => self.decode_plain(ScaleDtype::Bf16, codes, cols.start, out, round),
            WeightFormat::Affine { bits, group, scale } => {
                let (scales, offsets) = (self.scale_row(row), self.offsets.row(row));
                for_each_group(group as usize, cols.start, out, |at, group, out| {
                    let (scale, offset) = (scale.read(scales, group), scale.read(offsets, group));
                    decode_codes(codes, bits as usize, at, out, |code| round(round(code as f32 * scale) + offset));
                });
                self.apply_global_scale(out);
            }
            WeightFormat::Fp8Block { block_cols, .. } => {
                self.decode_table(&E4M3, 8, block_cols as usize, row, cols.start, out, round);
            }
            WeightFormat::Mxfp4 => self.decode_table(&E2M1, 4, 32, row, cols.start, out, round),
            WeightFormat::Mxfp8 => self.decode_table(&E4M3_WITHOUT_NAN, 8, 32, row, cols.start, out, round),
            WeightFormat::Nvfp4 => self.decode_table(&E2M1, 4, 16, row, cols.start, out, round),
        }
    }

    fn decode_plain(&self, dtype: ScaleDtype, codes: &[u8], first: usize, out: &mut [f32], round: impl Fn(f32) -> f32) {
        dtype.read_slice(codes, first, out);
        out.iter_mut().for_each(|value| *value = round(*value));
        self.apply_global_scale(out);
    }

    fn decode_table(
        &self,
        table: &[f32],
        bits: usize,
        group: usize,
        row: usize,
        first: usize,
        out: &mut [f32],
        round: impl Fn(f32) -> f32,
    ) {
        let codes = self.codes.row(row);
        for_each_group(group, first, out, |at, group, out| {
            let scale = round(self.scale_value(row, group)) * self.global_scale;
            decode_codes(codes, bits, at, out, |code| round(table[code as usize] * scale));
        });
    }

    /// The scale of column group `group` of row `row`, without the global scale; 1 for plain floats.
    pub fn scale_value(&self, row: usize, group: usize) -> f32 {
        match self.format {
            WeightFormat::F32 | WeightFormat::F16 | WeightFormat::Bf16 => 1.0,
            WeightFormat::Fp8Block { .. } => ScaleDtype::F32.read(self.scale_row(row), group),
            WeightFormat::Affine { scale, .. } => scale.read(self.scale_row(row), group),
            WeightFormat::Mxfp4 | WeightFormat::Mxfp8 => E8M0[self.scale_row(row)[group] as usize],
            WeightFormat::Nvfp4 => E4M3_WITHOUT_NAN[self.scale_row(row)[group] as usize],
        }
    }

    fn apply_global_scale(&self, out: &mut [f32]) {
        if self.global_scale != 1.0 {
            out.iter_mut().for_each(|value| *value *= self.global_scale);
        }
    }
}

/// Calls `each(first column, group, values)` for the parts of `out` that lie in one group.
fn for_each_group(group: usize, first: usize, out: &mut [f32], mut each: impl FnMut(usize, usize, &mut [f32])) {
    let mut at = first;
    let mut rest = out;
    while !rest.is_empty() {
        let len = (group - at % group).min(rest.len());
        let (values, tail) = std::mem::take(&mut rest).split_at_mut(len);
        each(at, at / group, values);
        (at, rest) = (at + len, tail);
    }
}

/// `out[i] = value(code first+i)`.
fn decode_codes(packed: &[u8], bits: usize, first: usize, out: &mut [f32], value: impl Fn(u8) -> f32) {
    let mut codes = [0; STAGE];
    for (step, out) in out.chunks_mut(STAGE).enumerate() {
        let codes = &mut codes[..out.len()];
        unpack_codes(packed, bits, first + step * STAGE, codes);
        for (value_out, &code) in out.iter_mut().zip(&*codes) {
            *value_out = value(code);
        }
    }
}
