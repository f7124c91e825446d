//! What can go wrong in this crate. Every variant is about bad input: a file, a template, a request.

use std::path::PathBuf;

/// The error of every fallible function of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file that was asked for.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// `tokenizer.json` or `tokenizer_config.json` is malformed or needs something that is not supported.
    #[error("{file}: {reason}")]
    TokenizerFile {
        /// Which of the two files (its conventional name).
        file: &'static str,
        /// The field, the value found and what was expected.
        reason: String,
    },
    /// The tokenizer has a token that the model has no row for.
    #[error("tokenizer has token {token:?} with id {id}, expected every id below the model's vocab_size {vocab_size}")]
    VocabTooSmall {
        /// The token with the largest id.
        token: String,
        /// Its id.
        id: u32,
        /// `vocab_size` of the model's config.
        vocab_size: usize,
    },
    /// Text could not be turned into token ids.
    #[error("cannot tokenize the text: {reason}")]
    Encode {
        /// What the tokenizer library said.
        reason: String,
    },
    /// A stop string, marker or other setting of a streaming parser is unusable.
    #[error("{setting}: {reason}")]
    Setting {
        /// The setting at fault.
        setting: &'static str,
        /// What was found and expected.
        reason: String,
    },
    /// The chat template cannot be parsed, or failed while it ran.
    #[error("chat template line {line}: {message}")]
    Template {
        /// 1-based line of the template's source; 0 when the failure belongs to no line.
        line: usize,
        /// What failed.
        message: String,
    },
    /// The template called `raise_exception`: it refuses this conversation, and says why.
    #[error("chat template refused the conversation (line {line}): {message}")]
    TemplateRaised {
        /// 1-based line of the template's source; 0 when unknown.
        line: usize,
        /// The template's own words.
        message: String,
    },
    /// The template ran into one of the limits of [`TemplateLimits`](crate::TemplateLimits).
    #[error("chat template line {line}: exceeded the limit of {limit} {what}")]
    TemplateLimit {
        /// 1-based line of the template's source; 0 when unknown.
        line: usize,
        /// What was counted, in the plural with its unit: `output bytes`, `instructions`.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// The values given to the template are not usable.
    #[error("chat template input {name}: {reason}")]
    TemplateInput {
        /// The variable at fault.
        name: String,
        /// What was found and expected.
        reason: String,
    },
}
