//! Dispatches in order: those that wait for the next submission, those of a step that is recorded, and steps that are replayed.
//!
//! Most of what wgpu does for a step grows with its dispatches: looking through what they bind when it is submitted, letting go of all that
//! when it has run. So a recorded step goes in pieces: the adapter starts on a short first one while the host submits the rest, and while it
//! is busy with the last one the host lets go of those before.

mod clock;
mod own;

use self::clock::Clock;
use self::own::{OwnStep, Parked};
use crate::device::{Bound, Compiled, Device, Memory, Pipeline};
use crate::inputs::{Copies, Inputs};
use moellon_ops::{Result, Stage, StepTimes};
use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

/// Dispatches that wait at most: the adapter starts while the host encodes on.
const MAX_PENDING: usize = 64;
/// Dispatches of a recorded step's first piece, which keeps the adapter busy while the next is submitted: every piece more costs an H200
/// 16 us between two.
const FIRST_PIECE: usize = 10;
/// Dispatches of its last piece, the head among them: enough to let go of the others meanwhile.
const LAST_PIECE: usize = 4;

/// A kernel with everything that it is given.
#[derive(Clone)]
pub(crate) struct Dispatch {
    pub(crate) name: Arc<str>,
    pub(crate) kernel: Compiled,
    pub(crate) bound: Bound,
    /// Arguments, one word each.
    pub(crate) arguments: Vec<u32>,
    pub(crate) grid: [u32; 3],
    /// The part of the step that it belongs to, for the clock.
    pub(crate) stage: Stage,
}

/// Name, workgroups, seconds.
pub(crate) type TimedKernel = (Arc<str>, [u32; 3], f64);

/// A step that can run again.
struct Recording {
    dispatches: Vec<Dispatch>,
    /// Its pieces, encoded while the adapter was busy with the step before.
    encoded: Option<Encoded>,
    /// All of it as commands of Vulkan's own, once it was replayed.
    own: Option<OwnStep>,
}

/// The pieces of a step, and the copy of its inputs that stands in the first one, if one does.
struct Encoded {
    pieces: Vec<wgpu::CommandBuffer>,
    copies: Option<Copies>,
}

/// The one in-order stream of a back end.
#[derive(Default)]
pub(crate) struct Stream {
    pending: Vec<Dispatch>,
    recordings: HashMap<u64, Recording>,
    recording: Option<(u64, Vec<Dispatch>)>,
    /// The recorded step that ran last, whose command buffers wgpu has encoded ahead.
    ahead: Option<u64>,
    /// The last piece of the step that runs. It is submitted with what comes next, which is usually the choice of a token: a submission waits
    /// for the one before.
    tail: Option<wgpu::CommandBuffer>,
    /// The step that is submitted with what comes next as Vulkan's own commands.
    own_tail: Option<u64>,
    /// Vulkan's commands that may still run, and memory that they copy to.
    parked: Parked,
    staging: Option<wgpu::Buffer>,
    /// The submission before that piece.
    before_last: Option<wgpu::SubmissionIndex>,
    clock: Option<Clock>,
}

impl Stream {
    /// Appends a dispatch; nothing runs on an empty grid.
    pub(crate) fn push(
        &mut self,
        pipeline: &Pipeline,
        bound: Bound,
        arguments: &[u32],
        grid: [u32; 3],
        stage: Stage,
        device: &Device,
    ) {
        if grid.contains(&0) {
            return;
        }
        let dispatch = Dispatch {
            name: Arc::clone(&pipeline.name),
            kernel: pipeline.kernel.clone(),
            bound,
            arguments: arguments.to_vec(),
            grid,
            stage,
        };
        if let Some((_, dispatches)) = &mut self.recording {
            dispatches.push(dispatch.clone());
        }
        self.pending.push(dispatch);
        if self.pending.len() >= MAX_PENDING {
            self.flush(device);
        }
    }

    /// Submits what waits.
    pub(crate) fn flush(&mut self, device: &Device) {
        if device.vulkan.is_some() {
            if let Err(error) = self.flush_own(device) {
                device.fail(&error);
            }
        } else if !self.pending.is_empty() {
            self.flush_with(device, |_| {});
        } else if let Some(tail) = self.tail.take() {
            device.submit([tail]);
        }
    }

    /// Submits what waits, and more commands behind it, at once.
    pub(crate) fn flush_with(&mut self, device: &Device, more: impl FnOnce(&mut wgpu::CommandEncoder)) {
        let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if !self.pending.is_empty() {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            encode_pass(&self.pending, &mut pass);
        }
        more(&mut encoder);
        self.pending.clear();
        device.submit(self.tail.take().into_iter().chain([encoder.finish()]));
    }

    /// Copies what a kernel wrote to the host, behind everything that waits.
    ///
    /// # Errors
    /// A failing device.
    pub(crate) fn download(&mut self, from: &Memory, at: u64, dst: &mut [u8], device: &Device) -> Result<()> {
        if device.vulkan.is_some() {
            return self.download_own(from, at, dst, device);
        }
        let (at, bytes) = (from.offset + at, dst.len() as u64);
        let staging = match self.staging.take().filter(|staging| staging.size() >= bytes) {
            Some(staging) => staging,
            None => device.staging(bytes.next_power_of_two())?,
        };
        self.flush_with(device, |encoder| encoder.copy_buffer_to_buffer(&from.buffer, at, &staging, 0, bytes));
        if let Some(index) = self.before_last.take() {
            device.wait_for(index)?;
        }
        device.map_read(&staging, dst)?;
        self.staging = Some(staging);
        Ok(())
    }

    /// Submits what waits and waits for it.
    pub(crate) fn wait(&mut self, device: &Device) -> Result<()> {
        self.flush(device);
        if let Some(vulkan) = &device.vulkan {
            vulkan.wait()?;
        }
        device.wait()
    }

    /// Starts a step.
    pub(crate) fn begin(&mut self, key: u64) {
        self.recording = Some((key, Vec::new()));
    }

    /// Ends a step; only complete ones are kept.
    pub(crate) fn end(&mut self, complete: bool, device: &Device) {
        let Some((key, dispatches)) = self.recording.take() else { return };
        self.flush(device);
        if complete {
            self.recordings.insert(key, Recording { dispatches, encoded: None, own: None });
            match device.vulkan {
                Some(_) => self.ahead = Some(key),
                None => self.encode_ahead(key, device),
            }
        }
    }

    /// Runs a recorded step, if there is one.
    ///
    /// # Errors
    /// A failing device.
    pub(crate) fn replay(&mut self, key: u64, device: &Device) -> Result<bool> {
        self.flush(device);
        if device.vulkan.is_some() {
            return self.replay_own(key, device);
        }
        let Some(recording) = self.recordings.get_mut(&key) else { return Ok(false) };
        let ahead = recording.encoded.take();
        let mut encoded = ahead.unwrap_or_else(|| encode(&recording.dispatches, false, device));
        if let Some(copies) = encoded.copies.take_if(|copies| !device.inputs.borrow_mut().fill(copies)) {
            // The host wrote something else this time.
            drop(copies);
            encoded.pieces[0] = encode_piece(first_piece(&recording.dispatches), None, device).0;
        }
        self.tail = encoded.pieces.pop();
        self.before_last = encoded.pieces.into_iter().map(|piece| device.submit([piece])).last();
        if let Some(copies) = encoded.copies {
            device.inputs.borrow().map_again(&copies);
        }
        // The next step is usually the same one: it is encoded while the adapter is busy with this one.
        self.encode_ahead(key, device);
        Ok(true)
    }

    /// Runs a recorded step by the adapter's clock, if there are both: once as always, once a stage at a time.
    pub(crate) fn time_replay(&mut self, key: u64, device: &Device) -> Result<Option<StepTimes>> {
        self.flush(device);
        let Some(recording) = self.recordings.get(&key) else { return Ok(None) };
        if device.vulkan.is_some() {
            return own::time_step(&recording.dispatches, device);
        }
        if self.clock.is_none() {
            self.clock = Clock::new(device)?;
        }
        let Some(clock) = &self.clock else { return Ok(None) };
        let whole = clock.run(&[&recording.dispatches], device)?;
        let parts: Vec<&[Dispatch]> = recording.dispatches.chunk_by(|a, b| a.stage == b.stage).collect();
        let mut times = StepTimes { step: whole[0], ..StepTimes::default() };
        for (part, seconds) in parts.iter().zip(clock.run(&parts, device)?) {
            let index = Stage::ALL.iter().position(|stage| *stage == part[0].stage).expect("ALL names every stage");
            times.stages[index] += seconds;
        }
        Ok(Some(times))
    }

    /// The kernels of the step that ran last, each with its grid and the seconds that it took alone, where they are wgpu's with the start of a
    /// pass.
    pub(crate) fn time_kernels(&mut self, device: &Device) -> Result<Vec<TimedKernel>> {
        self.flush(device);
        let Some(recording) = self.ahead.and_then(|key| self.recordings.get(&key)) else { return Ok(Vec::new()) };
        if device.vulkan.is_some() {
            return own::time_kernels(&recording.dispatches, device);
        }
        if self.clock.is_none() {
            self.clock = Clock::new(device)?;
        }
        let Some(clock) = &self.clock else { return Ok(Vec::new()) };
        let parts: Vec<&[Dispatch]> = recording.dispatches.chunks(1).collect();
        let seconds = clock.run(&parts, device)?;
        Ok(parts
            .iter()
            .zip(seconds)
            .map(|(part, seconds)| (Arc::clone(&part[0].name), part[0].grid, seconds))
            .collect())
    }

    /// Forgets all recordings: some of their memory is no longer what it was.
    pub(crate) fn forget_recordings(&mut self) {
        self.recordings.clear();
        self.ahead = None;
        self.own_tail = None;
    }

    fn encode_ahead(&mut self, key: u64, device: &Device) {
        // Command buffers hold driver memory: one is enough.
        if let Some(other) = self.ahead.replace(key).filter(|other| *other != key)
            && let Some(recording) = self.recordings.get_mut(&other)
        {
            recording.encoded = None;
        }
        if let Some(recording) = self.recordings.get_mut(&key) {
            recording.encoded = Some(encode(&recording.dispatches, true, device));
        }
    }
}

fn first_piece(dispatches: &[Dispatch]) -> &[Dispatch] {
    &dispatches[..dispatches.len().min(FIRST_PIECE)]
}

/// The pieces of a step; `ahead`: with the copy of what the step before was given in front.
fn encode(dispatches: &[Dispatch], ahead: bool, device: &Device) -> Encoded {
    let first = first_piece(dispatches);
    let rest = &dispatches[first.len()..];
    let (second, last) = rest.split_at(rest.len().saturating_sub(LAST_PIECE));
    // A single piece is submitted later than the copy could wait.
    let inputs = (ahead && !rest.is_empty()).then_some(&device.inputs);
    let (first, copies) = encode_piece(first, inputs, device);
    let others = [second, last].into_iter().filter(|piece| !piece.is_empty());
    let pieces = [first].into_iter().chain(others.map(|piece| encode_piece(piece, None, device).0)).collect();
    Encoded { pieces, copies }
}

fn encode_piece(
    dispatches: &[Dispatch],
    inputs: Option<&RefCell<Inputs>>,
    device: &Device,
) -> (wgpu::CommandBuffer, Option<Copies>) {
    let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    let copies = inputs.and_then(|inputs| inputs.borrow_mut().encode_ahead(&mut encoder));
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        encode_pass(dispatches, &mut pass);
    }
    (encoder.finish(), copies)
}

fn encode_pass(dispatches: &[Dispatch], pass: &mut wgpu::ComputePass<'_>) {
    for dispatch in dispatches {
        let (Compiled::Wgpu(pipeline), Some(group)) = (&dispatch.kernel, &dispatch.bound.group) else {
            unreachable!("kernels of Vulkan's own are in no pass of wgpu's");
        };
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, group, &[]);
        if !dispatch.arguments.is_empty() {
            pass.set_immediates(0, bytemuck::cast_slice(&dispatch.arguments));
        }
        let [x, y, z] = dispatch.grid;
        pass.dispatch_workgroups(x, y, z);
    }
}
