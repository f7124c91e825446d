//! A layer's feed-forward: dense, or router, routed experts and shared expert. Spec: `glm52` section 4.

use crate::Result;
use crate::decoder::Pass;
use crate::tap::TapPoint;
use crate::weights::{DenseWeights, FfnWeights, MoeWeights};
use moellon_ops::{Activation, GateUp, Linear, MoeDown, MoeGateUp, Stage, Tensor};

/// `out = ffn(x)` for `x` `[num_tokens, hidden_size]`.
pub(crate) fn forward(
    pass: &mut Pass<'_, '_>,
    weights: &FfnWeights,
    layer: usize,
    x: Tensor,
    out: Tensor,
) -> Result<()> {
    match weights {
        FfnWeights::Dense(dense) => swiglu(pass, dense, x, out),
        FfnWeights::Moe(moe) => routed(pass, moe, layer, x, out),
    }
}

fn swiglu(pass: &mut Pass<'_, '_>, weights: &DenseWeights, x: Tensor, out: Tensor) -> Result<()> {
    let h = pass.decoder.workspace.ffn.tensor(x.rows, weights.gate.rows);
    pass.backend.gate_up(&GateUp { x, gate: weights.gate, up: weights.up, activation: Activation::SwiGlu, out: h })?;
    pass.backend.linear(&Linear { x: h, parts: &[(weights.down, out)] })?;
    Ok(())
}

fn routed(pass: &mut Pass<'_, '_>, weights: &MoeWeights, layer: usize, x: Tensor, out: Tensor) -> Result<()> {
    let decoder = pass.decoder;
    let (space, moe, tokens) = (&decoder.workspace, &decoder.config.moe, x.rows);
    let top_k = moe.num_experts_per_tok;
    let logits = space.router_logits.tensor(tokens, weights.experts.num_experts);
    pass.backend.linear(&Linear { x, parts: &[(weights.router, logits)] })?;
    let ids = space.expert_ids.tensor(tokens, top_k);
    let expert_weights = space.expert_weights.tensor(tokens, top_k);
    pass.backend.route(&moe.route(logits, weights.correction_bias, ids, expert_weights))?;
    let shared = match &weights.shared {
        Some(shared) => {
            pass.backend.stage(Stage::SharedExpert);
            swiglu(pass, shared, x, out)?;
            Some(out)
        }
        None => None,
    };
    pass.backend.stage(Stage::Experts);
    let h = space.experts.tensor(tokens, top_k * weights.experts.intermediate_size);
    pass.backend.moe_gate_up(&MoeGateUp { x, experts: weights.experts, ids, activation: moe.activation, out: h })?;
    pass.tap(TapPoint::Experts(layer), &[x, ids, expert_weights, h])?;
    pass.backend.moe_down(&MoeDown { h, experts: weights.experts, ids, weights: expert_weights, plus: shared, out })?;
    Ok(())
}
