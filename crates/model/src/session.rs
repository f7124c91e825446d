//! One sequence on its own: the smallest user of a [`Decoder`]. The command line's `run` and `logits` stand on it; the
//! engine's scheduler replaces it where many sequences share the steps.

use crate::batch::{Batch, LogitRows};
use crate::decoder::Decoder;
use crate::mtp::{MtpHidden, MtpStep};
use crate::tap::Tap;
use crate::{Error, Result};
use moellon_ops::{Argmax, Backend, Tensor};

/// A sequence that grows: its tokens are cached in blocks `0..`.
#[derive(Debug, Clone, Default)]
pub struct Session {
    /// Tokens whose keys are cached.
    num_cached: usize,
}

impl Session {
    /// An empty sequence.
    pub fn new() -> Self {
        Session::default()
    }

    /// Tokens whose keys are cached.
    pub fn len(&self) -> usize {
        self.num_cached
    }

    /// Whether nothing is cached.
    pub fn is_empty(&self) -> bool {
        self.num_cached == 0
    }

    /// Forgets all but the first `len` tokens: a rejected draft, or another continuation of the same prefix.
    pub fn truncate(&mut self, len: usize) {
        self.num_cached = self.num_cached.min(len);
    }

    /// Appends `token_ids` in steps of at most `max_batch_tokens` and returns the logits of the last token,
    /// `[1, vocab_size]`.
    ///
    /// # Errors
    /// No tokens, a context beyond the decoder's, or a failing device.
    pub fn extend(&mut self, token_ids: &[u32], decoder: &mut Decoder, backend: &mut dyn Backend) -> Result<Tensor> {
        let chunk_size = decoder.options().max_batch_tokens;
        let mut logits = None;
        let chunks = token_ids.chunks(chunk_size);
        let last = chunks.len().saturating_sub(1);
        for (index, chunk) in chunks.enumerate() {
            let rows = if index == last { LogitRows::Last } else { LogitRows::None };
            logits = Some(self.step(chunk, rows, decoder, backend, None)?);
        }
        logits.ok_or_else(no_tokens)
    }

    /// Appends at most `max_batch_tokens` tokens in one step and returns the logits of the rows asked for.
    ///
    /// # Errors
    /// As [`Session::extend`].
    pub fn step(
        &mut self,
        token_ids: &[u32],
        rows: LogitRows,
        decoder: &mut Decoder,
        backend: &mut dyn Backend,
        tap: Option<&mut dyn Tap>,
    ) -> Result<Tensor> {
        let batch = self.batch(token_ids, self.num_cached, rows, decoder)?;
        let logits = decoder.forward_tapped(&batch, backend, tap)?;
        self.num_cached += token_ids.len();
        Ok(logits)
    }

    /// Runs the MTP layer over the rows of the last step: row `i` of it was the token at `first_position + i`, and
    /// `next_token_ids[i]` is the token after it. Returns logits of all rows.
    ///
    /// # Errors
    /// As [`Decoder::forward_mtp`].
    pub fn mtp(
        &self,
        next_token_ids: &[u32],
        first_position: usize,
        source: MtpHidden,
        decoder: &mut Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Tensor> {
        let batch = self.batch(next_token_ids, first_position, LogitRows::All, decoder)?;
        let rows: Vec<u32> = (0..next_token_ids.len() as u32).collect();
        let step = MtpStep { batch: &batch, hidden_rows: &rows, hidden: source, share_index_of: None };
        decoder.forward_mtp(&step, backend)
    }

    fn batch(&self, token_ids: &[u32], first_position: usize, rows: LogitRows, decoder: &Decoder) -> Result<Batch> {
        let options = decoder.options();
        let end = first_position + token_ids.len();
        if token_ids.is_empty() {
            return Err(no_tokens());
        }
        if end > options.max_context || end > options.num_blocks * options.block_size {
            let limit = options.max_context.min(options.num_blocks * options.block_size);
            return Err(Error::Batch { what: "context", found: end.to_string(), expected: format!("at most {limit}") });
        }
        let blocks: Vec<u32> = (0..end.div_ceil(options.block_size) as u32).collect();
        let mut batch = Batch::default();
        batch.push_sequence(token_ids, first_position, &blocks, options.block_size, rows);
        Ok(batch)
    }
}

fn no_tokens() -> Error {
    Error::Batch { what: "number of tokens", found: "0".to_owned(), expected: "at least 1".to_owned() }
}

/// Copies logits to the host, `[rows * vocab_size]`.
///
/// # Errors
/// A failing device.
pub fn read_logits(logits: Tensor, backend: &mut dyn Backend) -> Result<Vec<f32>> {
    let mut host = vec![0.0; logits.rows * logits.cols];
    backend.read_f32(logits, &mut host)?;
    Ok(host)
}

/// The most likely token of each row, chosen on the device.
///
/// # Errors
/// A failing device.
pub fn greedy(logits: Tensor, out: Tensor, backend: &mut dyn Backend) -> Result<Vec<u32>> {
    backend.argmax(&Argmax { logits, out })?;
    let mut ids = vec![0; logits.rows];
    backend.read_u32(out, &mut ids)?;
    Ok(ids)
}
