//! A ladder of kernels: the hot operations of a model's layer, each in up to three implementations with the same inputs. Every rung is
//! checked against the one before it and timed against the bytes that it must move.
//!
//! | rung | what runs | checked |
//! |---|---|---|
//! | reference | the back end that the others are compared with, operation by operation | |
//! | plain | the back end under test, operation by operation; on the host experts one by one | each output against the reference, from the same inputs, as a share of the conformance suite's tolerance |
//! | best | what a step runs: the recorded operations | its output against plain's, bit for bit |
//!
//! An operation is a chain of turns. Each turn has inputs of its own, and weights and caches of its own where one turn's would stay in a
//! cache, so that weights come from memory as they do in a step.

mod chain;

use crate::bench::Error;
use crate::machine::{Machine, ReadBandwidth};
use crate::statistics::{median, quantile};
use chain::{Bed, Step, Turn};
use moellon_model::config::{Attention, ModelConfig};
use moellon_model::synthetic::FormatPlan;
use moellon_ops::{ActivationPrecision, Backend, ElementType, KernelTime, Tensor};
use serde::Serialize;
use std::collections::BTreeSet;
use std::time::Instant;

type Result<T> = std::result::Result<T, Error>;

/// What is measured.
#[derive(Debug, Clone)]
pub struct LadderPlan {
    /// Rows of a step.
    pub rows: Vec<usize>,
    /// Rows of a prompt's chunk; they are checked against themselves in small company.
    pub prompts: Vec<usize>,
    /// Positions that each row attends.
    pub context: usize,
    /// Passes that count, a median of them.
    pub passes: usize,
    /// Seed of weights and inputs.
    pub seed: u64,
}

/// Everything that was measured.
#[derive(Debug, Clone, Serialize)]
pub struct LadderReport {
    /// Where.
    pub machine: Machine,
    /// The back end under test and its device.
    pub backend: String,
    /// The back end that it is compared with.
    pub reference: String,
    /// Shapes.
    pub model: String,
    /// Name of the format or plan.
    pub format: String,
    /// Median read bandwidth over the run.
    pub measured_read_gb_s: f64,
    /// In the order of operations, rows and implementations.
    pub rungs: Vec<Rung>,
}

/// One implementation of one operation.
#[derive(Debug, Clone, Serialize)]
pub struct Rung {
    /// `expert gate and up`, `experts`, ..
    pub operation: String,
    /// Rows.
    pub rows: usize,
    /// `reference`, `plain` or `best`.
    pub implementation: String,
    /// Microseconds of a turn, median over passes.
    pub microseconds: f64,
    /// First and third quartile of the passes.
    pub quartiles: [f64; 2],
    /// Bytes that a turn must move, a mean over turns: each distinct expert once.
    pub bytes: u64,
    /// Bytes over time.
    pub gb_s: f64,
    /// Of the read bandwidth measured beside it.
    pub bandwidth_share: f64,
    /// Two operations a product and its sum, over time.
    pub tflop_s: f64,
    /// Distinct experts of a turn, a mean; absent without experts.
    pub distinct_experts: Option<f64>,
    /// What the check found.
    pub check: String,
    /// Kernels of a turn by the device's own clock, in their order, where it has one.
    pub kernels: Vec<LadderKernel>,
}

/// One kernel of a recorded chain.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LadderKernel {
    /// Its name.
    pub name: String,
    /// Launches of a turn.
    pub launches: f64,
    /// Microseconds of a turn, a median over launches times their number.
    pub microseconds: f64,
}

/// The operations of the ladder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    /// Gate and up of the chosen experts.
    GateUp,
    /// Their down and weighted sum.
    Down,
    /// Choice, gate, up, down.
    Experts,
    /// The output projection of attention.
    Dense,
    /// Attention; latent attention with the product that leaves the latent space.
    Attention,
    /// The head.
    Head,
}

impl Operation {
    const STEP: [Operation; 6] = [
        Operation::GateUp,
        Operation::Down,
        Operation::Experts,
        Operation::Dense,
        Operation::Attention,
        Operation::Head,
    ];
    const PROMPT: [Operation; 2] = [Operation::Experts, Operation::Dense];

    fn name(self, config: &ModelConfig) -> &'static str {
        match (self, config.attention) {
            (Operation::GateUp, _) => "expert gate and up",
            (Operation::Down, _) => "expert down",
            (Operation::Experts, _) => "experts, with their choice",
            (Operation::Dense, _) => "dense product",
            (Operation::Attention, Attention::Mla(_)) => "latent attention",
            (Operation::Attention, Attention::Gqa(_)) => "grouped attention",
            (Operation::Head, _) => "head",
        }
    }
}

/// The back ends of a ladder.
pub struct Ladder<'a> {
    /// Shapes.
    pub config: &'a ModelConfig,
    /// Formats of the weights.
    pub format: FormatPlan,
    /// Under test.
    pub best: &'a mut dyn Backend,
    /// The same without what makes it fast, where that is another back end; else `best`, operation by operation.
    pub plain: Option<&'a mut dyn Backend>,
    /// Compared with.
    pub reference: &'a mut dyn Backend,
    /// The host's read bandwidth now, for back ends that work in its memory.
    pub measure_read: &'a dyn Fn() -> ReadBandwidth,
    /// Called with a line of what is being done.
    pub progress: &'a mut dyn FnMut(&str),
}

impl Ladder<'_> {
    /// Measures everything.
    ///
    /// # Errors
    /// Shapes or formats that a back end refuses, or a failing device.
    pub fn run(&mut self, plan: &LadderPlan, model: &str, format: &str) -> Result<LadderReport> {
        let mut report = LadderReport {
            machine: Machine::this(),
            backend: format!("{}: {}", self.best.caps().name, self.best.caps().device),
            reference: format!("{}: {}", self.reference.caps().name, self.reference.caps().device),
            model: model.to_owned(),
            format: format.to_owned(),
            measured_read_gb_s: 0.0,
            rungs: Vec::new(),
        };
        let mut bandwidths = Vec::new();
        let mut beds = [
            Bed::new(self.config, self.format, plan, true),
            Bed::new(self.config, self.format, plan, true),
            Bed::new(self.config, self.format, plan, false),
        ];
        let steps = plan.rows.iter().flat_map(|rows| Operation::STEP.map(|operation| (operation, *rows, false)));
        let prompts = plan.prompts.iter().flat_map(|rows| Operation::PROMPT.map(|operation| (operation, *rows, true)));
        for (operation, rows, prompt) in steps.chain(prompts).collect::<Vec<_>>() {
            let name = operation.name(self.config);
            (self.progress)(&format!("{name}, {rows} rows"));
            let read = match self.best.measure_read()? {
                Some(bytes) => bytes,
                None => (self.measure_read)().gb_per_s * 1e9,
            };
            bandwidths.push(read);
            report.rungs.extend(self.rungs(operation, rows, prompt, plan, &mut beds, read)?);
        }
        report.measured_read_gb_s = median(&bandwidths) / 1e9;
        Ok(report)
    }

    /// All implementations of one operation with so many rows.
    fn rungs(
        &mut self,
        operation: Operation,
        rows: usize,
        prompt: bool,
        plan: &LadderPlan,
        [best, plain, reference]: &mut [Bed; 3],
        read: f64,
    ) -> Result<Vec<Rung>> {
        let mut rungs = Vec::new();
        let turns = best.turns(operation, rows, self.best)?;
        let choices = Choices::of(&turns, self.best)?;
        let mut rung = |implementation: &str, seconds: &[f64], check: String, kernels: Vec<LadderKernel>| {
            let time = median(seconds);
            rungs.push(Rung {
                operation: operation.name(self.config).to_owned(),
                rows,
                implementation: implementation.to_owned(),
                microseconds: time * 1e6,
                quartiles: [quantile(seconds, 0.25) * 1e6, quantile(seconds, 0.75) * 1e6],
                bytes: choices.bytes,
                gb_s: choices.bytes as f64 / time / 1e9,
                bandwidth_share: choices.bytes as f64 / time / read,
                tflop_s: 2.0 * choices.macs as f64 / time / 1e12,
                distinct_experts: choices.distinct,
                check,
                kernels,
            });
        };
        // Plain's own weights and turns, where it is another back end.
        let mut own = match &mut self.plain {
            Some(backend) => Some(plain.turns(operation, rows, *backend)?),
            None => None,
        };
        let (plain_turns, backend): (&[Turn], &mut dyn Backend) = match (&own, &mut self.plain) {
            (Some(own), Some(backend)) => (own, *backend),
            _ => (&turns, self.best),
        };
        let check = if prompt {
            check_rows_alone(&plain_turns[0], backend)?
        } else {
            let expected = reference.turns(operation, rows, self.reference)?;
            let started = Instant::now();
            run_turn(&expected[0], self.reference)?;
            self.reference.synchronize()?;
            rung("reference", &[started.elapsed().as_secs_f64()], String::new(), Vec::new());
            let check = check_turn(&plain_turns[0], backend, &expected[0], self.reference)?;
            free(expected, self.reference);
            check
        };
        let seconds = time_chain(plain_turns, backend, plan.passes)?;
        rung("plain", &seconds, check, Vec::new());
        let expected = read_f32(plain_turns[plain_turns.len() - 1].out(), backend)?;
        if let (Some(own), Some(backend)) = (own.take(), &mut self.plain) {
            free(own, *backend);
        }
        let recorded = self.best.records_steps();
        if recorded || self.plain.is_some() {
            let (seconds, kernels) = if recorded {
                time_recorded(&turns, self.best, plan.passes, operation, rows)?
            } else {
                (time_chain(&turns, self.best, plan.passes)?, Vec::new())
            };
            let found = read_f32(turns[turns.len() - 1].out(), self.best)?;
            rung("best", &seconds, same_bits(&found, &expected), kernels);
        }
        free(turns, self.best);
        Ok(rungs)
    }
}

fn free(turns: Vec<Turn>, backend: &mut dyn Backend) {
    turns.into_iter().flat_map(|turn| turn.buffers).for_each(|buffer| backend.free(buffer));
}

/// What the turns move and compute, means.
struct Choices {
    bytes: u64,
    macs: u64,
    distinct: Option<f64>,
}

impl Choices {
    fn of(turns: &[Turn], backend: &mut dyn Backend) -> Result<Self> {
        let (mut bytes, mut macs, mut distinct) = (0, 0, None);
        for turn in turns {
            run_turn(turn, backend)?;
            let mut experts = 0;
            if let Some(ids) = turn.ids {
                let mut chosen = vec![0; ids.rows * ids.cols];
                backend.read_u32(ids, &mut chosen)?;
                experts = chosen.iter().collect::<BTreeSet<_>>().len();
                *distinct.get_or_insert(0.0) += experts as f64 / turns.len() as f64;
            }
            bytes += turn.timed().iter().map(|step| step.bytes(experts)).sum::<u64>();
            macs += turn.timed().iter().map(Step::macs).sum::<u64>();
        }
        let count = turns.len() as u64;
        Ok(Choices { bytes: bytes / count, macs: macs / count, distinct })
    }
}

/// Everything of a turn, what comes before the timed steps too.
fn run_turn(turn: &Turn, backend: &mut dyn Backend) -> Result<()> {
    turn.steps.iter().try_for_each(|step| step.run(backend))?;
    Ok(())
}

/// How long passes last at least, so that starting and waiting do not count.
const PASS_SECONDS: f64 = 0.01;
/// How long a chain runs before it counts.
const WARM_SECONDS: f64 = 0.05;

/// Seconds of a turn in each pass of `run`, which runs all turns.
fn time_passes(
    turns: usize,
    passes: usize,
    backend: &mut dyn Backend,
    run: &mut dyn FnMut(&mut dyn Backend) -> Result<()>,
) -> Result<Vec<f64>> {
    let mut timed = |times: usize, backend: &mut dyn Backend| -> Result<f64> {
        let started = Instant::now();
        (0..times).try_for_each(|_| run(backend))?;
        backend.synchronize()?;
        Ok(started.elapsed().as_secs_f64())
    };
    let once = timed(1, backend)?;
    let mut warm = once;
    let mut last = once;
    while warm < WARM_SECONDS {
        last = timed(1, backend)?;
        warm += last;
    }
    let times = (PASS_SECONDS / last).ceil().clamp(1.0, 10_000.0) as usize;
    (0..passes).map(|_| Ok(timed(times, backend)? / (times * turns) as f64)).collect()
}

/// Operation by operation.
fn time_chain(turns: &[Turn], backend: &mut dyn Backend, passes: usize) -> Result<Vec<f64>> {
    turns.iter().try_for_each(|turn| run_turn(turn, backend))?;
    time_passes(turns.len(), passes, backend, &mut |backend| {
        turns.iter().flat_map(Turn::timed).try_for_each(|step| step.run(backend))?;
        Ok(())
    })
}

/// Recorded as a step is, all turns as one.
fn time_recorded(
    turns: &[Turn],
    backend: &mut dyn Backend,
    passes: usize,
    operation: Operation,
    rows: usize,
) -> Result<(Vec<f64>, Vec<LadderKernel>)> {
    // Any number that no other chain of this back end has.
    let key = ((operation as u64) << 32 | rows as u64) ^ 0x6c61_6464_6572_0000;
    let lead = turns[0].lead;
    let mut attempts = 0;
    while !backend.replay(key)? {
        assert!(attempts < 8, "a back end that records steps replays one that ran eight times");
        attempts += 1;
        backend.begin_recording(key)?;
        // A step begins with a norm, which says how many rows it has.
        let result =
            std::iter::once(&lead).chain(turns.iter().flat_map(Turn::timed)).try_for_each(|step| step.run(backend));
        backend.end_recording(result.is_ok())?;
        result?;
    }
    let seconds = time_passes(turns.len(), passes, backend, &mut |backend| {
        backend.replay(key)?;
        Ok(())
    })?;
    let kernels = backend.time_kernels(key)?;
    Ok((seconds, by_name(&kernels, turns.len())))
}

/// Launches added up by name; the first is the lead's.
fn by_name(kernels: &[KernelTime], turns: usize) -> Vec<LadderKernel> {
    let mut names: Vec<(&str, Vec<f64>)> = Vec::new();
    for kernel in kernels.iter().skip(1) {
        match names.iter_mut().find(|(name, _)| *name == kernel.name) {
            Some((_, times)) => times.push(kernel.seconds),
            None => names.push((&kernel.name, vec![kernel.seconds])),
        }
    }
    let row = |(name, times): (&str, Vec<f64>)| {
        let launches = times.len() as f64 / turns as f64;
        LadderKernel { name: name.to_owned(), launches, microseconds: median(&times) * launches * 1e6 }
    };
    names.into_iter().map(row).collect()
}

fn read_f32(tensor: Tensor, backend: &mut dyn Backend) -> Result<Vec<f32>> {
    let mut host = vec![0.0; tensor.rows * tensor.cols];
    backend.read_f32(tensor, &mut host)?;
    Ok(host)
}

/// Runs a turn step by step on both; each step of `expected` has the inputs that the other one had.
fn check_turn(turn: &Turn, backend: &mut dyn Backend, expected: &Turn, reference: &mut dyn Backend) -> Result<String> {
    let mut worst = 0.0f32;
    // Both sides' rounding of activations counts.
    let precisions = [backend.caps().activations, reference.caps().activations];
    let precision =
        if precisions.contains(&ActivationPrecision::Int8) { ActivationPrecision::Int8 } else { precisions[0] };
    for (step, other) in turn.steps.iter().zip(&expected.steps) {
        step.run(backend)?;
        other.run(reference)?;
        for (out, other_out) in step.outputs().into_iter().zip(other.outputs()) {
            if out.buffer.element == ElementType::U32 {
                let (mut found, mut wanted) = (vec![0; out.rows * out.cols], vec![0; out.rows * out.cols]);
                backend.read_u32(out, &mut found)?;
                reference.read_u32(other_out, &mut wanted)?;
                if found != wanted {
                    return Ok(format!("{} chooses otherwise than the reference", step.name()));
                }
                continue;
            }
            let (found, wanted) = (read_f32(out, backend)?, read_f32(other_out, reference)?);
            worst = worst.max(step.tolerance().share(precision, &found, &wanted, step.alike(out)));
            reference.write_f32(other_out, &found)?;
        }
    }
    Ok(format!("{worst:.2} of the tolerance"))
}

/// Whether the first rows have the bits that they have in a step of eight rows.
fn check_rows_alone(turn: &Turn, backend: &mut dyn Backend) -> Result<String> {
    const FEW: usize = 8;
    run_turn(turn, backend)?;
    let (rows, out) = (FEW.min(turn.out().rows), turn.out());
    let whole = read_f32(out.row_range(0, rows), backend)?;
    turn.steps.iter().try_for_each(|step| step.first_rows(rows).run(backend))?;
    let alone = read_f32(out.row_range(0, rows), backend)?;
    // Whatever runs next finds what it would have found.
    run_turn(turn, backend)?;
    Ok(match same_bits(&whole, &alone).as_str() {
        "same bits" => "the bits of fewer rows".to_owned(),
        other => format!("{other} from fewer rows"),
    })
}

fn same_bits(found: &[f32], expected: &[f32]) -> String {
    let differ = found.iter().zip(expected).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
    match differ {
        0 => "same bits".to_owned(),
        _ => {
            let far = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            let scale = expected.iter().map(|x| x.abs()).fold(0.0, f32::max);
            format!("differs by {:.1e} of the largest", far / scale.max(f32::MIN_POSITIVE))
        }
    }
}

#[cfg(test)]
mod tests;
