//! What this machine's memory gives to kernels that only read: the yardstick for all others.
//!
//! `unsafe`: a SIMD kernel over raw memory.
#![allow(unsafe_code)]

use crate::simd::{CpuLevel, Kernel, Level, Simd};
use moellon_tensor::arena::AlignedBuf;
use moellon_tensor::pool::{Pool, partition};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

/// Streams that a thread reads at once. One stream reads 10 % less: memory has banks to fill.
const STREAMS: usize = 4;
/// How far ahead lines are fetched, as weight kernels do.
const PREFETCH_BYTES: usize = 2048;
const LINE_BYTES: usize = 64;

/// Read bandwidth of several passes over one buffer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ReadBandwidth {
    /// Of the median pass.
    pub median_gb_per_s: f64,
    /// Of the fastest pass.
    pub best_gb_per_s: f64,
}

/// Memory to read, for passes between the passes of something else.
#[derive(Debug)]
pub struct ReadProbe {
    buffer: AlignedBuf<u8>,
    level: Level,
}

impl ReadProbe {
    /// A buffer of `size_bytes`: several times the caches.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(size_bytes: usize) -> io::Result<Self> {
        let level = Level::new(CpuLevel::detect()).expect("the detected level is available");
        let mut buffer = AlignedBuf::<u8>::zeroed(size_bytes.next_multiple_of(LINE_BYTES))?;
        // Pages that were never written are all the same page of zeros.
        for page in buffer.chunks_mut(4096) {
            page[0] = 1;
        }
        Ok(ReadProbe { buffer, level })
    }

    /// Reads the buffer once with all threads of `pool`: gigabytes a second.
    pub fn pass(&self, pool: &Pool) -> f64 {
        let lines = self.buffer.len() / LINE_BYTES;
        let total = AtomicU32::new(0);
        let start = Instant::now();
        pool.run(|index, num_threads| {
            let range = partition(lines, num_threads, index, STREAMS);
            let part = &self.buffer[range.start * LINE_BYTES..range.end * LINE_BYTES];
            total.fetch_add(read(self.level, part), Ordering::Relaxed);
        });
        let seconds = start.elapsed().as_secs_f64();
        // Also keeps the reads alive.
        assert!(total.into_inner() != 0, "the pages hold ones");
        self.buffer.len() as f64 / seconds / 1e9
    }

    /// Reads the buffer `passes` times.
    ///
    /// # Panics
    /// If `passes` is 0.
    pub fn measure(&self, pool: &Pool, passes: usize) -> ReadBandwidth {
        assert!(passes > 0, "at least one pass");
        let mut rates: Vec<f64> = (0..passes).map(|_| self.pass(pool)).collect();
        rates.sort_unstable_by(f64::total_cmp);
        ReadBandwidth { median_gb_per_s: rates[passes / 2], best_gb_per_s: rates[passes - 1] }
    }
}

/// Something that depends on every line of `bytes`.
fn read(level: Level, bytes: &[u8]) -> u32 {
    let args = Read { bytes, result: AtomicU32::new(0) };
    // SAFETY: only the lifetime changes, and the kernel keeps nothing.
    unsafe { level.call::<Read<'static>>(std::mem::transmute::<&Read<'_>, &Read<'static>>(&args)) };
    args.result.into_inner()
}

struct Read<'a> {
    bytes: &'a [u8],
    result: AtomicU32,
}

impl Kernel for Read<'_> {
    type Args = Read<'static>;

    #[inline(always)]
    unsafe fn run<S: Simd>(s: S, args: &Read<'static>) {
        let lines_per_stream = args.bytes.len() / LINE_BYTES / STREAMS;
        let mut any = [s.splat_i(0); STREAMS];
        for line in 0..lines_per_stream {
            for (stream, any) in any.iter_mut().enumerate() {
                // SAFETY: inside the slice.
                unsafe {
                    let at = args.bytes.as_ptr().add((stream * lines_per_stream + line) * LINE_BYTES);
                    s.prefetch(at.wrapping_add(PREFETCH_BYTES));
                    *any = s.or(*any, s.load_i(at));
                }
            }
        }
        let any = s.or(s.or(any[0], any[1]), s.or(any[2], any[3]));
        args.result.store(s.sum_i(any) as u32, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::pool::PoolOptions;

    #[test]
    fn reads_what_it_says() {
        let pool = Pool::new(PoolOptions { threads: Some(2), pin: false });
        let bandwidth = ReadProbe::new(3 << 20).unwrap().measure(&pool, 3);
        assert!(bandwidth.median_gb_per_s > 0.0 && bandwidth.best_gb_per_s >= bandwidth.median_gb_per_s);
    }
}
