//! Which tokens may come next: the trait that the sampler asks, the mask it gets, and grammars behind it.
//!
//! A constraint sees every token of the output, and nothing of the prompt. It fails closed: an error ends the request,
//! it never opens the mask. Tokens that end a generation are not the grammar's: the engine allows them exactly where
//! [`Constraint::may_end`] says so.

mod deferred;
mod grammar;
mod tool_calls;

pub use deferred::Deferred;
pub use grammar::{Grammar, GrammarCompiler};

/// Decides which tokens may come next.
pub trait Constraint: Send {
    /// Clears in `mask` every token that may not come next. `mask` comes with all tokens set.
    ///
    /// # Errors
    /// [`ConstraintError::Failed`]: the request must end.
    fn allow(&mut self, mask: &mut TokenMask) -> Result<(), ConstraintError>;

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// [`ConstraintError::NotAllowed`] for a token that [`Constraint::allow`] would not have allowed.
    fn consume(&mut self, token: u32) -> Result<(), ConstraintError>;

    /// Takes back the last `num_tokens` consumed tokens: rejected drafts.
    ///
    /// # Errors
    /// [`ConstraintError::Rollback`] if fewer were consumed.
    fn rollback(&mut self, num_tokens: usize) -> Result<(), ConstraintError>;

    /// Whether the output may end here.
    fn may_end(&mut self) -> bool;

    /// Whether it must: nothing can follow.
    fn is_complete(&mut self) -> bool;
}

/// Why a constraint cannot be used or cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConstraintError {
    /// The grammar or schema is not usable.
    #[error("{kind}: {reason}")]
    Grammar {
        /// What it was: `json_schema`, `regex`, `grammar`.
        kind: &'static str,
        /// What was found and expected.
        reason: String,
    },
    /// The grammar is beyond what one request may cost.
    #[error("{kind}: {what} is {found}, expected at most {limit}")]
    TooComplex {
        /// What it was: `json_schema`, `regex`, `grammar`.
        kind: &'static str,
        /// What was counted, with its unit.
        what: &'static str,
        /// How much was found.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// Others left it no time or no processor: the same grammar may do later.
    #[error("{kind}: other grammars are being compiled, and there was no time left for this one")]
    Busy {
        /// What it was: `json_schema`, `regex`, `grammar`.
        kind: &'static str,
    },
    /// The token may not come here.
    #[error("token {token} is not allowed after {consumed} tokens of constrained output")]
    NotAllowed {
        /// The token.
        token: u32,
        /// Tokens consumed before it.
        consumed: usize,
    },
    /// More tokens were taken back than consumed.
    #[error("cannot take back {found} tokens, expected at most {consumed}")]
    Rollback {
        /// Tokens to take back.
        found: usize,
        /// Tokens consumed.
        consumed: usize,
    },
    /// The parser gave up: out of fuel or memory, or a fault of its own.
    #[error("the grammar's parser stopped after {consumed} tokens: {reason}")]
    Failed {
        /// Tokens consumed.
        consumed: usize,
        /// Its own words.
        reason: String,
    },
}

/// A set of tokens, one bit each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenMask {
    /// Bit `t % 32` of word `t / 32` is token `t`; bits from `len` on are clear.
    words: Vec<u32>,
    len: usize,
}

impl TokenMask {
    /// All of `vocab_size` tokens.
    pub fn all(vocab_size: usize) -> Self {
        let mut mask = TokenMask { words: vec![0; vocab_size.div_ceil(32)], len: vocab_size };
        mask.set_all();
        mask
    }

    /// Tokens of the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.len
    }

    /// Sets every token.
    pub fn set_all(&mut self) {
        self.words.fill(u32::MAX);
        self.clear_padding();
    }

    /// Keeps only tokens that are also in `words`, laid out alike; tokens past its end are cleared.
    pub fn intersect(&mut self, words: &[u32]) {
        for (index, word) in self.words.iter_mut().enumerate() {
            *word &= words.get(index).copied().unwrap_or(0);
        }
    }

    /// Sets a token; ids outside the vocabulary are ignored.
    pub fn set(&mut self, token: u32) {
        if (token as usize) < self.len {
            self.words[token as usize / 32] |= 1 << (token % 32);
        }
    }

    /// Clears a token.
    pub fn clear(&mut self, token: u32) {
        if let Some(word) = self.words.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }

    /// Whether a token is set.
    pub fn contains(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word & (1 << (token % 32)) != 0)
    }

    /// Whether no token is set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Tokens set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// The bits, 32 tokens a word.
    pub fn words(&self) -> &[u32] {
        &self.words
    }

    fn clear_padding(&mut self) {
        let used = self.len % 32;
        if let (Some(last), true) = (self.words.last_mut(), used > 0) {
            *last &= (1 << used) - 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_no_token_past_the_vocabulary() {
        for vocab_size in [1, 31, 32, 33, 100] {
            let mut mask = TokenMask::all(vocab_size);
            assert_eq!(mask.count(), vocab_size);
            mask.set(vocab_size as u32);
            assert_eq!(mask.count(), vocab_size);
            mask.clear(0);
            assert!(!mask.contains(0) && !mask.contains(vocab_size as u32));
            mask.intersect(&[]);
            assert!(mask.is_empty());
        }
    }
}
