//! What the engine says about itself: for health checks, metrics and people.

use crate::disk_cache::DiskCacheStats;
use crate::speculate::SpeculationStats;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Rates are averages over this long.
const RATE_WINDOW: Duration = Duration::from_secs(5);

/// A decode step whose bytes were counted: each distinct expert of the batch once.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CountedStep {
    /// Sequences in it.
    pub rows: usize,
    /// Bytes that it must move.
    pub bytes: u64,
    /// Its time, the choice of tokens included.
    pub elapsed: Duration,
    /// Mean number of different experts of a layer; `None` without experts.
    pub distinct_experts: Option<f64>,
}

impl CountedStep {
    /// Bytes over time.
    pub fn bytes_per_s(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// A snapshot of the engine.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct EngineStats {
    /// Requests with cache blocks.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Cache blocks of all.
    pub total_blocks: usize,
    /// Blocks held by running requests.
    pub used_blocks: usize,
    /// Blocks that hold reusable prefixes and can be evicted.
    pub reusable_blocks: usize,
    /// Bytes of a block, all layers together.
    pub block_bytes: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queried_tokens: u64,
    /// Of them found, in memory or on disk.
    pub prefix_hit_tokens: u64,
    /// Of them read from disk.
    pub disk_hit_tokens: u64,
    /// The cache on disk, if there is one.
    pub disk: Option<DiskCacheStats>,
    /// Steps since the start.
    pub steps: u64,
    /// Rows of the last step.
    pub last_step_tokens: usize,
    /// Time of the last step.
    pub last_step: Duration,
    /// The last decode step whose bytes were counted: one in a few seconds, because counting waits for the device.
    pub counted_step: Option<CountedStep>,
    /// Time since the last step ended or the engine became busy; zero while there is nothing to do.
    pub since_progress: Duration,
    /// Prompt tokens computed.
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Prompt tokens computed a second, lately.
    pub prefill_tokens_per_s: f64,
    /// Tokens generated a second, lately.
    pub generated_tokens_per_s: f64,
    /// Prompt tokens that may ride in a step that decodes.
    pub prefill_chunk: usize,
    /// Masks of constraints computed.
    pub masks: u64,
    /// Their time.
    pub mask_time: Duration,
    /// What speculation did; `None` where nothing drafts.
    pub speculation: Option<SpeculationStats>,
    /// Requests put back into the queue for want of blocks.
    pub preemptions: u64,
    /// Requests refused by `submit`.
    pub rejected: u64,
    /// Requests that ended by a stop token or a complete constraint.
    pub finished_stop: u64,
    /// Requests that ended by their length.
    pub finished_length: u64,
    /// Requests whose client left.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Failures of a step after which the engine began anew with empty caches.
    pub restarts: u64,
    /// Of them since the last step that worked; above 0 the engine is not healthy.
    pub failures_in_a_row: u64,
}

impl EngineStats {
    /// Bytes of the whole cache.
    pub fn total_bytes(&self) -> u64 {
        self.total_blocks as u64 * self.block_bytes
    }

    /// Bytes held by running requests.
    pub fn used_bytes(&self) -> u64 {
        self.used_blocks as u64 * self.block_bytes
    }

    /// Bytes of reusable prefixes that can be evicted.
    pub fn reusable_bytes(&self) -> u64 {
        self.reusable_blocks as u64 * self.block_bytes
    }
}

/// Events a second over the last seconds.
#[derive(Debug)]
pub(crate) struct Rate {
    samples: VecDeque<(Instant, usize)>,
    sum: usize,
}

impl Rate {
    pub(crate) fn new() -> Self {
        Rate { samples: VecDeque::new(), sum: 0 }
    }

    pub(crate) fn add(&mut self, count: usize, now: Instant) {
        self.forget(now);
        if count > 0 {
            self.samples.push_back((now, count));
            self.sum += count;
        }
    }

    /// Over the window, or the time since its first sample if that is shorter (but not below a tenth of a second).
    pub(crate) fn per_second(&mut self, now: Instant) -> f64 {
        self.forget(now);
        let Some((first, _)) = self.samples.front() else { return 0.0 };
        self.sum as f64 / (now - *first).as_secs_f64().max(0.1)
    }

    fn forget(&mut self, now: Instant) {
        while let Some((time, count)) = self.samples.front().copied() {
            if now.saturating_duration_since(time) <= RATE_WINDOW {
                break;
            }
            self.samples.pop_front();
            self.sum -= count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_forgets() {
        let start = Instant::now();
        let mut rate = Rate::new();
        rate.add(10, start);
        rate.add(10, start + Duration::from_secs(1));
        assert_eq!(rate.per_second(start + Duration::from_secs(2)), 10.0);
        assert_eq!(rate.per_second(start + Duration::from_secs(6)), 2.0);
        assert_eq!(rate.per_second(start + Duration::from_secs(60)), 0.0);
    }
}
