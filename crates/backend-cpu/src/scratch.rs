//! Work space of threads, reused from step to step.
//!
//! `unsafe`: each thread takes its own part of one buffer.
#![allow(unsafe_code)]

use crate::disjoint::Disjoint;

/// Floats between the parts of two threads: whole pairs of cache lines.
const GRANULARITY: usize = 32;

/// A buffer that only grows.
#[derive(Default)]
pub(crate) struct Scratch {
    floats: Vec<f32>,
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
        if self.floats.len() < each * num_threads + shared {
            self.floats.resize((each * num_threads + shared).next_power_of_two(), 0.0);
        }
        let (own, rest) = self.floats.split_at_mut(each * num_threads);
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
