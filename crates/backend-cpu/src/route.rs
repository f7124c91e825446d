//! [`moellon_ops::Route`]: a few hundred logits a row, so scalar code is fast enough (about 2 us a row). It is the
//! reference's arithmetic in the reference's order, without its allocations, and its choices are the reference's to the
//! bit.
//!
//! `unsafe`: threads write different rows.
#![allow(unsafe_code)]

use crate::backend::{CpuBackend, run_rows_of_threads};
use moellon_ops::{Result, Route, Scoring};

pub(crate) fn run(backend: &mut CpuBackend, op: &Route) -> Result<()> {
    let (logits, weights) = (backend.memory.floats(op.logits), backend.memory.floats(op.weights));
    let (ids, bias) = (backend.memory.integers(op.ids), op.correction_bias.map(|b| backend.memory.floats(b)));
    let num_experts = logits.cols;
    let space = backend.scratch.per_thread(backend.pool.num_threads(), 2 * num_experts + op.n_group);
    run_rows_of_threads(&backend.pool, logits.rows, num_experts * 16, |index, rows| {
        // SAFETY: each thread takes its own part.
        let space = unsafe { space.part(index) };
        for t in rows {
            // SAFETY: nobody writes logits and bias; rows of the outputs are this thread's.
            unsafe {
                let (ids, weights) = (ids.row_mut(t), weights.part_mut(t, 0, weights.cols));
                route_row(op, logits.row(t), bias.as_ref().map(|b| b.row(0)), space, ids, weights);
            }
        }
    });
    Ok(())
}

/// `Route::route_row` in memory that is given: `space` holds two floats an expert and one a group.
fn route_row(
    op: &Route,
    logits: &[f32],
    bias: Option<&[f32]>,
    space: &mut [f32],
    ids: &mut [u32],
    weights: &mut [f32],
) {
    let (scores, rest) = space.split_at_mut(logits.len());
    let (choice, rest) = rest.split_at_mut(logits.len());
    scores.copy_from_slice(logits);
    match op.scoring {
        Scoring::Sigmoid => scores.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
        Scoring::SoftmaxThenTopk => softmax(scores),
        Scoring::TopkThenSoftmax => {}
    }
    choice.copy_from_slice(scores);
    if let Some(bias) = bias {
        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
    }
    if op.n_group > 1 {
        mask_groups(op, choice, &mut rest[..op.n_group]);
    }
    best_first(choice, ids);
    for (weight, id) in weights.iter_mut().zip(&*ids) {
        *weight = scores[*id as usize];
    }
    if op.scoring == Scoring::TopkThenSoftmax {
        softmax(weights);
    }
    if op.norm_topk_prob {
        let sum = weights.iter().sum::<f32>() + 1e-20;
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    weights.iter_mut().for_each(|weight| *weight *= op.routed_scaling_factor);
}

/// Leaves the experts of the best `topk_group` groups to be chosen. A group's score is the sum of its two best.
fn mask_groups(op: &Route, choice: &mut [f32], group_scores: &mut [f32]) {
    let group_size = choice.len() / op.n_group;
    for (group, score) in choice.chunks_exact(group_size).zip(&mut *group_scores) {
        let mut best = [0; 2];
        let best = &mut best[..2.min(group_size)];
        best_first(group, best);
        *score = best.iter().map(|e| group[*e as usize]).sum();
    }
    for (number, group) in choice.chunks_exact_mut(group_size).enumerate() {
        // How many groups come before this one, best first, the lower number first where equal.
        let is_before =
            |(other, score): (usize, &f32)| group_scores[number].total_cmp(score).then(other.cmp(&number)).is_lt();
        if group_scores.iter().enumerate().filter(|other| is_before(*other)).count() >= op.topk_group {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

fn softmax(x: &mut [f32]) {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// Indices of the largest values, best first, the lower index first where equal.
fn best_first(values: &[f32], best: &mut [u32]) {
    for (index, value) in values.iter().enumerate() {
        let mut place = index.min(best.len());
        if place == best.len() && value.total_cmp(&values[best[place - 1] as usize]).is_le() {
            continue;
        }
        // What is smaller moves down; the last one falls out.
        place = place.min(best.len() - 1);
        while place > 0 && value.total_cmp(&values[best[place - 1] as usize]).is_gt() {
            best[place] = best[place - 1];
            place -= 1;
        }
        best[place] = index as u32;
    }
}
