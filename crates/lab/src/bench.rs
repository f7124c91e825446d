//! Decode and prefill speed of a loaded model, against the bytes it must move and the bandwidth of the same minute.

use crate::machine::{Machine, ReadBandwidth, ResidentMemory, StealClock};
use crate::statistics::{median, quantile};
use moellon_model::Decoder;
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_ops::profile::{Profile, Profiler};
use moellon_ops::{Backend, ElementType, Stage, StepTimes};
use moellon_tensor::rng::SplitMix64;
use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// What can go wrong in a measurement.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model or its back end.
    #[error(transparent)]
    Model(#[from] moellon_model::Error),
    /// The back end.
    #[error(transparent)]
    Ops(#[from] moellon_ops::Error),
    /// A machine whose host is too busy to measure anything on.
    #[error("{what}: all {windows} windows had more than {STEAL_LIMIT_PERCENT} % steal, so nothing was measured")]
    Stolen {
        /// What was to be measured.
        what: String,
        /// Windows that were discarded.
        windows: usize,
    },
    /// The engine refused a request or failed.
    #[error("engine: {0}")]
    Engine(String),
}

type Result<T> = std::result::Result<T, Error>;

pub use crate::disturbance::STEAL_LIMIT_PERCENT;

/// Rows that unions of experts are stated for.
const UNION_ROWS: [usize; 14] = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];

/// Steps of one row whose choices of experts are counted, to say what rows of strangers read together.
const COUNTED_STEPS: usize = 64;

/// How long a device with memory of its own runs steps before any counts: behind Vulkan an idle GPU has a fraction of its clock, and goes
/// back to all of it only after a while.
const DEVICE_WARM_UP: Duration = Duration::from_secs(2);
/// Steps after every measurement of bandwidth that are timed but do not count: it goes through all of memory several times, and a
/// decode follows a step, not that ([`DecodeResult::step_ms_by_place`] has what they take).
const WARM_STEPS: usize = 2;
/// Steps whose operations are timed and counted one by one.
const PROFILED_STEPS: u64 = 8;

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchPlan {
    /// Sequences of a decode step, each with its own random tokens.
    pub batches: Vec<usize>,
    /// Positions that each sequence has in the cache; each batch is measured at each of them.
    pub contexts: Vec<usize>,
    /// Lengths of the prompts to prefill.
    pub prompts: Vec<usize>,
    /// Steps of a window; a window is one sample.
    pub steps: usize,
    /// Windows that count, of each batch size and prompt length.
    pub windows: usize,
    /// Whether all sequences of a step have the same token instead, so that their experts coincide.
    pub identical: bool,
    /// Seed of the tokens.
    pub seed: u64,
}

/// Everything that was measured. What older receipts lack is read as nothing.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct BenchReport {
    /// Where.
    pub machine: Machine,
    /// `cpu`, and the device in words.
    pub backend: String,
    /// What.
    pub model: String,
    /// Name of the format or plan.
    pub format: String,
    /// Median read bandwidth over the run.
    pub measured_read_gb_s: f64,
    /// Memory of the process at the end; absent where the system does not say.
    #[serde(default)]
    pub memory: Option<ResidentMemory>,
    /// Bytes of the weights that were loaded, as a file has them.
    #[serde(default)]
    pub weight_bytes: u64,
    /// Bytes of all cache rows that the decoder has room for.
    #[serde(default)]
    pub cache_bytes: u64,
    /// One entry a batch size.
    pub results: Vec<DecodeResult>,
    /// One entry a prompt length.
    pub prefill: Vec<PrefillResult>,
}

/// Decode speed at one batch size.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct DecodeResult {
    /// Sequences.
    pub batch: usize,
    /// Positions cached.
    pub context: usize,
    /// Tokens a second, all sequences together, of the median window.
    pub decode_tok_s: f64,
    /// Milliseconds of a step, median.
    pub step_ms: f64,
    /// First and third quartile of the windows.
    #[serde(default)]
    pub step_ms_quartiles: [f64; 2],
    /// Milliseconds of the first step after a measurement of bandwidth, of the second, .., each the median of the windows. The first
    /// two are not in any other number here. Empty in older receipts, where they were.
    #[serde(default)]
    pub step_ms_by_place: Vec<f64>,
    /// Bytes that a step must move: each distinct expert once.
    pub bytes_per_step: u64,
    /// Bytes over time.
    pub bandwidth_gb_s: f64,
    /// Of the bandwidth measured around the windows.
    pub bandwidth_share: f64,
    /// Read bandwidth measured around the windows.
    pub measured_read_gb_s: f64,
    /// Mean number of different experts that a layer's batch used.
    pub distinct_experts: f64,
    /// What independent uniform choices would give: E(1 - (1 - k/E)^B).
    pub expected_experts: f64,
    /// CPU time stolen during the windows that counted, in percent.
    pub steal_pct: f64,
    /// Windows that were discarded for steal.
    #[serde(default)]
    pub discarded_windows: usize,
    /// Milliseconds of a step by the device's own clock, where it has one; the rest of `step_ms` is the host's, and the choice of a token.
    #[serde(default)]
    pub device_ms: Option<f64>,
    /// Where the time goes, from a separate profiled step: by the device's clock where it has one, else with a wait after each operation.
    pub stages: Vec<StageResult>,
    /// Distinct experts of a layer by rows, for rows that choose as single rows did, each with a token of its own; empty without
    /// experts, and for batches of several rows.
    #[serde(default)]
    pub unions: Vec<(f64, f64)>,
}

/// One stage of a step.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StageResult {
    /// Name of the stage.
    pub stage: String,
    /// Microseconds.
    pub microseconds: f64,
    /// Bytes that it must move.
    pub bytes: u64,
    /// Bytes over time.
    pub gb_s: f64,
    /// Operations.
    pub operations: u64,
}

/// Prefill speed at one prompt length.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PrefillResult {
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Tokens a second, median.
    pub tok_s: f64,
    /// First and third quartile of the runs, in tokens a second.
    #[serde(default)]
    pub tok_s_quartiles: [f64; 2],
    /// CPU time stolen during the runs that counted, in percent.
    pub steal_pct: f64,
    /// Runs that were discarded for steal.
    #[serde(default)]
    pub discarded_windows: usize,
    /// Where the time goes, from a separate profiled run.
    pub stages: Vec<StageResult>,
    /// Distinct experts of a layer by rows, for independent rows that choose as this prompt's did; empty without experts.
    #[serde(default)]
    pub unions: Vec<(f64, f64)>,
}

/// A model on a back end, and how its machine's bandwidth is measured.
pub struct Bench<'a> {
    /// The model.
    pub decoder: &'a mut Decoder,
    /// Where it is.
    pub backend: &'a mut dyn Backend,
    /// Bytes of its weights.
    pub weight_bytes: u64,
    /// Measures the host's read bandwidth now, for back ends that work in its memory.
    pub measure_read: &'a dyn Fn() -> ReadBandwidth,
    /// Called with a line of what is being done.
    pub progress: &'a mut dyn FnMut(&str),
}

impl Bench<'_> {
    /// Runs the plan.
    ///
    /// # Errors
    /// A plan beyond the decoder's limits, or a failing device.
    pub fn run(&mut self, plan: &BenchPlan, model: &str, format: &str) -> Result<BenchReport> {
        self.decoder.fill_caches(plan.seed, self.backend)?;
        let mut results = Vec::new();
        for context in &plan.contexts {
            for batch in &plan.batches {
                (self.progress)(&format!("decode, batch {batch}, context {context}"));
                results.push(self.decode(plan, *context, *batch)?);
            }
        }
        let mut prefill = Vec::new();
        for tokens in &plan.prompts {
            (self.progress)(&format!("prefill, {tokens} tokens"));
            prefill.push(self.prefill(plan, *tokens)?);
        }
        let bandwidths: Vec<f64> = results.iter().map(|r| r.measured_read_gb_s).collect();
        let measured_read_gb_s = if bandwidths.is_empty() { self.read()?.gb_per_s } else { median(&bandwidths) };
        let caps = self.backend.caps();
        Ok(BenchReport {
            machine: Machine::this(),
            backend: format!("{}: {}", caps.name, caps.device),
            model: model.to_owned(),
            format: format.to_owned(),
            measured_read_gb_s,
            memory: ResidentMemory::now(),
            weight_bytes: self.weight_bytes,
            cache_bytes: self.decoder.caches().map(|cache| (cache.num_slots * cache.row_bytes()) as u64).sum(),
            results,
            prefill,
        })
    }

    fn read(&mut self) -> Result<ReadBandwidth> {
        Ok(match self.backend.measure_read()? {
            Some(bytes_per_s) => ReadBandwidth { gb_per_s: bytes_per_s / 1e9, steal_percent: 0.0 },
            None => (self.measure_read)(),
        })
    }

    fn decode(&mut self, plan: &BenchPlan, context: usize, batch: usize) -> Result<DecodeResult> {
        let mut rng = SplitMix64::new(plan.seed + batch as u64);
        let chosen = self.backend.alloc("chosen tokens", ElementType::U32, batch)?.tensor(batch, 1);
        let mut step = |decoder: &mut Decoder, backend: &mut dyn Backend| -> Result<()> {
            let logits = decoder.forward(&decode_batch(decoder, batch, context, plan.identical, &mut rng), backend)?;
            // The choice on the device, as a greedy engine makes it.
            greedy(logits, chosen, backend)?;
            Ok(())
        };
        for _ in 0..plan.steps.max(2) {
            step(self.decoder, self.backend)?;
        }
        // A device that was idle takes its time to clock up.
        let (has_clocks, warm) = (self.backend.measure_read()?.is_some(), Instant::now());
        while has_clocks && warm.elapsed() < DEVICE_WARM_UP {
            step(self.decoder, self.backend)?;
        }
        let (mut samples, mut steals, mut bandwidths, mut discarded) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let mut by_place = vec![Vec::new(); WARM_STEPS + plan.steps];
        while samples.len() < plan.windows && discarded < 4 * plan.windows {
            let read = self.read()?;
            let steal = StealClock::start();
            let mut times = Vec::with_capacity(by_place.len());
            for _ in 0..by_place.len() {
                let started = Instant::now();
                step(self.decoder, self.backend)?;
                times.push(started.elapsed().as_secs_f64());
            }
            let elapsed = times[WARM_STEPS..].iter().sum::<f64>() / plan.steps as f64;
            let stolen = steal.steal_percent().max(read.steal_percent);
            if stolen > STEAL_LIMIT_PERCENT {
                discarded += 1;
                continue;
            }
            samples.push(elapsed);
            for (place, time) in by_place.iter_mut().zip(times) {
                place.push(time * 1e3);
            }
            steals.push(stolen);
            bandwidths.push(read.gb_per_s);
        }
        self.backend.free(chosen.buffer);
        if samples.is_empty() {
            return Err(Error::Stolen { what: format!("decode, batch {batch}"), windows: discarded });
        }
        // Random tokens choose more or fewer experts: bytes are a mean over steps as well.
        let mut profiler = Profiler::new(self.backend);
        for _ in 0..PROFILED_STEPS {
            self.decoder
                .forward(&decode_batch(self.decoder, batch, context, plan.identical, &mut rng), &mut profiler)?;
        }
        let profile = profiler.profile().clone();
        let mut times = Vec::new();
        for _ in 0..PROFILED_STEPS {
            times.extend(
                self.decoder.forward_timed(
                    &decode_batch(self.decoder, batch, context, plan.identical, &mut rng),
                    self.backend,
                )?,
            );
        }
        let unions = if batch == 1 { self.unions_of_strangers(context, &mut rng)? } else { Vec::new() };
        let device_steps: Vec<f64> = times.iter().map(|t: &StepTimes| t.step * 1e3).collect();
        let seconds = median(&samples);
        let bytes = profile.total_bytes() / PROFILED_STEPS;
        let measured = median(&bandwidths);
        let bandwidth = bytes as f64 / seconds / 1e9;
        let (experts, top_k) =
            (self.decoder.weights().max_experts() as f64, self.decoder.config().moe.num_experts_per_tok as f64);
        Ok(DecodeResult {
            batch,
            context,
            decode_tok_s: batch as f64 / seconds,
            step_ms: seconds * 1e3,
            step_ms_quartiles: [quantile(&samples, 0.25) * 1e3, quantile(&samples, 0.75) * 1e3],
            step_ms_by_place: by_place.iter().map(|times| median(times)).collect(),
            bytes_per_step: bytes,
            bandwidth_gb_s: bandwidth,
            bandwidth_share: bandwidth / measured,
            measured_read_gb_s: measured,
            distinct_experts: profile.distinct_experts as f64 / profile.moe_layers.max(1) as f64,
            expected_experts: experts * (1.0 - (1.0 - top_k / experts).powi(batch as i32)),
            steal_pct: median(&steals),
            discarded_windows: discarded,
            device_ms: (!device_steps.is_empty()).then(|| median(&device_steps)),
            stages: stage_results(&profile, PROFILED_STEPS, &times),
            unions,
        })
    }

    /// What several rows read together if they choose as single rows do. A prompt's rows see each other and choose alike: they
    /// are no measure of strangers.
    fn unions_of_strangers(&mut self, context: usize, rng: &mut SplitMix64) -> Result<Vec<(f64, f64)>> {
        let mut profiler = Profiler::new(self.backend);
        for _ in 0..COUNTED_STEPS {
            self.decoder.forward(&decode_batch(self.decoder, 1, context, false, rng), &mut profiler)?;
        }
        Ok(unions(profiler.profile(), COUNTED_STEPS))
    }

    fn prefill(&mut self, plan: &BenchPlan, tokens: usize) -> Result<PrefillResult> {
        let mut rng = SplitMix64::new(plan.seed);
        let (mut samples, mut steals, mut discarded, mut warm) = (Vec::new(), Vec::new(), 0, false);
        let runs = plan.windows.min(3);
        while samples.len() < runs && discarded < 4 * runs {
            let mut session = moellon_model::Session::new();
            let prompt = random_tokens(self.decoder, tokens, &mut rng);
            let steal = StealClock::start();
            let started = Instant::now();
            session.extend(&prompt, self.decoder, self.backend)?;
            self.backend.synchronize()?;
            let elapsed = started.elapsed().as_secs_f64();
            let stolen = steal.steal_percent();
            // The first run warms up.
            if !std::mem::replace(&mut warm, true) {
                continue;
            }
            if stolen > STEAL_LIMIT_PERCENT {
                discarded += 1;
                continue;
            }
            samples.push(tokens as f64 / elapsed);
            steals.push(stolen);
        }
        if samples.is_empty() {
            return Err(Error::Stolen { what: format!("prefill, {tokens} tokens"), windows: discarded });
        }
        let prompt = random_tokens(self.decoder, tokens, &mut rng);
        let mut profiler = Profiler::new(self.backend);
        moellon_model::Session::new().extend(&prompt, self.decoder, &mut profiler)?;
        let stages = stage_results(profiler.profile(), 1, &[]);
        let unions = unions(profiler.profile(), tokens);
        Ok(PrefillResult {
            tokens,
            tok_s: median(&samples),
            tok_s_quartiles: [quantile(&samples, 0.25), quantile(&samples, 0.75)],
            steal_pct: median(&steals),
            discarded_windows: discarded,
            stages,
            unions,
        })
    }
}

/// The stages that had operations, each a mean over `steps`; seconds are the device's own where it has measured some steps.
fn stage_results(profile: &Profile, steps: u64, times: &[StepTimes]) -> Vec<StageResult> {
    let result = |(index, stage): (usize, Stage)| {
        let count = profile.stage(stage);
        let seconds = match times {
            [] => count.seconds / steps as f64,
            times => times.iter().map(|t| t.stages[index]).sum::<f64>() / times.len() as f64,
        };
        StageResult {
            stage: stage.name().to_owned(),
            microseconds: seconds * 1e6,
            bytes: count.bytes / steps,
            // On some devices kernels of another stage do this one's work, and it has no time of its own.
            gb_s: if seconds > 0.0 { (count.bytes / steps) as f64 / seconds / 1e9 } else { 0.0 },
            operations: count.operations / steps,
        }
    };
    Stage::ALL.into_iter().enumerate().map(result).filter(|s| s.operations > 0).collect()
}

fn random_tokens(decoder: &Decoder, count: usize, rng: &mut SplitMix64) -> Vec<u32> {
    (0..count).map(|_| rng.below(decoder.config().vocab_size) as u32).collect()
}

/// One random token of each of `batch` sequences at position `context`, in blocks of its own.
fn decode_batch(decoder: &Decoder, batch: usize, context: usize, identical: bool, rng: &mut SplitMix64) -> Batch {
    let block_size = decoder.options().block_size;
    let blocks = (context + 1).div_ceil(block_size);
    let mut step = Batch::default();
    let mut tokens = random_tokens(decoder, batch, rng);
    if let (true, Some(token)) = (identical, tokens.first().copied()) {
        // All blocks hold the same rows, so the sequences are the same.
        tokens.fill(token);
    }
    for (sequence, token) in tokens.iter().enumerate() {
        let table: Vec<u32> = (0..blocks).map(|b| (sequence * blocks + b) as u32).collect();
        step.push_sequence(&[*token], context, &table, block_size, LogitRows::Last);
    }
    step
}

/// Distinct experts of a layer for numbers of rows up to those that were counted.
fn unions(profile: &Profile, counted: usize) -> Vec<(f64, f64)> {
    let rows = UNION_ROWS.into_iter().filter(|rows| *rows <= counted);
    rows.filter_map(|rows| Some((rows as f64, profile.union_of_experts(rows)?))).collect()
}
