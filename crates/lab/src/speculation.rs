//! Speculation on random weights: what verifying costs against its bytes, and what drafting brings at a given acceptance,
//! against plain decoding in turn on one engine.

use crate::bench::{Error, STEAL_LIMIT_PERCENT};
use crate::machine::{Machine, StealClock};
use crate::statistics::{median, quantile};
use moellon_engine::{Engine, EngineStats, Request, SamplingParams};
use moellon_model::Decoder;
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_ops::profile::Profiler;
use moellon_ops::{Backend, ElementType};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::time::Instant;

type Result<T> = std::result::Result<T, Error>;

/// Rows whose verification is measured.
const VERIFIED: [usize; 8] = [1, 2, 3, 4, 5, 6, 8, 9];

/// Steps with drafts before the first window: acceptance is learned and costs are corrected.
const WARM_UP_STEPS: usize = 48;

/// A step that verifies.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VerifyCost {
    /// Rows of one sequence.
    pub rows: usize,
    /// Milliseconds, median.
    pub ms: f64,
    /// First and third quartile.
    pub ms_quartiles: [f64; 2],
    /// Against one row.
    pub cost: f64,
    /// Bytes that it must move.
    pub bytes: u64,
    /// Against one row.
    pub bytes_cost: f64,
    /// Mean number of different experts of a layer.
    pub distinct_experts: f64,
    /// The same of single steps; those of one place are of steps that begin with the same token.
    #[serde(default)]
    pub distinct_experts_of_steps: Vec<f64>,
}

/// The token at a position of the text that walks through `tokens`, over and over: what [`replay`] reads and writes.
fn walk(tokens: &Range<u32>, position: usize) -> u32 {
    tokens.start + (position % (tokens.end - tokens.start) as usize) as u32
}

/// Caches the first `context` positions of the walk. What rows have in common of their text decides how many experts they
/// share: after a cache of random numbers four rows of a replay read a tenth more experts than in the replay.
fn read_walk(decoder: &mut Decoder, backend: &mut dyn Backend, tokens: &Range<u32>, context: usize) -> Result<()> {
    let sizes = *decoder.options();
    let blocks: Vec<u32> = (0..context.div_ceil(sizes.block_size) as u32).collect();
    for start in (0..context).step_by(sizes.max_batch_tokens) {
        let end = context.min(start + sizes.max_batch_tokens);
        let ids: Vec<u32> = (start..end).map(|position| walk(tokens, position)).collect();
        let mut batch = Batch::default();
        batch.push_sequence(&ids, start, &blocks, sizes.block_size, LogitRows::Last);
        decoder.forward(&batch, backend)?;
    }
    Ok(())
}

/// Measures steps of a few rows of one sequence after `context` positions of the text that walks through `tokens`, in turn,
/// `rounds` times.
///
/// # Errors
/// A failing device or a decoder without room.
pub fn verify_cost(
    decoder: &mut Decoder,
    backend: &mut dyn Backend,
    tokens: &Range<u32>,
    context: usize,
    rounds: usize,
) -> Result<Vec<VerifyCost>> {
    let sizes = *decoder.options();
    let most = VERIFIED.into_iter().max().unwrap_or(1);
    let chosen = backend.alloc("chosen tokens", ElementType::U32, most)?;
    read_walk(decoder, backend, tokens, context)?;
    let batch = |rows: usize, round: usize| {
        // Elsewhere each time: experts differ.
        let ids: Vec<u32> = (0..rows).map(|row| walk(tokens, context + round * 11 + row)).collect();
        let blocks: Vec<u32> = (0..(context + rows).div_ceil(sizes.block_size) as u32).collect();
        let mut batch = Batch::default();
        batch.push_sequence(&ids, context, &blocks, sizes.block_size, LogitRows::All);
        batch
    };
    let mut samples = vec![Vec::new(); VERIFIED.len()];
    for round in 0..=rounds {
        for (rows, samples) in VERIFIED.iter().zip(&mut samples) {
            let batch = batch(*rows, round);
            let started = Instant::now();
            let logits = decoder.forward(&batch, backend)?;
            greedy(logits, chosen.tensor(*rows, 1), backend)?;
            if round > 0 {
                samples.push(started.elapsed().as_secs_f64());
            }
        }
    }
    backend.free(chosen);
    let mut costs: Vec<VerifyCost> = Vec::new();
    for (rows, samples) in VERIFIED.iter().zip(samples) {
        // As many batches as were timed would take long to count; experts of a few are enough of an average.
        let (mut bytes, mut experts) = (0.0, Vec::new());
        const COUNTED: usize = 8;
        for round in 1..=COUNTED {
            let mut profiler = Profiler::new(backend);
            decoder.forward(&batch(*rows, round), &mut profiler)?;
            let profile = profiler.profile();
            bytes += profile.total_bytes() as f64 / COUNTED as f64;
            experts.push(profile.distinct_experts as f64 / profile.moe_layers.max(1) as f64);
        }
        let ms = median(&samples) * 1e3;
        let first = costs.first();
        costs.push(VerifyCost {
            rows: *rows,
            ms,
            ms_quartiles: [quantile(&samples, 0.25) * 1e3, quantile(&samples, 0.75) * 1e3],
            cost: ms / first.map_or(ms, |one| one.ms),
            bytes: bytes as u64,
            bytes_cost: bytes / first.map_or(bytes, |one| one.bytes as f64),
            distinct_experts: experts.iter().sum::<f64>() / COUNTED as f64,
            distinct_experts_of_steps: experts,
        });
    }
    Ok(costs)
}

/// For each wanted share of experts the band whose neighbouring tokens, after `context` positions, come closest to sharing
/// it, and what they share.
///
/// # Errors
/// A failing device.
pub fn bands_of_overlaps(
    decoder: &mut Decoder,
    backend: &mut dyn Backend,
    bands: &[Range<u32>],
    context: usize,
    overlaps: &[f64],
) -> Result<Vec<(Range<u32>, f64)>> {
    let mut found = Vec::new();
    for band in bands {
        found.push((band.clone(), overlap_of(decoder, backend, band, context)?));
    }
    let closest = |wanted: &f64| {
        let distance = |(_, overlap): &&(Range<u32>, f64)| (overlap - wanted).abs();
        found.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).cloned().unwrap_or((0..1, 0.0))
    };
    Ok(overlaps.iter().map(closest).collect())
}

/// The share of a token's experts that the token before it had, over all layers: 2 - U(2) / k, where U(2) is the number of
/// different experts of two neighbours.
fn overlap_of(decoder: &mut Decoder, backend: &mut dyn Backend, band: &Range<u32>, context: usize) -> Result<f64> {
    const PAIRS: usize = 6;
    let top_k = decoder.config().moe.num_experts_per_tok as f64;
    let block_size = decoder.options().block_size;
    let blocks: Vec<u32> = (0..(context + 2).div_ceil(block_size) as u32).collect();
    read_walk(decoder, backend, band, context)?;
    let mut shared = 0.0;
    for pair in 0..PAIRS {
        let first = context + pair * 11;
        let mut batch = Batch::default();
        batch.push_sequence(&[walk(band, first), walk(band, first + 1)], context, &blocks, block_size, LogitRows::Last);
        let mut profiler = Profiler::new(backend);
        decoder.forward(&batch, &mut profiler)?;
        let profile = profiler.profile();
        shared += 2.0 - profile.distinct_experts as f64 / profile.moe_layers.max(1) as f64 / top_k;
    }
    Ok(shared / PAIRS as f64)
}

/// What to replay.
#[derive(Debug, Clone)]
pub struct ReplayPlan {
    /// Chance that a draft is right, given those before it.
    pub acceptance: f64,
    /// Sequences.
    pub batches: Vec<usize>,
    /// Tokens of each prompt.
    pub context: usize,
    /// Tokens that the prompts and texts are made of.
    pub tokens: Range<u32>,
    /// Steps of a window.
    pub steps: usize,
    /// Windows of each kind, in turn.
    pub windows: usize,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplayReport {
    /// Where.
    pub machine: Machine,
    /// The back end and its device in words.
    pub backend: String,
    /// What.
    pub model: String,
    /// Name of the format or plan.
    pub format: String,
    /// Chance that a draft is right.
    pub acceptance: f64,
    /// Share of experts that neighbouring tokens have in common, as found.
    pub overlap: f64,
    /// Rows and seconds of a drafting step; empty where drafts are free.
    #[serde(default)]
    pub draft_cost: Vec<(usize, f64)>,
    /// What verifying costs.
    pub verify: Vec<VerifyCost>,
    /// One entry a batch size.
    pub results: Vec<ReplayResult>,
}

/// Plain and drafted decoding at one batch size.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReplayResult {
    /// Sequences.
    pub batch: usize,
    /// Milliseconds of a token of one sequence without drafts, median window.
    pub plain_ms: f64,
    /// First and third quartile.
    pub plain_ms_quartiles: [f64; 2],
    /// With drafts.
    pub drafted_ms: f64,
    /// First and third quartile.
    pub drafted_ms_quartiles: [f64; 2],
    /// How many times as fast with drafts.
    pub factor: f64,
    /// What the costs of rows and of drafting steps, measured apart, promise at this acceptance and depth.
    pub predicted_factor: f64,
    /// What bytes alone promise, drafting free; for one sequence.
    pub bytes_factor: Option<f64>,
    /// Drafts of a sequence's step, mean over steps.
    pub depth: f64,
    /// Tokens of a sequence's step with drafts.
    pub tokens_per_step: f64,
    /// Milliseconds of a step spent drafting.
    pub draft_ms: f64,
    /// CPU time stolen in the windows that counted, in percent.
    pub steal_pct: f64,
    /// Pairs of windows discarded for steal.
    pub discarded_windows: usize,
}

/// Runs a plan on an engine that replays outcomes.
///
/// # Errors
/// A failing device, or a request that the engine refuses.
pub fn replay(
    engine: &mut Engine,
    plan: &ReplayPlan,
    verify: &[VerifyCost],
    progress: &mut dyn FnMut(&str),
) -> Result<Vec<ReplayResult>> {
    let mut results = Vec::new();
    for batch in &plan.batches {
        progress(&format!("replay, batch {batch}"));
        results.push(replay_batch(engine, plan, *batch, verify)?);
    }
    Ok(results)
}

fn replay_batch(engine: &mut Engine, plan: &ReplayPlan, batch: usize, verify: &[VerifyCost]) -> Result<ReplayResult> {
    let size = (plan.tokens.end - plan.tokens.start) as usize;
    let mut receivers = Vec::new();
    for sequence in 0..batch {
        // Sequences walk apart from each other.
        let first = sequence * size / batch;
        let prompt = (0..plan.context).map(|i| walk(&plan.tokens, first + i)).collect();
        let request = Request {
            id: format!("replay {sequence}"),
            prompt,
            sampling: SamplingParams::default(),
            max_tokens: usize::MAX,
            min_tokens: 0,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: false,
            constraint: None,
            thinking_budget: None,
            // Prompts of other batch sizes would be found cached.
            cache_salt: Some(format!("{batch} {sequence}")),
        };
        receivers.push(engine.submit(request).map_err(|error| Error::Engine(error.to_string()))?);
    }
    let step = |engine: &mut Engine| engine.step().map(|_| ()).map_err(|error| Error::Engine(error.to_string()));
    while engine.stats().running < batch || engine.stats().generated_tokens == 0 {
        step(engine)?;
    }
    (0..WARM_UP_STEPS).try_for_each(|_| step(engine))?;
    // Seconds of a step, and the state before and after the window.
    let window = |engine: &mut Engine, drafting: bool| -> Result<(f64, EngineStats, EngineStats)> {
        engine.set_speculating(drafting);
        // One step in which what was drafted before goes its way.
        step(engine)?;
        let before = engine.stats();
        let started = Instant::now();
        (0..plan.steps).try_for_each(|_| step(engine))?;
        Ok((started.elapsed().as_secs_f64() / plan.steps as f64, before, engine.stats()))
    };
    let (mut plain, mut drafted, mut steals, mut discarded) = (Vec::new(), Vec::new(), Vec::new(), 0);
    let (mut tokens, mut drafts, mut drafting) = (Vec::new(), Vec::new(), Vec::new());
    while plain.len() < plan.windows && discarded < 4 * plan.windows {
        let steal = StealClock::start();
        let (without, ..) = window(engine, false)?;
        let (with, before, after) = window(engine, true)?;
        let stolen = steal.steal_percent();
        if stolen > STEAL_LIMIT_PERCENT {
            discarded += 1;
            continue;
        }
        steals.push(stolen);
        plain.push(without);
        drafted.push(with);
        let steps = (plan.steps * batch) as f64;
        tokens.push((after.generated_tokens - before.generated_tokens) as f64 / steps);
        if let (Some(before), Some(after)) = (&before.speculation, &after.speculation) {
            drafts.push((after.all().draft_tokens - before.all().draft_tokens) as f64 / steps);
            drafting.push((after.draft_seconds - before.draft_seconds) / plan.steps as f64);
        }
    }
    engine.set_speculating(true);
    drop(receivers);
    while !engine.is_idle() {
        step(engine)?;
    }
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    let (depth, draft_seconds, tokens_per_step) = (mean(&drafts), mean(&drafting), mean(&tokens));
    // The machine disturbs seconds of single windows, the coin decides the tokens of all: a median of the one, a mean of the other.
    let drafted: Vec<f64> = drafted.iter().map(|step| step / tokens_per_step.max(1e-9)).collect();
    let rows = batch as f64 * (1.0 + depth);
    let curve = engine.cost_curve();
    let expected = between(depth, &|depth| (0..=depth).map(|i| plan.acceptance.powi(i as i32)).sum());
    // Rows of one sequence were measured at this overlap; others were measured with random tokens when the engine began.
    let step = |rows: usize| match verify_ms(verify, rows).filter(|_| batch == 1) {
        Some(ms) => ms / 1e3,
        None => curve.map_or(0.0, |curve| curve.step(rows)),
    };
    let (plain_step, verify_step) = (step(batch), between(rows, &step));
    // The first drafting step takes the rows of the step before it, the others one row a sequence.
    let expected_drafting = curve.filter(|_| depth > 0.0).map_or(0.0, |curve| {
        let first = between(expected * batch as f64, &|rows| curve.draft(rows));
        first + (depth - 1.0).max(0.0) * curve.draft(batch)
    });
    let bytes = between(1.0 + depth, &|rows| {
        let point = verify.iter().find(|cost| cost.rows >= rows).or(verify.last());
        point.map_or(1.0, |cost| cost.bytes_cost)
    });
    let summary = |values: &[f64]| (median(values) * 1e3, [quantile(values, 0.25) * 1e3, quantile(values, 0.75) * 1e3]);
    let ((plain_ms, plain_ms_quartiles), (drafted_ms, drafted_ms_quartiles)) = (summary(&plain), summary(&drafted));
    let factors: Vec<f64> = plain.iter().zip(&drafted).map(|(plain, drafted)| plain / drafted).collect();
    Ok(ReplayResult {
        batch,
        plain_ms,
        plain_ms_quartiles,
        drafted_ms,
        drafted_ms_quartiles,
        factor: median(&factors),
        predicted_factor: expected * plain_step / (verify_step + expected_drafting),
        bytes_factor: (batch == 1).then_some(expected / bytes),
        depth,
        tokens_per_step,
        draft_ms: draft_seconds * 1e3,
        steal_pct: median(&steals),
        discarded_windows: discarded,
    })
}

/// Milliseconds of a step of `rows` rows, between those that were measured; `None` beyond them.
fn verify_ms(verify: &[VerifyCost], rows: usize) -> Option<f64> {
    let above = verify.iter().position(|cost| cost.rows >= rows)?;
    let (upper, lower) = (&verify[above], &verify[above.saturating_sub(1)]);
    if upper.rows == rows {
        return Some(upper.ms);
    }
    let share = (rows - lower.rows) as f64 / (upper.rows - lower.rows) as f64;
    Some(lower.ms + (upper.ms - lower.ms) * share)
}

/// A function of whole numbers at a number between two.
fn between(at: f64, value: &dyn Fn(usize) -> f64) -> f64 {
    let low = at.floor();
    let (below, above) = (value(low as usize), value(low as usize + 1));
    below + (above - below) * (at - low)
}

#[cfg(test)]
mod tests {
    use super::{VerifyCost, between, verify_ms};

    #[test]
    fn rows_between_measured_ones_are_interpolated() {
        let cost = |rows, ms| VerifyCost {
            rows,
            ms,
            ms_quartiles: [ms, ms],
            cost: ms,
            bytes: 0,
            bytes_cost: 1.0,
            distinct_experts: 0.0,
            distinct_experts_of_steps: Vec::new(),
        };
        let verify = [cost(1, 10.0), cost(2, 15.0), cost(6, 23.0)];
        assert_eq!([1, 2, 3, 6].map(|rows| verify_ms(&verify, rows)), [10.0, 15.0, 17.0, 23.0].map(Some));
        assert_eq!(verify_ms(&verify, 7), None);
    }

    #[test]
    fn values_between_are_mixtures() {
        let square = |x: usize| (x * x) as f64;
        assert_eq!(between(2.0, &square), 4.0);
        assert_eq!(between(2.5, &square), 6.5);
    }
}
