//! Token ids of one sequence to text, as they come: never half a character.
//!
//! The text of all chunks together is [`Tokenizer::decode`] of all ids, whatever the ids are.

use std::sync::Arc;

use crate::tokenizer::Tokenizer;

/// The streaming detokenizer of one sequence.
#[derive(Debug, Clone)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The next token is the first of its text.
    at_start: bool,
    /// Leading spaces that the text may still lose.
    spaces_to_strip: usize,
    /// Bytes that came in and are not out yet: at most the beginning of one character between two pushes.
    pending: Vec<u8>,
    /// The chunk of the last call.
    chunk: String,
}

impl Detokenizer {
    /// For ids that begin a text: sentencepiece's leading space is removed. What `decode` does.
    pub fn from_start(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Detokenizer {
        let spaces_to_strip = tokenizer.leading_spaces_to_strip();
        Detokenizer {
            tokenizer,
            skip_special,
            at_start: true,
            spaces_to_strip,
            pending: Vec::new(),
            chunk: String::new(),
        }
    }

    /// For ids that follow a prompt: a leading space belongs to the text.
    ///
    /// Parsers of tool calls and thinking need the markers, which may be special tokens: give them
    /// `skip_special = false`.
    pub fn continuing(tokenizer: Arc<Tokenizer>, skip_special: bool) -> Detokenizer {
        Detokenizer { at_start: false, spaces_to_strip: 0, ..Detokenizer::from_start(tokenizer, skip_special) }
    }

    /// Takes the next token and returns the text that became final, which may be empty.
    pub fn push(&mut self, id: u32) -> &str {
        self.chunk.clear();
        if self.skip_special && self.tokenizer.is_special(id) {
            return &self.chunk;
        }
        if self.at_start {
            self.pending.extend_from_slice(&self.tokenizer.first_token_bytes(id));
            self.at_start = self.tokenizer.token_bytes(id).is_empty();
        } else {
            self.pending.extend_from_slice(self.tokenizer.token_bytes(id));
        }
        self.drain();
        &self.chunk
    }

    /// Ends the text: an unfinished character becomes U+FFFD. Call it once, after the last token.
    pub fn finish(&mut self) -> &str {
        self.chunk.clear();
        if !self.pending.is_empty() {
            self.pending.clear();
            self.chunk.push(char::REPLACEMENT_CHARACTER);
        }
        &self.chunk
    }

    /// Whether bytes of an unfinished character are held back.
    pub fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Moves everything that is final from `pending` to `chunk`; the same replacements as `from_utf8_lossy`.
    fn drain(&mut self) {
        let mut start = 0;
        // Spaces are single bytes, so they can be taken before the rest is decoded.
        while self.spaces_to_strip > 0 && start < self.pending.len() {
            if self.pending[start] == b' ' {
                start += 1;
                self.spaces_to_strip -= 1;
            } else {
                self.spaces_to_strip = 0;
            }
        }
        let mut kept = self.pending.len();
        for part in self.pending[start..].utf8_chunks() {
            self.chunk.push_str(part.valid());
            start += part.valid().len() + part.invalid().len();
            if !part.invalid().is_empty() {
                if start == self.pending.len() && is_unfinished(part.invalid()) {
                    kept = start - part.invalid().len();
                } else {
                    self.chunk.push(char::REPLACEMENT_CHARACTER);
                }
            }
        }
        self.pending.drain(..kept);
    }
}

/// Whether more bytes could make a character of these.
fn is_unfinished(bytes: &[u8]) -> bool {
    matches!(std::str::from_utf8(bytes), Err(error) if error.error_len().is_none())
}
