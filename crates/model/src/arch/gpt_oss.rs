//! gpt-oss (`gpt_oss`): sinks, alternating windows, clamped SwiGLU, biases everywhere.

use super::{eps, num_layers};
use crate::config::{Architecture, Attention, Ffn, Gqa, IndexSource, Layer, ModelConfig, Moe, Rope};
use crate::fields::Fields;
use crate::{Error, Result, rope};
use moellon_ops::{Activation, RopePairs, Scoring};

pub(super) fn parse(fields: &Fields<'_>) -> Result<ModelConfig> {
    let num_layers = num_layers(fields)?;
    let head_dim = fields.dimension("head_dim")?;
    let scaling = rope::parse(fields, head_dim)?;
    let bias = fields.flag_or("attention_bias", true)?;
    let num_experts = match fields.optional_dimension("num_local_experts")? {
        Some(n) => n,
        None => fields.dimension("num_experts")?,
    };
    Ok(ModelConfig {
        architecture: Architecture::GptOss,
        hidden_size: fields.dimension("hidden_size")?,
        vocab_size: fields.dimension("vocab_size")?,
        rms_norm_eps: eps(fields)?,
        max_position_embeddings: fields.dimension("max_position_embeddings")?,
        attention: Attention::Gqa(Gqa {
            num_heads: fields.dimension("num_attention_heads")?,
            num_kv_heads: fields.dimension("num_key_value_heads")?,
            head_dim,
            qkv_bias: bias,
            output_bias: bias,
            qk_norm: false,
            sinks: true,
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
            router_name: "router",
            num_experts,
            num_experts_per_tok: match fields.optional_dimension("num_experts_per_tok")? {
                Some(n) => n,
                None => fields.dimension("experts_per_token")?,
            },
            moe_intermediate_size: fields.dimension("intermediate_size")?,
            shared_intermediate_size: None,
            activation: Activation::ClampedSwiGlu {
                alpha: 1.702,
                limit: fields.number_or("swiglu_limit", 7.0)? as f32,
            },
            scoring: Scoring::TopkThenSoftmax,
            correction_bias: false,
            router_bias: true,
            expert_bias: true,
            n_group: 1,
            topk_group: 1,
            norm_topk_prob: false,
            routed_scaling_factor: 1.0,
        },
        layers: layers(fields, num_layers)?,
        num_mtp_layers: 0,
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

/// `layer_types`, or windows on the even layers.
fn layers(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<Layer>> {
    let window = fields.optional_dimension("sliding_window")?;
    let types = fields.optional_texts("layer_types", num_layers)?;
    let layer = |i: usize| {
        let slides = match types.as_ref().map(|t| t[i]) {
            Some("sliding_attention") => true,
            Some("full_attention") => false,
            Some(other) => {
                return Err(Error::config(format!("layer_types[{i}]"), other, "sliding_attention or full_attention"));
            }
            None => i.is_multiple_of(2),
        };
        if slides && window.is_none() {
            return Err(fields.error("sliding_window", "a positive integer"));
        }
        Ok(Layer { index: IndexSource::None, window: window.filter(|_| slides), ffn: Ffn::Moe })
    };
    (0..num_layers).map(layer).collect()
}
