//! Multi-head latent attention in absorbed form, with or without a sparse index set. Spec: `glm52` section 2.

use crate::Result;
use crate::config::{IndexSource, Mla};
use crate::decoder::Pass;
use crate::indexer;
use crate::weights::{MlaWeights, QueryWeights};
use moellon_ops::{AttendMla, KvStore, Linear, LinearHeads, RmsNorm, Rope, Stage, Tensor};

/// `out = attention(x)` for `x` `[num_tokens, hidden_size]`; stores the layer's latents.
pub(crate) fn forward(
    pass: &mut Pass<'_, '_>,
    weights: &MlaWeights,
    mla: &Mla,
    layer: usize,
    x: Tensor,
    out: Tensor,
) -> Result<()> {
    let (decoder, step) = (pass.decoder, pass.step);
    let (space, tokens) = (&decoder.workspace, step.num_tokens);
    let head_dim = mla.qk_nope_head_dim + mla.qk_rope_head_dim;
    let q = space.q.tensor(tokens, mla.num_heads * head_dim);
    let kv = space.kv.tensor(tokens, mla.kv_lora_rank + mla.qk_rope_head_dim);
    let (latent, k_pe) = (kv.columns(0, mla.kv_lora_rank), kv.columns(mla.kv_lora_rank, mla.qk_rope_head_dim));
    let norm = |x, weight| RmsNorm { x, delta: None, weight, eps: mla.latent_norm_eps, out: x };
    // The query latent, which the indexer reads too; the queries themselves where there is no latent.
    let q_latent = match &weights.query {
        QueryWeights::LowRank { q_a, q_a_norm, q_b } => {
            let q_latent = space.q_latent_raw.tensor(tokens, q_a.rows);
            pass.backend.linear(&Linear { x, parts: &[(*q_a, q_latent), (weights.kv_a, kv)] })?;
            pass.backend.rms_norm(&norm(q_latent, *q_a_norm))?;
            pass.backend.linear(&Linear { x: q_latent, parts: &[(*q_b, q)] })?;
            Some(q_latent)
        }
        QueryWeights::Direct { q: weight } => {
            pass.backend.linear(&Linear { x, parts: &[(*weight, q), (weights.kv_a, kv)] })?;
            None
        }
    };
    pass.backend.rms_norm(&norm(latent, weights.kv_a_norm))?;
    let q_rope = q.columns(mla.qk_nope_head_dim, q.cols - mla.qk_nope_head_dim);
    let pairs = decoder.config.rope.pairs;
    pass.backend.rope(&Rope {
        x: q_rope,
        num_heads: mla.num_heads,
        head_stride: head_dim,
        table: step.rope_table,
        pairs,
    })?;
    pass.backend.rope(&Rope {
        x: k_pe,
        num_heads: 1,
        head_stride: mla.qk_rope_head_dim,
        table: step.rope_table,
        pairs,
    })?;
    let cache = decoder.caches[layer];
    pass.backend.kv_store(&KvStore { parts: &[latent, k_pe], slots: step.slots, cache: cache.main })?;
    let q_absorbed = space.q_absorbed.tensor(tokens, mla.num_heads * mla.kv_lora_rank);
    pass.backend.linear_heads(&LinearHeads {
        x: q,
        x_head_stride: head_dim,
        weight: weights.embed_q,
        out: q_absorbed,
    })?;
    match (decoder.layer_config(layer).index, &weights.indexer, cache.index, q_latent) {
        (IndexSource::Own, ..) if pass.shares_index => {}
        (IndexSource::Own, Some(indexer), Some(keys), Some(q_latent)) => {
            pass.index_set = indexer::select(pass, indexer, keys, layer, x, q_latent)?;
        }
        (IndexSource::Shared, ..) => {}
        _ => pass.index_set = None,
    }
    pass.backend.stage(Stage::Attention);
    let latents = space.latents.tensor(tokens, mla.num_heads * mla.kv_lora_rank);
    pass.backend.attend_mla(&AttendMla {
        q_latent: q_absorbed,
        q_rope,
        q_rope_head_stride: head_dim,
        cache: cache.main,
        num_heads: mla.num_heads,
        kv_lora_rank: mla.kv_lora_rank,
        qk_rope_head_dim: mla.qk_rope_head_dim,
        scale: mla.scale,
        index: pass.index_set,
        paging: step.paging,
        out: latents,
    })?;
    pass.backend.stage(Stage::AttentionOutput);
    let attended = space.attended.tensor(tokens, mla.num_heads * mla.v_head_dim);
    pass.backend.linear_heads(&LinearHeads {
        x: latents,
        x_head_stride: mla.kv_lora_rank,
        weight: weights.unembed_out,
        out: attended,
    })?;
    pass.backend.linear(&Linear { x: attended, parts: &[(weights.o, out)] })?;
    Ok(())
}
