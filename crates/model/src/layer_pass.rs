//! One part of a model at a time: a model larger than memory runs layer by layer over many tokens, its hidden states
//! waiting on the host. What [`Decoder`] computes in one step, the parts compute in turn, bit for bit.

use crate::batch::Batch;
use crate::config::ModelConfig;
use crate::decoder::{Decoder, DecoderOptions, Pass};
use crate::mtp::{MtpHidden, MtpStep};
use crate::provider::WeightProvider;
use crate::tap::Tap;
use crate::weights::{Progress, Weights};
use crate::{Error, Result};
use moellon_ops::{Add, Backend, Embed, IndexSet, RmsNorm, Stage, Tensor};

/// A part that can be loaded alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The embedding table.
    Embedding,
    /// Layer `.0` of the trunk.
    Layer(usize),
    /// Final norm and head.
    Head,
    /// MTP layer `.0`, counted from 0, with the embedding table and the head that it shares.
    Mtp(usize),
}

/// An index set on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostIndexSet {
    /// `[num_tokens, index_topk]`
    pub ids: Vec<u32>,
    /// `[num_tokens]`
    pub counts: Vec<u32>,
}

/// A loaded part.
pub struct LayerPass {
    part: Part,
    decoder: Decoder,
}

impl LayerPass {
    /// Loads `part` of the model. Drop the back end to have the memory back.
    ///
    /// # Errors
    /// As [`Weights::load`] and [`Decoder::new`]; also if the model has no such part.
    pub fn load(
        config: &ModelConfig,
        provider: &dyn WeightProvider,
        part: Part,
        options: DecoderOptions,
        backend: &mut dyn Backend,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self> {
        let missing = |what: &'static str, found: usize, limit: usize| Error::Batch {
            what,
            found: found.to_string(),
            expected: format!("below {limit}"),
        };
        let layers = match part {
            Part::Layer(layer) => {
                let found = config.layers.get(layer);
                vec![*found.ok_or_else(|| missing("layer to load", layer, config.layers.len()))?]
            }
            Part::Mtp(layer) if layer >= config.num_mtp_layers => {
                return Err(missing("MTP layer to load", layer, config.num_mtp_layers));
            }
            Part::Embedding | Part::Head | Part::Mtp(_) => Vec::new(),
        };
        let weights = Weights::load_part(config, provider, part, backend, progress)?;
        let sliced = ModelConfig { layers, num_mtp_layers: weights.mtp.len(), ..config.clone() };
        Ok(LayerPass { part, decoder: Decoder::new(sliced, weights, options, backend)? })
    }

    /// Embeds the tokens of `batch`: hidden states `[num_tokens, hidden_size]`.
    ///
    /// # Errors
    /// If another part is loaded, a batch beyond the options, or a failing device.
    pub fn embed(&mut self, batch: &Batch, backend: &mut dyn Backend) -> Result<Vec<f32>> {
        self.expect(Part::Embedding)?;
        let step = self.decoder.upload(batch, backend)?;
        let space = &self.decoder.workspace;
        let hidden = space.hidden.tensor(step.num_tokens, self.decoder.config.hidden_size);
        let token_ids = space.token_ids.tensor(1, step.num_tokens);
        backend.embed(&Embed { table: self.decoder.weights.embed_tokens, token_ids, out: hidden })?;
        read(hidden, backend)
    }

    /// Runs the layer over `hidden` (`[num_tokens, hidden_size]`, updated). `index_set` is the set of the last layer with
    /// an indexer for the same rows: read by a layer that shares it, replaced by one that has its own. A tap sees layer 0.
    ///
    /// # Errors
    /// As [`LayerPass::embed`].
    pub fn layer(
        &mut self,
        batch: &Batch,
        hidden: &mut [f32],
        index_set: &mut Option<HostIndexSet>,
        backend: &mut dyn Backend,
        tap: Option<&mut dyn Tap>,
    ) -> Result<()> {
        let Part::Layer(_) = self.part else { return Err(self.wrong_part("a layer")) };
        let step = self.decoder.upload(batch, backend)?;
        self.decoder.begin(&step, backend)?;
        let (tokens, hidden_size) = (step.num_tokens, self.decoder.config.hidden_size);
        let space = &self.decoder.workspace;
        let [device_hidden, delta] = [space.hidden, space.delta].map(|b| b.tensor(tokens, hidden_size));
        backend.write_f32(device_hidden, hidden)?;
        let device_set = match index_set {
            Some(set) => {
                let ids = space.index_ids.tensor(tokens, set.ids.len() / tokens);
                let counts = space.index_counts.tensor(1, tokens);
                backend.write_u32(ids, &set.ids)?;
                backend.write_u32(counts, &set.counts)?;
                Some(IndexSet { ids, counts })
            }
            None => None,
        };
        let weights = &self.decoder.weights.layers[0];
        let mut run = Pass {
            decoder: &self.decoder,
            step: &step,
            backend: &mut *backend,
            tap,
            index_set: device_set,
            shares_index: false,
        };
        run.layer(weights, 0, None)?;
        let device_set = run.index_set;
        // The next layer's norm would add the feed-forward's output; the sum is the same.
        backend.add(&Add { x: device_hidden, y: delta })?;
        backend.read_f32(device_hidden, hidden)?;
        *index_set = match device_set {
            Some(set) => {
                let mut host =
                    HostIndexSet { ids: vec![0; set.ids.rows * set.ids.cols], counts: vec![0; set.counts.cols] };
                backend.read_u32(set.ids, &mut host.ids)?;
                backend.read_u32(set.counts, &mut host.counts)?;
                Some(host)
            }
            None => None,
        };
        Ok(())
    }

    /// Final norm over `hidden`, which becomes what the MTP layer reads, and logits of the rows that `batch` asks for.
    ///
    /// # Errors
    /// As [`LayerPass::embed`].
    pub fn head(&mut self, batch: &Batch, hidden: &mut [f32], backend: &mut dyn Backend) -> Result<Tensor> {
        self.expect(Part::Head)?;
        let step = self.decoder.upload(batch, backend)?;
        self.decoder.begin(&step, backend)?;
        let space = &self.decoder.workspace;
        let [x, out] =
            [space.hidden, space.final_hidden].map(|b| b.tensor(step.num_tokens, self.decoder.config.hidden_size));
        backend.stage(Stage::Head);
        backend.write_f32(x, hidden)?;
        let eps = self.decoder.config.rms_norm_eps;
        backend.rms_norm(&RmsNorm { x, delta: None, weight: self.decoder.weights.norm, eps, out })?;
        backend.read_f32(out, hidden)?;
        self.decoder.head(out, &batch.logit_rows, backend)
    }

    /// Runs the MTP layer: `batch` and `final_hidden` as in [`Decoder::forward_mtp`], a hidden row for every token.
    ///
    /// # Errors
    /// As [`LayerPass::embed`].
    pub fn mtp(&mut self, batch: &Batch, final_hidden: &[f32], backend: &mut dyn Backend) -> Result<Tensor> {
        let Part::Mtp(_) = self.part else { return Err(self.wrong_part("an MTP layer")) };
        let tokens = batch.num_tokens();
        let rows = self.decoder.workspace.final_hidden.tensor(tokens, self.decoder.config.hidden_size);
        backend.write_f32(rows, final_hidden)?;
        let all: Vec<u32> = (0..tokens as u32).collect();
        let step = MtpStep { batch, hidden_rows: &all, hidden: MtpHidden::Trunk, share_index_of: None };
        self.decoder.forward_mtp(&step, backend)
    }

    fn expect(&self, part: Part) -> Result<()> {
        if self.part == part { Ok(()) } else { Err(self.wrong_part(&format!("{part:?}"))) }
    }

    fn wrong_part(&self, expected: &str) -> Error {
        Error::Batch { what: "loaded part", found: format!("{:?}", self.part), expected: expected.to_owned() }
    }
}

fn read(tensor: Tensor, backend: &mut dyn Backend) -> Result<Vec<f32>> {
    let mut host = vec![0.0; tensor.rows * tensor.cols];
    backend.read_f32(tensor, &mut host)?;
    Ok(host)
}
