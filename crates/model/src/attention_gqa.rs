//! Grouped-query attention: optional biases, head norms, sinks and window.

use crate::Result;
use crate::config::Gqa;
use crate::decoder::Pass;
use crate::weights::GqaWeights;
use moellon_ops::{AttendGqa, KvStore, Linear, RmsNorm, Rope, Stage, Tensor};

/// `out = attention(x)` for `x` `[num_tokens, hidden_size]`; stores the layer's keys and values.
pub(crate) fn forward(
    pass: &mut Pass<'_, '_>,
    weights: &GqaWeights,
    gqa: &Gqa,
    layer: usize,
    x: Tensor,
    out: Tensor,
) -> Result<()> {
    let (decoder, step) = (pass.decoder, pass.step);
    let (space, tokens) = (&decoder.workspace, step.num_tokens);
    let kv_width = gqa.num_kv_heads * gqa.head_dim;
    let q = space.q.tensor(tokens, gqa.num_heads * gqa.head_dim);
    // Keys and values as two contiguous halves, so that heads can be normed as rows.
    let k = space.kv.tensor(tokens, kv_width);
    let v = Tensor { offset: tokens * kv_width, ..k };
    pass.backend.linear(&Linear { x, parts: &[(weights.q, q), (weights.k, k), (weights.v, v)] })?;
    for (heads, norm, count) in [(q, weights.q_norm, gqa.num_heads), (k, weights.k_norm, gqa.num_kv_heads)] {
        if let Some(weight) = norm {
            let rows = heads.split_rows(count);
            pass.backend.rms_norm(&RmsNorm {
                x: rows,
                delta: None,
                weight,
                eps: decoder.config.rms_norm_eps,
                out: rows,
            })?;
        }
    }
    let rope = |x, num_heads| Rope {
        x,
        num_heads,
        head_stride: gqa.head_dim,
        table: step.rope_table,
        pairs: decoder.config.rope.pairs,
    };
    pass.backend.rope(&rope(q, gqa.num_heads))?;
    pass.backend.rope(&rope(k, gqa.num_kv_heads))?;
    let cache = decoder.caches[layer].main;
    pass.backend.kv_store(&KvStore { parts: &[k, v], slots: step.slots, cache })?;
    pass.backend.stage(Stage::Attention);
    let attended = space.attended.tensor(tokens, q.cols);
    pass.backend.attend_gqa(&AttendGqa {
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
    pass.backend.stage(Stage::AttentionOutput);
    pass.backend.linear(&Linear { x: attended, parts: &[(weights.o, out)] })?;
    Ok(())
}
