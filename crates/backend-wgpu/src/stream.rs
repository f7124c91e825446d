//! Dispatches in order: those that wait for the next submission, those of a step that is recorded, and steps that are replayed.

use crate::device::{Device, Pipeline};
use moellon_ops::Result;
use std::collections::HashMap;

/// Dispatches that wait at most: the adapter starts while the host encodes on.
const MAX_PENDING: usize = 64;

/// A kernel with everything that it is given.
#[derive(Debug, Clone)]
pub(crate) struct Dispatch {
    pub(crate) pipeline: wgpu::ComputePipeline,
    pub(crate) bind_group: wgpu::BindGroup,
    /// Arguments, one word each.
    pub(crate) arguments: Vec<u32>,
    pub(crate) grid: [u32; 3],
}

/// A step that can run again.
struct Recording {
    dispatches: Vec<Dispatch>,
    /// Encoded while the adapter was busy with the step before.
    encoded: Option<wgpu::CommandBuffer>,
}

/// The one in-order stream of a back end.
#[derive(Default)]
pub(crate) struct Stream {
    pending: Vec<Dispatch>,
    recordings: HashMap<u64, Recording>,
    recording: Option<(u64, Vec<Dispatch>)>,
    /// Whose command buffer is encoded ahead.
    ahead: Option<u64>,
}

impl Stream {
    /// Appends a dispatch; nothing runs on an empty grid.
    pub(crate) fn push(
        &mut self,
        pipeline: &Pipeline,
        bind_group: wgpu::BindGroup,
        arguments: &[u32],
        grid: [u32; 3],
        device: &Device,
    ) {
        if grid.contains(&0) {
            return;
        }
        let dispatch =
            Dispatch { pipeline: pipeline.pipeline.clone(), bind_group, arguments: arguments.to_vec(), grid };
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
        if self.pending.is_empty() {
            return;
        }
        let commands = encode(&self.pending, device);
        self.pending.clear();
        device.queue.submit([commands]);
    }

    /// Submits what waits and waits for it.
    pub(crate) fn wait(&mut self, device: &Device) -> Result<()> {
        self.flush(device);
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
            self.recordings.insert(key, Recording { dispatches, encoded: None });
            self.encode_ahead(key, device);
        }
    }

    /// Runs a recorded step, if there is one.
    pub(crate) fn replay(&mut self, key: u64, device: &Device) -> bool {
        self.flush(device);
        let Some(recording) = self.recordings.get_mut(&key) else { return false };
        let commands = recording.encoded.take().unwrap_or_else(|| encode(&recording.dispatches, device));
        device.queue.submit([commands]);
        // The next step is usually the same one: it is encoded while the adapter is busy with this one.
        self.encode_ahead(key, device);
        true
    }

    /// Forgets all recordings: some of their memory is no longer what it was.
    pub(crate) fn forget_recordings(&mut self) {
        self.recordings.clear();
        self.ahead = None;
    }

    fn encode_ahead(&mut self, key: u64, device: &Device) {
        // Command buffers hold driver memory: one is enough.
        if let Some(other) = self.ahead.replace(key).filter(|other| *other != key)
            && let Some(recording) = self.recordings.get_mut(&other)
        {
            recording.encoded = None;
        }
        if let Some(recording) = self.recordings.get_mut(&key) {
            recording.encoded = Some(encode(&recording.dispatches, device));
        }
    }
}

fn encode(dispatches: &[Dispatch], device: &Device) -> wgpu::CommandBuffer {
    let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        for dispatch in dispatches {
            pass.set_pipeline(&dispatch.pipeline);
            pass.set_bind_group(0, &dispatch.bind_group, &[]);
            pass.set_immediates(0, bytemuck::cast_slice(&dispatch.arguments));
            let [x, y, z] = dispatch.grid;
            pass.dispatch_workgroups(x, y, z);
        }
    }
    encoder.finish()
}
