//! Token ids to hidden states.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, all_formats, floats, load_random, upload_ids, zeros};
use crate::error::expect_eq;
use crate::reference::Memory;
use crate::weight::Weight;

/// `out[t] = table[token_ids[t]]`, decoded.
#[derive(Debug, Clone, Copy)]
pub struct Embed {
    /// `[vocab_size, hidden_size]`.
    pub table: Weight,
    /// `[1, num_tokens]` u32, each below `vocab_size` (the caller checks: ids are input).
    pub token_ids: Tensor,
    /// `[num_tokens, hidden_size]`.
    pub out: Tensor,
}

impl Embed {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        expect_eq("embed", "matrices of the table", self.table.count, 1)?;
        self.token_ids.check_u32("embed", "token_ids", [1, self.token_ids.cols])?;
        self.out.check_f32("embed", "out", [self.token_ids.cols, self.table.cols])
    }

    /// Bytes that must be moved: a row a token.
    pub fn bytes(&self) -> u64 {
        self.token_ids.cols as u64 * self.table.format.matrix_bytes(1, self.table.cols)
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let ids = memory.ids(self.token_ids).remove(0);
        let rows: Vec<Vec<f32>> = ids.iter().map(|id| memory.weight_row(&self.table, *id as usize)).collect();
        memory.set_rows(self.out, &rows);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    all_formats()
        .into_iter()
        .map(|format| {
            let token_ids = [0u32, 36, 7, 7, 16];
            Case::new("embed", format.to_string(), token_ids.len(), Tolerance::exact(1), move |backend, picked| {
                let table = load_random(backend, 5, format, [1, 37, 128], None)?;
                let token_ids = upload_ids(backend, &[picked.iter().map(|r| token_ids[*r]).collect()])?;
                let out = zeros(backend, picked.len(), 128)?;
                backend.embed(&Embed { table, token_ids, out })?;
                Ok(vec![floats(backend, "out", out)?])
            })
        })
        .collect()
}
