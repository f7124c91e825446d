//! A layer's feed-forward: dense, or router, routed experts and shared expert. Spec: `glm52` section 4.

use crate::Result;
use crate::decoder::Decoder;
use crate::tap::{Tap, TapPoint};
use crate::weights::{DenseWeights, FfnWeights, MoeWeights};
use moellon_ops::{Activation, Backend, GateUp, Linear, MoeDown, MoeGateUp, Route, Stage, Tensor};

/// `out = ffn(x)` for `x` `[num_tokens, hidden_size]`.
pub(crate) fn forward(
    decoder: &Decoder,
    weights: &FfnWeights,
    layer: usize,
    x: Tensor,
    out: Tensor,
    backend: &mut dyn Backend,
    tap: &mut Option<&mut dyn Tap>,
) -> Result<()> {
    match weights {
        FfnWeights::Dense(dense) => swiglu(decoder, dense, x, out, backend),
        FfnWeights::Moe(moe) => routed(decoder, moe, layer, x, out, backend, tap),
    }
}

fn swiglu(decoder: &Decoder, weights: &DenseWeights, x: Tensor, out: Tensor, backend: &mut dyn Backend) -> Result<()> {
    let h = decoder.workspace.ffn.tensor(x.rows, weights.gate.rows);
    backend.gate_up(&GateUp { x, gate: weights.gate, up: weights.up, activation: Activation::SwiGlu, out: h })?;
    backend.linear(&Linear { x: h, parts: &[(weights.down, out)] })?;
    Ok(())
}

fn routed(
    decoder: &Decoder,
    weights: &MoeWeights,
    layer: usize,
    x: Tensor,
    out: Tensor,
    backend: &mut dyn Backend,
    tap: &mut Option<&mut dyn Tap>,
) -> Result<()> {
    let (space, moe, tokens) = (&decoder.workspace, &decoder.config.moe, x.rows);
    let top_k = moe.num_experts_per_tok;
    let logits = space.router_logits.tensor(tokens, weights.experts.num_experts);
    backend.linear(&Linear { x, parts: &[(weights.router, logits)] })?;
    let ids = space.expert_ids.tensor(tokens, top_k);
    let expert_weights = space.expert_weights.tensor(tokens, top_k);
    backend.route(&Route {
        logits,
        correction_bias: weights.correction_bias,
        scoring: moe.scoring,
        n_group: moe.n_group,
        topk_group: moe.topk_group,
        norm_topk_prob: moe.norm_topk_prob,
        routed_scaling_factor: moe.routed_scaling_factor,
        ids,
        weights: expert_weights,
    })?;
    let shared = match &weights.shared {
        Some(shared) => {
            backend.stage(Stage::SharedExpert);
            swiglu(decoder, shared, x, out, backend)?;
            Some(out)
        }
        None => None,
    };
    backend.stage(Stage::Experts);
    let h = space.experts.tensor(tokens, top_k * weights.experts.intermediate_size);
    backend.moe_gate_up(&MoeGateUp { x, experts: weights.experts, ids, activation: moe.activation, out: h })?;
    if let Some(tap) = tap {
        tap.at(TapPoint::Experts(layer), &[x, ids, expert_weights, h], backend)?;
    }
    backend.moe_down(&MoeDown { h, experts: weights.experts, ids, weights: expert_weights, plus: shared, out })?;
    Ok(())
}
