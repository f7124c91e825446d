//! Texts as token sequences.

use super::options::TextOptions;
use anyhow::{Context, Result};
use moellon_surgery::stream::Sequences;
use moellon_text::Tokenizer;
use sha2::{Digest, Sha256};

/// Tokens of all texts, and a name and SHA-256 for each.
pub struct Texts {
    pub sequences: Sequences,
    pub names: Vec<[String; 2]>,
}

/// Reads, tokenizes and cuts the texts. They are text, whatever they contain: no special tokens are recognised in them.
pub fn read(options: &TextOptions, tokenizer: &Tokenizer, max_position: usize) -> Result<Texts> {
    anyhow::ensure!(!options.text.is_empty(), "--text is missing, expected one file at least");
    anyhow::ensure!(
        (2..=max_position).contains(&options.sequence),
        "--sequence is {}, expected 2 to {max_position}, what the model was made for",
        options.sequence
    );
    let mut tokens = Vec::new();
    let mut names = Vec::new();
    for path in &options.text {
        let bytes = std::fs::read(path).with_context(|| format!("--text {}", path.display()))?;
        let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let text = String::from_utf8(bytes).with_context(|| format!("--text {}", path.display()))?;
        tokens.push(tokenizer.encode_ordinary(&text)?);
        let name = path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        names.push([name, hash]);
    }
    let sequences = Sequences::cut(&tokens, options.sequence, options.max_tokens).context("--text")?;
    Ok(Texts { sequences, names })
}
