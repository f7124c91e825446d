//! Which tokens go to which expert: the batch seen from the experts, so that each distinct one is read once.
//!
//! `unsafe`: reads the batch's expert ids and weights.
#![allow(unsafe_code)]

use crate::memory::{Floats, Integers};
use moellon_ops::{Error, Result};
use std::ops::Range;

/// Rows of each expert, rebuilt for every batch in the same memory.
#[derive(Default)]
pub(crate) struct ExpertLists {
    /// `[num_experts + 1]`: where each expert's list starts.
    starts: Vec<u32>,
    /// `[num_tokens * top_k]`: `t * top_k + i` of each choice, by expert, ascending.
    pairs: Vec<u32>,
    /// The same choices as tokens.
    tokens: Vec<u32>,
    /// Weights of the same choices, once they were gathered.
    weights: Vec<f32>,
    /// Experts with at least one row, ascending.
    active: Vec<u32>,
}

impl ExpertLists {
    /// Sorts the choices `ids` (`[num_tokens, top_k]`) by expert.
    ///
    /// # Errors
    /// If an id is not below `num_experts`.
    pub(crate) fn build(&mut self, op: &'static str, ids: &Integers, num_experts: usize) -> Result<()> {
        let top_k = ids.cols;
        // SAFETY: nothing runs beside this.
        let choices = || (0..ids.rows).flat_map(|t| unsafe { ids.row(t) });
        self.starts.clear();
        self.starts.resize(num_experts + 1, 0);
        for id in choices() {
            let Some(count) = self.starts[..num_experts].get_mut(*id as usize) else {
                let expected = format!("below {num_experts}");
                return Err(Error::Contract { op, what: "expert id".to_owned(), found: id.to_string(), expected });
            };
            *count += 1;
        }
        // Counts to starts, then each start moves on as its list fills; afterwards it is the next expert's start.
        self.active.clear();
        let mut next = 0;
        for (expert, start) in self.starts.iter_mut().enumerate() {
            let count = std::mem::replace(start, next);
            next += count;
            if count > 0 {
                self.active.push(expert as u32);
            }
        }
        self.pairs.resize(next as usize, 0);
        self.tokens.resize(next as usize, 0);
        for (pair, id) in choices().enumerate() {
            let place = &mut self.starts[*id as usize];
            self.pairs[*place as usize] = pair as u32;
            self.tokens[*place as usize] = (pair / top_k) as u32;
            *place += 1;
        }
        self.starts.rotate_right(1);
        self.starts[0] = 0;
        Ok(())
    }

    /// Puts the weights of all choices (`[num_tokens, top_k]`) in the order of the lists.
    pub(crate) fn gather_weights(&mut self, weights: &Floats) {
        let top_k = weights.cols;
        self.weights.clear();
        // SAFETY: nothing runs beside this.
        self.weights.extend(
            self.pairs.iter().map(|pair| unsafe { weights.row(*pair as usize / top_k)[*pair as usize % top_k] }),
        );
    }

    /// Weights of an expert's choices, which were gathered, in the order of [`ExpertLists::pairs`].
    pub(crate) fn weights(&self, expert: usize) -> &[f32] {
        &self.weights[self.places(expert)]
    }

    /// Experts with rows, ascending.
    pub(crate) fn active(&self) -> &[u32] {
        &self.active
    }

    /// Choices (`t * top_k + i`) of an expert.
    pub(crate) fn pairs(&self, expert: usize) -> &[u32] {
        &self.pairs[self.places(expert)]
    }

    /// All choices, expert after expert.
    pub(crate) fn all_pairs(&self) -> &[u32] {
        &self.pairs
    }

    /// Where the choices of an expert stand among [`ExpertLists::all_pairs`].
    pub(crate) fn places(&self, expert: usize) -> Range<usize> {
        self.starts[expert] as usize..self.starts[expert + 1] as usize
    }

    /// Tokens of an expert, in the order of [`ExpertLists::pairs`].
    pub(crate) fn tokens(&self, expert: usize) -> &[u32] {
        &self.tokens[self.places(expert)]
    }
}
