//! What a checkpoint gives for a weight: a view into the map where the bytes can stay, a copy where they cannot.

use moellon_tensor::{MatrixView, OwnedMatrix};

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
}
