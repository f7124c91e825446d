//! The crate's error type.

use std::fmt::Display;

/// What can go wrong between a model and a back end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument does not fit the contract of the operation.
    #[error("{op}: {what} is {found}, expected {expected}")]
    Contract {
        /// Name of the operation.
        op: &'static str,
        /// Which argument or relation.
        what: String,
        /// The value found.
        found: String,
        /// The value expected.
        expected: String,
    },
    /// The back end has no kernel for a weight format.
    #[error("back end {backend}: weight {weight} has format {format}, for which it has no kernel (it takes {takes})")]
    UnsupportedFormat {
        /// Name of the back end.
        backend: &'static str,
        /// Name of the weight.
        weight: String,
        /// The format found.
        format: String,
        /// The formats that it takes.
        takes: String,
    },
    /// The device has not enough memory.
    #[error("back end {backend}: {what} needs {needed_bytes} bytes, {free_bytes} bytes are free")]
    OutOfMemory {
        /// Name of the back end.
        backend: &'static str,
        /// What the memory was for.
        what: String,
        /// Bytes asked for.
        needed_bytes: u64,
        /// Bytes free.
        free_bytes: u64,
    },
    /// The device or its driver failed.
    #[error("back end {backend}: {message}")]
    Device {
        /// Name of the back end.
        backend: &'static str,
        /// What it said.
        message: String,
    },
    /// A weight's bytes do not fit its format.
    #[error(transparent)]
    Tensor(#[from] moellon_tensor::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Returns a [`Error::Contract`] unless `found == expected`. Operations are checked in every step: texts are made (with
/// `format_args!`) only for an error.
pub(crate) fn expect_eq<T: PartialEq + std::fmt::Debug>(
    op: &'static str,
    what: impl Display,
    found: T,
    expected: T,
) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Contract { op, what: what.to_string(), found: format!("{found:?}"), expected: format!("{expected:?}") })
}

/// Returns a [`Error::Contract`] unless `holds`.
pub(crate) fn expect(
    op: &'static str,
    holds: bool,
    what: impl Display,
    found: impl Display,
    expected: impl Display,
) -> Result<()> {
    if holds {
        return Ok(());
    }
    Err(Error::Contract { op, what: what.to_string(), found: found.to_string(), expected: expected.to_string() })
}
