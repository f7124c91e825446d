//! Mixtral (`mixtral`).

use super::{eps, num_layers};
use crate::config::{Architecture, Attention, Ffn, Gqa, IndexSource, Layer, ModelConfig, Moe, Rope};
use crate::fields::Fields;
use crate::{Result, rope};
use moellon_ops::{Activation, RopePairs, Scoring};

pub(super) fn parse(fields: &Fields<'_>) -> Result<ModelConfig> {
    fields.expect_text("hidden_act", &["silu"])?;
    let num_layers = num_layers(fields)?;
    let num_heads = fields.dimension("num_attention_heads")?;
    let hidden_size = fields.dimension("hidden_size")?;
    let head_dim = fields.optional_dimension("head_dim")?.unwrap_or(hidden_size / num_heads);
    let scaling = rope::parse(fields, head_dim)?;
    let window = fields.optional_dimension("sliding_window")?;
    Ok(ModelConfig {
        architecture: Architecture::Mixtral,
        hidden_size,
        vocab_size: fields.dimension("vocab_size")?,
        rms_norm_eps: eps(fields)?,
        max_position_embeddings: fields.dimension("max_position_embeddings")?,
        attention: Attention::Gqa(Gqa {
            num_heads,
            num_kv_heads: fields.dimension("num_key_value_heads")?,
            head_dim,
            qkv_bias: false,
            output_bias: false,
            qk_norm: false,
            sinks: false,
            scale: (head_dim as f32).powf(-0.5),
        }),
        rope: Rope {
            inverse_frequencies: scaling.inverse_frequencies,
            scale: scaling.scale,
            pairs: RopePairs::HalfSplit,
        },
        indexer: None,
        moe: Moe {
            block_name: "block_sparse_moe",
            router_name: "gate",
            num_experts: fields.dimension("num_local_experts")?,
            num_experts_per_tok: fields.dimension("num_experts_per_tok")?,
            moe_intermediate_size: fields.dimension("intermediate_size")?,
            shared_intermediate_size: None,
            activation: Activation::SwiGlu,
            scoring: Scoring::SoftmaxThenTopk,
            correction_bias: false,
            router_bias: false,
            expert_bias: false,
            n_group: 1,
            topk_group: 1,
            norm_topk_prob: true,
            routed_scaling_factor: 1.0,
        },
        layers: vec![Layer { index: IndexSource::None, window, ffn: Ffn::Moe }; num_layers],
        num_mtp_layers: 0,
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}
