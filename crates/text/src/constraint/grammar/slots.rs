//! Whose turn it is to compile, and how long a compilation has really run.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A number of places, for which callers wait.
#[derive(Clone)]
pub(super) struct Slots(Arc<Places>);

struct Places {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A place that is taken until this is dropped.
pub(super) struct Slot(Arc<Places>);

impl Slots {
    pub(super) fn new(count: usize) -> Slots {
        Slots(Arc::new(Places { free: Mutex::new(count), freed: Condvar::new() }))
    }

    /// A place, or `None` if there is none until `deadline`.
    pub(super) fn take(&self, deadline: Instant) -> Option<Slot> {
        // A count is whole whenever the lock is free.
        let free = self.0.free.lock().unwrap_or_else(PoisonError::into_inner);
        let patience = deadline.saturating_duration_since(Instant::now());
        let waited = self.0.freed.wait_timeout_while(free, patience, |free| *free == 0);
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *free = free.checked_sub(1)?;
        drop(free);
        Some(Slot(Arc::clone(&self.0)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

/// The time that a thread has run, seen from another one. On Linux that is processor time; where the system does not say,
/// time on the wall.
pub(super) struct ThreadClock {
    /// `schedstat` of the thread (Linux, `Documentation/scheduler/sched-stats.rst`).
    schedstat: Option<PathBuf>,
    started: Instant,
}

impl ThreadClock {
    pub(super) fn of_this_thread() -> ThreadClock {
        // The link names the thread's folder: the clock is read from other threads.
        let link = std::fs::read_link("/proc/thread-self").ok();
        let schedstat = link.map(|folder| Path::new("/proc").join(folder).join("schedstat"));
        ThreadClock { schedstat: schedstat.filter(|path| on_processor(path).is_some()), started: Instant::now() }
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.schedstat.as_deref().and_then(on_processor).unwrap_or_else(|| self.started.elapsed())
    }
}

/// Time on a processor. `None`: the system does not count it, or the thread has ended.
fn on_processor(schedstat: &Path) -> Option<Duration> {
    let line = std::fs::read_to_string(schedstat).ok()?;
    let mut numbers = line.split_whitespace().map_while(|number| number.parse().ok());
    // Nanoseconds on a processor, nanoseconds of waiting for one, turns. A thread that has run had a turn: where there is
    // none, the kernel was built without the count.
    let (nanoseconds, _, turns) = (numbers.next()?, numbers.next()?, numbers.next()?);
    (turns > 0).then(|| Duration::from_nanos(nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_waited_for_and_given_back() {
        let slots = Slots::new(1);
        let soon = || Instant::now() + Duration::from_millis(20);
        let first = slots.take(soon()).expect("one is free");
        assert!(slots.take(soon()).is_none());
        let waiting = {
            let slots = slots.clone();
            std::thread::spawn(move || slots.take(Instant::now() + Duration::from_secs(60)).is_some())
        };
        drop(first);
        assert!(waiting.join().unwrap());
        assert!(slots.take(soon()).is_some());
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "a test that cannot run here says so")]
    fn a_thread_that_sleeps_does_not_spend_its_time() {
        let clock = ThreadClock::of_this_thread();
        if clock.schedstat.is_none() {
            eprintln!("skipped: this system does not say how long a thread ran");
            return;
        }
        let before = clock.elapsed();
        std::thread::sleep(Duration::from_millis(100));
        let slept = std::thread::scope(|scope| scope.spawn(|| clock.elapsed()).join().unwrap());
        assert!(slept - before < Duration::from_millis(50), "{:?}", slept - before);
        while clock.elapsed() - before < Duration::from_millis(50) {
            std::hint::black_box(0);
        }
    }
}
