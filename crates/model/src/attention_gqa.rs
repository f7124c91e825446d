//! Grouped-query attention: optional biases, head norms, sinks and window.

use crate::Result;
use crate::config::Gqa;
use crate::decoder::{Decoder, Step};
use crate::weights::GqaWeights;
use moellon_ops::{AttendGqa, Backend, KvStore, Linear, RmsNorm, Rope, Stage, Tensor};

/// `out = attention(x)` for `x` `[num_tokens, hidden_size]`; stores the layer's keys and values.
pub(crate) fn forward(
    decoder: &Decoder,
    weights: &GqaWeights,
    gqa: &Gqa,
    layer: usize,
    step: &Step,
    x: Tensor,
    out: Tensor,
    backend: &mut dyn Backend,
) -> Result<()> {
    let (space, tokens) = (&decoder.workspace, step.num_tokens);
    let kv_width = gqa.num_kv_heads * gqa.head_dim;
    let q = space.q.tensor(tokens, gqa.num_heads * gqa.head_dim);
    // Keys and values as two contiguous halves, so that heads can be normed as rows.
    let k = space.kv.tensor(tokens, kv_width);
    let v = Tensor { offset: tokens * kv_width, ..k };
    backend.linear(&Linear { x, parts: &[(weights.q, q), (weights.k, k), (weights.v, v)] })?;
    for (heads, norm, count) in [(q, weights.q_norm, gqa.num_heads), (k, weights.k_norm, gqa.num_kv_heads)] {
        if let Some(weight) = norm {
            let rows = heads.split_rows(count);
            backend.rms_norm(&RmsNorm { x: rows, delta: None, weight, eps: decoder.config.rms_norm_eps, out: rows })?;
        }
    }
    let rope = |x, num_heads| Rope {
        x,
        num_heads,
        head_stride: gqa.head_dim,
        table: step.rope_table,
        pairs: decoder.config.rope.pairs,
    };
    backend.rope(&rope(q, gqa.num_heads))?;
    backend.rope(&rope(k, gqa.num_kv_heads))?;
    let cache = decoder.caches[layer].main;
    backend.kv_store(&KvStore { parts: &[k, v], slots: step.slots, cache })?;
    backend.stage(Stage::Attention);
    let attended = space.attended.tensor(tokens, q.cols);
    backend.attend_gqa(&AttendGqa {
        q,
        cache,
        num_heads: gqa.num_heads,
        num_kv_heads: gqa.num_kv_heads,
        head_dim: gqa.head_dim,
        scale: gqa.scale,
        window: decoder.layer_config(layer).window,
        sinks: weights.sinks,
        paging: step.paging,
        out: attended,
    })?;
    backend.stage(Stage::AttentionOutput);
    backend.linear(&Linear { x: attended, parts: &[(weights.o, out)] })?;
    Ok(())
}
