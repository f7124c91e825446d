//! From positions to cache slots.
//!
//! `unsafe`: reads the batch's position tables.
#![allow(unsafe_code)]

use crate::memory::{Integers, Memory};
use moellon_ops::Paging;

/// The tables of [`Paging`], ready to read.
#[derive(Clone, Copy)]
pub(crate) struct Pages {
    positions: Integers,
    sequences: Integers,
    block_table: Integers,
    block_size: usize,
}

impl Pages {
    /// Views of the tables.
    pub(crate) fn new(memory: &Memory, paging: &Paging) -> Self {
        Pages {
            positions: memory.integers(paging.positions),
            sequences: memory.integers(paging.sequences),
            block_table: memory.integers(paging.block_table),
            block_size: paging.block_size,
        }
    }

    /// Position of row `t` in its sequence.
    pub(crate) fn position(&self, t: usize) -> usize {
        // SAFETY: nobody writes the tables during an operation.
        unsafe { self.positions.row(0)[t] as usize }
    }

    /// Blocks of row `t`'s sequence.
    pub(crate) fn blocks(&self, t: usize) -> &[u32] {
        // SAFETY: as above.
        unsafe { self.block_table.row(self.sequences.row(0)[t] as usize) }
    }

    /// Slot of position `position`, given the sequence's blocks.
    pub(crate) fn slot(&self, blocks: &[u32], position: usize) -> u32 {
        blocks[position / self.block_size] * self.block_size as u32 + (position % self.block_size) as u32
    }
}
