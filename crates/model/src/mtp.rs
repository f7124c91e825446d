//! Multi-token prediction: a decoder layer that reads the trunk's hidden state and the next token's embedding and
//! predicts the token after it. Spec: `glm52` section 5.

use crate::batch::Batch;
use crate::decoder::Decoder;
use crate::{Error, Result};
use moellon_ops::{Backend, Embed, GatherRows, Linear, RmsNorm, Stage, Tensor};

/// Where the hidden states of an MTP step come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MtpHidden {
    /// The trunk's last step: the first draft.
    Trunk,
    /// The MTP layer's own last step: chained drafts. transformers and SGLang feed the state after `shared_head.norm`.
    Mtp,
}

impl Decoder {
    /// Runs the MTP layer. Row `t` of `batch` holds the token *after* the one whose hidden state is row `hidden_rows[t]`
    /// of the last step, at that earlier token's position; its logits predict the token after next. The layer keeps
    /// caches of its own under the same slots.
    ///
    /// # Errors
    /// No MTP layer, a batch beyond the decoder's limits, or a failing device.
    pub fn forward_mtp(
        &mut self,
        batch: &Batch,
        hidden_rows: &[u32],
        source: MtpHidden,
        backend: &mut dyn Backend,
    ) -> Result<Tensor> {
        if self.weights.mtp.is_empty() {
            return Err(Error::Batch {
                what: "MTP layers of the model",
                found: "0".to_owned(),
                expected: "at least 1".to_owned(),
            });
        }
        if hidden_rows.len() != batch.num_tokens() {
            return Err(Error::Batch {
                what: "hidden rows of an MTP step",
                found: hidden_rows.len().to_string(),
                expected: batch.num_tokens().to_string(),
            });
        }
        let step = self.begin(batch, backend)?;
        backend.stage(Stage::Mtp);
        let (tokens, hidden_size, eps) = (step.num_tokens, self.config.hidden_size, self.config.rms_norm_eps);
        let space = &self.workspace;
        let mtp = &self.weights.mtp[0];
        let [hidden, normed, delta] = [space.hidden, space.normed, space.delta].map(|b| b.tensor(tokens, hidden_size));
        let source_rows = match source {
            MtpHidden::Trunk => space.final_hidden,
            MtpHidden::Mtp => space.mtp_hidden,
        };
        let last_row = hidden_rows.iter().max().map_or(0, |r| *r as usize + 1);
        let rows = space.rows.tensor(1, tokens);
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
        self.layer_with(&mtp.layer, self.config.layers.len(), &step, None, &mut None, backend, &mut None)?;
        backend.stage(Stage::Head);
        let out = space.mtp_hidden.tensor(tokens, hidden_size);
        backend.rms_norm(&RmsNorm { x: hidden, delta: Some(delta), weight: mtp.shared_head_norm, eps, out })?;
        self.head(out, &batch.logit_rows, backend)
    }
}
