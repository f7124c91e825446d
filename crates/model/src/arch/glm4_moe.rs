//! GLM-4.5, 4.6, 4.7 (`glm4_moe`): grouped-query attention, GLM's router.

use super::{eps, ffn_schedule, num_layers, sigmoid_router};
use crate::config::{Architecture, Attention, Gqa, IndexSource, Layer, ModelConfig, Rope};
use crate::fields::Fields;
use crate::{Result, rope};
use moellon_ops::RopePairs;

pub(super) fn parse(fields: &Fields<'_>) -> Result<ModelConfig> {
    let num_layers = num_layers(fields)?;
    let num_heads = fields.dimension("num_attention_heads")?;
    let hidden_size = fields.dimension("hidden_size")?;
    let head_dim = fields.optional_dimension("head_dim")?.unwrap_or(hidden_size / num_heads);
    let nested =
        fields.object("rope_parameters").map(|r| r.optional_number("partial_rotary_factor")).transpose()?.flatten();
    let partial = match nested {
        Some(partial) => partial,
        None => fields.number_or("partial_rotary_factor", 0.5)?,
    };
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(fields.error("partial_rotary_factor", "above 0, at most 1"));
    }
    let scaling = rope::parse(fields, (head_dim as f64 * partial) as usize)?;
    let layer = |ffn| Layer { index: IndexSource::None, window: None, ffn };
    Ok(ModelConfig {
        architecture: Architecture::Glm4Moe,
        hidden_size,
        vocab_size: fields.dimension("vocab_size")?,
        rms_norm_eps: eps(fields)?,
        max_position_embeddings: fields.dimension("max_position_embeddings")?,
        attention: Attention::Gqa(Gqa {
            num_heads,
            num_kv_heads: fields.dimension("num_key_value_heads")?,
            head_dim,
            qkv_bias: fields.flag_or("attention_bias", false)?,
            output_bias: false,
            qk_norm: fields.flag_or("use_qk_norm", false)?,
            sinks: false,
            scale: (head_dim as f32).powf(-0.5),
        }),
        rope: Rope {
            inverse_frequencies: scaling.inverse_frequencies,
            scale: scaling.scale,
            pairs: RopePairs::HalfSplit,
        },
        indexer: None,
        moe: sigmoid_router(fields)?,
        layers: ffn_schedule(fields, num_layers)?.into_iter().map(layer).collect(),
        num_mtp_layers: fields.count_or("num_nextn_predict_layers", 0)?,
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}
