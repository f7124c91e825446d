//! One step of the model: embed; for each layer norm, attention, norm, feed-forward; final norm; head.

use crate::batch::{Batch, BatchLimits};
use crate::config::{Attention, IndexSource, Layer, ModelConfig};
use crate::tap::{Tap, TapPoint};
use crate::weights::{AttentionWeights, LayerWeights, Weights};
use crate::workspace::Workspace;
use crate::{Error, Result, attention_gqa, attention_mla, ffn};
use moellon_ops::{
    Backend, Buffer, Cache, CacheDtype, ElementType, Embed, GatherRows, IndexSet, KvStore, Linear, Paging, RmsNorm,
    RopeTable, Stage, StepTimes, Tensor, Weight,
};
use moellon_tensor::rng::SplitMix64;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, Ordering};

/// Sizes that a decoder is built for.
#[derive(Debug, Clone, Copy)]
pub struct DecoderOptions {
    /// Rows of a step.
    pub max_batch_tokens: usize,
    /// Sequences of a step.
    pub max_sequences: usize,
    /// Rows of a step that need logits.
    pub max_logit_rows: usize,
    /// Positions of a sequence.
    pub max_context: usize,
    /// Slots of a cache block.
    pub block_size: usize,
    /// Cache blocks.
    pub num_blocks: usize,
    /// Type of cached rows.
    pub cache_dtype: CacheDtype,
}

impl DecoderOptions {
    /// For one sequence of up to `max_context` positions, prefilled in chunks of up to `max_batch_tokens`.
    pub fn single_sequence(max_context: usize, max_batch_tokens: usize, cache_dtype: CacheDtype) -> Self {
        let block_size = 64;
        DecoderOptions {
            max_batch_tokens,
            max_sequences: 1,
            max_logit_rows: max_batch_tokens,
            max_context,
            block_size,
            num_blocks: max_context.div_ceil(block_size),
            cache_dtype,
        }
    }
}

/// Contexts of recorded steps are rounded up to a multiple of this, so that a sequence goes through few different steps.
const RECORDED_CONTEXT: usize = 512;

/// What of a batch decides which operations a step is, with which arguments.
pub(crate) fn step_shape(batch: &Batch, step: &Step) -> [usize; 4] {
    [step.num_tokens, batch.block_tables.len(), batch.logit_rows.len(), step.paging.max_context]
}

/// Numbers decoders, so that two of one back end do not take each other's recorded steps.
fn next_number() -> u64 {
    static NUMBERS: AtomicU64 = AtomicU64::new(0);
    NUMBERS.fetch_add(1, Ordering::Relaxed)
}

/// The residual streams that an EAGLE-3 head reads, gathered as they pass.
pub(crate) struct HiddenTaps {
    /// Layers before which the stream is copied, ascending; the number of layers for what the last one leaves.
    layers: [usize; NUM_TAPS],
    /// `[max_batch_tokens, NUM_TAPS * hidden_size]`
    pub(crate) streams: Buffer,
    /// u32 `[1, max_batch_tokens]`: 0, 1, 2, ..
    all_rows: Buffer,
}

/// Streams that an EAGLE-3 head reads.
pub const NUM_TAPS: usize = 3;

/// Cached rows of one layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerCache {
    /// Keys and values, or latents.
    pub(crate) main: Cache,
    /// Index keys, where the layer has an indexer.
    pub(crate) index: Option<Cache>,
}

/// What all layers of a step share.
pub(crate) struct Step {
    pub(crate) num_tokens: usize,
    pub(crate) paging: Paging,
    /// `[1, num_tokens]` u32
    pub(crate) slots: Tensor,
    /// `[num_tokens, rope dim]`
    pub(crate) rope_table: Tensor,
}

/// A step on its way through the layers.
pub(crate) struct Pass<'a, 't> {
    pub(crate) decoder: &'a Decoder,
    pub(crate) step: &'a Step,
    pub(crate) backend: &'a mut dyn Backend,
    pub(crate) tap: Option<&'a mut (dyn Tap + 't)>,
    /// The set of the last layer that had an indexer: read by layers that share it, replaced by layers with their own.
    pub(crate) index_set: Option<IndexSet>,
    /// Whether layers with an indexer of their own take `index_set` as it is: chained drafts, which look where the first
    /// one looked (`index_share_for_mtp_iteration`).
    pub(crate) shares_index: bool,
}

impl Pass<'_, '_> {
    /// Shows tensors to the tap, if there is one.
    pub(crate) fn tap(&mut self, point: TapPoint, tensors: &[Tensor]) -> Result<()> {
        self.tap.as_mut().map_or(Ok(()), |tap| tap.at(point, tensors, self.backend))
    }
}

/// A loaded model: config, weight handles, caches and buffers on one back end.
pub struct Decoder {
    pub(crate) config: ModelConfig,
    pub(crate) options: DecoderOptions,
    pub(crate) weights: Weights,
    pub(crate) workspace: Workspace,
    /// One a layer, the MTP layers' after the trunk's.
    pub(crate) caches: Vec<LayerCache>,
    /// The index set of the MTP layer's last run, for chained drafts.
    pub(crate) mtp_index_set: Option<IndexSet>,
    /// Index sets that recorded runs of the MTP layer leave.
    pub(crate) recorded_index_sets: HashMap<u64, Option<IndexSet>>,
    pub(crate) hidden_taps: Option<HiddenTaps>,
    number: u64,
    /// `[1, rope dim / 2]`
    inverse_frequencies: Tensor,
    /// `[num_sequences, blocks of max_context]`: a batch's block tables on their way to the device, in memory that is
    /// kept.
    padded_block_tables: Vec<u32>,
}

impl Decoder {
    /// Allocates caches and buffers for loaded `weights`.
    ///
    /// # Errors
    /// If the device has no room.
    pub fn new(
        config: ModelConfig,
        weights: Weights,
        options: DecoderOptions,
        backend: &mut dyn Backend,
    ) -> Result<Self> {
        let (main_width, index_width) = config.cache_widths();
        let num_slots = options.num_blocks * options.block_size;
        let mtp_layers = weights.mtp.iter().map(|_| config.mtp_layer());
        let mut caches = Vec::new();
        for layer in config.layers.iter().copied().chain(mtp_layers) {
            let main = backend.alloc_cache("KV cache", options.cache_dtype, num_slots, main_width)?;
            let index = match (layer.index, index_width) {
                (IndexSource::Own, Some(width)) => {
                    Some(backend.alloc_cache("index key cache", options.cache_dtype, num_slots, width)?)
                }
                _ => None,
            };
            caches.push(LayerCache { main, index });
        }
        let workspace = Workspace::new(&config, &options, &weights, backend)?;
        let frequencies = &config.rope.inverse_frequencies;
        let inverse_frequencies =
            backend.alloc("rope frequencies", ElementType::F32, frequencies.len())?.tensor(1, frequencies.len());
        backend.write_f32(inverse_frequencies, frequencies)?;
        Ok(Decoder {
            config,
            options,
            weights,
            workspace,
            caches,
            mtp_index_set: None,
            recorded_index_sets: HashMap::new(),
            hidden_taps: None,
            number: next_number(),
            inverse_frequencies,
            padded_block_tables: Vec::new(),
        })
    }

    /// The model's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The sizes that it was built for.
    pub fn options(&self) -> &DecoderOptions {
        &self.options
    }

    /// Handles of its weights.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Every cache of every layer, in a fixed order. Row `slot` of all of them together is what one token left behind.
    pub fn caches(&self) -> impl Iterator<Item = Cache> + '_ {
        self.caches.iter().flat_map(|cache| [Some(cache.main), cache.index]).flatten()
    }

    /// Whether an MTP layer is loaded.
    pub fn has_mtp(&self) -> bool {
        !self.weights.mtp.is_empty()
    }

    /// Tokens that the columns of an MTP step's logits stand for; `None` where they are the vocabulary.
    pub fn draft_tokens(&self) -> Option<&[u32]> {
        self.weights.mtp.first()?.draft_tokens.as_deref()
    }

    /// Fills every cache with random rows, as if all blocks held contexts: for measuring steps without prefilling them.
    ///
    /// # Errors
    /// If the device has no room for the rows of one cache block.
    pub fn fill_caches(&mut self, seed: u64, backend: &mut dyn Backend) -> Result<()> {
        let mut rng = SplitMix64::new(seed);
        let caches: Vec<Cache> = self.caches.iter().flat_map(|c| [Some(c.main), c.index]).flatten().collect();
        let block_size = self.options.block_size;
        for cache in caches {
            // One block's rows, stored into every block.
            let rows = backend
                .alloc("random cache rows", ElementType::F32, block_size * cache.width)?
                .tensor(block_size, cache.width);
            let slots = backend.alloc("slots", ElementType::U32, block_size)?.tensor(1, block_size);
            backend.write_f32(rows, &rng.normals(block_size * cache.width, 1.0))?;
            for block in 0..self.options.num_blocks {
                let ids: Vec<u32> = (0..block_size).map(|i| (block * block_size + i) as u32).collect();
                backend.write_u32(slots, &ids)?;
                backend.kv_store(&KvStore { parts: &[rows], slots, cache })?;
            }
            backend.free(rows.buffer);
            backend.free(slots.buffer);
        }
        Ok(())
    }

    /// Runs one step and returns logits `[logit_rows, vocab_size]`, which hold until the next step.
    ///
    /// # Errors
    /// A batch beyond the decoder's limits, or a failing device.
    pub fn forward(&mut self, batch: &Batch, backend: &mut dyn Backend) -> Result<Tensor> {
        if !backend.records_steps() {
            return self.forward_tapped(batch, backend, None);
        }
        let step = self.upload(batch, backend)?;
        let logits = self.workspace.logits.tensor(batch.logit_rows.len(), self.config.vocab_size);
        let key = self.step_key("trunk", &step_shape(batch, &step));
        if backend.replay(key)? {
            return Ok(logits);
        }
        backend.begin_recording(key)?;
        let result = self.run(batch, &step, backend, None);
        backend.end_recording(result.is_ok())?;
        result
    }

    /// Keeps the residual streams before these layers of every step from now on, for a head that reads them.
    ///
    /// # Errors
    /// Layers out of order or past the last, or no room on the device.
    pub(crate) fn tap_hidden(&mut self, layers: [usize; NUM_TAPS], backend: &mut dyn Backend) -> Result<()> {
        let limit = self.config.layers.len();
        if !layers.is_sorted_by(|a, b| a < b) || layers[NUM_TAPS - 1] > limit {
            return Err(Error::config(
                "layers that an EAGLE-3 head reads",
                format!("{layers:?}"),
                format!("ascending, at most {limit}"),
            ));
        }
        let tokens = self.options.max_batch_tokens;
        let streams = backend.alloc(
            "hidden states for the head",
            ElementType::F32,
            tokens * NUM_TAPS * self.config.hidden_size,
        )?;
        let all_rows = backend.alloc("row numbers", ElementType::U32, tokens)?;
        let numbers: Vec<u32> = (0..tokens as u32).collect();
        backend.write_u32(all_rows.tensor(1, tokens), &numbers)?;
        self.hidden_taps = Some(HiddenTaps { layers, streams, all_rows });
        Ok(())
    }

    /// The key of a recorded run of this decoder.
    pub(crate) fn step_key(&self, what: &str, arguments: &[usize]) -> u64 {
        let mut hasher = std::hash::DefaultHasher::new();
        (what, self.number, self.hidden_taps.is_some(), arguments).hash(&mut hasher);
        hasher.finish()
    }

    /// Copies the residual stream before `layer`, if a head reads it.
    pub(crate) fn tap_stream(&self, layer: usize, hidden: Tensor, backend: &mut dyn Backend) -> Result<()> {
        let Some(taps) = &self.hidden_taps else { return Ok(()) };
        let Some(place) = taps.layers.iter().position(|tapped| *tapped == layer) else { return Ok(()) };
        let size = self.config.hidden_size;
        let rows = taps.all_rows.tensor(1, hidden.rows);
        let out = taps.streams.tensor(hidden.rows, NUM_TAPS * size).columns(place * size, size);
        backend.gather_rows(&GatherRows { x: hidden, rows, out })?;
        Ok(())
    }

    /// [`Decoder::forward`], timed by the device's own clock; `None` where the back end has none.
    ///
    /// # Errors
    /// As [`Decoder::forward`].
    pub fn forward_timed(&mut self, batch: &Batch, backend: &mut dyn Backend) -> Result<Option<StepTimes>> {
        // Records the step if it was not yet.
        self.forward(batch, backend)?;
        if !backend.records_steps() {
            return Ok(None);
        }
        let step = self.upload(batch, backend)?;
        Ok(backend.time_replay(self.step_key("trunk", &step_shape(batch, &step)))?)
    }

    /// [`Decoder::forward`] with a look inside.
    ///
    /// # Errors
    /// As [`Decoder::forward`], or the tap's own.
    pub fn forward_tapped(
        &mut self,
        batch: &Batch,
        backend: &mut dyn Backend,
        tap: Option<&mut dyn Tap>,
    ) -> Result<Tensor> {
        let step = self.upload(batch, backend)?;
        self.run(batch, &step, backend, tap)
    }

    /// The operations of a step whose batch has been uploaded.
    fn run(&self, batch: &Batch, step: &Step, backend: &mut dyn Backend, tap: Option<&mut dyn Tap>) -> Result<Tensor> {
        self.begin(step, backend)?;
        let (hidden_size, tokens) = (self.config.hidden_size, step.num_tokens);
        let [hidden, delta] = [self.workspace.hidden, self.workspace.delta].map(|b| b.tensor(tokens, hidden_size));
        let token_ids = self.workspace.token_ids.tensor(1, tokens);
        backend.embed(&Embed { table: self.weights.embed_tokens, token_ids, out: hidden })?;
        let mut pass = Pass { decoder: self, step, backend, tap, index_set: None, shares_index: false };
        for (layer, weights) in self.weights.layers.iter().enumerate() {
            // The feed-forward's output of the layer before is added by this layer's first norm.
            pass.layer(weights, layer, (layer > 0).then_some(delta))?;
        }
        let Pass { backend, tap, .. } = pass;
        backend.stage(Stage::Head);
        let final_hidden = self.workspace.final_hidden.tensor(tokens, hidden_size);
        let norm = RmsNorm {
            x: hidden,
            delta: Some(delta),
            weight: self.weights.norm,
            eps: self.config.rms_norm_eps,
            out: final_hidden,
        };
        backend.rms_norm(&norm)?;
        self.tap_stream(self.config.layers.len(), hidden, backend)?;
        if let Some(tap) = tap {
            tap.at(TapPoint::Hidden(self.config.layers.len()), &[hidden], backend)?;
            tap.at(TapPoint::FinalHidden, &[final_hidden], backend)?;
        }
        self.head(final_hidden, &batch.logit_rows, backend)
    }

    /// Checks the batch and copies it to the device.
    pub(crate) fn upload(&mut self, batch: &Batch, backend: &mut dyn Backend) -> Result<Step> {
        batch.check(&self.limits())?;
        let num_tokens = batch.num_tokens();
        let space = &self.workspace;
        let columns = self.options.max_context.div_ceil(self.options.block_size);
        let block_table = space.block_table.tensor(batch.block_tables.len(), columns);
        self.padded_block_tables.clear();
        for table in &batch.block_tables {
            self.padded_block_tables.extend(table.iter().copied().chain(std::iter::repeat(0)).take(columns));
        }
        backend.write_u32(block_table, &self.padded_block_tables)?;
        let row = |buffer: moellon_ops::Buffer| buffer.tensor(1, num_tokens);
        let (positions, sequences, slots) = (row(space.positions), row(space.sequences), row(space.slots));
        backend.write_u32(row(space.token_ids), &batch.token_ids)?;
        backend.write_u32(positions, &batch.positions)?;
        backend.write_u32(sequences, &batch.sequences)?;
        backend.write_u32(slots, &batch.slots)?;
        if !batch.logit_rows.is_empty() {
            backend.write_u32(space.rows.tensor(1, batch.logit_rows.len()), &batch.logit_rows)?;
        }
        let rope_table = space.rope_table.tensor(num_tokens, self.config.rope.dim());
        let mut max_context = batch.max_context();
        if backend.records_steps() {
            max_context = max_context.next_multiple_of(RECORDED_CONTEXT).min(self.options.max_context);
        }
        let paging = Paging { positions, sequences, block_table, block_size: self.options.block_size, max_context };
        Ok(Step { num_tokens, paging, slots, rope_table })
    }

    /// Computes what all layers of an uploaded step share.
    pub(crate) fn begin(&self, step: &Step, backend: &mut dyn Backend) -> Result<()> {
        backend.stage(Stage::Embed);
        backend.rope_table(&RopeTable {
            positions: step.paging.positions,
            inverse_frequencies: self.inverse_frequencies,
            scale: self.config.rope.scale,
            table: step.rope_table,
        })?;
        Ok(())
    }

    /// Logits of the chosen rows of `final_hidden`.
    pub(crate) fn head(&self, final_hidden: Tensor, rows: &[u32], backend: &mut dyn Backend) -> Result<Tensor> {
        self.head_with(self.weights.lm_head, final_hidden, rows, backend)
    }

    /// [`Decoder::head`] with the weight given.
    pub(crate) fn head_with(
        &self,
        lm_head: Weight,
        final_hidden: Tensor,
        rows: &[u32],
        backend: &mut dyn Backend,
    ) -> Result<Tensor> {
        backend.stage(Stage::Head);
        let logits = self.workspace.logits.tensor(rows.len(), lm_head.rows);
        if rows.is_empty() {
            return Ok(logits);
        }
        let indices = self.workspace.rows.tensor(1, rows.len());
        let x = self.workspace.head_input.tensor(rows.len(), self.config.hidden_size);
        backend.gather_rows(&GatherRows { x: final_hidden, rows: indices, out: x })?;
        backend.linear(&Linear { x, parts: &[(lm_head, logits)] })?;
        Ok(logits)
    }

    /// What is special about layer `layer`; numbers past the trunk's are MTP layers.
    pub(crate) fn layer_config(&self, layer: usize) -> Layer {
        self.config.layers.get(layer).copied().unwrap_or_else(|| self.config.mtp_layer())
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits {
            max_batch_tokens: self.options.max_batch_tokens,
            max_sequences: self.options.max_sequences,
            max_logit_rows: self.options.max_logit_rows,
            max_context: self.options.max_context,
            vocab_size: self.config.vocab_size,
            num_slots: self.options.num_blocks * self.options.block_size,
            block_size: self.options.block_size,
        }
    }
}

impl Pass<'_, '_> {
    /// One layer: reads and updates `hidden`, leaves the feed-forward's output in `delta`. `pending` is added to `hidden`
    /// first. Layer numbers past the trunk's are MTP layers.
    pub(crate) fn layer(&mut self, weights: &LayerWeights, layer: usize, pending: Option<Tensor>) -> Result<()> {
        let decoder = self.decoder;
        let (hidden_size, eps) = (decoder.config.hidden_size, decoder.config.rms_norm_eps);
        let space = &decoder.workspace;
        let [hidden, normed, delta] =
            [space.hidden, space.normed, space.delta].map(|b| b.tensor(self.step.num_tokens, hidden_size));
        self.backend.stage(Stage::AttentionInput);
        self.backend.rms_norm(&RmsNorm { x: hidden, delta: pending, weight: weights.input_norm, eps, out: normed })?;
        if layer < decoder.config.layers.len() {
            decoder.tap_stream(layer, hidden, self.backend)?;
        }
        self.tap(TapPoint::Hidden(layer), &[hidden])?;
        match (&weights.attention, &decoder.config.attention) {
            (AttentionWeights::Mla(w), Attention::Mla(mla)) => {
                attention_mla::forward(self, w, mla, layer, normed, delta)?;
            }
            (AttentionWeights::Gqa(w), Attention::Gqa(gqa)) => {
                attention_gqa::forward(self, w, gqa, layer, normed, delta)?;
            }
            _ => unreachable!("weights are loaded by the config's kind of attention"),
        }
        self.tap(TapPoint::AttentionOutput(layer), &[delta])?;
        self.backend.stage(if weights.ffn.is_moe() { Stage::Router } else { Stage::DenseFfn });
        self.backend.rms_norm(&RmsNorm {
            x: hidden,
            delta: Some(delta),
            weight: weights.post_attention_norm,
            eps,
            out: normed,
        })?;
        ffn::forward(self, &weights.ffn, layer, normed, delta)
    }
}
