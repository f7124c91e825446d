//! The crate's error type.

/// What can be wrong with bytes that claim to be a weight.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A shape, byte length or group does not fit the format.
    #[error("{what}: found {found}, expected {expected}")]
    Mismatch {
        /// The thing that is wrong, e.g. `affine-3 group 64 codes of a row of 96 columns`.
        what: String,
        /// The value found.
        found: String,
        /// The value expected.
        expected: String,
    },
    /// A value that no weight may have.
    #[error("{what} has {found} at row {row}, column group {group}")]
    NotFinite {
        /// Which part: `scales`, `offsets`, `codes`, `global scale`.
        what: &'static str,
        /// The offending value.
        found: String,
        /// Row of the matrix.
        row: usize,
        /// Group (or column for ungrouped formats) in the row.
        group: usize,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Mismatch`] from anything printable.
    pub fn mismatch(what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::Mismatch { what: what.into(), found: found.to_string(), expected: expected.to_string() }
    }
}
