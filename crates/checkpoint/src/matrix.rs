//! What a checkpoint gives for a weight: a view into the map where the bytes can stay, a copy where they cannot.

use moellon_tensor::{MatrixView, OwnedMatrix, WeightFormat};
use std::ops::Range;

/// A weight matrix, borrowed from the map or converted at load.
#[derive(Debug, Clone)]
pub enum Matrix<'a> {
    /// The bytes of the checkpoint.
    Borrowed(MatrixView<'a>),
    /// A copy, where the checkpoint's layout is not row-major `[out, in]`.
    Owned(OwnedMatrix),
}

impl Matrix<'_> {
    /// The matrix as a view.
    pub fn view(&self) -> MatrixView<'_> {
        match self {
            Matrix::Borrowed(view) => *view,
            Matrix::Owned(matrix) => matrix.view(),
        }
    }

    /// Some of its rows: of a view a view, of a copy a copy.
    pub(crate) fn row_range(&self, rows: Range<usize>) -> Self {
        match self {
            Matrix::Borrowed(view) => Matrix::Borrowed(view.row_range(rows)),
            Matrix::Owned(matrix) => Matrix::Owned(copy(&matrix.view().row_range(rows))),
        }
    }
}

/// The bytes of a view, row by row. FP8 blocks, whose rows share scales, are never converted at load.
fn copy(view: &MatrixView<'_>) -> OwnedMatrix {
    assert!(
        !matches!(view.format, WeightFormat::Fp8Block { .. }),
        "a copy of {} has scales of its own per row",
        view.format
    );
    let offset_rows = if view.format.has_offsets() { view.rows } else { 0 };
    let scale_rows = view.format.scale_rows(view.rows);
    OwnedMatrix {
        format: view.format,
        rows: view.rows,
        cols: view.cols,
        codes: (0..view.rows).flat_map(|row| view.codes.row(row)).copied().collect(),
        scales: (0..scale_rows).flat_map(|row| view.scales.row(row)).copied().collect(),
        offsets: (0..offset_rows).flat_map(|row| view.offsets.row(row)).copied().collect(),
        global_scale: view.global_scale,
    }
}
