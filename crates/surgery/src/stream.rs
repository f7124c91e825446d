//! Many tokens through a model, one part at a time: what is in memory is one layer and the hidden states.

use crate::{Error, Result};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::layer_pass::{HostIndexSet, Part};
use moellon_model::provider::WeightProvider;
use moellon_model::{DecoderOptions, LayerPass, ModelConfig};
use moellon_ops::{Backend, CacheDtype};

/// Makes a back end; each part gets a fresh one, whose memory is given back with it.
pub type BackendFactory<'a> = dyn FnMut() -> moellon_ops::Result<Box<dyn Backend>> + 'a;

/// Rows of a step.
const CHUNK: usize = 512;

/// Token sequences, each on its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    /// Each of at least two tokens.
    pub ids: Vec<Vec<u32>>,
}

impl Sequences {
    /// Cuts texts into sequences of `sequence_len` tokens (the rest of a text makes a shorter one), up to `max_tokens`
    /// in all, taking turns between the texts.
    ///
    /// # Errors
    /// If nothing is left.
    pub fn cut(texts: &[Vec<u32>], sequence_len: usize, max_tokens: usize) -> Result<Self> {
        let mut parts: Vec<_> = texts.iter().map(|text| text.chunks(sequence_len.max(2))).collect();
        let mut ids: Vec<Vec<u32>> = Vec::new();
        let mut left = max_tokens;
        let mut any = true;
        while any && left >= 2 {
            any = false;
            for part in &mut parts {
                let Some(chunk) = part.next() else { continue };
                any = true;
                let chunk = &chunk[..chunk.len().min(left)];
                if chunk.len() >= 2 {
                    ids.push(chunk.to_vec());
                    left -= chunk.len();
                }
            }
        }
        if ids.is_empty() {
            return Err(Error::mismatch("tokens of the texts", 0, "at least 2"));
        }
        Ok(Sequences { ids })
    }

    /// All tokens.
    pub fn num_tokens(&self) -> usize {
        self.ids.iter().map(Vec::len).sum()
    }
}

/// Consecutive rows of one sequence.
#[derive(Debug, Clone)]
pub(crate) struct Chunk {
    pub(crate) sequence: usize,
    pub(crate) first: usize,
    pub(crate) batch: Batch,
    /// `[num_tokens, hidden_size]`: residual stream, after the head the final hidden states.
    pub(crate) hidden: Vec<f32>,
    index_set: Option<HostIndexSet>,
}

/// A model and the tokens that are on their way through it.
pub(crate) struct Stream<'a> {
    config: &'a ModelConfig,
    provider: &'a dyn WeightProvider,
    sequences: &'a Sequences,
    pub(crate) chunks: Vec<Chunk>,
}

impl<'a> Stream<'a> {
    pub(crate) fn new(config: &'a ModelConfig, provider: &'a dyn WeightProvider, sequences: &'a Sequences) -> Self {
        let options = options(sequences);
        let mut chunks = Vec::new();
        for (sequence, ids) in sequences.ids.iter().enumerate() {
            for (at, tokens) in ids.chunks(options.max_batch_tokens).enumerate() {
                let first = at * options.max_batch_tokens;
                let batch = batch(tokens, first, &options);
                chunks.push(Chunk { sequence, first, batch, hidden: Vec::new(), index_set: None });
            }
        }
        Stream { config, provider, sequences, chunks }
    }

    fn load(&self, part: Part, backend: &mut dyn Backend) -> Result<LayerPass> {
        Ok(LayerPass::load(self.config, self.provider, part, options(self.sequences), backend, &mut |_| {})?)
    }

    pub(crate) fn embed(&mut self, backend: &mut dyn Backend) -> Result<()> {
        let mut pass = self.load(Part::Embedding, backend)?;
        for chunk in &mut self.chunks {
            chunk.hidden = pass.embed(&chunk.batch, backend)?;
        }
        Ok(())
    }

    pub(crate) fn layer(&mut self, layer: usize, backend: &mut dyn Backend) -> Result<()> {
        let mut pass = self.load_layer(layer, backend)?;
        Self::run_layer(&mut pass, &mut self.chunks, backend)
    }

    /// A layer, loaded, for callers that run several versions of the hidden states through it.
    pub(crate) fn load_layer(&self, layer: usize, backend: &mut dyn Backend) -> Result<LayerPass> {
        self.load(Part::Layer(layer), backend)
    }

    /// Runs a loaded layer over chunks of any stream of the same sequences.
    pub(crate) fn run_layer(pass: &mut LayerPass, chunks: &mut [Chunk], backend: &mut dyn Backend) -> Result<()> {
        for chunk in chunks {
            pass.layer(&chunk.batch, &mut chunk.hidden, &mut chunk.index_set, backend, None)?;
        }
        Ok(())
    }

    /// Final norm and head; `each` gets the chunk's number and its logits `[num_tokens, vocab_size]`.
    pub(crate) fn head(
        &mut self,
        backend: &mut dyn Backend,
        each: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let mut pass = self.load(Part::Head, backend)?;
        let mut logits = Vec::new();
        for (at, chunk) in self.chunks.iter_mut().enumerate() {
            head_chunk(&mut pass, chunk, &mut logits, backend)?;
            each(at, &logits)?;
        }
        Ok(())
    }

    /// The head, loaded, for callers that run two models side by side.
    pub(crate) fn load_head(&self, backend: &mut dyn Backend) -> Result<LayerPass> {
        self.load(Part::Head, backend)
    }

    /// Runs the MTP layer over the final hidden states. `each` gets the chunk's number and the logits of its rows that
    /// have a token after them.
    pub(crate) fn mtp(
        &mut self,
        layer: usize,
        backend: &mut dyn Backend,
        each: &mut dyn FnMut(usize, &[f32]) -> Result<()>,
    ) -> Result<()> {
        let mut pass = self.load(Part::Mtp(layer), backend)?;
        let hidden_size = self.config.hidden_size;
        let mut logits = Vec::new();
        for (at, chunk) in self.chunks.iter().enumerate() {
            let ids = &self.sequences.ids[chunk.sequence];
            let end = (chunk.first + chunk.batch.num_tokens() + 1).min(ids.len());
            let next = &ids[chunk.first + 1..end];
            if next.is_empty() {
                continue;
            }
            let batch = batch(next, chunk.first, &options(self.sequences));
            let tensor = pass.mtp(&batch, &chunk.hidden[..next.len() * hidden_size], backend)?;
            logits.resize(tensor.rows * tensor.cols, 0.0);
            backend.read_f32(tensor, &mut logits)?;
            each(at, &logits)?;
        }
        Ok(())
    }
}

/// Runs the head over a chunk, whose hidden states become the final ones.
pub(crate) fn head_chunk(
    pass: &mut LayerPass,
    chunk: &mut Chunk,
    logits: &mut Vec<f32>,
    backend: &mut dyn Backend,
) -> Result<()> {
    let tensor = pass.head(&chunk.batch, &mut chunk.hidden, backend)?;
    logits.resize(tensor.rows * tensor.cols, 0.0);
    backend.read_f32(tensor, logits)?;
    Ok(())
}

/// Room for the longest sequence, f32 caches.
fn options(sequences: &Sequences) -> DecoderOptions {
    let longest = sequences.ids.iter().map(Vec::len).max().unwrap_or(1);
    DecoderOptions::single_sequence(longest, CHUNK.min(longest), CacheDtype::F32)
}

fn batch(tokens: &[u32], first: usize, options: &DecoderOptions) -> Batch {
    let blocks: Vec<u32> = (0..options.num_blocks as u32).collect();
    let mut batch = Batch::default();
    batch.push_sequence(tokens, first, &blocks, options.block_size, LogitRows::All);
    batch
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_take_turns_and_nothing_is_too_short() {
        let texts = [(0..10).collect::<Vec<u32>>(), (100..105).collect()];
        let cut = |len, max| Sequences::cut(&texts, len, max).map(|s| s.ids).map_err(|e| e.to_string());
        assert_eq!(
            cut(4, 100).expect("tokens"),
            [vec![0, 1, 2, 3], vec![100, 101, 102, 103], vec![4, 5, 6, 7], vec![8, 9]]
        );
        assert_eq!(cut(4, 7).expect("tokens"), [vec![0, 1, 2, 3], vec![100, 101, 102]]);
        assert_eq!(cut(4, 1).unwrap_err(), "tokens of the texts is 0, expected at least 2");
    }
}
