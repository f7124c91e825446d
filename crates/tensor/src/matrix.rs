//! One weight matrix as it lies in a checkpoint: borrowed bytes plus their meaning.

use crate::{Error, Result, WeightFormat};
use std::ops::Range;

/// Rows of bytes with a stride, so that every second row of a fused matrix (gpt-oss gate and up) is a view, not a copy.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    bytes: &'a [u8],
    stride_bytes: usize,
    row_bytes: usize,
}

impl<'a> Rows<'a> {
    /// `num_rows` rows of `row_bytes` bytes, `stride_bytes` apart.
    ///
    /// # Errors
    /// If the last row would end past `bytes`, or rows overlap.
    pub fn new(what: &str, bytes: &'a [u8], num_rows: usize, row_bytes: usize, stride_bytes: usize) -> Result<Self> {
        if stride_bytes < row_bytes {
            return Err(Error::mismatch(
                format!("{what}: row stride in bytes"),
                stride_bytes,
                format!("at least {row_bytes}"),
            ));
        }
        let needed = match num_rows {
            0 => Some(0),
            n => (n - 1).checked_mul(stride_bytes).and_then(|b| b.checked_add(row_bytes)),
        };
        match needed {
            Some(needed) if needed <= bytes.len() => Ok(Rows { bytes, stride_bytes, row_bytes }),
            _ => Err(Error::mismatch(
                format!("{what}: bytes for {num_rows} rows of {row_bytes}"),
                bytes.len(),
                needed.map_or("a size that fits memory".to_owned(), |n| format!("at least {n}")),
            )),
        }
    }

    /// No bytes at all (scales of plain floats, offsets of formats without them).
    pub const fn empty() -> Rows<'static> {
        Rows { bytes: &[], stride_bytes: 0, row_bytes: 0 }
    }

    /// Bytes of row `row`.
    pub fn row(&self, row: usize) -> &'a [u8] {
        &self.bytes[row * self.stride_bytes..][..self.row_bytes]
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Distance between the starts of two rows in bytes.
    pub fn stride_bytes(&self) -> usize {
        self.stride_bytes
    }

    /// The bytes from the start of row 0 to the end of row `num_rows - 1`, the gaps of a strided view included.
    pub fn span(&self, num_rows: usize) -> &'a [u8] {
        match num_rows {
            0 => &[],
            n => &self.bytes[..(n - 1) * self.stride_bytes + self.row_bytes],
        }
    }

    /// Every `step`-th row from `first` on.
    pub fn every(&self, first: usize, step: usize) -> Rows<'a> {
        let start = (first * self.stride_bytes).min(self.bytes.len());
        Rows { bytes: &self.bytes[start..], stride_bytes: self.stride_bytes * step, row_bytes: self.row_bytes }
    }
}

/// One matrix `[rows, cols]` (`y = x Wᵀ`: a row makes one output) in its canonical layout, borrowed from a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct MatrixView<'a> {
    /// What the bits mean.
    pub format: WeightFormat,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `[rows]` rows of packed codes (or plain floats).
    pub codes: Rows<'a>,
    /// `[rows]` rows of scales; for FP8 blocks one row per `block_rows` rows; empty for plain floats.
    pub scales: Rows<'a>,
    /// `[rows]` rows of offsets beside the scales (affine only; MLX calls them `biases`).
    pub offsets: Rows<'a>,
    /// Multiplies every decoded value; 1.0 where the checkpoint has none. For NVFP4 this is ModelOpt's
    /// `weight_scale_2`, the reciprocal of compressed-tensors' `weight_global_scale`, and MLX's `global_scale / 2688`.
    pub global_scale: f32,
    /// FP8 blocks: row of the block grid's matrix that is this view's row 0 (a view into a fused matrix may start
    /// inside a block). 0 otherwise.
    pub first_block_row: usize,
}

impl<'a> MatrixView<'a> {
    /// A view over contiguous parts, each checked against the format and shape.
    ///
    /// # Errors
    /// If the column count is not legal in `format` or a part has the wrong number of bytes.
    pub fn new(
        what: &str,
        format: WeightFormat,
        [rows, cols]: [usize; 2],
        codes: &'a [u8],
        scales: &'a [u8],
        offsets: &'a [u8],
    ) -> Result<Self> {
        format.validate(cols).map_err(|e| Error::mismatch(what, e, "a legal shape"))?;
        let code_row = format.code_row_bytes(cols);
        let scale_row = format.scales_per_row(cols) * format.scale_bytes();
        let part = |name: &str, bytes: &'a [u8], num_rows: usize, row_bytes: usize| {
            let expected = num_rows.checked_mul(row_bytes);
            if expected != Some(bytes.len()) {
                return Err(Error::mismatch(
                    format!("{what}: bytes of the {name} of a {format} matrix [{rows}, {cols}]"),
                    bytes.len(),
                    expected.map_or("a size that fits memory".to_owned(), |n| n.to_string()),
                ));
            }
            Rows::new(what, bytes, num_rows, row_bytes, row_bytes)
        };
        Ok(MatrixView {
            format,
            rows,
            cols,
            codes: part("codes", codes, rows, code_row)?,
            scales: part("scales", scales, format.scale_rows(rows), scale_row)?,
            offsets: part("offsets", offsets, rows, if format.has_offsets() { scale_row } else { 0 })?,
            global_scale: 1.0,
            first_block_row: 0,
        })
    }

    /// The same matrix with a global scale.
    #[must_use]
    pub fn with_global_scale(mut self, global_scale: f32) -> Self {
        self.global_scale = global_scale;
        self
    }

    /// Rows `rows` of the matrix, without copying.
    ///
    /// # Panics
    /// If the range is not inside the matrix.
    #[must_use]
    pub fn row_range(&self, rows: Range<usize>) -> MatrixView<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of a matrix with {}", self.rows);
        let mut part = MatrixView { rows: rows.len(), codes: self.codes.every(rows.start, 1), ..*self };
        if let WeightFormat::Fp8Block { block_rows, .. } = self.format {
            let first = self.first_block_row + rows.start;
            part.scales = self.scales.every(first / block_rows as usize, 1);
            part.first_block_row = first % block_rows as usize;
        } else {
            part.scales = self.scales.every(rows.start, 1);
            part.offsets = self.offsets.every(rows.start, 1);
        }
        part
    }

    /// Every `step`-th row from `first` on, without copying (gate and up of gpt-oss alternate).
    ///
    /// # Errors
    /// For FP8 blocks, whose rows share scales.
    pub fn every_row(&self, first: usize, step: usize) -> Result<MatrixView<'a>> {
        if let WeightFormat::Fp8Block { .. } = self.format {
            return Err(Error::mismatch(
                "format of a matrix with interleaved rows",
                self.format,
                "scales of its own per row",
            ));
        }
        Ok(MatrixView {
            rows: self.rows.saturating_sub(first).div_ceil(step),
            codes: self.codes.every(first, step),
            scales: self.scales.every(first, step),
            offsets: self.offsets.every(first, step),
            ..*self
        })
    }

    /// Scales of row `row`.
    pub fn scale_row(&self, row: usize) -> &'a [u8] {
        if let WeightFormat::Fp8Block { block_rows, .. } = self.format {
            return self.scales.row((self.first_block_row + row) / block_rows as usize);
        }
        self.scales.row(row)
    }

    /// Bytes that this matrix takes in a checkpoint (codes, scales, offsets).
    pub fn size_bytes(&self) -> u64 {
        self.format.matrix_bytes(self.rows, self.cols)
    }
}
