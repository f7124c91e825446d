//! What else happened on the machine during a window: time that the hypervisor gave to others, other programs, a slower
//! clock, throttling. A window with any of it is discarded and counted.

use crate::machine::StealClock;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// Percent of CPU time stolen above which a window is discarded.
pub const STEAL_LIMIT_PERCENT: f64 = 2.0;

/// Percent of CPU time of other programs above which a window is discarded.
const OTHERS_LIMIT_PERCENT: f64 = 15.0;

/// Ticks of other programs that are no more than the clock's grain.
const GRAIN_TICKS: u64 = 2;

/// How many times as long as the fastest a fixed loop may take.
const CLOCK_LIMIT: f64 = 1.15;

/// Why a window does not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Taint {
    /// The hypervisor gave CPU time to others.
    Steal,
    /// Other programs ran.
    OtherPrograms,
    /// The processor ran slower than before.
    Clock,
    /// The processor throttled itself.
    Throttled,
}

/// What was seen of the machine while windows ran.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Windows {
    /// Windows, or pairs of them, that count.
    pub kept: usize,
    /// Those that do not.
    pub discarded: usize,
    /// Why not.
    pub reasons: BTreeMap<Taint, usize>,
    /// Percent of CPU time stolen over all, kept or not.
    pub steal_pct: f64,
}

/// Says whether something disturbed the time since it was asked to begin.
pub trait Witness {
    /// A window begins.
    fn begin(&mut self);
    /// It ended: what disturbed it, if anything did.
    fn end(&mut self) -> Option<Taint>;
    /// Percent of CPU time stolen since the first window.
    fn steal_percent(&self) -> f64;
}

/// Looks at Linux' counters; where there are none, only at the clock.
#[derive(Debug)]
pub struct SystemWitness {
    first: StealClock,
    begun: Ticks,
    throttles: u64,
    fastest_loop: f64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Ticks {
    total: u64,
    busy: u64,
    stolen: u64,
    own: u64,
}

impl Default for SystemWitness {
    fn default() -> Self {
        Self::new()
    }
}

impl SystemWitness {
    /// Learns how fast the clock is.
    pub fn new() -> Self {
        let fastest_loop = (0..20).map(|_| fixed_loop()).fold(f64::INFINITY, f64::min);
        SystemWitness { first: StealClock::start(), begun: ticks(), throttles: throttles(), fastest_loop }
    }
}

impl Witness for SystemWitness {
    fn begin(&mut self) {
        self.begun = ticks();
        self.throttles = throttles();
    }

    fn end(&mut self) -> Option<Taint> {
        let (before, after) = (self.begun, ticks());
        let total = after.total.saturating_sub(before.total).max(1) as f64;
        let stolen = after.stolen.saturating_sub(before.stolen);
        let others = (after.busy.saturating_sub(before.busy)).saturating_sub(after.own.saturating_sub(before.own));
        if 100.0 * stolen as f64 / total > STEAL_LIMIT_PERCENT {
            return Some(Taint::Steal);
        }
        if others > GRAIN_TICKS && 100.0 * others as f64 / total > OTHERS_LIMIT_PERCENT {
            return Some(Taint::OtherPrograms);
        }
        if throttles() != self.throttles {
            return Some(Taint::Throttled);
        }
        // Twice, for an interrupt makes one of them longer.
        let now = fixed_loop().min(fixed_loop());
        self.fastest_loop = self.fastest_loop.min(now);
        (now > CLOCK_LIMIT * self.fastest_loop).then_some(Taint::Clock)
    }

    fn steal_percent(&self) -> f64 {
        self.first.steal_percent()
    }
}

/// Seconds of a loop whose every step needs the one before: its time is the clock's.
fn fixed_loop() -> f64 {
    let started = Instant::now();
    let mut state = 1u64;
    for _ in 0..60_000 {
        state = std::hint::black_box(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
    }
    std::hint::black_box(state);
    started.elapsed().as_secs_f64()
}

fn ticks() -> Ticks {
    let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let Some(line) = stat.lines().find(|l| l.starts_with("cpu ")) else { return Ticks::default() };
    // user nice system idle iowait irq softirq steal
    let fields: Vec<u64> = line.split_whitespace().skip(1).take(8).filter_map(|t| t.parse().ok()).collect();
    let field = |i: usize| fields.get(i).copied().unwrap_or(0);
    let own = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may hold anything, stand the state and ten numbers before utime and stime.
    let own: u64 = own
        .rsplit_once(')')
        .map_or(0, |(_, rest)| rest.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<u64>().ok()).sum());
    Ticks {
        total: fields.iter().sum(),
        busy: field(0) + field(1) + field(2) + field(5) + field(6),
        stolen: field(7),
        own,
    }
}

/// How often processors throttled themselves, all together; 0 where the system does not say.
fn throttles() -> u64 {
    let cores = std::fs::read_dir("/sys/devices/system/cpu").into_iter().flatten().flatten();
    cores
        .filter_map(|e| std::fs::read_to_string(e.path().join("thermal_throttle/core_throttle_count")).ok())
        .filter_map(|text| text.trim().parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_counters_grow() {
        let before = ticks();
        assert!(fixed_loop() > 0.0);
        let after = ticks();
        assert!(after.total >= before.total && after.own >= before.own);
        let mut witness = SystemWitness::new();
        witness.begin();
        // Whatever it says here depends on the machine; it must say something and not panic.
        let _ = witness.end();
        assert!((0.0..=100.0).contains(&witness.steal_percent()));
    }
}
