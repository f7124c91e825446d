//! The router: logits to chosen experts and their weights.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, floats, ids, normal_rows, upload, upload_row, zero_ids, zeros};
use crate::error::expect;
use crate::reference::Memory;

/// How logits become choices and weights. Spec: `glm52` sections 4 and 10.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scoring {
    /// `s = sigmoid(logits)`; chosen by `s + correction_bias`, weighted by `s` (DeepSeek-V3 noaux_tc, GLM).
    Sigmoid,
    /// `s = softmax(logits)` over all experts; chosen and weighted by `s` (Qwen3, Mixtral).
    SoftmaxThenTopk,
    /// Chosen by logits, weights are the softmax over the chosen (gpt-oss).
    TopkThenSoftmax,
}

/// Chooses `top_k` experts a row, best first (the lower index first where equal), with their weights.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// `[num_tokens, num_experts]`.
    pub logits: Tensor,
    /// `[1, num_experts]`, added for the choice only.
    pub correction_bias: Option<Tensor>,
    /// How logits become choices and weights.
    pub scoring: Scoring,
    /// Contiguous groups of experts; 1 for none. A group's score is the sum of its two best.
    pub n_group: usize,
    /// Groups that stay eligible.
    pub topk_group: usize,
    /// Whether the weights of the chosen are divided by their sum (plus 1e-20).
    pub norm_topk_prob: bool,
    /// Factor on the weights.
    pub routed_scaling_factor: f32,
    /// `[num_tokens, top_k]` u32.
    pub ids: Tensor,
    /// `[num_tokens, top_k]`.
    pub weights: Tensor,
}

impl Route {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "route";
        let (num_tokens, num_experts, top_k) = (self.logits.rows, self.logits.cols, self.ids.cols);
        self.logits.check_f32(op, "logits", [num_tokens, num_experts])?;
        if let Some(bias) = self.correction_bias {
            bias.check_f32(op, "correction_bias", [1, num_experts])?;
        }
        self.ids.check_u32(op, "ids", [num_tokens, top_k])?;
        self.weights.check_f32(op, "weights", [num_tokens, top_k])?;
        let groups = self.n_group >= 1 && num_experts.is_multiple_of(self.n_group);
        expect(op, groups, "n_group", self.n_group, format_args!("a divisor of {num_experts} experts"))?;
        let kept = (1..=self.n_group).contains(&self.topk_group);
        expect(op, kept, "topk_group", self.topk_group, format_args!("1 to {}", self.n_group))?;
        let eligible = num_experts / self.n_group * self.topk_group;
        expect(op, (1..=eligible).contains(&top_k), "top_k", top_k, format_args!("1 to {eligible} eligible experts"))
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.logits.rows * (self.logits.cols + 2 * self.ids.cols) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let bias = self.correction_bias.map(|b| memory.row(b));
        let (mut all_ids, mut all_weights) = (Vec::new(), Vec::new());
        for logits in memory.rows(self.logits) {
            let (ids, weights) = self.route_row(&logits, bias.as_deref());
            all_ids.push(ids);
            all_weights.push(weights);
        }
        memory.set_ids(self.ids, &all_ids);
        memory.set_rows(self.weights, &all_weights);
    }

    /// One row of the reference: ids and weights of the chosen experts. Public so that a back end may use it where a
    /// few hundred logits are not worth a kernel.
    pub fn route_row(&self, logits: &[f32], correction_bias: Option<&[f32]>) -> (Vec<u32>, Vec<f32>) {
        let scores: Vec<f32> = match self.scoring {
            Scoring::Sigmoid => logits.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Scoring::SoftmaxThenTopk => softmax(logits),
            Scoring::TopkThenSoftmax => logits.to_vec(),
        };
        let mut choice: Vec<f32> = match correction_bias {
            Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
            None => scores.clone(),
        };
        if self.n_group > 1 {
            let group_size = logits.len() / self.n_group;
            let group_score = |g: usize| {
                let best = best_first(&choice[g * group_size..][..group_size], 2.min(group_size));
                best.iter().map(|e| choice[g * group_size + *e as usize]).sum::<f32>()
            };
            let group_scores: Vec<f32> = (0..self.n_group).map(group_score).collect();
            let kept = best_first(&group_scores, self.topk_group);
            for (expert, value) in choice.iter_mut().enumerate() {
                if !kept.contains(&((expert / group_size) as u32)) {
                    *value = f32::NEG_INFINITY;
                }
            }
        }
        let ids = best_first(&choice, self.ids.cols);
        let mut weights: Vec<f32> = ids.iter().map(|e| scores[*e as usize]).collect();
        if self.scoring == Scoring::TopkThenSoftmax {
            weights = softmax(&weights);
        }
        if self.norm_topk_prob {
            let sum: f32 = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= self.routed_scaling_factor);
        (ids, weights)
    }
}

fn softmax(x: &[f32]) -> Vec<f32> {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f32> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exp.iter().sum();
    exp.into_iter().map(|e| e / sum).collect()
}

/// Indices of the `k` largest values, best first, the lower index first where equal.
fn best_first(values: &[f32], k: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..values.len() as u32).collect();
    order.sort_by(|a, b| values[*b as usize].total_cmp(&values[*a as usize]).then(a.cmp(b)));
    order.truncate(k);
    order
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str,
                num_experts: usize,
                top_k: usize,
                scoring: Scoring,
                groups: (usize, usize),
                biased: bool,
                norm: bool| {
        let rows = 6;
        Case::new("route", name, rows, Tolerance::exact(num_experts), move |backend, picked| {
            let logits = upload(backend, &normal_rows(29, rows, num_experts), picked)?;
            let correction_bias =
                if biased { Some(upload_row(backend, &normal_rows(30, 1, num_experts)[0])?) } else { None };
            let (chosen, weights) = (zero_ids(backend, picked.len(), top_k)?, zeros(backend, picked.len(), top_k)?);
            backend.route(&Route {
                logits,
                correction_bias,
                scoring,
                n_group: groups.0,
                topk_group: groups.1,
                norm_topk_prob: norm,
                routed_scaling_factor: 2.5,
                ids: chosen,
                weights,
            })?;
            Ok(vec![ids(backend, "ids", chosen)?, floats(backend, "weights", weights)?])
        })
    };
    vec![
        case("77 experts, no power of two", 77, 8, Scoring::Sigmoid, (1, 1), true, true),
        case("256 experts in 8 groups", 256, 8, Scoring::Sigmoid, (8, 4), true, true),
        case("groups of one", 6, 3, Scoring::Sigmoid, (6, 4), true, false),
        case("softmax then top-k", 128, 8, Scoring::SoftmaxThenTopk, (1, 1), false, true),
        case("softmax without norm", 60, 4, Scoring::SoftmaxThenTopk, (1, 1), false, false),
        case("top-k then softmax", 32, 4, Scoring::TopkThenSoftmax, (1, 1), false, false),
        case("all experts", 5, 5, Scoring::SoftmaxThenTopk, (1, 1), false, true),
    ]
}
