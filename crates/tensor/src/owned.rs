//! A weight matrix that owns its bytes: what encoders and load-time conversions produce.

use crate::{MatrixView, Result, ScaleDtype, WeightFormat};

/// A matrix `[rows, cols]` in the canonical layout of its format, contiguous.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnedMatrix {
    /// What the bits mean.
    pub format: WeightFormat,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// Packed codes or plain floats, `rows * format.code_row_bytes(cols)` bytes.
    pub codes: Vec<u8>,
    /// Scales, empty for plain floats.
    pub scales: Vec<u8>,
    /// Offsets, empty for formats without them.
    pub offsets: Vec<u8>,
    /// See [`MatrixView::global_scale`].
    pub global_scale: f32,
}

impl OwnedMatrix {
    /// A matrix of zero bytes in every part.
    ///
    /// # Errors
    /// If the column count is not legal in `format` or the sizes do not fit memory.
    pub fn zeroed(format: WeightFormat, [rows, cols]: [usize; 2]) -> Result<Self> {
        format.validate(cols)?;
        let part = |num_rows: usize, row_bytes: usize| {
            num_rows.checked_mul(row_bytes).map(|n| vec![0; n]).ok_or_else(|| {
                crate::Error::mismatch(
                    format!("{format} matrix"),
                    format!("[{rows}, {cols}]"),
                    "a size that fits memory",
                )
            })
        };
        let scale_row_bytes = format.scales_per_row(cols) * format.scale_bytes();
        Ok(OwnedMatrix {
            format,
            rows,
            cols,
            codes: part(rows, format.code_row_bytes(cols))?,
            scales: part(format.scale_rows(rows), scale_row_bytes)?,
            offsets: part(if format.has_offsets() { rows } else { 0 }, scale_row_bytes)?,
            global_scale: 1.0,
        })
    }

    /// A plain matrix from f32 values `[rows, cols]`, each rounded to `dtype`.
    ///
    /// # Panics
    /// If there are not `rows * cols` values.
    pub fn plain(dtype: ScaleDtype, [rows, cols]: [usize; 2], values: &[f32]) -> Self {
        assert_eq!(values.len(), rows * cols, "values of a [{rows}, {cols}] matrix");
        let format = WeightFormat::plain(dtype);
        let mut codes = vec![0; values.len() * dtype.size_bytes()];
        for (at, &value) in values.iter().enumerate() {
            dtype.write(value, &mut codes, at);
        }
        OwnedMatrix { format, rows, cols, codes, scales: Vec::new(), offsets: Vec::new(), global_scale: 1.0 }
    }

    /// The matrix as a view.
    pub fn view(&self) -> MatrixView<'_> {
        MatrixView::new("owned matrix", self.format, [self.rows, self.cols], &self.codes, &self.scales, &self.offsets)
            .expect("the constructors give every part its length")
            .with_global_scale(self.global_scale)
    }
}
