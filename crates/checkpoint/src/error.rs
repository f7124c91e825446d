//! The crate's error type: one line that names the file, the tensor, the value found and the value expected.

use std::path::{Path, PathBuf};

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// File or directory.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not what its name promises.
    #[error("{file}: {what}: found {found}, expected {expected}")]
    File {
        /// The file.
        file: PathBuf,
        /// Which property.
        what: String,
        /// The value found.
        found: String,
        /// The value expected.
        expected: String,
    },
    /// A JSON file, or the JSON header of a safetensors file, does not parse.
    #[error("{file}: not valid: {message}")]
    Json {
        /// The file.
        file: PathBuf,
        /// What the parser said, with line and column.
        message: String,
    },
    /// A tensor does not have the dtype, shape, bytes or values that it must have.
    #[error("{file}: tensor {tensor}: {what}: found {found}, expected {expected}")]
    Tensor {
        /// The file that holds the tensor.
        file: PathBuf,
        /// Its name.
        tensor: String,
        /// Which property.
        what: String,
        /// The value found.
        found: String,
        /// The value expected.
        expected: String,
    },
    /// A weight as a whole (several tensors) is wrong.
    #[error("{weight}: {source}")]
    Weight {
        /// Module path of the weight.
        weight: String,
        /// What is wrong with it.
        source: moellon_tensor::Error,
    },
    /// A tensor or module that must be there is not.
    #[error("{dir}: {missing} is missing, expected {expected}")]
    Missing {
        /// The checkpoint.
        dir: PathBuf,
        /// Tensor or module path.
        missing: String,
        /// What should have been there.
        expected: String,
    },
    /// The tensors of a module and what the config says of it (or one another) disagree.
    #[error("{module}: {what}: found {found}, expected {expected}")]
    Module {
        /// Module path.
        module: String,
        /// Which property.
        what: String,
        /// The value found.
        found: String,
        /// The value expected.
        expected: String,
    },
    /// A known format that this version cannot read.
    #[error("{module}: {format} is not supported yet; {instead}")]
    Unsupported {
        /// Module path.
        module: String,
        /// The format.
        format: String,
        /// What works.
        instead: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Error::Io { path: path.to_owned(), source }
    }

    pub(crate) fn json(file: &Path, error: &serde_json::Error) -> Self {
        Error::Json { file: file.to_owned(), message: one_line(error) }
    }

    pub(crate) fn file(file: &Path, what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::File {
            file: file.to_owned(),
            what: one_line(what.into()),
            found: one_line(found),
            expected: one_line(expected),
        }
    }

    pub(crate) fn tensor(
        file: &Path,
        tensor: &str,
        what: impl Into<String>,
        found: impl ToString,
        expected: impl ToString,
    ) -> Self {
        Error::Tensor {
            file: file.to_owned(),
            tensor: tensor.to_owned(),
            what: one_line(what.into()),
            found: one_line(found),
            expected: one_line(expected),
        }
    }

    pub(crate) fn module(module: &str, what: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Error::Module {
            module: module.to_owned(),
            what: one_line(what.into()),
            found: one_line(found),
            expected: one_line(expected),
        }
    }
}

/// Text that may come from a file, made fit for a log: control characters escaped, cut after 200 characters.
fn one_line(text: impl ToString) -> String {
    const MAX_CHARS: usize = 200;
    let text = text.to_string();
    let mut line = String::with_capacity(text.len().min(4 * MAX_CHARS));
    for (at, character) in text.chars().enumerate() {
        if at == MAX_CHARS {
            line.push_str("...");
            break;
        }
        if character.is_control() { line.extend(character.escape_default()) } else { line.push(character) }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_one_line_whatever_the_file_says() {
        let json = serde_json::from_str::<serde_json::Value>("nonsense").expect_err("this is not JSON");
        assert!(Error::json(Path::new("f"), &json).to_string().starts_with("f: not valid: expected"));
        let error = Error::module("m", "mode", "a\nb\u{1b}[31m", "x".repeat(1000)).to_string();
        assert!(error.starts_with("m: mode: found a\\nb\\u{1b}[31m, expected xxx"), "{error}");
        assert!(error.len() < 300 && error.ends_with("..."));
    }
}
