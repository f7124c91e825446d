use super::*;
use moellon_ops::Activation;

const HIDDEN: usize = 24;
const EXPERTS: usize = 6;

fn moe(scoring: Scoring, norm_topk_prob: bool, n_group: usize) -> Moe {
    Moe {
        block_name: "mlp",
        router_name: "gate",
        num_experts: EXPERTS,
        num_experts_per_tok: 2,
        moe_intermediate_size: 1,
        shared_intermediate_size: None,
        activation: Activation::SwiGlu,
        scoring,
        correction_bias: true,
        router_bias: true,
        expert_bias: false,
        n_group,
        topk_group: 1,
        norm_topk_prob,
        routed_scaling_factor: 1.5,
    }
}

fn rule(scoring: Scoring, norm_topk_prob: bool, n_group: usize) -> Rule {
    let mut rng = SplitMix64::new(9);
    let (bias, correction) = (rng.normals(EXPERTS, 0.2), rng.normals(EXPERTS, 0.01));
    Rule::new(&moe(scoring, norm_topk_prob, n_group), EXPERTS, Some(bias), Some(correction))
}

/// The router that made the outputs.
fn target() -> Vec<f32> {
    SplitMix64::new(5).normals(HIDDEN * EXPERTS, 0.4)
}

/// Experts are linear; the wanted output is what the target's choice of two gives.
fn samples(tokens: usize) -> Samples {
    let mut rng = SplitMix64::new(4);
    let x = rng.normals(tokens * HIDDEN, 1.0);
    let experts: Vec<Vec<f32>> = (0..EXPERTS).map(|_| rng.normals(HIDDEN * HIDDEN, 0.2)).collect();
    let target = target();
    let rule = rule(Scoring::Sigmoid, true, 1);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let wanted = logits(&x, &target, HIDDEN, &rule);
    let mut samples = Samples { hidden_size: HIDDEN, candidates: EXPERTS, ..Samples::default() };
    for (x, wanted) in x.chunks_exact(HIDDEN).zip(wanted.chunks_exact(EXPERTS)) {
        let outputs: Vec<Vec<f32>> =
            experts.iter().map(|e| e.chunks_exact(HIDDEN).map(|row| dot(row, x)).collect()).collect();
        let chosen: Vec<u32> = rule.ranking(wanted).into_iter().take(2).collect();
        let (weights, _) = rule.weights(wanted, &chosen);
        let mut y = vec![0.0f32; HIDDEN];
        for (&expert, weight) in chosen.iter().zip(weights) {
            y.iter_mut().zip(&outputs[expert as usize]).for_each(|(y, f)| *y += weight as f32 * f);
        }
        samples.ids.extend(0..EXPERTS as u32);
        samples.gram.extend(outputs.iter().flat_map(|a| outputs.iter().map(|b| dot(a, b))));
        samples.cross.extend(outputs.iter().map(|f| dot(f, &y)));
        samples.energy.push(dot(&y, &y));
    }
    samples.x = x;
    samples
}

/// Every way of scoring against differences of the error itself.
#[test]
fn the_gradient_is_the_slope_of_the_error() {
    let samples = samples(3);
    let mut rng = SplitMix64::new(11);
    for (scoring, normalised, groups) in [
        (Scoring::Sigmoid, true, 1),
        (Scoring::Sigmoid, false, 1),
        (Scoring::Sigmoid, true, 2),
        (Scoring::SoftmaxThenTopk, true, 1),
        (Scoring::SoftmaxThenTopk, false, 1),
        (Scoring::TopkThenSoftmax, false, 1),
    ] {
        let rule = rule(scoring, normalised, groups);
        for t in 0..3 {
            let logits = rng.normals(EXPERTS, 0.8);
            let mut slope = vec![0.0; EXPERTS];
            samples.error(t, &logits, &rule, Some(&mut slope));
            for expert in 0..EXPERTS {
                // Small enough to change no choice, large enough for f32 logits.
                let at = |step: f32| {
                    let mut logits = logits.clone();
                    logits[expert] += step;
                    samples.error(t, &logits, &rule, None)
                };
                let expected = (at(1e-3) - at(-1e-3)) / 2e-3;
                let found = f64::from(slope[expert]);
                let scale = 1e-3 * f64::from(samples.energy[t]) + 5e-3 * expected.abs();
                assert!((found - expected).abs() < scale, "{scoring:?} {normalised}: {found} {expected}");
            }
        }
    }
}

/// From a router that is off by as much as half of its weights, more than half of the way to the one that made the outputs.
#[test]
fn a_router_learns_what_another_one_chose() {
    let samples = samples(4096);
    let rule = rule(Scoring::Sigmoid, true, 1);
    let noise = SplitMix64::new(77).normals(HIDDEN * EXPERTS, 0.2);
    let begin: Vec<f32> = target().iter().zip(noise).map(|(target, noise)| target + noise).collect();
    let found = fit(&samples, begin.clone(), &rule);
    assert!(mean_error(&samples, &[0, 1, 2, 3], &target(), &rule) < 1e-5, "the products add up to the errors");
    assert!(found.before > 0.1, "{}", found.before);
    assert!(found.after < 0.5 * found.before, "{} of {}", found.after, found.before);
    let all: Vec<usize> = (0..4096).collect();
    assert!(mean_error(&samples, &all, &found.weights, &rule) < 0.5 * mean_error(&samples, &all, &begin, &rule));
    assert_eq!(found, fit(&samples, begin, &rule), "the same bits again");
}

/// Experts outside the candidates are passed over; groups that are not eligible too.
#[test]
fn choices_stay_among_the_candidates() {
    let rule = rule(Scoring::Sigmoid, true, 2);
    let logits = [3.0, -3.0, -3.0, 1.0, 1.5, 2.0];
    // The best two of the second group weigh more than those of the first.
    assert_eq!(rule.ranking(&logits), [5, 4, 3]);
    assert_eq!(candidates(&logits, EXPERTS, 2, &rule), [5, 4]);
    let mut samples = samples(1);
    samples.candidates = 2;
    samples.ids = vec![3, 4];
    samples.gram = vec![1.0, 0.0, 0.0, 1.0];
    samples.cross = vec![0.0, 0.0];
    samples.energy = vec![0.0];
    let error = samples.error(0, &logits, &rule, None);
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let (a, b) = (sigmoid(1.0), sigmoid(1.5));
    let expected = (1.5f64 / (a + b)).powi(2) * (a * a + b * b);
    assert!((error - expected).abs() < 1e-6, "{error} {expected}");
}
