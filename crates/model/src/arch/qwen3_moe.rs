//! Qwen3-MoE (`qwen3_moe`).

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
    let bias = fields.flag_or("attention_bias", false)?;
    let num_experts = match fields.optional_dimension("num_experts")? {
        Some(n) => n,
        None => fields.dimension("num_local_experts")?,
    };
    Ok(ModelConfig {
        architecture: Architecture::Qwen3Moe,
        hidden_size,
        vocab_size: fields.dimension("vocab_size")?,
        rms_norm_eps: eps(fields)?,
        max_position_embeddings: fields.dimension("max_position_embeddings")?,
        attention: Attention::Gqa(Gqa {
            num_heads,
            num_kv_heads: fields.dimension("num_key_value_heads")?,
            head_dim,
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: true,
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
            block_name: "mlp",
            router_name: "gate",
            num_experts,
            num_experts_per_tok: fields.dimension("num_experts_per_tok")?,
            moe_intermediate_size: fields.dimension("moe_intermediate_size")?,
            shared_intermediate_size: None,
            activation: Activation::SwiGlu,
            scoring: Scoring::SoftmaxThenTopk,
            correction_bias: false,
            router_bias: false,
            expert_bias: false,
            n_group: 1,
            topk_group: 1,
            norm_topk_prob: fields.flag_or("norm_topk_prob", false)?,
            routed_scaling_factor: 1.0,
        },
        layers: layers(fields, num_layers)?,
        num_mtp_layers: 0,
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

/// Every `decoder_sparse_step`-th layer is MoE unless `mlp_only_layers` names it; layers from `max_window_layers` on have
/// a window where `use_sliding_window` says so.
fn layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<Layer>> {
    let step = fields.count_or("decoder_sparse_step", 1)?.max(1);
    let dense_layers: Vec<u32> = fields.token_ids("mlp_only_layers")?;
    let intermediate_size = match fields.optional_dimension("intermediate_size")? {
        Some(n) => n,
        None => fields.dimension("moe_intermediate_size")?,
    };
    let window = match fields.flag_or("use_sliding_window", false)? {
        true => Some(fields.dimension("sliding_window")?),
        false => None,
    };
    let first_window = fields.count_or("max_window_layers", 0)?;
    let layer = |i: usize| Layer {
        index: IndexSource::None,
        window: window.filter(|_| i >= first_window),
        ffn: if !dense_layers.contains(&(i as u32)) && (i + 1).is_multiple_of(step) {
            Ffn::Moe
        } else {
            Ffn::Dense { intermediate_size }
        },
    };
    Ok((0..num_layers).map(layer).collect())
}
