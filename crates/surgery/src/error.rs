//! The crate's error type.

use std::path::{Path, PathBuf};

/// What can go wrong in surgery.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value does not fit.
    #[error("{what} is {found}, expected {expected}")]
    Mismatch {
        /// The thing.
        what: String,
        /// The value found.
        found: String,
        /// What would be right.
        expected: String,
    },
    /// The file system.
    #[error("{}: {source}", path.display())]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A JSON file that is not what it should be.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The checkpoint's files.
    #[error(transparent)]
    Checkpoint(#[from] moellon_checkpoint::Error),
    /// The model.
    #[error(transparent)]
    Model(#[from] moellon_model::Error),
    /// A back end.
    #[error(transparent)]
    Ops(#[from] moellon_ops::Error),
    /// A weight's bits.
    #[error("{weight}: {source}")]
    Weight {
        /// Name of the module.
        weight: String,
        /// What is wrong with it.
        source: moellon_tensor::Error,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Mismatch`] from anything printable.
    pub(crate) fn mismatch(what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::Mismatch { what: what.into(), found: found.to_string(), expected: expected.to_string() }
    }

    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_owned(), source }
    }

    pub(crate) fn json(path: &Path, source: serde_json::Error) -> Self {
        Error::Json { path: path.to_owned(), source }
    }

    pub(crate) fn weight(weight: &str) -> impl FnOnce(moellon_tensor::Error) -> Error + use<> {
        let weight = weight.to_owned();
        move |source| Error::Weight { weight, source }
    }
}
