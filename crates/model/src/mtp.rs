//! Multi-token prediction: a decoder layer that reads the trunk's hidden state and the next token's embedding and
//! predicts the token after it. Spec: `glm52` section 5.

use crate::batch::Batch;
use crate::decoder::{Decoder, Pass, Step, step_shape};
use crate::{Error, Result};
use moellon_ops::{Backend, Embed, GatherRows, IndexSet, Linear, RmsNorm, Stage, Tensor, Weight};

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
    /// For chained drafts: attend where as many rows of the MTP layer's last run from this one on attended, without running
    /// the indexer again (`index_share_for_mtp_iteration`).
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
        let limit = self.options.max_batch_tokens;
        if let Some(row) = hidden_rows.iter().find(|row| **row as usize >= limit) {
            return Err(unfit("hidden row of an MTP step", *row as usize, format!("below {limit}")));
        }
        if hidden_rows.len() != batch.num_tokens() {
            return Err(unfit("hidden rows of an MTP step", hidden_rows.len(), batch.num_tokens().to_string()));
        }
        if let (Some(first), Some(set)) = (share_index_of, self.mtp_index_set) {
            let (end, limit) = (first as usize + batch.num_tokens(), set.ids.rows);
            if end > limit {
                return Err(unfit("rows of the index set that an MTP step shares", end, format!("at most {limit}")));
            }
        }
        let step = self.upload(batch, backend)?;
        backend.write_u32(self.workspace.hidden_rows.tensor(1, step.num_tokens), hidden_rows)?;
        let shared = share_index_of.and_then(|row| {
            let (IndexSet { ids, counts }, row) = (self.mtp_index_set?, row as usize);
            let tokens = step.num_tokens;
            Some(IndexSet { ids: ids.row_range(row, tokens), counts: counts.columns(row, tokens) })
        });
        let run = MtpRun { source, shares_index: share_index_of.is_some(), shared };
        if !backend.records_steps() {
            let (logits, index_set) = self.run_mtp(batch, &step, run, backend)?;
            self.mtp_index_set = index_set;
            return Ok(logits);
        }
        let [a, b, c, d] = step_shape(batch, &step);
        let set = shared.map_or(0, |set| 1 + set.ids.offset);
        let key = self.step_key("mtp", &[a, b, c, d, source_number(source), usize::from(run.shares_index), set]);
        if let Some(index_set) = self.recorded_index_sets.get(&key).copied()
            && backend.replay(key)?
        {
            self.mtp_index_set = index_set;
            return Ok(self.workspace.logits.tensor(batch.logit_rows.len(), self.draft_head().rows));
        }
        backend.begin_recording(key)?;
        let result = self.run_mtp(batch, &step, run, backend);
        backend.end_recording(result.is_ok())?;
        let (logits, index_set) = result?;
        self.recorded_index_sets.insert(key, index_set);
        self.mtp_index_set = index_set;
        Ok(logits)
    }

    /// The head whose logits an MTP step gives.
    fn draft_head(&self) -> Weight {
        self.weights.mtp.first().and_then(|mtp| mtp.draft_head).unwrap_or(self.weights.lm_head)
    }

    /// The operations of an MTP step that has been uploaded: logits, and where its rows attended.
    fn run_mtp(
        &self,
        batch: &Batch,
        step: &Step,
        run: MtpRun,
        backend: &mut dyn Backend,
    ) -> Result<(Tensor, Option<IndexSet>)> {
        self.begin(step, backend)?;
        backend.stage(Stage::Mtp);
        let (tokens, hidden_size, eps) = (step.num_tokens, self.config.hidden_size, self.config.rms_norm_eps);
        let space = &self.workspace;
        let mtp = &self.weights.mtp[0];
        let [hidden, normed, delta] = [space.hidden, space.normed, space.delta].map(|b| b.tensor(tokens, hidden_size));
        let source_rows = match run.source {
            MtpHidden::Trunk => space.final_hidden,
            MtpHidden::Saved => space.mtp_saved,
            MtpHidden::Mtp => space.mtp_hidden,
        };
        let x = source_rows.tensor(self.options.max_batch_tokens, hidden_size);
        backend.gather_rows(&GatherRows { x, rows: space.hidden_rows.tensor(1, tokens), out: normed })?;
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
        let mut pass =
            Pass { decoder: self, step, backend, tap: None, index_set: run.shared, shares_index: run.shares_index };
        pass.layer(&mtp.layer, self.config.layers.len(), None)?;
        let Pass { backend, index_set, .. } = pass;
        backend.stage(Stage::Head);
        let out = space.mtp_hidden.tensor(tokens, hidden_size);
        backend.rms_norm(&RmsNorm { x: hidden, delta: Some(delta), weight: mtp.shared_head_norm, eps, out })?;
        Ok((self.head_with(self.draft_head(), out, &batch.logit_rows, backend)?, index_set))
    }
}

fn source_number(source: MtpHidden) -> usize {
    match source {
        MtpHidden::Trunk => 0,
        MtpHidden::Saved => 1,
        MtpHidden::Mtp => 2,
    }
}

/// What an MTP step reads beside its batch.
#[derive(Clone, Copy)]
struct MtpRun {
    source: MtpHidden,
    shares_index: bool,
    /// The set that chained drafts share.
    shared: Option<IndexSet>,
}

pub(crate) fn unfit(what: &'static str, found: usize, expected: String) -> Error {
    Error::Batch { what, found: found.to_string(), expected }
}
