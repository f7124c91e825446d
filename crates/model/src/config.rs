//! Every number of a model. The parsers in [`crate::arch`] fill it from `config.json`; nothing else reads that file.

use moellon_ops::{Activation, RopePairs, Route, Scoring, Tensor};

/// The architectures that we know, by `model_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// GLM-5, 5.1, 5.2, 5.3: MLA with sparse attention (`glm_moe_dsa`).
    GlmMoeDsa,
    /// DeepSeek-V3, V3.1, R1 (`deepseek_v3`).
    DeepseekV3,
    /// DeepSeek-V3.2 (`deepseek_v32`).
    DeepseekV32,
    /// GLM-4.5, 4.6, 4.7 (`glm4_moe`).
    Glm4Moe,
    /// GLM-4.7-Flash (`glm4_moe_lite`).
    Glm4MoeLite,
    /// Qwen3-MoE (`qwen3_moe`).
    Qwen3Moe,
    /// gpt-oss (`gpt_oss`).
    GptOss,
    /// Mixtral (`mixtral`).
    Mixtral,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 8] = [
        Architecture::GlmMoeDsa,
        Architecture::DeepseekV3,
        Architecture::DeepseekV32,
        Architecture::Glm4Moe,
        Architecture::Glm4MoeLite,
        Architecture::Qwen3Moe,
        Architecture::GptOss,
        Architecture::Mixtral,
    ];

    /// The `model_type` of its `config.json`.
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::GlmMoeDsa => "glm_moe_dsa",
            Architecture::DeepseekV3 => "deepseek_v3",
            Architecture::DeepseekV32 => "deepseek_v32",
            Architecture::Glm4Moe => "glm4_moe",
            Architecture::Glm4MoeLite => "glm4_moe_lite",
            Architecture::Qwen3Moe => "qwen3_moe",
            Architecture::GptOss => "gpt_oss",
            Architecture::Mixtral => "mixtral",
        }
    }
}

/// A decoder's shape and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which parser made it.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding and the head.
    pub vocab_size: usize,
    /// Added to the mean square in the norms of the residual stream.
    pub rms_norm_eps: f32,
    /// Positions that the model was made for.
    pub max_position_embeddings: usize,
    /// Heads and projections, the same in all layers.
    pub attention: Attention,
    /// Position embedding.
    pub rope: Rope,
    /// Sparse attention; `None` where every position is attended.
    pub indexer: Option<Indexer>,
    /// Routed experts; `None` would be a dense model.
    pub moe: Moe,
    /// One entry a layer.
    pub layers: Vec<Layer>,
    /// Multi-token-prediction layers that the config promises (the checkpoint may lack them).
    pub num_mtp_layers: usize,
    /// Whether the head is the embedding table.
    pub tie_word_embeddings: bool,
    /// Tokens that end a generation.
    pub eos_token_ids: Vec<u32>,
}

/// How queries, keys and values are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Attention {
    /// Grouped-query attention.
    Gqa(Gqa),
    /// Multi-head latent attention.
    Mla(Mla),
}

/// Grouped-query attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gqa {
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Whether q, k and v projections have biases.
    pub qkv_bias: bool,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// Whether each head of q and k is RMS-normed before rope.
    pub qk_norm: bool,
    /// Whether each head has a learned sink logit.
    pub sinks: bool,
    /// Factor on the logits.
    pub scale: f32,
}

/// Multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mla {
    /// Heads.
    pub num_heads: usize,
    /// Width of the query latent; `None` where queries are projected directly.
    pub q_lora_rank: Option<usize>,
    /// Width of the key/value latent.
    pub kv_lora_rank: usize,
    /// Part of a query head without rope.
    pub qk_nope_head_dim: usize,
    /// Part of a query head with rope, after the other.
    pub qk_rope_head_dim: usize,
    /// Elements of a value head.
    pub v_head_dim: usize,
    /// Eps of the latent norms. transformers and DeepSeek's code use 1e-6 whatever `rms_norm_eps` says; `latent_norm_eps`
    /// in `config.json` overrides it.
    pub latent_norm_eps: f32,
    /// Factor on the logits, yarn's share included.
    pub scale: f32,
}

/// Rotary position embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// `[dim / 2]`: radians per position, scaling included.
    pub inverse_frequencies: Vec<f32>,
    /// Factor on cosine and sine.
    pub scale: f32,
    /// Which elements rotate together.
    pub pairs: RopePairs,
}

impl Rope {
    /// Elements that rotate.
    pub fn dim(&self) -> usize {
        self.inverse_frequencies.len() * 2
    }
}

/// DeepSeek Sparse Attention's lightning indexer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Indexer {
    /// Heads.
    pub num_heads: usize,
    /// Elements of a head and of an index key; rope turns the first `qk_rope_head_dim` of them.
    pub head_dim: usize,
    /// Positions that attention may see.
    pub topk: usize,
    /// Which elements rotate together.
    pub rope_pairs: RopePairs,
    /// Eps of the key's layer norm.
    pub k_norm_eps: f32,
}

/// Routed experts, where a layer has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Moe {
    /// Module of the routed block below a layer: `mlp` or `block_sparse_moe`.
    pub block_name: &'static str,
    /// Module of the router below that: `gate` or `router`.
    pub router_name: &'static str,
    /// Experts that the config promises. Layers may have fewer or more: the tensors say.
    pub num_experts: usize,
    /// Experts that a token uses.
    pub num_experts_per_tok: usize,
    /// Width of an expert.
    pub moe_intermediate_size: usize,
    /// Width of the shared expert; `None` where there is none.
    pub shared_intermediate_size: Option<usize>,
    /// Between gate/up and down of the routed experts.
    pub activation: Activation,
    /// How logits become choices and weights.
    pub scoring: Scoring,
    /// Whether the router has a correction bias (`e_score_correction_bias`).
    pub correction_bias: bool,
    /// Whether the router's projection has a bias.
    pub router_bias: bool,
    /// Whether experts have biases.
    pub expert_bias: bool,
    /// Groups of experts; 1 for none.
    pub n_group: usize,
    /// Groups that stay eligible.
    pub topk_group: usize,
    /// Whether weights are divided by their sum.
    pub norm_topk_prob: bool,
    /// Factor on the weights.
    pub routed_scaling_factor: f32,
}

impl Moe {
    /// The choice of experts by `logits` `[num_tokens, num_experts]`, to `ids` and `weights` `[num_tokens, num_experts_per_tok]`.
    pub fn route(&self, logits: Tensor, correction_bias: Option<Tensor>, ids: Tensor, weights: Tensor) -> Route {
        Route {
            logits,
            correction_bias,
            scoring: self.scoring,
            n_group: self.n_group,
            topk_group: self.topk_group,
            norm_topk_prob: self.norm_topk_prob,
            routed_scaling_factor: self.routed_scaling_factor,
            ids,
            weights,
        }
    }
}

/// What is special about one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layer {
    /// Where attention's index set comes from.
    pub index: IndexSource,
    /// Positions that attention sees, itself included; `None` for all.
    pub window: Option<usize>,
    /// Its feed-forward.
    pub ffn: Ffn,
}

/// Where a layer's index set comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexSource {
    /// Attention is not sparse.
    None,
    /// The layer has an indexer ("full").
    Own,
    /// The set of the last layer that has one ("shared").
    Shared,
}

/// A layer's feed-forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ffn {
    /// SwiGLU of this width.
    Dense {
        /// Width.
        intermediate_size: usize,
    },
    /// Router, routed experts, shared expert.
    Moe,
}

impl ModelConfig {
    /// The MTP layer: always sparse, always with an indexer of its own where attention is sparse.
    pub fn mtp_layer(&self) -> Layer {
        let index = if self.indexer.is_some() { IndexSource::Own } else { IndexSource::None };
        Layer { index, window: None, ffn: Ffn::Moe }
    }

    /// Elements of a cached row of the main cache, and of the index cache where a layer has one.
    pub fn cache_widths(&self) -> (usize, Option<usize>) {
        let main = match self.attention {
            Attention::Gqa(gqa) => 2 * gqa.num_kv_heads * gqa.head_dim,
            Attention::Mla(mla) => mla.kv_lora_rank + mla.qk_rope_head_dim,
        };
        (main, self.indexer.map(|i| i.head_dim))
    }
}
