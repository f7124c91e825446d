//! The stream where Vulkan is below wgpu: what waits becomes commands of Vulkan's own, and a recorded step is recorded once more as such, which
//! a token submits as they are. What comes behind a step (the choice of a token and its copy to the host) is known from the time before, so
//! that both go to the queue at once: the adapter has nothing to do between two submissions for 16 us.

use super::{Dispatch, Stream, TimedKernel};
use crate::device::{Device, Memory, device_error};
use crate::inputs::Known;
use crate::vulkan::{Commands, Mapped, Program, Vulkan};
use moellon_ops::{Result, Stage, StepTimes};
use std::collections::HashSet;
use std::sync::Arc;

/// Submissions that are kept before the host waits for all of them.
const MOST_PARKED: usize = 64;

/// Steps whose commands are kept: each holds memory of the driver.
const MOST_STEPS: usize = 32;

/// Commands that may still run, and memory that they copy to.
#[derive(Default)]
pub(super) struct Parked {
    commands: Vec<Commands>,
    staging: Option<Mapped>,
}

/// A step.
pub(super) struct OwnStep {
    commands: Commands,
    /// What the host writes before it.
    inputs: Option<(Mapped, Known)>,
    behind: Option<Behind>,
}

/// What came behind a step and will again: dispatches, and a copy to the host.
struct Behind {
    commands: Commands,
    dispatches: Vec<Dispatch>,
    /// Memory, its first byte, bytes.
    copied: (u64, u64, usize),
    staging: Mapped,
}

impl Behind {
    fn record(dispatches: Vec<Dispatch>, from: &Memory, at: u64, bytes: usize, device: &Device) -> Result<Behind> {
        let own = vulkan(device)?;
        let staging = own.map(bytes, true)?;
        let copy_out = Some((from, at, &staging, bytes as u64));
        let commands = own.record(&Program { copy_in: None, dispatches: &dispatches, stamps: None, copy_out })?;
        Ok(Behind { commands, dispatches, copied: (from.id, at, bytes), staging })
    }

    fn is(&self, pending: &[Dispatch], copied: (u64, u64, usize)) -> bool {
        let ids = |dispatch: &Dispatch| dispatch.bound.memories.iter().map(|memory| memory.id).collect::<Vec<_>>();
        let same = |(a, b): (&Dispatch, &Dispatch)| {
            a.name == b.name && a.arguments == b.arguments && a.grid == b.grid && ids(a) == ids(b)
        };
        self.copied == copied && self.dispatches.len() == pending.len() && self.dispatches.iter().zip(pending).all(same)
    }
}

fn vulkan(device: &Device) -> Result<&Vulkan> {
    device.vulkan.as_ref().ok_or_else(|| device_error("no Vulkan below wgpu"))
}

impl OwnStep {
    fn record(dispatches: &[Dispatch], device: &Device) -> Result<OwnStep> {
        let own = vulkan(device)?;
        let inputs = device.inputs.borrow();
        let ids: HashSet<u64> =
            dispatches.iter().flat_map(|d| d.bound.memories.iter()).map(|memory| memory.id).collect();
        let known = inputs.known(&ids);
        let mapped = match known.ranges.last() {
            Some((_, end)) => Some((own.map(*end, false)?, known)),
            None => None,
        };
        let copy_in = mapped.as_ref().zip(inputs.buffer.as_ref());
        let copy_in = copy_in.map(|((mapped, known), buffer)| (mapped, buffer, &known.ranges[..]));
        let commands = own.record(&Program { copy_in, dispatches, stamps: None, copy_out: None })?;
        Ok(OwnStep { commands, inputs: mapped, behind: None })
    }

    /// Hands over what the host wrote; `false` if this is not the place for it.
    fn fill(&mut self, device: &Device) -> Result<bool> {
        let Some((mapped, known)) = &mut self.inputs else { return Ok(false) };
        device.inputs.borrow_mut().fill_known(known, |at, bytes| mapped.write(at, bytes))
    }

    fn is_current(&self, device: &Device) -> bool {
        let generation = device.inputs.borrow().generation();
        self.inputs.as_ref().is_none_or(|(_, known)| known.generation == generation)
    }
}

impl Stream {
    /// Submits what waits.
    pub(super) fn flush_own(&mut self, device: &Device) -> Result<()> {
        self.submit_tail(device)?;
        if self.pending.is_empty() {
            return Ok(());
        }
        self.submit_pending(None, device)
    }

    /// Submits the step that waits for what comes behind it.
    fn submit_tail(&mut self, device: &Device) -> Result<()> {
        let step = self.own_tail.take().and_then(|key| self.recordings.get(&key)?.own.as_ref());
        step.map_or(Ok(()), |step| vulkan(device)?.submit(&[&step.commands]))
    }

    /// Submits dispatches that wait, and a copy to the host behind them.
    fn submit_pending(&mut self, copy_out: Option<(&Memory, u64, &Mapped, u64)>, device: &Device) -> Result<()> {
        let own = vulkan(device)?;
        device.submit_writes(false);
        let commands = own.record(&Program { copy_in: None, dispatches: &self.pending, stamps: None, copy_out })?;
        self.pending.clear();
        own.submit(&[&commands])?;
        self.parked.commands.push(commands);
        if self.parked.commands.len() >= MOST_PARKED {
            own.wait()?;
            self.parked.commands.clear();
        }
        Ok(())
    }

    /// Prepares a recorded step, if there is one. It is submitted with what comes next.
    pub(super) fn replay_own(&mut self, key: u64, device: &Device) -> Result<bool> {
        // Commands and what they copy from are in use until then.
        vulkan(device)?.wait()?;
        self.parked.commands.clear();
        if self.recordings.values().filter(|recording| recording.own.is_some()).count() >= MOST_STEPS {
            self.recordings.iter_mut().filter(|(other, _)| **other != key).for_each(|(_, other)| other.own = None);
        }
        let Some(recording) = self.recordings.get_mut(&key) else { return Ok(false) };
        let mut step = match recording.own.take().filter(|step| step.is_current(device)) {
            Some(step) => step,
            None => OwnStep::record(&recording.dispatches, device)?,
        };
        if step.fill(device)? {
            device.submit_writes(true);
        } else {
            // The host wrote what the step does not copy, so all of it goes the way of other writes.
            device.submit_writes(false);
            step.fill(device)?;
        }
        recording.own = Some(step);
        self.ahead = Some(key);
        self.own_tail = Some(key);
        Ok(true)
    }

    /// Copies a range to the host behind what waits.
    pub(super) fn download_own(&mut self, from: &Memory, at: u64, dst: &mut [u8], device: &Device) -> Result<()> {
        let (own, copied) = (vulkan(device)?, (from.id, at, dst.len()));
        let key = self.own_tail;
        let step = key.and_then(|key| self.recordings.get(&key)?.own.as_ref());
        if let Some(step) = step
            && let Some(behind) = step.behind.as_ref().filter(|behind| behind.is(&self.pending, copied))
        {
            own.submit(&[&step.commands, &behind.commands])?;
            self.own_tail = None;
            self.pending.clear();
            behind.staging.read(dst)?;
            return device.check();
        }
        self.submit_tail(device)?;
        let dispatches = self.pending.clone();
        let staging = match self.parked.staging.take().filter(|staging| staging.bytes() >= dst.len()) {
            Some(staging) => staging,
            None => own.map(dst.len().next_power_of_two(), true)?,
        };
        self.submit_pending(Some((from, at, &staging, dst.len() as u64)), device)?;
        staging.read(dst)?;
        self.parked.staging = Some(staging);
        self.parked.commands.clear();
        if let Some(step) = key.and_then(|key| self.recordings.get_mut(&key)?.own.as_mut()) {
            step.behind = Some(Behind::record(dispatches, from, at, dst.len(), device)?);
        }
        device.check()
    }
}

/// Seconds of parts of a step by the adapter's clock: each ends with the dispatch of that index.
fn time_parts(dispatches: &[Dispatch], ends: &[usize], device: &Device) -> Result<Vec<f64>> {
    let own = vulkan(device)?;
    device.submit_writes(false);
    let stamps = own.stamps(ends.len() + 1)?;
    let program = Program { copy_in: None, dispatches, stamps: Some((&stamps, ends)), copy_out: None };
    let commands = own.record(&program)?;
    own.submit(&[&commands])?;
    let ticks = stamps.read(ends.len() + 1)?;
    let tick = f64::from(device.queue.get_timestamp_period()) * 1e-9;
    Ok(ticks.windows(2).map(|pair| pair[1].saturating_sub(pair[0]) as f64 * tick).collect())
}

/// A step by the adapter's clock, if it has one: once as always, once stage by stage.
pub(super) fn time_step(dispatches: &[Dispatch], device: &Device) -> Result<Option<StepTimes>> {
    if dispatches.is_empty() || !device.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        return Ok(None);
    }
    let whole = time_parts(dispatches, &[dispatches.len() - 1], device)?;
    let mut times = StepTimes { step: whole[0], ..StepTimes::default() };
    let mut ends = Vec::new();
    for part in dispatches.chunk_by(|a, b| a.stage == b.stage) {
        ends.push(ends.last().map_or(0, |end| end + 1) + part.len() - 1);
    }
    for (end, seconds) in ends.iter().zip(time_parts(dispatches, &ends, device)?) {
        let stage = dispatches[*end].stage;
        let index = Stage::ALL.iter().position(|other| *other == stage).expect("ALL names every stage");
        times.stages[index] += seconds;
    }
    Ok(Some(times))
}

/// Every kernel of a step by the adapter's clock, if it has one.
pub(super) fn time_kernels(dispatches: &[Dispatch], device: &Device) -> Result<Vec<TimedKernel>> {
    if !device.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
        return Ok(Vec::new());
    }
    let ends: Vec<usize> = (0..dispatches.len()).collect();
    let named = dispatches.iter().zip(time_parts(dispatches, &ends, device)?);
    Ok(named.map(|(dispatch, seconds)| (Arc::clone(&dispatch.name), dispatch.grid, seconds)).collect())
}
