//! How long work takes and how far it is. Libraries do not print: the caller's callback does.

use std::time::{Duration, Instant};

/// State of a running command.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// What was finished last: a module or a layer.
    pub name: &'a str,
    /// Work done, in weights (quantize, prune) or token-layers (calibrate, compare).
    pub done: u64,
    /// All work, in the same unit.
    pub total: u64,
    /// Time since the start, work that an earlier run did not counted.
    pub elapsed: Duration,
    /// Estimated time that is left.
    pub left: Duration,
    /// Signal to noise of everything encoded so far in dB, weighted by importance where there is a calibration.
    pub snr_db: Option<f64>,
}

/// Counts work and calls back.
pub(crate) struct Meter<'a> {
    callback: &'a mut dyn FnMut(Progress<'_>),
    started: Instant,
    total: u64,
    done: u64,
    /// Work that an earlier run did.
    skipped: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(total: u64, callback: &'a mut dyn FnMut(Progress<'_>)) -> Self {
        Meter { callback, started: Instant::now(), total, done: 0, skipped: 0 }
    }

    /// Work of this run.
    pub(crate) fn add(&mut self, name: &str, work: u64, snr_db: Option<f64>) {
        self.done += work;
        self.report(name, snr_db);
    }

    /// Work that needs no doing again.
    pub(crate) fn skip(&mut self, name: &str, work: u64, snr_db: Option<f64>) {
        self.done += work;
        self.skipped += work;
        self.report(name, snr_db);
    }

    fn report(&mut self, name: &str, snr_db: Option<f64>) {
        let elapsed = self.started.elapsed();
        let own = self.done - self.skipped;
        let left = match own {
            0 => Duration::ZERO,
            own => elapsed.mul_f64(self.total.saturating_sub(self.done) as f64 / own as f64),
        };
        (self.callback)(Progress { name, done: self.done, total: self.total, elapsed, left, snr_db });
    }
}
