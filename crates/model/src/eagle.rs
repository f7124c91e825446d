//! EAGLE-3 heads in the published format (Li et al., arXiv 2503.01840): one dense decoder layer that reads three of the
//! model's residual streams and the next token's embedding, and predicts the token after it.
//!
//! ```text
//! g = fc( concat[ h_low , h_mid , h_high ] )          # of position i; in a chain, the layer's own output instead
//! x = concat[ input_layernorm(embed(token i+1)) , hidden_norm(g) ]
//! g = g + self_attn(x)                                # grouped-query attention, projections twice as wide
//! g = g + mlp(post_attention_layernorm(g))            # what a chain feeds back
//! draft logits for token i+2 = lm_head( norm(g) )     # of the draft vocabulary; token = column + d2t[column]
//! ```
//!
//! Names and meanings are those of SafeAILab's EAGLE (`midlayer.*`), SpecForge and SGLang's `llama_eagle3.py`, and of the
//! speculators format of vLLM (`layers.0.*`). Which streams: `eagle_config.eagle_aux_hidden_state_layer_ids` counts layers
//! whose *output* is read, as SGLang does; the same key at the top level counts layers whose *input* is read, as vLLM does;
//! without either they are the inputs of layers 2, n / 2 and n - 3, as in both.

use crate::batch::Batch;
use crate::config::{Attention, Ffn, Gqa, IndexSource, Layer, ModelConfig, Moe, Rope};
use crate::decoder::{Decoder, NUM_TAPS, Pass, Step, step_shape};
use crate::fields::Fields;
use crate::mtp::{MtpHidden, MtpStep, unfit};
use crate::weights::{AttentionWeights, DenseWeights, FfnWeights, GqaWeights, LayerWeights, Weights, check_finite};
use crate::{Account, Error, Result, attention_gqa, ffn, rope};
use moellon_checkpoint::{Checkpoint, TensorView};
use moellon_ops::{
    Activation, Backend, Buffer, Cache, ElementType, Embed, GatherRows, Linear, RmsNorm, RopePairs, Scoring, Stage,
    Tensor, Weight, WeightSource,
};
use moellon_tensor::Dtype;
use serde_json::Value;

/// An EAGLE-3 head's numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct EagleConfig {
    /// The layer as a model of its own: widths, heads, rope; its vocabulary is the target's.
    pub layer: ModelConfig,
    /// Rows of its head.
    pub draft_vocab_size: usize,
    /// The target's layers before which residual streams are read, ascending; the number of layers for what the last leaves.
    pub taps: [usize; NUM_TAPS],
    /// Whether the residual stream is the normed hidden state (speculators).
    pub norm_before_residual: bool,
}

impl EagleConfig {
    /// Whether a `config.json` is one of an EAGLE-3 head.
    pub fn is_eagle(config: &Value) -> bool {
        let named = |value: &Value| value.as_str().is_some_and(|name| name.to_lowercase().contains("eagle3"));
        let architectures = config.get("architectures").and_then(Value::as_array);
        architectures.is_some_and(|names| names.iter().any(named))
            || config.get("speculators_model_type").is_some_and(named)
    }

    /// Reads a head's `config.json`, to draft for `target`.
    ///
    /// # Errors
    /// A missing field, one that does not fit the target, or a kind of head that we do not know, by name.
    pub fn parse(config: &Value, target: &ModelConfig) -> Result<Self> {
        let top = Fields::new(config);
        // The speculators format keeps the layer's numbers in an object of their own.
        let mut layer = config.get("transformer_layer_config").filter(|v| v.is_object()).unwrap_or(config).clone();
        if let Some(object) = layer.as_object_mut() {
            // What LlamaConfig has where a file says nothing.
            object.entry("rope_theta").or_insert_with(|| 10_000.0.into());
        }
        let fields = Fields::new(&layer);
        fields.expect_text("hidden_act", &["silu"])?;
        if fields.count_or("num_hidden_layers", 1)? != 1 {
            return Err(fields.error("num_hidden_layers", "1 (heads of several layers are not supported)"));
        }
        let hidden_size = fields.dimension("hidden_size")?;
        let target_hidden_size = top.optional_dimension("target_hidden_size")?.unwrap_or(hidden_size);
        if target_hidden_size != target.hidden_size {
            return Err(Error::config(
                "target_hidden_size",
                target_hidden_size,
                format!("the model's hidden_size ({})", target.hidden_size),
            ));
        }
        let vocab_size = fields.dimension("vocab_size")?;
        if vocab_size != target.vocab_size {
            return Err(fields.error("vocab_size", format!("the model's ({})", target.vocab_size)));
        }
        let draft_vocab_size = top.optional_dimension("draft_vocab_size")?.unwrap_or(vocab_size);
        if draft_vocab_size > vocab_size {
            return Err(top.error("draft_vocab_size", format!("at most vocab_size ({vocab_size})")));
        }
        Ok(EagleConfig {
            layer: layer_config(&fields, hidden_size, vocab_size, target)?,
            draft_vocab_size,
            taps: taps(&top, target.layers.len())?,
            norm_before_residual: top.flag_or("norm_before_residual", false)?,
        })
    }
}

/// The layer as a model: one dense layer.
fn layer_config(
    fields: &Fields<'_>,
    hidden_size: usize,
    vocab_size: usize,
    target: &ModelConfig,
) -> Result<ModelConfig> {
    let num_heads = fields.dimension("num_attention_heads")?;
    let num_kv_heads = fields.optional_dimension("num_key_value_heads")?.unwrap_or(num_heads);
    if !num_heads.is_multiple_of(num_kv_heads) {
        return Err(fields.error("num_key_value_heads", format!("a divisor of num_attention_heads ({num_heads})")));
    }
    let head_dim = fields.optional_dimension("head_dim")?.unwrap_or(hidden_size / num_heads);
    let scaling = rope::parse(fields, head_dim)?;
    let bias = fields.flag_or("attention_bias", false)?;
    let attention = Attention::Gqa(Gqa {
        num_heads,
        num_kv_heads,
        head_dim,
        qkv_bias: bias,
        output_bias: false,
        qk_norm: false,
        sinks: false,
        scale: (head_dim as f32).powf(-0.5),
    });
    let intermediate_size = fields.dimension("intermediate_size")?;
    Ok(ModelConfig {
        architecture: target.architecture,
        hidden_size,
        vocab_size,
        rms_norm_eps: fields.number_or("rms_norm_eps", 1e-6)? as f32,
        max_position_embeddings: target.max_position_embeddings,
        attention,
        rope: Rope {
            inverse_frequencies: scaling.inverse_frequencies,
            scale: scaling.scale,
            pairs: RopePairs::HalfSplit,
        },
        indexer: None,
        moe: NO_EXPERTS,
        layers: vec![Layer { index: IndexSource::None, window: None, ffn: Ffn::Dense { intermediate_size } }],
        num_mtp_layers: 0,
        tie_word_embeddings: false,
        eos_token_ids: Vec::new(),
    })
}

/// The head's layer is dense.
const NO_EXPERTS: Moe = Moe {
    block_name: "mlp",
    router_name: "gate",
    num_experts: 0,
    num_experts_per_tok: 0,
    moe_intermediate_size: 0,
    shared_intermediate_size: None,
    activation: Activation::SwiGlu,
    scoring: Scoring::SoftmaxThenTopk,
    correction_bias: false,
    router_bias: false,
    expert_bias: false,
    n_group: 1,
    topk_group: 1,
    norm_topk_prob: false,
    routed_scaling_factor: 1.0,
};

fn taps(top: &Fields<'_>, num_layers: usize) -> Result<[usize; NUM_TAPS]> {
    const KEY: &str = "eagle_aux_hidden_state_layer_ids";
    let nested = top.object("eagle_config");
    let (fields, offset) = match &nested {
        Some(nested) if nested.get(KEY).and_then(Value::as_array).is_some_and(|ids| !ids.is_empty()) => (nested, 1),
        _ => (top, 0),
    };
    let ids = fields.token_ids(KEY)?;
    let expected = || format!("{NUM_TAPS} layers in ascending order of the model's {num_layers}");
    let layers: Vec<usize> = match ids.len() {
        0 => [2, num_layers / 2, num_layers.saturating_sub(3)].to_vec(),
        _ => ids.iter().map(|id| *id as usize + offset).collect(),
    };
    let layers: [usize; NUM_TAPS] = layers.try_into().map_err(|_| fields.error(KEY, expected()))?;
    if !layers.is_sorted_by(|a, b| a < b) || layers[NUM_TAPS - 1] > num_layers {
        return Err(Error::config(KEY, format!("{layers:?} (as inputs of layers)"), expected()));
    }
    Ok(layers)
}

/// A loaded head.
pub struct Eagle {
    config: EagleConfig,
    /// The layer with its cache and buffers.
    layer: Decoder,
    /// `[hidden_size, NUM_TAPS * target hidden_size]`
    fc: Weight,
    /// `[1, hidden_size]`
    hidden_norm: Tensor,
    /// `[1, hidden_size]`
    norm: Tensor,
    /// The target's token of each row of the head; `None` where they are the same.
    tokens: Option<Vec<u32>>,
    target_hidden_size: usize,
    /// Streams of steps that the head has not run yet `[max_batch_tokens, NUM_TAPS * target hidden_size]`
    saved: Buffer,
    /// The same of the rows of one run
    streams: Buffer,
    /// What the last run left, for chains `[max_batch_tokens, hidden_size]`
    outputs: Buffer,
    /// `[max_batch_tokens, 2 * hidden_size]`
    input: Buffer,
    /// u32 `[1, max_batch_tokens]`
    rows: Buffer,
    /// u32 `[1, max_batch_tokens]`: 0, 1, 2, ..
    all_rows: Buffer,
}

impl Eagle {
    /// Loads a head's weights onto the back end of `target`, whose embedding it takes unless it has its own, and taps the
    /// target's residual streams.
    ///
    /// # Errors
    /// A missing tensor, one that does not fit, one that nobody reads, or no room on the device; each by name.
    pub fn load(
        config: &EagleConfig,
        checkpoint: &Checkpoint,
        target: &mut Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Self> {
        let options = *target.options();
        let hidden_size = config.layer.hidden_size;
        let mut loader = Loader { checkpoint, backend, read: Vec::new() };
        let weights = loader.layer(config, target)?;
        let fc = loader.linear("fc", [hidden_size, NUM_TAPS * target.config().hidden_size], config_bias(checkpoint))?;
        let hidden_norm = loader.vector(&format!("{}.hidden_norm.weight", loader.prefix()), hidden_size)?;
        let norm = loader.vector("norm.weight", hidden_size)?;
        let tokens = loader.tokens(config)?;
        loader.expect_all_read()?;
        target.tap_hidden(config.taps, backend)?;
        let tokens_of_step = options.max_batch_tokens;
        let layer = Decoder::new(config.layer.clone(), weights, options, backend)?;
        let streams = NUM_TAPS * target.config().hidden_size;
        let mut alloc = |columns: usize| backend.alloc("EAGLE-3 head", ElementType::F32, tokens_of_step * columns);
        let (saved, streams, outputs, input) =
            (alloc(streams)?, alloc(streams)?, alloc(hidden_size)?, alloc(2 * hidden_size)?);
        let rows = backend.alloc("EAGLE-3 head rows", ElementType::U32, tokens_of_step)?;
        let all_rows = backend.alloc("EAGLE-3 head rows", ElementType::U32, tokens_of_step)?;
        let numbers: Vec<u32> = (0..tokens_of_step as u32).collect();
        backend.write_u32(all_rows.tensor(1, tokens_of_step), &numbers)?;
        let target_hidden_size = target.config().hidden_size;
        let config = config.clone();
        Ok(Eagle {
            config,
            layer,
            fc,
            hidden_norm,
            norm,
            tokens,
            target_hidden_size,
            saved,
            streams,
            outputs,
            input,
            rows,
            all_rows,
        })
    }

    /// Tokens that the columns of its logits stand for; `None` where they are the vocabulary.
    pub fn draft_tokens(&self) -> Option<&[u32]> {
        self.tokens.as_deref()
    }

    /// The caches of its layer.
    pub fn caches(&self) -> impl Iterator<Item = Cache> + '_ {
        self.layer.caches()
    }

    /// Keeps rows of the streams of `target`'s last step for a later [`MtpHidden::Saved`], as saved rows `first ..`.
    ///
    /// # Errors
    /// More rows than a step has, or a failing device.
    pub fn save_hidden(
        &mut self,
        rows: &[u32],
        first: usize,
        target: &Decoder,
        backend: &mut dyn Backend,
    ) -> Result<()> {
        let limit = self.layer.options().max_batch_tokens;
        if first + rows.len() > limit {
            return Err(unfit("saved hidden rows", first + rows.len(), format!("at most {limit}")));
        }
        let indices = self.rows.tensor(1, rows.len());
        backend.write_u32(indices, rows)?;
        let columns = NUM_TAPS * self.target_hidden_size;
        let x = target_streams(target)?.tensor(limit, columns);
        let out = self.saved.tensor(limit, columns).row_range(first, rows.len());
        backend.gather_rows(&GatherRows { x, rows: indices, out })?;
        Ok(())
    }

    /// Runs the head over a batch, as [`Decoder::forward_mtp`] runs an MTP layer, and returns logits
    /// `[logit_rows, draft_vocab_size]`.
    ///
    /// # Errors
    /// A batch beyond the decoder's limits, or a failing device.
    pub fn forward(&mut self, step: &MtpStep<'_>, target: &Decoder, backend: &mut dyn Backend) -> Result<Tensor> {
        let MtpStep { batch, hidden_rows, hidden: source, .. } = *step;
        if hidden_rows.len() != batch.num_tokens() {
            return Err(unfit("hidden rows of an EAGLE-3 step", hidden_rows.len(), batch.num_tokens().to_string()));
        }
        let limit = self.layer.options().max_batch_tokens;
        if let Some(row) = hidden_rows.iter().find(|row| **row as usize >= limit) {
            return Err(unfit("hidden row of an EAGLE-3 step", *row as usize, format!("below {limit}")));
        }
        let uploaded = self.layer.upload(batch, backend)?;
        backend.write_u32(self.rows.tensor(1, uploaded.num_tokens), hidden_rows)?;
        if !backend.records_steps() {
            return self.run(batch, &uploaded, source, target, backend);
        }
        let [a, b, c, d] = step_shape(batch, &uploaded);
        let source_number = match source {
            MtpHidden::Trunk => 0,
            MtpHidden::Saved => 1,
            MtpHidden::Mtp => 2,
        };
        let key = self.layer.step_key("eagle", &[a, b, c, d, source_number]);
        if backend.replay(key)? {
            return Ok(self.layer.workspace.logits.tensor(batch.logit_rows.len(), self.layer.weights().lm_head.rows));
        }
        backend.begin_recording(key)?;
        let result = self.run(batch, &uploaded, source, target, backend);
        backend.end_recording(result.is_ok())?;
        result
    }

    fn run(
        &self,
        batch: &Batch,
        step: &Step,
        source: MtpHidden,
        target: &Decoder,
        backend: &mut dyn Backend,
    ) -> Result<Tensor> {
        let layer = &self.layer;
        layer.begin(step, backend)?;
        backend.stage(Stage::Mtp);
        let (tokens, size, eps) = (step.num_tokens, layer.config.hidden_size, layer.config.rms_norm_eps);
        let limit = layer.options.max_batch_tokens;
        let space = &layer.workspace;
        let [hidden, normed, delta] = [space.hidden, space.normed, space.delta].map(|b| b.tensor(tokens, size));
        let rows = self.rows.tensor(1, tokens);
        let all_rows = self.all_rows.tensor(1, tokens);
        let columns = NUM_TAPS * self.target_hidden_size;
        let streams_of = |buffer: Buffer| buffer.tensor(limit, columns);
        let from_target = match source {
            MtpHidden::Trunk => Some(streams_of(target_streams(target)?)),
            MtpHidden::Saved => Some(streams_of(self.saved)),
            MtpHidden::Mtp => None,
        };
        match from_target {
            Some(x) => {
                let streams = self.streams.tensor(tokens, columns);
                backend.gather_rows(&GatherRows { x, rows, out: streams })?;
                backend.linear(&Linear { x: streams, parts: &[(self.fc, hidden)] })?;
            }
            None => {
                backend.gather_rows(&GatherRows { x: self.outputs.tensor(limit, size), rows, out: hidden })?;
            }
        }
        let token_ids = space.token_ids.tensor(1, tokens);
        backend.embed(&Embed { table: layer.weights.embed_tokens, token_ids, out: delta })?;
        let weights = &layer.weights.layers[0];
        // The embedding's half first.
        let input = self.input.tensor(tokens, 2 * size);
        let norm = |x, weight, first: usize| RmsNorm { x, delta: None, weight, eps, out: input.columns(first, size) };
        backend.rms_norm(&norm(delta, weights.input_norm, 0))?;
        backend.rms_norm(&norm(hidden, self.hidden_norm, size))?;
        if self.config.norm_before_residual {
            backend.gather_rows(&GatherRows { x: input.columns(size, size), rows: all_rows, out: hidden })?;
        }
        let mut pass = Pass { decoder: layer, step, backend, tap: None, index_set: None, shares_index: false };
        let (AttentionWeights::Gqa(attention), Attention::Gqa(gqa)) = (&weights.attention, &layer.config.attention)
        else {
            unreachable!("an EAGLE-3 head is parsed with grouped-query attention")
        };
        attention_gqa::forward(&mut pass, attention, gqa, 0, input, delta)?;
        pass.backend.stage(Stage::DenseFfn);
        let add = |weight, out| RmsNorm { x: hidden, delta: Some(delta), weight, eps, out };
        pass.backend.rms_norm(&add(weights.post_attention_norm, normed))?;
        ffn::forward(&mut pass, &weights.ffn, 0, normed, delta)?;
        let Pass { backend, .. } = pass;
        backend.stage(Stage::Head);
        let out = space.final_hidden.tensor(tokens, size);
        backend.rms_norm(&add(self.norm, out))?;
        // The norm has added the feed-forward's output to the stream.
        let outputs = self.outputs.tensor(tokens, size);
        backend.gather_rows(&GatherRows { x: hidden, rows: all_rows, out: outputs })?;
        layer.head_with(layer.weights.lm_head, out, &batch.logit_rows, backend)
    }
}

fn target_streams(target: &Decoder) -> Result<Buffer> {
    let missing = || unfit("tapped residual streams of the model", 0, NUM_TAPS.to_string());
    target.hidden_taps.as_ref().map(|taps| taps.streams).ok_or_else(missing)
}

/// Whether `fc` has a bias.
fn config_bias(checkpoint: &Checkpoint) -> bool {
    checkpoint.tensor("fc.bias").is_some()
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    backend: &'a mut dyn Backend,
    /// Modules and tensors that were read.
    read: Vec<String>,
}

impl Loader<'_> {
    /// The layer's module: `midlayer` (EAGLE, SpecForge, SGLang) or `layers.0` (speculators).
    fn prefix(&self) -> &'static str {
        let has = |prefix: &str| self.checkpoint.tensor(&format!("{prefix}.hidden_norm.weight")).is_some();
        if has("layers.0") { "layers.0" } else { "midlayer" }
    }

    fn layer(&mut self, config: &EagleConfig, target: &Decoder) -> Result<Weights> {
        let layer = &config.layer;
        let size = layer.hidden_size;
        let (Attention::Gqa(gqa), Some(Ffn::Dense { intermediate_size })) =
            (layer.attention, layer.layers.first().map(|layer| layer.ffn))
        else {
            unreachable!("an EAGLE-3 head is parsed as one dense layer with grouped-query attention")
        };
        let (q, kv) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
        let prefix = self.prefix();
        let name = |module: &str| format!("{prefix}.{module}");
        let attention = AttentionWeights::Gqa(GqaWeights {
            q: self.linear(&name("self_attn.q_proj"), [q, 2 * size], gqa.qkv_bias)?,
            k: self.linear(&name("self_attn.k_proj"), [kv, 2 * size], gqa.qkv_bias)?,
            v: self.linear(&name("self_attn.v_proj"), [kv, 2 * size], gqa.qkv_bias)?,
            o: self.linear(&name("self_attn.o_proj"), [size, q], gqa.output_bias)?,
            q_norm: None,
            k_norm: None,
            sinks: None,
        });
        let ffn = FfnWeights::Dense(DenseWeights {
            gate: self.linear(&name("mlp.gate_proj"), [intermediate_size, size], false)?,
            up: self.linear(&name("mlp.up_proj"), [intermediate_size, size], false)?,
            down: self.linear(&name("mlp.down_proj"), [size, intermediate_size], false)?,
        });
        let weights = LayerWeights {
            input_norm: self.vector(&name("input_layernorm.weight"), size)?,
            attention,
            post_attention_norm: self.vector(&name("post_attention_layernorm.weight"), size)?,
            ffn,
        };
        let own_embedding = self.checkpoint.tensor("embed_tokens.weight").is_some();
        let embed_tokens = if own_embedding {
            self.linear("embed_tokens", [layer.vocab_size, size], false)?
        } else if target.config().hidden_size == size {
            target.weights().embed_tokens
        } else {
            return Err(Error::Weight {
                name: "embed_tokens".to_owned(),
                what: "tensor",
                found: "missing".to_owned(),
                expected: format!("[{}, {size}], for the model's embedding is wider or narrower", layer.vocab_size),
            });
        };
        // Without a head of its own it predicts with the model's.
        let own_head = self.checkpoint.tensor("lm_head.weight").is_some();
        let lm_head = match own_head || config.draft_vocab_size != layer.vocab_size {
            true => self.linear("lm_head", [config.draft_vocab_size, size], false)?,
            false => target.weights().lm_head,
        };
        let norm = weights.post_attention_norm;
        let (layers, mtp, account) = (vec![weights], Vec::new(), Account::default());
        Ok(Weights { embed_tokens, layers, norm, lm_head, mtp, account })
    }

    fn linear(&mut self, path: &str, shape: [usize; 2], biased: bool) -> Result<Weight> {
        let matrix = self.checkpoint.linear(path, shape)?;
        let bias = match biased {
            true => Some(self.checkpoint.vector(&format!("{path}.bias"), shape[0])?),
            false => None,
        };
        let views = [matrix.view()];
        check_finite(path, &views)?;
        self.read.push(format!("{path}."));
        Ok(self.backend.load_weight(&WeightSource { name: path, matrices: &views, bias: bias.as_deref() })?)
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        let values = self.checkpoint.vector(name, len)?;
        let tensor = self.backend.alloc(name, ElementType::F32, len)?.tensor(1, len);
        self.backend.write_f32(tensor, &values)?;
        self.read.push(name.to_owned());
        Ok(tensor)
    }

    /// The target's tokens of the head's rows: `d2t` holds how far each is from its row's number.
    fn tokens(&mut self, config: &EagleConfig) -> Result<Option<Vec<u32>>> {
        // The inverse, of which nothing more is learned.
        self.read.extend(["d2t".to_owned(), "t2d".to_owned()]);
        let (rows, vocab_size) = (config.draft_vocab_size, config.layer.vocab_size);
        let wrong =
            |what, found: String, expected: String| Error::Weight { name: "d2t".to_owned(), what, found, expected };
        let Some(TensorView { dtype, shape, bytes, .. }) = self.checkpoint.tensor("d2t") else {
            if rows == vocab_size {
                return Ok(None);
            }
            let expected = format!("[{rows}], for the head has fewer tokens than the model");
            return Err(wrong("tensor", "missing".to_owned(), expected));
        };
        if shape != [rows] {
            return Err(wrong("shape", format!("{shape:?}"), format!("[{rows}]")));
        }
        let offsets: Vec<i64> = match dtype {
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect(),
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|b| i64::from(i32::from_le_bytes(*b))).collect(),
            _ => return Err(wrong("dtype", dtype.to_string(), "I64 or I32".to_owned())),
        };
        let token = |(row, offset): (i64, i64)| {
            let token = row.checked_add(offset).filter(|token| (0..vocab_size as i64).contains(token));
            token.map(|token| token as u32).ok_or_else(|| {
                wrong("offset", format!("{offset} in row {row}"), format!("one to a token below {vocab_size}"))
            })
        };
        (0..).zip(offsets).map(token).collect::<Result<Vec<u32>>>().map(Some)
    }

    /// A tensor that nobody reads means a kind of head that we do not know.
    fn expect_all_read(&self) -> Result<()> {
        let is_read =
            |name: &str| self.read.iter().any(|read| name == read || (read.ends_with('.') && name.starts_with(read)));
        match self.checkpoint.tensors().find(|tensor| !is_read(tensor.name)) {
            None => Ok(()),
            Some(tensor) => Err(Error::Weight {
                name: tensor.name.to_owned(),
                what: "tensor of an EAGLE-3 head",
                found: "one that is not known".to_owned(),
                expected: "fc, midlayer or layers.0, norm, lm_head, embed_tokens, d2t and t2d".to_owned(),
            }),
        }
    }
}
