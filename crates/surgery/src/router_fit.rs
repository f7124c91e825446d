//! Fits the router of a block that lost experts, so that the block's output is again near to what it was:
//! `min over W of mean_t |y_t - sum_k w_k(W x_t) f_k(x_t)|²`, by gradient descent (Adam). What `f_k` are matters only through
//! their products with each other and with `y`, which are computed once for the experts that a token may come to use; the
//! gradient is analytic, with each step's choice of experts taken as given. (The layer-local kin of Router-KD,
//! arXiv 2603.02217.)

use crate::linear_algebra::{Columns, add_product};
use moellon_model::config::Moe;
use moellon_ops::{Buffer, ElementType, Route, Scoring};
use moellon_tensor::rng::SplitMix64;
use rayon::prelude::*;

/// Rows of a batch that one task computes.
const TASK: usize = 64;
/// Tokens between which the gradient is taken.
const BATCH: usize = 1024;
/// Tokens in a row that are judged or learned from together: neighbours are alike.
const SPAN: usize = 64;
/// Every so many spans one is not learned from and decides when to stop.
const HELD_OUT: usize = 8;
/// Passes over the tokens.
const EPOCHS: usize = 16;
/// Step of a weight at the beginning, as a share of the root mean square of the router's weights.
const RATE: f64 = 0.02;
/// Adam's usual decays and floor.
const BETAS: [f64; 2] = [0.9, 0.99];
const EPSILON: f64 = 1e-12;

/// How logits become experts and weights.
pub(crate) struct Rule {
    route: Route,
    top_k: usize,
    /// `[num_experts]`, added to logits.
    bias: Option<Vec<f32>>,
    /// `[num_experts]`, added to scores for the choice only.
    correction_bias: Option<Vec<f32>>,
}

impl Rule {
    pub(crate) fn new(
        moe: &Moe,
        num_experts: usize,
        bias: Option<Vec<f32>>,
        correction_bias: Option<Vec<f32>>,
    ) -> Self {
        let row = |len, element| Buffer { id: 0, element, len }.tensor(1, len);
        // All that may be chosen at all, best first.
        let eligible = num_experts / moe.n_group * moe.topk_group.min(moe.n_group);
        let route = Route {
            logits: row(num_experts, ElementType::F32),
            correction_bias: correction_bias.is_some().then(|| row(num_experts, ElementType::F32)),
            scoring: moe.scoring,
            n_group: moe.n_group,
            topk_group: moe.topk_group,
            norm_topk_prob: moe.norm_topk_prob,
            routed_scaling_factor: moe.routed_scaling_factor,
            ids: row(eligible, ElementType::U32),
            weights: row(eligible, ElementType::F32),
        };
        Rule { route, top_k: moe.num_experts_per_tok, bias, correction_bias }
    }

    /// Experts that these logits may choose, best first.
    fn ranking(&self, logits: &[f32]) -> Vec<u32> {
        self.route.route_row(logits, self.correction_bias.as_deref()).0
    }

    /// Weights of `chosen` experts.
    fn weights(&self, logits: &[f32], chosen: &[u32]) -> (Vec<f64>, Normalised) {
        let logit = |expert: u32| f64::from(logits[expert as usize]);
        let factor = f64::from(self.route.routed_scaling_factor);
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exp = |x: f64| (x - f64::from(max)).exp();
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let softmax = self.route.scoring != Scoring::Sigmoid;
        let raw: Vec<f64> = chosen.iter().map(|&e| if softmax { exp(logit(e)) } else { sigmoid(logit(e)) }).collect();
        let normalised = match (self.route.scoring, self.route.norm_topk_prob) {
            (Scoring::TopkThenSoftmax, _) | (Scoring::Sigmoid | Scoring::SoftmaxThenTopk, true) => Normalised::Chosen,
            (Scoring::SoftmaxThenTopk, false) => Normalised::All,
            (Scoring::Sigmoid, false) => Normalised::No,
        };
        let sum = match normalised {
            Normalised::Chosen => raw.iter().sum::<f64>() + 1e-20,
            Normalised::All => logits.iter().map(|&x| exp(f64::from(x))).sum(),
            Normalised::No => 1.0,
        };
        (raw.into_iter().map(|r| factor * r / sum).collect(), normalised)
    }

    /// Adds to `slope` (`[num_experts]`) the gradient with respect to the logits, given the one with respect to the weights
    /// of the chosen.
    fn add_slope(
        &self,
        logits: &[f32],
        chosen: &[u32],
        weights: &[f64],
        normalised: Normalised,
        by_weight: &[f64],
        slope: &mut [f32],
    ) {
        let factor = f64::from(self.route.routed_scaling_factor);
        // What a larger sum would take from all weights together.
        let shared = weights.iter().zip(by_weight).map(|(w, g)| w * g).sum::<f64>() / factor;
        for ((&expert, &weight), &gradient) in chosen.iter().zip(weights).zip(by_weight) {
            // d raw / d logit, divided by the sum and times the factor.
            let own = match self.route.scoring {
                Scoring::Sigmoid => weight * (1.0 - 1.0 / (1.0 + (-f64::from(logits[expert as usize])).exp())),
                Scoring::SoftmaxThenTopk | Scoring::TopkThenSoftmax => weight,
            };
            let of_sum = if normalised == Normalised::Chosen { shared } else { 0.0 };
            slope[expert as usize] += (own * (gradient - of_sum)) as f32;
        }
        if normalised == Normalised::All {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let exp: Vec<f64> = logits.iter().map(|&x| f64::from(x - max).exp()).collect();
            let sum: f64 = exp.iter().sum();
            for (slope, exp) in slope.iter_mut().zip(exp) {
                *slope -= (factor * exp / sum * shared) as f32;
            }
        }
    }
}

/// What the weights of the chosen are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Normalised {
    /// Their own sum.
    Chosen,
    /// The sum over all experts.
    All,
    /// Nothing.
    No,
}

/// Tokens, and what their candidates' outputs are to each other and to the output that is wanted.
#[derive(Debug, Default)]
pub(crate) struct Samples {
    pub(crate) hidden_size: usize,
    /// Candidates of a token.
    pub(crate) candidates: usize,
    /// `[tokens, hidden_size]`
    pub(crate) x: Vec<f32>,
    /// `[tokens, candidates]`
    pub(crate) ids: Vec<u32>,
    /// `[tokens, candidates, candidates]`: `f_a · f_b`
    pub(crate) gram: Vec<f32>,
    /// `[tokens, candidates]`: `f_a · y`
    pub(crate) cross: Vec<f32>,
    /// `[tokens]`: `|y|²`
    pub(crate) energy: Vec<f32>,
}

impl Samples {
    fn len(&self) -> usize {
        self.energy.len()
    }

    /// Squared error of the output of token `t`; its gradient with respect to the logits is added to `slope`.
    fn error(&self, t: usize, logits: &[f32], rule: &Rule, slope: Option<&mut [f32]>) -> f64 {
        let count = self.candidates;
        let ids = &self.ids[t * count..][..count];
        let places: Vec<usize> = rule
            .ranking(logits)
            .iter()
            .filter_map(|expert| ids.iter().position(|id| id == expert))
            .take(rule.top_k)
            .collect();
        let chosen: Vec<u32> = places.iter().map(|&place| ids[place]).collect();
        let (weights, normalised) = rule.weights(logits, &chosen);
        let (gram, cross) = (&self.gram[t * count * count..][..count * count], &self.cross[t * count..][..count]);
        let mixed: Vec<f64> = places
            .iter()
            .map(|&a| places.iter().zip(&weights).map(|(&b, w)| w * f64::from(gram[a * count + b])).sum())
            .collect();
        let mut error = f64::from(self.energy[t]);
        for ((&place, &weight), &mixed) in places.iter().zip(&weights).zip(&mixed) {
            error += weight * (mixed - 2.0 * f64::from(cross[place]));
        }
        if let Some(slope) = slope {
            let by_weight: Vec<f64> =
                places.iter().zip(&mixed).map(|(&place, mixed)| 2.0 * (mixed - f64::from(cross[place]))).collect();
            rule.add_slope(logits, &chosen, &weights, normalised, &by_weight, slope);
        }
        error
    }
}

/// `x Wᵀ` plus the router's bias, `weights` `[hidden_size, num_experts]` (transposed), for rows `x`.
pub(crate) fn logits(x: &[f32], weights: &[f32], hidden_size: usize, rule: &Rule) -> Vec<f32> {
    let num_experts = weights.len() / hidden_size;
    let mut out = vec![0.0f32; x.len() / hidden_size * num_experts];
    let columns = Columns { data: weights, stride: num_experts, first: 0, count: num_experts };
    out.par_chunks_mut(TASK * num_experts).zip(x.par_chunks(TASK * hidden_size)).for_each(|(out, x)| {
        if let Some(bias) = &rule.bias {
            out.chunks_exact_mut(num_experts).for_each(|row| row.copy_from_slice(bias));
        }
        add_product(|c, t| x[t * hidden_size + c], hidden_size, columns, out, [num_experts, 0]);
    });
    out
}

/// The `count` experts that each row of logits would choose first.
pub(crate) fn candidates(logits: &[f32], num_experts: usize, count: usize, rule: &Rule) -> Vec<u32> {
    let rows: Vec<Vec<u32>> = logits
        .par_chunks_exact(num_experts)
        .map(|logits| {
            let mut ids = rule.ranking(logits);
            ids.truncate(count);
            ids
        })
        .collect();
    rows.concat()
}

/// A router that was fitted, and the relative squared errors of the block's output before and after, on tokens that were
/// not learned from.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fit {
    /// `[hidden_size, num_experts]`
    pub(crate) weights: Vec<f32>,
    pub(crate) before: f64,
    pub(crate) after: f64,
}

/// Fits `weights` (`[hidden_size, num_experts]`).
pub(crate) fn fit(samples: &Samples, weights: Vec<f32>, rule: &Rule) -> Fit {
    let (held_out, mut learned): (Vec<usize>, Vec<usize>) =
        (0..samples.len()).partition(|t| (t / SPAN) % HELD_OUT == HELD_OUT - 1);
    let judge = |weights: &[f32]| mean_error(samples, &held_out, weights, rule);
    let before = judge(&weights);
    let mut best = Fit { weights: weights.clone(), before, after: before };
    let size = (weights.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / weights.len() as f64).sqrt();
    let mut descent = Adam::new(weights);
    let mut rng = SplitMix64::new(0x7001);
    let steps = EPOCHS * learned.len().div_ceil(BATCH);
    let mut step = 0;
    for _ in 0..EPOCHS {
        (1..learned.len()).rev().for_each(|i| learned.swap(i, rng.below(i + 1)));
        for batch in learned.chunks(BATCH) {
            // From the full step down to none along a half cosine.
            let rate = RATE * size * 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / steps as f64).cos());
            let gradient = gradient(samples, batch, &descent.weights, rule);
            descent.step(&gradient, rate);
            step += 1;
        }
        let after = judge(&descent.weights);
        if after < best.after {
            best.after = after;
            best.weights.copy_from_slice(&descent.weights);
        }
    }
    best
}

/// Squared error over squared output, over some tokens.
fn mean_error(samples: &Samples, tokens: &[usize], weights: &[f32], rule: &Rule) -> f64 {
    let (hidden_size, num_experts) = (samples.hidden_size, weights.len() / samples.hidden_size);
    let (mut error, mut energy) = (0.0, 0.0);
    for batch in tokens.chunks(BATCH) {
        let logits = logits(&rows(samples, batch), weights, hidden_size, rule);
        let pairs = batch.par_iter().zip(logits.par_chunks_exact(num_experts));
        let errors: Vec<f64> = pairs.map(|(&t, logits)| samples.error(t, logits, rule, None)).collect();
        error += errors.iter().sum::<f64>();
        energy += batch.iter().map(|&t| f64::from(samples.energy[t])).sum::<f64>();
    }
    if energy > 0.0 { error / energy } else { 0.0 }
}

fn rows(samples: &Samples, tokens: &[usize]) -> Vec<f32> {
    let width = samples.hidden_size;
    tokens.iter().flat_map(|&t| &samples.x[t * width..][..width]).copied().collect()
}

/// The gradient of the mean error of a batch with respect to the weights, `[hidden_size, num_experts]`.
fn gradient(samples: &Samples, batch: &[usize], weights: &[f32], rule: &Rule) -> Vec<f32> {
    let (hidden_size, num_experts) = (samples.hidden_size, weights.len() / samples.hidden_size);
    let x = rows(samples, batch);
    let logits = logits(&x, weights, hidden_size, rule);
    let mut slopes = vec![0.0f32; logits.len()];
    slopes.par_chunks_exact_mut(num_experts).zip(logits.par_chunks_exact(num_experts)).zip(batch).for_each(
        |((slope, logits), &t)| {
            samples.error(t, logits, rule, Some(slope));
        },
    );
    let share = 1.0 / batch.len() as f32;
    slopes.iter_mut().for_each(|slope| *slope *= share);
    let mut gradient = vec![0.0f32; weights.len()];
    let columns = Columns { data: &slopes, stride: num_experts, first: 0, count: num_experts };
    gradient.par_chunks_mut(TASK * num_experts).enumerate().for_each(|(task, out)| {
        let first = task * TASK;
        add_product(|t, c| x[t * hidden_size + first + c], batch.len(), columns, out, [num_experts, 0]);
    });
    gradient
}

/// Adam (Kingma and Ba 2015).
struct Adam {
    weights: Vec<f32>,
    /// Decaying means of gradients and of their squares.
    means: Vec<[f64; 2]>,
    steps: i32,
}

impl Adam {
    fn new(weights: Vec<f32>) -> Self {
        let means = vec![[0.0; 2]; weights.len()];
        Adam { weights, means, steps: 0 }
    }

    fn step(&mut self, gradient: &[f32], rate: f64) {
        self.steps += 1;
        let [first, second] = BETAS.map(|beta| 1.0 - beta.powi(self.steps));
        for ((weight, means), &gradient) in self.weights.iter_mut().zip(&mut self.means).zip(gradient) {
            let gradient = f64::from(gradient);
            means[0] += (1.0 - BETAS[0]) * (gradient - means[0]);
            means[1] += (1.0 - BETAS[1]) * (gradient * gradient - means[1]);
            *weight -= (rate * (means[0] / first) / ((means[1] / second).sqrt() + EPSILON)) as f32;
        }
    }
}

#[cfg(test)]
mod tests;
