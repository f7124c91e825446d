//! DeepSeek Sparse Attention's lightning indexer: which positions a layer's attention may see. Spec: `glm52` section 3.

use crate::Result;
use crate::decoder::Pass;
use crate::tap::TapPoint;
use crate::weights::IndexerWeights;
use moellon_ops::{Cache, IndexScore, IndexSet, IndexTopk, KvStore, LayerNorm, Linear, Rope, Stage, Tensor};

/// Stores the layer's index keys and, once a context is longer than `index_topk`, scores them and picks the best.
/// `x` `[num_tokens, hidden_size]` is the attention's input, `q_latent` `[num_tokens, q_lora_rank]` the normed query latent.
/// `None` means every position.
pub(crate) fn select(
    pass: &mut Pass<'_, '_>,
    weights: &IndexerWeights,
    keys: Cache,
    layer: usize,
    x: Tensor,
    q_latent: Tensor,
) -> Result<Option<IndexSet>> {
    let (decoder, step) = (pass.decoder, pass.step);
    let config = decoder.config.indexer.expect("layers with an indexer exist only where the config has one");
    let (space, tokens) = (&decoder.workspace, step.num_tokens);
    pass.backend.stage(Stage::Indexer);
    let key = space.index_key.tensor(tokens, config.head_dim);
    let head_weights = space.index_weights.tensor(tokens, config.num_heads);
    pass.backend.linear(&Linear { x, parts: &[(weights.wk, key), (weights.weights_proj, head_weights)] })?;
    pass.backend.layer_norm(&LayerNorm {
        x: key,
        weight: weights.k_norm_weight,
        bias: weights.k_norm_bias,
        eps: config.k_norm_eps,
        out: key,
    })?;
    let rope = |x, num_heads| Rope {
        x,
        num_heads,
        head_stride: config.head_dim,
        table: step.rope_table,
        pairs: config.rope_pairs,
    };
    pass.backend.rope(&rope(key, 1))?;
    pass.backend.kv_store(&KvStore { parts: &[key], slots: step.slots, cache: keys })?;
    if step.paging.max_context <= config.topk {
        return Ok(None);
    }
    let q = space.index_q.tensor(tokens, config.num_heads * config.head_dim);
    pass.backend.linear(&Linear { x: q_latent, parts: &[(weights.wq_b, q)] })?;
    pass.backend.rope(&rope(q, config.num_heads))?;
    let scores = space.index_scores.tensor(tokens, step.paging.max_context);
    pass.backend.index_score(&IndexScore {
        q,
        weights: head_weights,
        cache: keys,
        num_heads: config.num_heads,
        head_dim: config.head_dim,
        scale: (config.head_dim as f32 * config.num_heads as f32).powf(-0.5),
        paging: step.paging,
        scores,
    })?;
    let ids = space.index_ids.tensor(tokens, config.topk);
    let counts = space.index_counts.tensor(1, tokens);
    pass.backend.index_topk(&IndexTopk { scores, positions: step.paging.positions, ids, counts })?;
    pass.tap(TapPoint::IndexSet(layer), &[ids, counts])?;
    Ok(Some(IndexSet { ids, counts }))
}
