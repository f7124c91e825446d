//! The MLA family: `glm_moe_dsa` (GLM-5.x), `deepseek_v3`, `deepseek_v32`, `glm4_moe_lite`. Spec: `glm52` sections 1-4.

use super::{eps, ffn_schedule, num_layers, sigmoid_router};
use crate::config::{Architecture, Attention, IndexSource, Indexer, Layer, Mla, ModelConfig, Rope};
use crate::fields::Fields;
use crate::{Error, Result, rope};
use moellon_ops::RopePairs;

pub(super) fn parse(fields: &Fields<'_>, architecture: Architecture) -> Result<ModelConfig> {
    let num_layers = num_layers(fields)?;
    let qk_nope_head_dim = fields.dimension("qk_nope_head_dim")?;
    let qk_rope_head_dim = fields.dimension("qk_rope_head_dim")?;
    let scaling = rope::parse(fields, qk_rope_head_dim)?;
    // transformers hard-codes interleaved pairs for glm_moe_dsa and defaults to them elsewhere.
    let pairs = rope_pairs(fields.flag_or("rope_interleave", true)?);
    let mla = Mla {
        num_heads: fields.dimension("num_attention_heads")?,
        q_lora_rank: fields.optional_dimension("q_lora_rank")?,
        kv_lora_rank: fields.dimension("kv_lora_rank")?,
        qk_nope_head_dim,
        qk_rope_head_dim,
        v_head_dim: fields.dimension("v_head_dim")?,
        latent_norm_eps: fields.number_or("latent_norm_eps", 1e-6)? as f32,
        scale: (((qk_nope_head_dim + qk_rope_head_dim) as f64).powf(-0.5) * scaling.softmax_factor) as f32,
    };
    if fields.flag_or("attention_bias", false)? {
        return Err(fields.error("attention_bias", "false (biases in latent attention are not supported)"));
    }
    let indexer = indexer(fields, architecture, &mla)?;
    let sources = index_sources(fields, architecture, num_layers)?;
    let layers = ffn_schedule(fields, num_layers)?
        .into_iter()
        .zip(sources)
        .map(|(ffn, index)| Layer { index, window: None, ffn })
        .collect();
    Ok(ModelConfig {
        architecture,
        hidden_size: fields.dimension("hidden_size")?,
        vocab_size: fields.dimension("vocab_size")?,
        rms_norm_eps: eps(fields)?,
        max_position_embeddings: fields.dimension("max_position_embeddings")?,
        attention: Attention::Mla(mla),
        rope: Rope { inverse_frequencies: scaling.inverse_frequencies, scale: scaling.scale, pairs },
        indexer,
        moe: sigmoid_router(fields)?,
        layers,
        num_mtp_layers: fields.count_or("num_nextn_predict_layers", 0)?,
        tie_word_embeddings: fields.flag_or("tie_word_embeddings", false)?,
        eos_token_ids: fields.token_ids("eos_token_id")?,
    })
}

fn rope_pairs(interleaved: bool) -> RopePairs {
    if interleaved { RopePairs::Interleaved } else { RopePairs::HalfSplit }
}

fn indexer(fields: &Fields<'_>, architecture: Architecture, mla: &Mla) -> Result<Option<Indexer>> {
    let interleaved_by_default = match architecture {
        Architecture::GlmMoeDsa => true,
        Architecture::DeepseekV32 => false,
        _ => return Ok(None),
    };
    let indexer = Indexer {
        num_heads: fields.dimension("index_n_heads")?,
        head_dim: fields.dimension("index_head_dim")?,
        topk: fields.dimension("index_topk")?,
        rope_pairs: rope_pairs(fields.flag_or("indexer_rope_interleave", interleaved_by_default)?),
        // nn.LayerNorm's default would be 1e-5; transformers and vLLM say 1e-6.
        k_norm_eps: 1e-6,
    };
    if mla.q_lora_rank.is_none() {
        return Err(fields.error("q_lora_rank", "a number: the indexer reads the query latent"));
    }
    if indexer.head_dim < mla.qk_rope_head_dim {
        return Err(fields.error("index_head_dim", format!("at least qk_rope_head_dim ({})", mla.qk_rope_head_dim)));
    }
    Ok(Some(indexer))
}

/// `indexer_types`, else `index_topk_pattern`, else `index_topk_freq` and `index_skip_topk_offset`.
fn index_sources(fields: &Fields<'_>, architecture: Architecture, num_layers: usize) -> Result<Vec<IndexSource>> {
    match architecture {
        Architecture::GlmMoeDsa => {}
        Architecture::DeepseekV32 => return Ok(vec![IndexSource::Own; num_layers]),
        _ => return Ok(vec![IndexSource::None; num_layers]),
    }
    let parse = |text: &str| match text {
        "full" | "F" => Ok(IndexSource::Own),
        "shared" | "S" => Ok(IndexSource::Shared),
        other => Err(Error::config("indexer_types", other, "full or shared")),
    };
    if let Some(types) = fields.optional_texts("indexer_types", num_layers)? {
        return types.into_iter().map(parse).collect();
    }
    if fields.get("index_topk_pattern").is_some_and(|v| v.is_array()) {
        let pattern = fields.optional_texts("index_topk_pattern", num_layers)?.unwrap_or_default();
        return pattern.into_iter().map(parse).collect();
    }
    if let Some(pattern) = fields.optional_text("index_topk_pattern")?.filter(|p| !p.is_empty()) {
        if pattern.chars().count() != num_layers {
            return Err(fields.error("index_topk_pattern", format!("{num_layers} letters F or S")));
        }
        return pattern.chars().map(|c| parse(c.encode_utf8(&mut [0; 4]))).collect();
    }
    let frequency = fields.count_or("index_topk_freq", 1)?.max(1);
    let offset = fields.count_or("index_skip_topk_offset", 2)?;
    let own = |i: usize| (i + 1).saturating_sub(offset).is_multiple_of(frequency);
    Ok((0..num_layers).map(|i| if own(i) { IndexSource::Own } else { IndexSource::Shared }).collect())
}
