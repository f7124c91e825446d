//! The adapter's own clock: timestamps around passes. Only whole passes are timed, which every API can.

use super::{Dispatch, encode_pass};
use crate::device::Device;
use moellon_ops::Result;

/// Parts of a step that can be told apart.
const MOST_PARTS: usize = 2048;

pub(super) struct Clock {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    staging: wgpu::Buffer,
    /// Seconds of a tick.
    tick: f64,
}

impl Clock {
    /// The adapter's clock, if it has one.
    pub(super) fn new(device: &Device) -> Result<Option<Clock>> {
        if !device.device.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let bytes = 16 * MOST_PARTS as u64;
        let queries = device.device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: 2 * MOST_PARTS as u32,
        });
        let resolved = device.device.create_buffer(&wgpu::BufferDescriptor {
            label: None,
            size: bytes,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let staging = device.staging(bytes)?;
        let tick = f64::from(device.queue.get_timestamp_period()) * 1e-9;
        Ok(Some(Clock { queries, resolved, staging, tick }))
    }

    /// Runs parts one after the other and says how many seconds each took, what lies between it and the part before included.
    pub(super) fn run(&self, parts: &[&[Dispatch]], device: &Device) -> Result<Vec<f64>> {
        let mut seconds = Vec::with_capacity(parts.len());
        // A step of more parts than there are timestamps goes in pieces.
        for parts in parts.chunks(MOST_PARTS) {
            let mut encoder = device.device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            for (first, part) in (0..).step_by(2).zip(parts) {
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
                    label: None,
                    timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                        query_set: &self.queries,
                        beginning_of_pass_write_index: Some(first),
                        end_of_pass_write_index: Some(first + 1),
                    }),
                });
                encode_pass(part, &mut pass);
            }
            let bytes = 16 * parts.len();
            encoder.resolve_query_set(&self.queries, 0..2 * parts.len() as u32, &self.resolved, 0);
            encoder.copy_buffer_to_buffer(&self.resolved, 0, &self.staging, 0, bytes as u64);
            device.submit([encoder.finish()]);
            let mut ticks = vec![0u64; 2 * parts.len()];
            device.map_read(&self.staging, bytemuck::cast_slice_mut(&mut ticks))?;
            let mut last = ticks.first().copied().unwrap_or(0);
            for end in ticks.iter().skip(1).step_by(2) {
                // Clocks of some adapters step back by a tick.
                seconds.push(end.saturating_sub(last) as f64 * self.tick);
                last = *end;
            }
        }
        Ok(seconds)
    }
}
