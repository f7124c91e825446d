//! Multi-token prediction: a decoder layer that reads the trunk's hidden state and the next token's embedding and
//! predicts the token after it. Spec: `glm52` section 5.

use crate::batch::Batch;
use crate::decoder::{Decoder, Pass};
use crate::{Error, Result};
use moellon_ops::{Backend, Embed, GatherRows, IndexSet, Linear, RmsNorm, Stage, Tensor};

/// Where the hidden states of an MTP step come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtpHidden {
    /// The trunk's last step: the first draft.
    Trunk,
    /// Rows that [`Decoder::save_hidden`] kept of earlier steps.
    Saved,
    /// The MTP layer's own last step: chained drafts. transformers and SGLang feed the state after `shared_head.norm`.
    Mtp,
}

/// One run of the MTP layer.
#[derive(Debug, Clone, Copy)]
pub struct MtpStep<'a> {
    /// Row `t` holds the token *after* the one whose hidden state is row `hidden_rows[t]` of `hidden`, at that earlier
    /// token's position; its logits predict the token after next.
    pub batch: &'a Batch,
    /// `[num_tokens]`
    pub hidden_rows: &'a [u32],
    /// Where these rows are.
    pub hidden: MtpHidden,
    /// For a chained draft of one row: attend where this row of the MTP layer's last run attended, without running the
    /// indexer again (`index_share_for_mtp_iteration`).
    pub share_index_of: Option<u32>,
}

impl Decoder {
    /// Hidden states that [`Decoder::save_hidden`] can keep.
    pub fn max_saved_rows(&self) -> usize {
        if self.has_mtp() { self.options.max_batch_tokens } else { 0 }
    }

    /// Keeps rows of the last step's hidden states for a later [`MtpHidden::Saved`], as saved rows `first ..`.
    ///
    /// # Errors
    /// More than [`Decoder::max_saved_rows`], or a failing device.
    pub fn save_hidden(&mut self, rows: &[u32], first: usize, backend: &mut dyn Backend) -> Result<()> {
        let (end, limit) = (first + rows.len(), self.max_saved_rows());
        if end > limit {
            return Err(unfit("saved hidden rows", end, format!("at most {limit}")));
        }
        let Some(last) = rows.iter().max() else { return Ok(()) };
        let (space, hidden_size) = (&self.workspace, self.config.hidden_size);
        let indices = space.hidden_rows.tensor(1, rows.len());
        backend.write_u32(indices, rows)?;
        let x = space.final_hidden.tensor(*last as usize + 1, hidden_size);
        let out = space.mtp_saved.tensor(end, hidden_size).row_range(first, rows.len());
        backend.gather_rows(&GatherRows { x, rows: indices, out })?;
        Ok(())
    }

    /// Runs the MTP layer and returns the logits of the batch's logit rows. The layer keeps caches of its own under the same
    /// slots.
    ///
    /// # Errors
    /// No MTP layer, a batch beyond the decoder's limits, or a failing device.
    pub fn forward_mtp(&mut self, mtp_step: &MtpStep<'_>, backend: &mut dyn Backend) -> Result<Tensor> {
        let MtpStep { batch, hidden_rows, hidden: source, share_index_of } = *mtp_step;
        if self.weights.mtp.is_empty() {
            return Err(unfit("MTP layers of the model", 0, "at least 1".to_owned()));
        }
        if hidden_rows.len() != batch.num_tokens() {
            return Err(unfit("hidden rows of an MTP step", hidden_rows.len(), batch.num_tokens().to_string()));
        }
        if share_index_of.is_some() && batch.num_tokens() != 1 {
            return Err(unfit("rows of an MTP step that shares an index set", batch.num_tokens(), "1".to_owned()));
        }
        let step = self.upload(batch, backend)?;
        self.begin(&step, backend)?;
        backend.stage(Stage::Mtp);
        let (tokens, hidden_size, eps) = (step.num_tokens, self.config.hidden_size, self.config.rms_norm_eps);
        let space = &self.workspace;
        let mtp = &self.weights.mtp[0];
        let [hidden, normed, delta] = [space.hidden, space.normed, space.delta].map(|b| b.tensor(tokens, hidden_size));
        let source_rows = match source {
            MtpHidden::Trunk => space.final_hidden,
            MtpHidden::Saved => space.mtp_saved,
            MtpHidden::Mtp => space.mtp_hidden,
        };
        let last_row = hidden_rows.iter().max().map_or(0, |r| *r as usize + 1);
        let rows = space.hidden_rows.tensor(1, tokens);
        backend.write_u32(rows, hidden_rows)?;
        backend.gather_rows(&GatherRows { x: source_rows.tensor(last_row, hidden_size), rows, out: normed })?;
        backend.embed(&Embed {
            table: self.weights.embed_tokens,
            token_ids: space.token_ids.tensor(1, tokens),
            out: delta,
        })?;
        // The embedding's half first.
        let input = space.mtp_input.tensor(tokens, 2 * hidden_size);
        let norm =
            |x, weight, first: usize| RmsNorm { x, delta: None, weight, eps, out: input.columns(first, hidden_size) };
        backend.rms_norm(&norm(delta, mtp.enorm, 0))?;
        backend.rms_norm(&norm(normed, mtp.hnorm, hidden_size))?;
        backend.linear(&Linear { x: input, parts: &[(mtp.eh_proj, hidden)] })?;
        let shared = share_index_of.and_then(|row| {
            let IndexSet { ids, counts } = self.mtp_index_set?;
            Some(IndexSet { ids: ids.row_range(row as usize, 1), counts: counts.columns(row as usize, 1) })
        });
        let mut pass = Pass {
            decoder: self,
            step: &step,
            backend,
            tap: None,
            index_set: shared,
            shares_index: share_index_of.is_some(),
        };
        pass.layer(&mtp.layer, self.config.layers.len(), None)?;
        let Pass { backend, index_set, .. } = pass;
        backend.stage(Stage::Head);
        let out = space.mtp_hidden.tensor(tokens, hidden_size);
        backend.rms_norm(&RmsNorm { x: hidden, delta: Some(delta), weight: mtp.shared_head_norm, eps, out })?;
        let lm_head = mtp.draft_head.unwrap_or(self.weights.lm_head);
        let logits = self.head_with(lm_head, out, &batch.logit_rows, backend)?;
        self.mtp_index_set = index_set;
        Ok(logits)
    }
}

fn unfit(what: &'static str, found: usize, expected: String) -> Error {
    Error::Batch { what, found: found.to_string(), expected }
}
