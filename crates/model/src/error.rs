//! The crate's error type.

/// What can go wrong between a model directory and its logits.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of `config.json` is missing or has a value that no model can have.
    #[error("config.json: {field} is {found}, expected {expected}")]
    Config {
        /// Path of the field.
        field: String,
        /// The value found.
        found: String,
        /// What would be legal.
        expected: String,
    },
    /// A weight does not fit the config.
    #[error("{name}: {what} is {found}, expected {expected}")]
    Weight {
        /// Module or tensor.
        name: String,
        /// Which property.
        what: &'static str,
        /// The value found.
        found: String,
        /// The value expected.
        expected: String,
    },
    /// A batch asks for what the decoder was not built for.
    #[error("batch: {what} is {found}, expected {expected}")]
    Batch {
        /// Which property.
        what: &'static str,
        /// The value found.
        found: String,
        /// What would be legal.
        expected: String,
    },
    /// The checkpoint's files.
    #[error(transparent)]
    Checkpoint(#[from] moellon_checkpoint::Error),
    /// The back end.
    #[error(transparent)]
    Ops(#[from] moellon_ops::Error),
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// A [`Error::Config`] from anything printable.
    pub(crate) fn config(field: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::Config { field: field.into(), found: found.to_string(), expected: expected.to_string() }
    }
}
