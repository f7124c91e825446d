//! Handles of all weights of a model, loaded from a checkpoint and checked against the config.

use crate::account::{Account, Component, Entry};
use crate::config::{Attention, Ffn, Gqa, IndexSource, Layer, Mla, ModelConfig};
use crate::draft_precision::DRAFT_HEAD;
use crate::layer_pass::Part;
use crate::provider::WeightProvider;
use crate::{Error, Result};
use moellon_checkpoint::{Checkpoint, Matrix, MlaShape, Projection};
use moellon_ops::{Backend, Buffer, ElementType, Experts, ExpertsSource, Tensor, Weight, WeightSource};
use moellon_tensor::{MatrixView, WeightFormat};

/// All weights of a model.
pub struct Weights {
    /// `[vocab_size, hidden_size]`
    pub embed_tokens: Weight,
    /// One a layer.
    pub layers: Vec<LayerWeights>,
    /// `[1, hidden_size]`
    pub norm: Tensor,
    /// `[vocab_size, hidden_size]`
    pub lm_head: Weight,
    /// The MTP layers that the checkpoint has.
    pub mtp: Vec<MtpWeights>,
    /// What was counted while loading.
    pub account: Account,
}

/// Weights of one layer.
pub struct LayerWeights {
    /// `[1, hidden_size]`
    pub input_norm: Tensor,
    /// Attention.
    pub attention: AttentionWeights,
    /// `[1, hidden_size]`
    pub post_attention_norm: Tensor,
    /// Feed-forward.
    pub ffn: FfnWeights,
}

/// Weights of a layer's attention.
#[expect(clippy::large_enum_variant, reason = "a few dozen of them, made once at load")]
pub enum AttentionWeights {
    /// Grouped-query attention.
    Gqa(GqaWeights),
    /// Latent attention.
    Mla(MlaWeights),
}

/// Grouped-query attention.
pub struct GqaWeights {
    /// `[num_heads * head_dim, hidden_size]`
    pub q: Weight,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub k: Weight,
    /// `[num_kv_heads * head_dim, hidden_size]`
    pub v: Weight,
    /// `[hidden_size, num_heads * head_dim]`
    pub o: Weight,
    /// `[1, head_dim]`
    pub q_norm: Option<Tensor>,
    /// `[1, head_dim]`
    pub k_norm: Option<Tensor>,
    /// `[1, num_heads]`
    pub sinks: Option<Tensor>,
}

/// Latent attention.
pub struct MlaWeights {
    /// Hidden state to queries.
    pub query: QueryWeights,
    /// `[kv_lora_rank + qk_rope_head_dim, hidden_size]`
    pub kv_a: Weight,
    /// `[1, kv_lora_rank]`
    pub kv_a_norm: Tensor,
    /// `[num_heads, kv_lora_rank, qk_nope_head_dim]`: absorbs the key projection into the query.
    pub embed_q: Weight,
    /// `[num_heads, v_head_dim, kv_lora_rank]`: makes values of averaged latents.
    pub unembed_out: Weight,
    /// `[hidden_size, num_heads * v_head_dim]`
    pub o: Weight,
    /// On layers with their own index set.
    pub indexer: Option<IndexerWeights>,
}

/// Hidden state to queries.
pub enum QueryWeights {
    /// Through a latent.
    LowRank {
        /// `[q_lora_rank, hidden_size]`
        q_a: Weight,
        /// `[1, q_lora_rank]`
        q_a_norm: Tensor,
        /// `[num_heads * qk_head_dim, q_lora_rank]`
        q_b: Weight,
    },
    /// Directly.
    Direct {
        /// `[num_heads * qk_head_dim, hidden_size]`
        q: Weight,
    },
}

/// Sparse attention's indexer.
pub struct IndexerWeights {
    /// `[num_heads * head_dim, q_lora_rank]`
    pub wq_b: Weight,
    /// `[head_dim, hidden_size]`
    pub wk: Weight,
    /// `[num_heads, hidden_size]`
    pub weights_proj: Weight,
    /// `[1, head_dim]`
    pub k_norm_weight: Tensor,
    /// `[1, head_dim]`
    pub k_norm_bias: Tensor,
}

/// Weights of a layer's feed-forward.
pub enum FfnWeights {
    /// SwiGLU.
    Dense(DenseWeights),
    /// Routed experts.
    Moe(MoeWeights),
}

impl FfnWeights {
    /// Whether there is a router.
    pub fn is_moe(&self) -> bool {
        matches!(self, FfnWeights::Moe(_))
    }
}

/// SwiGLU.
pub struct DenseWeights {
    /// `[intermediate_size, hidden_size]`
    pub gate: Weight,
    /// `[intermediate_size, hidden_size]`
    pub up: Weight,
    /// `[hidden_size, intermediate_size]`
    pub down: Weight,
}

/// Router and experts.
pub struct MoeWeights {
    /// `[num_experts, hidden_size]`
    pub router: Weight,
    /// `[1, num_experts]`
    pub correction_bias: Option<Tensor>,
    /// The routed experts.
    pub experts: Experts,
    /// The shared expert.
    pub shared: Option<DenseWeights>,
}

/// An MTP layer.
pub struct MtpWeights {
    /// `[1, hidden_size]`, norm of the embedding.
    pub enorm: Tensor,
    /// `[1, hidden_size]`, norm of the hidden state.
    pub hnorm: Tensor,
    /// `[hidden_size, 2 * hidden_size]`, embedding first.
    pub eh_proj: Weight,
    /// The decoder layer.
    pub layer: LayerWeights,
    /// `[1, hidden_size]`
    pub shared_head_norm: Tensor,
    /// `[draft tokens, hidden_size]`: a cheaper head than the model's, for drafts.
    pub draft_head: Option<Weight>,
    /// Tokens of its rows; `None` for the whole vocabulary.
    pub draft_tokens: Option<Vec<u32>>,
}

/// What is being loaded, for progress bars.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Bytes of weights loaded so far.
    pub done_bytes: u64,
    /// Module that was loaded last.
    pub name: &'a str,
}

impl Weights {
    /// Loads all weights onto `backend`, a module at a time, giving each module's pages back once it is repacked, so that
    /// the model is never held twice.
    ///
    /// # Errors
    /// A missing tensor, a shape that does not fit the config, a format without a kernel, or no memory; each by name.
    pub fn load(
        config: &ModelConfig,
        provider: &dyn WeightProvider,
        backend: &mut dyn Backend,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self> {
        Loader {
            config,
            provider,
            target: Some((backend, progress)),
            account: Account::default(),
            done_bytes: 0,
            mtp: false,
            head_is_quantized: false,
        }
        .run()
    }

    /// Loads one part alone. Handles of what was not loaded are empty (no matrix), and an operation on one is refused.
    ///
    /// # Errors
    /// As [`Weights::load`].
    pub(crate) fn load_part(
        config: &ModelConfig,
        provider: &dyn WeightProvider,
        part: Part,
        backend: &mut dyn Backend,
        progress: &mut dyn FnMut(Progress<'_>),
    ) -> Result<Self> {
        let account = Account::default();
        Loader {
            config,
            provider,
            target: Some((backend, progress)),
            account,
            done_bytes: 0,
            mtp: false,
            head_is_quantized: false,
        }
        .run_part(part)
    }

    /// Checks every shape and counts every byte without reading weights or touching a device; the handles are empty.
    ///
    /// # Errors
    /// As [`Weights::load`], less the device's.
    pub fn describe(config: &ModelConfig, provider: &dyn WeightProvider) -> Result<Self> {
        Loader {
            config,
            provider,
            target: None,
            account: Account::default(),
            done_bytes: 0,
            mtp: false,
            head_is_quantized: false,
        }
        .run()
    }

    /// Experts of each layer, 0 where it is dense; the MTP layers follow.
    pub fn experts_per_layer(&self) -> Vec<usize> {
        let layers = self.layers.iter().chain(self.mtp.iter().map(|m| &m.layer));
        layers
            .map(|l| match &l.ffn {
                FfnWeights::Dense(_) => 0,
                FfnWeights::Moe(moe) => moe.experts.num_experts,
            })
            .collect()
    }

    /// The largest number of experts in a layer.
    pub fn max_experts(&self) -> usize {
        self.experts_per_layer().into_iter().max().unwrap_or(0)
    }
}

type Target<'a> = (&'a mut dyn Backend, &'a mut dyn FnMut(Progress<'_>));

struct Loader<'a> {
    config: &'a ModelConfig,
    provider: &'a dyn WeightProvider,
    /// `None` only describes.
    target: Option<Target<'a>>,
    account: Account,
    done_bytes: u64,
    /// Whether an MTP layer is being loaded.
    mtp: bool,
    head_is_quantized: bool,
}

impl Loader<'_> {
    fn run(mut self) -> Result<Weights> {
        let config = self.config;
        let shape = [config.vocab_size, config.hidden_size];
        let embed_tokens = self.linear(Component::Embedding, "model.embed_tokens", shape, false)?;
        // One row of the table is read a token.
        if let Some(entry) = self.account.entries.last_mut() {
            entry.active_parameters = 0.0;
            entry.bytes_per_token /= config.vocab_size as f64;
        }
        let mut layers = Vec::new();
        for (index, layer) in config.layers.iter().enumerate() {
            layers.push(self.layer(&format!("model.layers.{index}"), layer)?);
        }
        let norm = self.vector("model.norm.weight", config.hidden_size)?;
        let lm_head = if config.tie_word_embeddings && !self.provider.has("lm_head.weight") {
            self.count(
                Component::Head,
                embed_tokens.format,
                0,
                embed_tokens.rows * embed_tokens.cols,
                0,
                embed_tokens.size_bytes() as f64,
            );
            embed_tokens
        } else {
            self.linear(Component::Head, "lm_head", shape, false)?
        };
        self.mtp = true;
        self.head_is_quantized = lm_head.format.is_quantized();
        let mut mtp = Vec::new();
        // Files pruned by other tools keep num_nextn_predict_layers and lose the layer: tolerated, and `inspect` says so.
        for index in config.layers.len()..config.layers.len() + config.num_mtp_layers {
            let prefix = format!("model.layers.{index}");
            if self.provider.has(&format!("{prefix}.eh_proj.weight")) {
                mtp.push(self.mtp_layer(&prefix)?);
            }
        }
        Ok(Weights { embed_tokens, layers, norm, lm_head, mtp, account: self.account })
    }

    fn run_part(mut self, part: Part) -> Result<Weights> {
        let config = self.config;
        let shape = [config.vocab_size, config.hidden_size];
        let nothing = Weight { id: 0, format: WeightFormat::F32, count: 0, rows: 0, cols: 0, has_bias: false };
        let no_norm = Buffer { id: 0, element: ElementType::F32, len: 0 }.tensor(0, 0);
        let mut weights = Weights {
            embed_tokens: nothing,
            layers: Vec::new(),
            norm: no_norm,
            lm_head: nothing,
            mtp: Vec::new(),
            account: Account::default(),
        };
        if let Part::Embedding | Part::Mtp(_) = part {
            weights.embed_tokens = self.linear(Component::Embedding, "model.embed_tokens", shape, false)?;
        }
        if let Part::Head | Part::Mtp(_) = part {
            let tied = config.tie_word_embeddings && !self.provider.has("lm_head.weight");
            let name = if tied { "model.embed_tokens" } else { "lm_head" };
            weights.lm_head = self.linear(Component::Head, name, shape, false)?;
            self.head_is_quantized = weights.lm_head.format.is_quantized();
        }
        match part {
            Part::Embedding => {}
            Part::Layer(layer) => {
                weights.layers.push(self.layer(&format!("model.layers.{layer}"), &config.layers[layer])?);
            }
            Part::Head => weights.norm = self.vector("model.norm.weight", config.hidden_size)?,
            Part::Mtp(layer) => {
                weights.mtp.push(self.mtp_layer(&format!("model.layers.{}", config.layers.len() + layer))?);
            }
        }
        weights.account = self.account;
        Ok(weights)
    }

    fn mtp_layer(&mut self, prefix: &str) -> Result<MtpWeights> {
        let hidden_size = self.config.hidden_size;
        // Only where it has fewer bytes than the model's own head.
        let draft_tokens = self.provider.draft_tokens().map(<[u32]>::to_vec);
        let wanted = !self.head_is_quantized || draft_tokens.is_some();
        let draft_head = if wanted && self.provider.has(&format!("{DRAFT_HEAD}.weight")) {
            let rows = draft_tokens.as_ref().map_or(self.config.vocab_size, Vec::len);
            Some(self.linear(Component::Head, DRAFT_HEAD, [rows, hidden_size], false)?)
        } else {
            None
        };
        Ok(MtpWeights {
            draft_tokens: draft_tokens.filter(|_| draft_head.is_some()),
            draft_head,
            enorm: self.vector(&format!("{prefix}.enorm.weight"), hidden_size)?,
            hnorm: self.vector(&format!("{prefix}.hnorm.weight"), hidden_size)?,
            eh_proj: self.linear(
                Component::Attention,
                &format!("{prefix}.eh_proj"),
                [hidden_size, 2 * hidden_size],
                false,
            )?,
            layer: self.layer(prefix, &self.config.mtp_layer())?,
            shared_head_norm: self.vector(&format!("{prefix}.shared_head.norm.weight"), hidden_size)?,
        })
    }

    fn layer(&mut self, prefix: &str, layer: &Layer) -> Result<LayerWeights> {
        let hidden_size = self.config.hidden_size;
        let attention = match &self.config.attention {
            Attention::Gqa(gqa) => AttentionWeights::Gqa(self.gqa(&format!("{prefix}.self_attn"), gqa)?),
            Attention::Mla(mla) => AttentionWeights::Mla(self.mla(&format!("{prefix}.self_attn"), mla, layer)?),
        };
        let ffn = match layer.ffn {
            Ffn::Dense { intermediate_size } => {
                FfnWeights::Dense(self.swiglu(Component::DenseFfn, &format!("{prefix}.mlp"), intermediate_size)?)
            }
            Ffn::Moe => FfnWeights::Moe(self.moe(prefix)?),
        };
        Ok(LayerWeights {
            input_norm: self.vector(&format!("{prefix}.input_layernorm.weight"), hidden_size)?,
            attention,
            post_attention_norm: self.vector(&format!("{prefix}.post_attention_layernorm.weight"), hidden_size)?,
            ffn,
        })
    }

    fn gqa(&mut self, prefix: &str, gqa: &Gqa) -> Result<GqaWeights> {
        let hidden_size = self.config.hidden_size;
        let (q, kv) = (gqa.num_heads * gqa.head_dim, gqa.num_kv_heads * gqa.head_dim);
        let mut project =
            |name: &str, shape, bias| self.linear(Component::Attention, &format!("{prefix}.{name}"), shape, bias);
        let (q, k, v, o) = (
            project("q_proj", [q, hidden_size], gqa.qkv_bias)?,
            project("k_proj", [kv, hidden_size], gqa.qkv_bias)?,
            project("v_proj", [kv, hidden_size], gqa.qkv_bias)?,
            project("o_proj", [hidden_size, q], gqa.output_bias)?,
        );
        let mut vector =
            |wanted: bool, name: &str, len| wanted.then(|| self.vector(&format!("{prefix}.{name}"), len)).transpose();
        Ok(GqaWeights {
            q,
            k,
            v,
            o,
            q_norm: vector(gqa.qk_norm, "q_norm.weight", gqa.head_dim)?,
            k_norm: vector(gqa.qk_norm, "k_norm.weight", gqa.head_dim)?,
            sinks: vector(gqa.sinks, "sinks", gqa.num_heads)?,
        })
    }

    fn mla(&mut self, prefix: &str, mla: &Mla, layer: &Layer) -> Result<MlaWeights> {
        let hidden_size = self.config.hidden_size;
        let q_width = mla.num_heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim);
        let kv_width = mla.kv_lora_rank + mla.qk_rope_head_dim;
        let query = match mla.q_lora_rank {
            Some(rank) => QueryWeights::LowRank {
                q_a: self.linear(Component::Attention, &format!("{prefix}.q_a_proj"), [rank, hidden_size], false)?,
                q_a_norm: self.vector(&format!("{prefix}.q_a_layernorm.weight"), rank)?,
                q_b: self.linear(Component::Attention, &format!("{prefix}.q_b_proj"), [q_width, rank], false)?,
            },
            None => QueryWeights::Direct {
                q: self.linear(Component::Attention, &format!("{prefix}.q_proj"), [q_width, hidden_size], false)?,
            },
        };
        let kv_a =
            self.linear(Component::Attention, &format!("{prefix}.kv_a_proj_with_mqa"), [kv_width, hidden_size], false)?;
        let (embed_q, unembed_out) = self.kv_b(prefix, mla)?;
        let o = self.linear(
            Component::Attention,
            &format!("{prefix}.o_proj"),
            [hidden_size, mla.num_heads * mla.v_head_dim],
            false,
        )?;
        let indexer = match (layer.index, mla.q_lora_rank) {
            (IndexSource::Own, Some(rank)) => Some(self.indexer(&format!("{prefix}.indexer"), rank)?),
            _ => None,
        };
        let kv_a_norm = self.vector(&format!("{prefix}.kv_a_layernorm.weight"), mla.kv_lora_rank)?;
        Ok(MlaWeights { query, kv_a, kv_a_norm, embed_q, unembed_out, o, indexer })
    }

    /// `kv_b_proj` as one matrix a head for the query's side and one for the values' side.
    fn kv_b(&mut self, prefix: &str, mla: &Mla) -> Result<(Weight, Weight)> {
        let shape = MlaShape {
            num_heads: mla.num_heads,
            qk_nope_head_dim: mla.qk_nope_head_dim,
            v_head_dim: mla.v_head_dim,
            kv_lora_rank: mla.kv_lora_rank,
        };
        if self.target.is_none()
            && let Some(fused) = self.provider.fused_kv_b_format(prefix, shape)?
        {
            // Describing must not transpose gigabytes: the formats that mla_kv_b would give.
            let transposed = match fused {
                WeightFormat::F16 | WeightFormat::Bf16 => fused,
                _ => WeightFormat::F32,
            };
            let describe =
                |format, rows, cols| Weight { id: 0, format, count: mla.num_heads, rows, cols, has_bias: false };
            let embed_q = describe(transposed, mla.kv_lora_rank, mla.qk_nope_head_dim);
            let unembed_out = describe(fused, mla.v_head_dim, mla.kv_lora_rank);
            self.count_weight(Component::Attention, &embed_q);
            self.count_weight(Component::Attention, &unembed_out);
            return Ok((embed_q, unembed_out));
        }
        let kv_b = self.provider.mla_kv_b(prefix, shape)?;
        let (queries, values) = (matrix_views(&kv_b.embed_q), matrix_views(&kv_b.unembed_out));
        let embed_q = self.load(Component::Attention, &format!("{prefix}.kv_b_proj (queries)"), &queries, None)?;
        let unembed_out = self.load(Component::Attention, &format!("{prefix}.kv_b_proj (values)"), &values, None)?;
        Ok((embed_q, unembed_out))
    }

    fn indexer(&mut self, prefix: &str, q_lora_rank: usize) -> Result<IndexerWeights> {
        let hidden_size = self.config.hidden_size;
        let indexer = self.config.indexer.expect("layers with an indexer exist only where the config has one");
        let mut project =
            |name: &str, shape| self.linear(Component::Indexer, &format!("{prefix}.{name}"), shape, false);
        Ok(IndexerWeights {
            wq_b: project("wq_b", [indexer.num_heads * indexer.head_dim, q_lora_rank])?,
            wk: project("wk", [indexer.head_dim, hidden_size])?,
            weights_proj: project("weights_proj", [indexer.num_heads, hidden_size])?,
            k_norm_weight: self.vector(&format!("{prefix}.k_norm.weight"), indexer.head_dim)?,
            k_norm_bias: self.vector(&format!("{prefix}.k_norm.bias"), indexer.head_dim)?,
        })
    }

    fn swiglu(&mut self, component: Component, prefix: &str, intermediate_size: usize) -> Result<DenseWeights> {
        let hidden_size = self.config.hidden_size;
        let mut project = |name: &str, shape| self.linear(component, &format!("{prefix}.{name}"), shape, false);
        Ok(DenseWeights {
            gate: project("gate_proj", [intermediate_size, hidden_size])?,
            up: project("up_proj", [intermediate_size, hidden_size])?,
            down: project("down_proj", [hidden_size, intermediate_size])?,
        })
    }

    fn moe(&mut self, layer: &str) -> Result<MoeWeights> {
        let (moe, hidden_size) = (self.config.moe, self.config.hidden_size);
        let block = format!("{layer}.{}", moe.block_name);
        let router_name = format!("{block}.{}", moe.router_name);
        // The tensors say how many experts the layer has; router and bias must agree with them.
        let num_experts = self.provider.num_experts(&block)?;
        let unfit = |expected: String| Error::Weight {
            name: block.clone(),
            what: "number of experts",
            found: num_experts.to_string(),
            expected,
        };
        if num_experts < moe.num_experts_per_tok {
            return Err(unfit(format!("at least num_experts_per_tok ({})", moe.num_experts_per_tok)));
        }
        if moe.n_group > 1 && !num_experts.is_multiple_of(moe.n_group) {
            return Err(unfit(format!("a multiple of n_group ({}), or groups change their meaning", moe.n_group)));
        }
        let router = self.linear(Component::Router, &router_name, [num_experts, hidden_size], moe.router_bias)?;
        let correction_bias = match moe.correction_bias {
            true => Some(self.vector(&format!("{router_name}.e_score_correction_bias"), num_experts)?),
            false => None,
        };
        let experts = self.experts(&block, num_experts)?;
        let shared = match moe.shared_intermediate_size {
            Some(size) => Some(self.swiglu(Component::SharedExperts, &format!("{layer}.mlp.shared_experts"), size)?),
            None => None,
        };
        Ok(MoeWeights { router, correction_bias, experts, shared })
    }

    fn experts(&mut self, prefix: &str, num_experts: usize) -> Result<Experts> {
        let (moe, hidden_size) = (self.config.moe, self.config.hidden_size);
        let (up_shape, down_shape) =
            ([moe.moe_intermediate_size, hidden_size], [hidden_size, moe.moe_intermediate_size]);
        let gate = self.provider.experts(prefix, Projection::Gate, num_experts, up_shape)?;
        let up = self.provider.experts(prefix, Projection::Up, num_experts, up_shape)?;
        let down = self.provider.experts(prefix, Projection::Down, num_experts, down_shape)?;
        let biases = match (moe.expert_bias, &self.target) {
            (true, Some(_)) => {
                let read = |projection, rows| {
                    let biases = self.provider.expert_biases(prefix, projection, rows)?;
                    let missing = || Error::Weight {
                        name: format!("{prefix}.experts"),
                        what: "expert biases",
                        found: "missing".to_owned(),
                        expected: format!("[{num_experts}, {rows}]"),
                    };
                    biases.ok_or_else(missing)
                };
                Some([
                    read(Projection::Gate, moe.moe_intermediate_size)?,
                    read(Projection::Up, moe.moe_intermediate_size)?,
                    read(Projection::Down, hidden_size)?,
                ])
            }
            _ => None,
        };
        let [gate_views, up_views, down_views] = [&gate, &up, &down].map(|list| matrix_views(list));
        let source = ExpertsSource {
            name: prefix,
            gate: &gate_views,
            up: &up_views,
            down: &down_views,
            biases: biases.as_ref().map(|b| [&b[0][..], &b[1][..], &b[2][..]]),
        };
        let experts = match &mut self.target {
            Some((backend, _)) => {
                for (projection, views) in
                    [("gate_proj", &gate_views), ("up_proj", &up_views), ("down_proj", &down_views)]
                {
                    check_finite(&format!("{prefix}.experts.{projection}"), views)?;
                }
                backend.load_experts(&source)?
            }
            None => source.describe(0)?,
        };
        for views in [&gate_views, &up_views, &down_views] {
            let bytes: u64 = views.iter().map(MatrixView::size_bytes).sum();
            let parameters = views.len() * views[0].rows * views[0].cols;
            let share = moe.num_experts_per_tok as f64 / num_experts as f64;
            self.count(
                Component::RoutedExperts,
                views[0].format,
                parameters as u64,
                (parameters as f64 * share) as usize,
                bytes,
                bytes as f64 * share,
            );
            self.finish(prefix, bytes, views);
        }
        Ok(experts)
    }

    fn linear(&mut self, component: Component, path: &str, shape: [usize; 2], biased: bool) -> Result<Weight> {
        let matrix = self.provider.linear(path, shape)?;
        let bias = match biased {
            true => Some(self.provider.vector(&format!("{path}.bias"), shape[0])?),
            false => None,
        };
        self.load(component, path, &[matrix.view()], bias.as_deref())
    }

    fn load(
        &mut self,
        component: Component,
        name: &str,
        views: &[MatrixView<'_>],
        bias: Option<&[f32]>,
    ) -> Result<Weight> {
        let source = WeightSource { name, matrices: views, bias };
        let weight = match &mut self.target {
            Some((backend, _)) => {
                check_finite(name, views)?;
                backend.load_weight(&source)?
            }
            None => source.describe(0)?,
        };
        self.count_weight(component, &weight);
        self.finish(name, weight.size_bytes(), views);
        Ok(weight)
    }

    /// Loads a vector as f32, `[1, len]`.
    fn vector(&mut self, name: &str, len: usize) -> Result<Tensor> {
        let tensor = match &mut self.target {
            Some((backend, _)) => {
                let values = self.provider.vector(name, len)?;
                let tensor = backend.alloc(name, ElementType::F32, len)?.tensor(1, len);
                backend.write_f32(tensor, &values)?;
                tensor
            }
            None => {
                self.provider.vector(name, len)?;
                Buffer { id: 0, element: ElementType::F32, len }.tensor(1, len)
            }
        };
        self.count(Component::Norms, WeightFormat::F32, len as u64, len, 4 * len as u64, 4.0 * len as f64);
        Ok(tensor)
    }

    fn count_weight(&mut self, component: Component, weight: &Weight) {
        let parameters = weight.count * weight.rows * weight.cols;
        self.count(
            component,
            weight.format,
            parameters as u64,
            parameters,
            weight.size_bytes(),
            weight.size_bytes() as f64,
        );
    }

    fn count(
        &mut self,
        component: Component,
        format: WeightFormat,
        parameters: u64,
        active: usize,
        size_bytes: u64,
        bytes_per_token: f64,
    ) {
        self.account.entries.push(Entry {
            component,
            mtp: self.mtp,
            format: format.to_string(),
            parameters,
            size_bytes,
            active_parameters: active as f64,
            bytes_per_token,
        });
    }

    /// Gives the module's pages back and reports progress.
    fn finish(&mut self, name: &str, bytes: u64, views: &[MatrixView<'_>]) {
        self.done_bytes += bytes;
        let done_bytes = self.done_bytes;
        if let Some((_, progress)) = &mut self.target {
            self.provider.release(views);
            progress(Progress { done_bytes, name });
        }
    }
}

/// Refuses NaN and infinite scales, offsets and floats, on all cores: this reads every byte once before it is repacked.
pub(crate) fn check_finite(name: &str, views: &[MatrixView<'_>]) -> Result<()> {
    use rayon::prelude::*;
    views.par_iter().try_for_each(|view| Checkpoint::check_finite(name, view))?;
    Ok(())
}

fn matrix_views<'a>(matrices: &'a [Matrix<'_>]) -> Vec<MatrixView<'a>> {
    matrices.iter().map(Matrix::view).collect()
}
