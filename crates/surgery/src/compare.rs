//! `compare`: how far a model's predictions are from another's. Both run a layer at a time over the same tokens, so that
//! models larger than memory can be compared, and so that the distance is known after every layer.

use crate::calibrate::present_mtp_layers;
use crate::inventory::Inventory;
use crate::progress::{Meter, Progress};
use crate::quantize::Source;
use crate::stream::{BackendFactory, Sequences, Stream, head_chunk};
use crate::{Error, Result};
use rayon::prelude::*;
use serde::Serialize;

/// Tokens that records of a reference's predictions usually keep.
pub const TOP: usize = 128;

/// The distance of a model from a reference.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Predictions that were compared.
    pub tokens: usize,
    /// Mean of `KL(reference || model)` over tokens in nats, over the whole vocabulary: no tail is cut off.
    pub kl_mean: f64,
    /// Its standard error, taking tokens as independent.
    pub kl_standard_error: f64,
    /// Median over tokens.
    pub kl_median: f64,
    /// 99.9 % of the tokens are below.
    pub kl_p999: f64,
    /// The worst token.
    pub kl_max: f64,
    /// Mean probability that the reference gives to all but its [`TOP`] most likely tokens: what a divergence over those
    /// alone would not see. `kl_mean` sees it.
    pub tail_mass: f64,
    /// Share of tokens with the same most likely next token.
    pub top1_agreement: f64,
    /// Perplexity of the model on the texts.
    pub ppl: f64,
    /// Perplexity of the reference.
    pub ref_ppl: f64,
    /// Share of tokens whose draft by the MTP layer is what the model itself then predicts; `None` without an MTP layer.
    pub mtp_agreement: Option<f64>,
    /// The same of the reference.
    pub ref_mtp_agreement: Option<f64>,
    /// Of all weight matrices.
    pub bits_per_weight: f64,
    /// Of the reference.
    pub ref_bits_per_weight: f64,
    /// Bytes of the model's files.
    pub bytes: u64,
    /// Bytes of the reference's files.
    pub ref_bytes: u64,
    /// Signal to noise of the residual stream after each layer in dB; infinite (null in JSON) where it is equal.
    pub layer_snr_db: Vec<f64>,
    /// KL of every token, in order.
    #[serde(skip)]
    pub kl: Vec<f32>,
}

/// Compares `model` with `reference`.
///
/// # Errors
/// Models of different vocabularies, depths or widths, or a failing back end.
pub fn compare(
    model: Source<'_>,
    reference: Source<'_>,
    sequences: &Sequences,
    backends: &mut BackendFactory<'_>,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Result<Comparison> {
    let dimensions = |source: &Source<'_>| {
        let config = source.config;
        format!("vocabulary {}, {} layers, hidden size {}", config.vocab_size, config.layers.len(), config.hidden_size)
    };
    if dimensions(&model) != dimensions(&reference) {
        return Err(Error::mismatch("the compared model", dimensions(&model), dimensions(&reference)));
    }
    let num_layers = model.config.layers.len();
    let tokens = sequences.num_tokens();
    let mut meter = Meter::new((tokens * (num_layers + 2)) as u64, progress);
    let mut streams = [&model, &reference].map(|source| Stream::new(source.config, source.checkpoint, sequences));
    for stream in &mut streams {
        stream.embed(backends()?.as_mut())?;
    }
    let mut layer_snr_db = Vec::new();
    for layer in 0..num_layers {
        for stream in &mut streams {
            stream.layer(layer, backends()?.as_mut())?;
        }
        layer_snr_db.push(hidden_snr_db(&streams));
        meter.add(&format!("layer {layer}"), tokens as u64, None);
    }
    let mut rows = compare_heads(&mut streams, sequences, model.config.vocab_size, backends)?;
    meter.add("head", tokens as u64, None);
    let [mtp_agreement, ref_mtp_agreement] =
        [(0, &model), (1, &reference)].map(|(at, source)| match present_mtp_layers(*source) {
            0 => Ok(None),
            _ => mtp_agreement(&mut streams[at], &rows.argmax[at], source.config.vocab_size, backends).map(Some),
        });
    meter.add("mtp", tokens as u64, None);
    let kl = std::mem::take(&mut rows.kl);
    let count = kl.len().max(1) as f64;
    let kl_mean = kl.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let variance = kl.iter().map(|x| (f64::from(*x) - kl_mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
    let mut sorted = kl.clone();
    sorted.sort_by(f32::total_cmp);
    let quantile = |share: f64| sorted.get(((count * share) as usize).min(sorted.len().saturating_sub(1))).copied();
    let (bits_per_weight, bytes) = size(model)?;
    let (ref_bits_per_weight, ref_bytes) = size(reference)?;
    Ok(Comparison {
        tokens: kl.len(),
        kl_mean,
        kl_standard_error: (variance / count).sqrt(),
        kl_median: f64::from(quantile(0.5).unwrap_or(0.0)),
        kl_p999: f64::from(quantile(0.999).unwrap_or(0.0)),
        kl_max: f64::from(sorted.last().copied().unwrap_or(0.0)),
        tail_mass: rows.tail_mass / count,
        top1_agreement: rows.agreed as f64 / count,
        ppl: (rows.nats[0] / count).exp(),
        ref_ppl: (rows.nats[1] / count).exp(),
        mtp_agreement: mtp_agreement?,
        ref_mtp_agreement: ref_mtp_agreement?,
        bits_per_weight,
        ref_bits_per_weight,
        bytes,
        ref_bytes,
        layer_snr_db,
        kl,
    })
}

/// Bits per weight of all matrices, and bytes of the files.
fn size(source: Source<'_>) -> Result<(f64, u64)> {
    let inventory = Inventory::take(source.config, source.checkpoint)?;
    let (mut bits, mut weights) = (0.0, 0.0);
    for module in &inventory.modules {
        let matrix = module.source_format.matrix_bytes(module.rows, module.cols) as f64 * 8.0;
        bits += matrix * module.count as f64;
        weights += module.num_weights() as f64;
    }
    Ok((bits / weights, source.checkpoint.size_bytes()))
}

fn hidden_snr_db(streams: &[Stream<'_>; 2]) -> f64 {
    let (mut error, mut signal) = (0.0, 0.0);
    for (found, expected) in streams[0].chunks.iter().zip(&streams[1].chunks) {
        for (a, b) in found.hidden.iter().zip(&expected.hidden) {
            error += f64::from(a - b).powi(2);
            signal += f64::from(*b).powi(2);
        }
    }
    10.0 * (signal / error).log10()
}

/// Sums over rows that have a next token, and the argmax of every row.
#[derive(Default)]
struct Rows {
    kl: Vec<f32>,
    tail_mass: f64,
    agreed: usize,
    /// Negative log-likelihoods of model and reference.
    nats: [f64; 2],
    /// By chunk.
    argmax: [Vec<Vec<u32>>; 2],
}

/// What one row of logits says.
pub(crate) struct Row {
    pub(crate) kl: f64,
    /// Probability that the reference gives to all but its [`TOP`] most likely tokens.
    pub(crate) tail_mass: f64,
    /// Negative log-likelihoods of model and reference.
    pub(crate) nats: [f64; 2],
    /// The most likely tokens of model and reference.
    pub(crate) argmax: [u32; 2],
}

fn compare_heads(
    streams: &mut [Stream<'_>; 2],
    sequences: &Sequences,
    vocab_size: usize,
    backends: &mut BackendFactory<'_>,
) -> Result<Rows> {
    let mut on = [backends()?, backends()?];
    let [model, reference] = streams;
    let mut heads = [model.load_head(on[0].as_mut())?, reference.load_head(on[1].as_mut())?];
    let mut logits = [Vec::new(), Vec::new()];
    let mut rows = Rows::default();
    for at in 0..model.chunks.len() {
        for (side, stream) in [&mut *model, &mut *reference].into_iter().enumerate() {
            head_chunk(&mut heads[side], &mut stream.chunks[at], &mut logits[side], on[side].as_mut())?;
        }
        let chunk = &model.chunks[at];
        let ids = &sequences.ids[chunk.sequence];
        let found: Vec<Row> = logits[0]
            .par_chunks_exact(vocab_size)
            .zip(logits[1].par_chunks_exact(vocab_size))
            .enumerate()
            .map(|(row, (p, q))| compare_row(p, q, ids.get(chunk.first + row + 1).copied()))
            .collect();
        for side in 0..2 {
            rows.argmax[side].push(found.iter().map(|row| row.argmax[side]).collect());
        }
        let with_next = (ids.len() - 1).saturating_sub(chunk.first).min(found.len());
        for row in &found[..with_next] {
            rows.kl.push(row.kl as f32);
            rows.tail_mass += row.tail_mass;
            rows.agreed += usize::from(row.argmax[0] == row.argmax[1]);
            rows.nats[0] += row.nats[0];
            rows.nats[1] += row.nats[1];
        }
    }
    Ok(rows)
}

/// Logarithm of the sum of exponentials, and the place of the largest.
fn log_sum_exp(logits: &[f32]) -> (f64, u32) {
    let mut best = 0;
    for (at, x) in logits.iter().enumerate() {
        if *x > logits[best] {
            best = at;
        }
    }
    let max = f64::from(logits[best]);
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    (max + sum.ln(), best as u32)
}

/// Probability outside the [`TOP`] most likely tokens, given the logarithm of the sum of exponentials.
fn tail_mass(logits: &[f32], sum: f64) -> f64 {
    if logits.len() <= TOP {
        return 0.0;
    }
    let mut sorted = logits.to_vec();
    let (_, _, tail) = sorted.select_nth_unstable_by(TOP - 1, |a, b| b.total_cmp(a));
    tail.iter().map(|x| (f64::from(*x) - sum).exp()).sum()
}

/// Sum over rows of `KL(reference || model)`.
pub(crate) fn total_divergence(model: &[f32], reference: &[f32], vocab_size: usize) -> f64 {
    let rows: Vec<f64> = model
        .par_chunks_exact(vocab_size)
        .zip(reference.par_chunks_exact(vocab_size))
        .map(|(model, reference)| compare_row(model, reference, None).kl)
        .collect();
    rows.iter().sum()
}

pub(crate) fn compare_row(model: &[f32], reference: &[f32], next: Option<u32>) -> Row {
    let (model_sum, model_best) = log_sum_exp(model);
    let (reference_sum, reference_best) = log_sum_exp(reference);
    let kl: f64 = model
        .iter()
        .zip(reference)
        .map(|(q, p)| {
            let log_p = f64::from(*p) - reference_sum;
            log_p.exp() * (log_p - (f64::from(*q) - model_sum))
        })
        .sum();
    let nats = |logits: &[f32], sum: f64| next.map_or(0.0, |id| sum - f64::from(logits[id as usize]));
    // Rounding may leave a hair below zero where the distributions are equal.
    Row {
        kl: kl.max(0.0),
        tail_mass: tail_mass(reference, reference_sum),
        nats: [nats(model, model_sum), nats(reference, reference_sum)],
        argmax: [model_best, reference_best],
    }
}

/// How often the draft for the token after next is what the trunk predicts once it sees the next token.
fn mtp_agreement(
    stream: &mut Stream<'_>,
    argmax: &[Vec<u32>],
    vocab_size: usize,
    backends: &mut BackendFactory<'_>,
) -> Result<f64> {
    // The trunk's prediction at every position of every sequence.
    let mut predicted: Vec<Vec<u32>> = Vec::new();
    for (chunk, best) in stream.chunks.iter().zip(argmax) {
        if chunk.sequence == predicted.len() {
            predicted.push(Vec::new());
        }
        predicted[chunk.sequence].extend(best);
    }
    let places: Vec<(usize, usize)> = stream.chunks.iter().map(|chunk| (chunk.sequence, chunk.first)).collect();
    let (mut agreed, mut drafted) = (0usize, 0usize);
    stream.mtp(0, backends()?.as_mut(), &mut |at, logits| {
        let (sequence, first) = places[at];
        for (row, logits) in logits.chunks_exact(vocab_size).enumerate() {
            agreed += usize::from(log_sum_exp(logits).1 == predicted[sequence][first + row + 1]);
            drafted += 1;
        }
        Ok(())
    })?;
    Ok(agreed as f64 / drafted.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_by_hand() {
        // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4).
        let (p, q) = ([2.0f32.ln(), 0.0, 0.0], [0.0, 2.0f32.ln(), 0.0]);
        let row = compare_row(&q, &p, Some(0));
        assert!((row.kl - 0.25 * 2.0f64.ln()).abs() < 1e-7, "{}", row.kl);
        assert!((row.nats[0] - 4.0f64.ln()).abs() < 1e-7 && (row.nats[1] - 2.0f64.ln()).abs() < 1e-7);
        assert_eq!(row.argmax, [1, 0]);
        assert_eq!(compare_row(&p, &p, None).kl, 0.0);
    }

    #[test]
    fn the_tail_is_what_128_tokens_leave() {
        // 128 tokens as likely as two of the 64 others together.
        let logits: Vec<f32> = (0..192).map(|i| if i % 3 == 0 { 0.0 } else { 2.0f32.ln() }).collect();
        let row = compare_row(&logits, &logits, None);
        assert!((row.tail_mass - 64.0 / (64.0 + 256.0)).abs() < 1e-6, "{}", row.tail_mass);
        assert_eq!(compare_row(&logits[..128], &logits[..128], None).tail_mass, 0.0);
    }
}
