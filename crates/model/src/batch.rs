//! What one step computes, as the scheduler says it: tokens, positions, slots, block tables. Counts only, no tensors.

use crate::{Error, Result};

/// The rows of one step. Row `t` is token `token_ids[t]` at `positions[t]` of sequence `sequences[t]`; its keys go to
/// `slots[t]`. Rows of one sequence are in ascending positions, and earlier positions are already cached or in the batch.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    /// `[num_tokens]`
    pub token_ids: Vec<u32>,
    /// `[num_tokens]`
    pub positions: Vec<u32>,
    /// `[num_tokens]`, rows of `block_tables`
    pub sequences: Vec<u32>,
    /// `[num_tokens]`
    pub slots: Vec<u32>,
    /// `[num_sequences]` lists of blocks
    pub block_tables: Vec<Vec<u32>>,
    /// Rows whose logits are wanted, ascending
    pub logit_rows: Vec<u32>,
}

/// Which rows of a sequence need logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitRows {
    /// None: a prefill chunk that is not the last.
    None,
    /// The last one: the next token is to be chosen.
    Last,
    /// All: verification of drafts, scoring.
    All,
}

impl Batch {
    /// Appends `token_ids` of one sequence, the first at `first_position`, with its block table.
    pub fn push_sequence(
        &mut self,
        token_ids: &[u32],
        first_position: usize,
        block_table: &[u32],
        block_size: usize,
        logits: LogitRows,
    ) {
        let sequence = self.block_tables.len() as u32;
        let first_row = self.token_ids.len() as u32;
        for (i, token) in token_ids.iter().enumerate() {
            let position = first_position + i;
            self.token_ids.push(*token);
            self.positions.push(position as u32);
            self.sequences.push(sequence);
            self.slots.push(block_table[position / block_size] * block_size as u32 + (position % block_size) as u32);
        }
        self.block_tables.push(block_table.to_vec());
        let end = self.token_ids.len() as u32;
        match logits {
            LogitRows::None => {}
            LogitRows::Last => self.logit_rows.extend((end > first_row).then(|| end - 1)),
            LogitRows::All => self.logit_rows.extend(first_row..end),
        }
    }

    /// Rows.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// One more than the largest position.
    pub fn max_context(&self) -> usize {
        self.positions.iter().max().map_or(0, |p| *p as usize + 1)
    }

    /// Checks the batch against what a decoder was built for.
    pub(crate) fn check(&self, limits: &BatchLimits) -> Result<()> {
        let at_most = |what, found: usize, limit: usize| {
            if found <= limit {
                return Ok(());
            }
            Err(Error::Batch { what, found: found.to_string(), expected: format!("at most {limit}") })
        };
        if self.num_tokens() == 0 {
            return Err(Error::Batch {
                what: "number of tokens",
                found: "0".to_owned(),
                expected: "at least 1".to_owned(),
            });
        }
        at_most("number of tokens", self.num_tokens(), limits.max_batch_tokens)?;
        at_most("number of sequences", self.block_tables.len(), limits.max_sequences)?;
        at_most("number of logit rows", self.logit_rows.len(), limits.max_logit_rows)?;
        at_most("context", self.max_context(), limits.max_context)?;
        let largest = |ids: &[u32]| ids.iter().max().map_or(0, |id| *id as usize);
        at_most("largest token id", largest(&self.token_ids), limits.vocab_size - 1)?;
        at_most("largest slot", largest(&self.slots), limits.num_slots - 1)?;
        at_most("largest logit row", largest(&self.logit_rows), self.num_tokens() - 1)?;
        let blocks = self.block_tables.iter().map(|t| largest(t)).max().unwrap_or(0);
        at_most("largest block", blocks, limits.num_slots / limits.block_size - 1)?;
        for (position, sequence) in self.positions.iter().zip(&self.sequences) {
            let table = self.block_tables.get(*sequence as usize).map_or(0, Vec::len);
            at_most("block of a position in its sequence's table", *position as usize / limits.block_size + 1, table)?;
        }
        Ok(())
    }
}

/// What a decoder was built for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchLimits {
    pub(crate) max_batch_tokens: usize,
    pub(crate) max_sequences: usize,
    pub(crate) max_logit_rows: usize,
    pub(crate) max_context: usize,
    pub(crate) vocab_size: usize,
    pub(crate) num_slots: usize,
    pub(crate) block_size: usize,
}
