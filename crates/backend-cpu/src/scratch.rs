//! Work space of threads, reused from step to step.
//!
//! `unsafe`: each thread takes its own part of one buffer, which is lines seen as floats.
#![allow(unsafe_code)]

use crate::disjoint::Disjoint;

/// Floats between the parts of two threads: whole pairs of cache lines.
const GRANULARITY: usize = 2 * LINE_FLOATS;

/// Floats of a cache line.
const LINE_FLOATS: usize = 16;

/// A cache line: vectors that cross two of them take two loads, and the system's large blocks begin in the middle of one.
#[derive(Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code, reason = "read as floats")]
struct Line([f32; LINE_FLOATS]);

/// A buffer that only grows.
#[derive(Default)]
pub(crate) struct Scratch {
    lines: Vec<Line>,
}

/// Equal parts for all threads.
pub(crate) struct PerThread<'a> {
    all: Disjoint<'a, f32>,
    each: usize,
}

impl Scratch {
    /// `each` floats or more for every thread, with anything in them.
    pub(crate) fn per_thread(&mut self, num_threads: usize, each: usize) -> PerThread<'_> {
        self.per_thread_and_shared(num_threads, each, 0).0
    }

    /// The same, and `shared` floats for all threads together.
    pub(crate) fn per_thread_and_shared(
        &mut self,
        num_threads: usize,
        each: usize,
        shared: usize,
    ) -> (PerThread<'_>, Disjoint<'_, f32>) {
        let each = each.next_multiple_of(GRANULARITY);
        let num_lines = (each * num_threads + shared).div_ceil(LINE_FLOATS);
        if self.lines.len() < num_lines {
            self.lines.resize(num_lines.next_power_of_two(), Line([0.0; LINE_FLOATS]));
        }
        // SAFETY: lines are arrays of floats without padding, borrowed as long as the result.
        let floats = unsafe {
            std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast::<f32>(), self.lines.len() * LINE_FLOATS)
        };
        let (own, rest) = floats.split_at_mut(each * num_threads);
        (PerThread { all: Disjoint::new(own), each }, Disjoint::new(&mut rest[..shared]))
    }
}

impl PerThread<'_> {
    /// The part of thread `index`.
    ///
    /// # Safety
    /// Each index is taken once at a time.
    #[expect(clippy::mut_from_ref, reason = "parts are disjoint by index")]
    pub(crate) unsafe fn part(&self, index: usize) -> &mut [f32] {
        // SAFETY: parts of different indices do not overlap.
        unsafe { self.all.part(index * self.each..(index + 1) * self.each) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_begin_with_a_line() {
        let mut scratch = Scratch::default();
        for (num_threads, each, shared) in [(1, 1, 0), (3, 1000, 77), (2, 100_000, 1 << 20)] {
            let (own, all) = scratch.per_thread_and_shared(num_threads, each, shared);
            for index in 0..num_threads {
                // SAFETY: each part once at a time.
                let part = unsafe { own.part(index) };
                assert!(part.len() >= each && (part.as_ptr() as usize).is_multiple_of(64), "{index} of {num_threads}");
            }
            // SAFETY: the only part.
            let shared_part = unsafe { all.part(0..shared) };
            assert!((shared_part.as_ptr() as usize).is_multiple_of(64), "{num_threads} threads");
        }
    }
}
