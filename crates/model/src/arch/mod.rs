//! One parser an architecture: `config.json` to [`ModelConfig`]. To add one: a file here, a variant of
//! [`Architecture`], a line in [`parse`], a tiny fixture. See `docs/adding-an-architecture.md`.

mod deepseek;
mod glm4_moe;
mod gpt_oss;
mod mixtral;
mod qwen3_moe;

use crate::config::{Architecture, Ffn, IndexSource, ModelConfig};
use crate::fields::Fields;
use crate::{Error, Result};
use serde_json::Value;

/// Reads a `config.json`.
///
/// # Errors
/// An unknown `model_type`, a missing field, or a value that no model can have, each by name.
pub fn parse(config: &Value) -> Result<ModelConfig> {
    let fields = Fields::new(config);
    let known = || Architecture::ALL.map(Architecture::model_type).join(", ");
    let model_type = fields.optional_text("model_type")?.ok_or_else(|| fields.error("model_type", known()))?;
    let architecture = Architecture::ALL.into_iter().find(|a| a.model_type() == model_type);
    let parsed = match architecture.ok_or_else(|| fields.error("model_type", known()))? {
        Architecture::GlmMoeDsa => deepseek::parse(&fields, Architecture::GlmMoeDsa),
        Architecture::DeepseekV3 => deepseek::parse(&fields, Architecture::DeepseekV3),
        Architecture::DeepseekV32 => deepseek::parse(&fields, Architecture::DeepseekV32),
        Architecture::Glm4MoeLite => deepseek::parse(&fields, Architecture::Glm4MoeLite),
        Architecture::Glm4Moe => glm4_moe::parse(&fields),
        Architecture::Qwen3Moe => qwen3_moe::parse(&fields),
        Architecture::GptOss => gpt_oss::parse(&fields),
        Architecture::Mixtral => mixtral::parse(&fields),
    }?;
    check(&parsed)?;
    Ok(parsed)
}

/// Relations between fields that every architecture must keep.
fn check(config: &ModelConfig) -> Result<()> {
    let moe = &config.moe;
    if moe.num_experts_per_tok > moe.num_experts {
        return Err(Error::config(
            "num_experts_per_tok",
            moe.num_experts_per_tok,
            format!("at most {} experts", moe.num_experts),
        ));
    }
    if moe.n_group == 0 || !moe.num_experts.is_multiple_of(moe.n_group) {
        return Err(Error::config("n_group", moe.n_group, format!("a divisor of {} experts", moe.num_experts)));
    }
    if !(1..=moe.n_group).contains(&moe.topk_group) {
        return Err(Error::config("topk_group", moe.topk_group, format!("1 to {} groups", moe.n_group)));
    }
    if moe.num_experts / moe.n_group * moe.topk_group < moe.num_experts_per_tok {
        let eligible = moe.num_experts / moe.n_group * moe.topk_group;
        return Err(Error::config(
            "topk_group",
            moe.topk_group,
            format!("enough groups for {} experts, not {eligible}", moe.num_experts_per_tok),
        ));
    }
    if config.layers.first().is_some_and(|l| l.index == IndexSource::Shared) {
        return Err(Error::config("indexer_types[0]", "shared", "full: there is no earlier layer to share with"));
    }
    if config.rope.dim() == 0 || !config.rope.dim().is_multiple_of(2) {
        return Err(Error::config("rotated head dimension", config.rope.dim(), "a positive even number"));
    }
    Ok(())
}

/// Number of layers: more than a thousand is no model.
fn num_layers(fields: &Fields<'_>) -> Result<usize> {
    let layers = fields.dimension("num_hidden_layers")?;
    if layers > 1000 { Err(fields.error("num_hidden_layers", "at most 1000")) } else { Ok(layers) }
}

/// `eps` as the models write it.
fn eps(fields: &Fields<'_>) -> Result<f32> {
    Ok(fields.positive_number("rms_norm_eps")? as f32)
}

/// The first `first_k_dense_replace` layers dense, the others MoE, unless `mlp_layer_types` says otherwise.
fn ffn_schedule(fields: &Fields<'_>, num_layers: usize) -> Result<Vec<Ffn>> {
    let dense = Ffn::Dense { intermediate_size: fields.dimension("intermediate_size")? };
    if let Some(types) = fields.optional_texts("mlp_layer_types", num_layers)? {
        let parse = |t: &&str| match *t {
            "dense" => Ok(dense),
            "sparse" => Ok(Ffn::Moe),
            other => Err(Error::config("mlp_layer_types", other, "dense or sparse")),
        };
        return types.iter().map(parse).collect();
    }
    let first = fields.count_or("first_k_dense_replace", 0)?;
    let frequency = fields.count_or("moe_layer_freq", 1)?.max(1);
    Ok((0..num_layers).map(|i| if i >= first && i.is_multiple_of(frequency) { Ffn::Moe } else { dense }).collect())
}

/// The router that GLM and DeepSeek-V3 share (`noaux_tc`): fields present in all of their configs.
fn sigmoid_router(fields: &Fields<'_>) -> Result<crate::config::Moe> {
    fields.expect_text("scoring_func", &["sigmoid"])?;
    fields.expect_text("topk_method", &["noaux_tc"])?;
    fields.expect_text("hidden_act", &["silu"])?;
    let moe_intermediate_size = fields.dimension("moe_intermediate_size")?;
    let shared = fields.count_or("n_shared_experts", 0)?;
    Ok(crate::config::Moe {
        block_name: "mlp",
        router_name: "gate",
        num_experts: fields.dimension("n_routed_experts")?,
        num_experts_per_tok: fields.dimension("num_experts_per_tok")?,
        moe_intermediate_size,
        shared_intermediate_size: (shared > 0).then_some(shared * moe_intermediate_size),
        activation: moellon_ops::Activation::SwiGlu,
        scoring: moellon_ops::Scoring::Sigmoid,
        correction_bias: true,
        router_bias: false,
        expert_bias: false,
        n_group: fields.count_or("n_group", 1)?,
        topk_group: fields.count_or("topk_group", 1)?,
        norm_topk_prob: fields.flag_or("norm_topk_prob", true)?,
        routed_scaling_factor: fields.number_or("routed_scaling_factor", 1.0)? as f32,
    })
}
