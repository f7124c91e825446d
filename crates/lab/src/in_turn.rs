//! Two arms of an experiment in turn: A B, B A, A B, .. until the rule has seen enough.
//!
//! Where an engine's weights and caches happen to lie in memory makes it faster or slower for as long as it lives, so arms are
//! built anew every [`BLOCK_PAIRS`] pairs, in the opposite order each time, and the interval allows for what such blocks differ.

use crate::disturbance::{Taint, Windows, Witness};
use crate::statistics::{Estimate, Outcome, Rule, median, quantile};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// Pairs that only warm up.
const WARM_UP_PAIRS: usize = 2;

/// Pairs that the same two arms run, at least.
pub const BLOCK_PAIRS: usize = 20;

/// Discarded pairs at most, for each that may count.
const DISCARDS_PER_PAIR: usize = 3;

/// What one window of an arm gave.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Seconds of a unit: a token, an answer, a first token.
    pub seconds: f64,
    /// Token ids that were generated, by sequence: what losslessness is judged by.
    pub output: Vec<Vec<u32>>,
    /// Further numbers by name, of which the median is reported.
    pub extra: BTreeMap<String, f64>,
}

/// One side of an experiment.
pub trait Arm {
    /// Runs a window.
    ///
    /// # Errors
    /// What failed, in words.
    fn window(&mut self) -> Result<Sample, String>;
}

/// Both sides, A and B.
pub type Arms = [Box<dyn Arm>; 2];

/// What was measured of one arm.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// Seconds of a unit in every window that counts, in order.
    pub samples_s: Vec<f64>,
    /// Their median.
    pub median_s: f64,
    /// First and third quartile.
    pub quartiles_s: [f64; 2],
    /// Medians of what else was counted.
    pub extra: BTreeMap<String, f64>,
}

impl Side {
    fn of(samples_s: Vec<f64>, extra: &BTreeMap<String, Vec<f64>>) -> Self {
        Side {
            median_s: median(&samples_s),
            quartiles_s: [quantile(&samples_s, 0.25), quantile(&samples_s, 0.75)],
            extra: extra.iter().map(|(name, values)| (name.clone(), median(values))).collect(),
            samples_s,
        }
    }
}

/// A comparison of two arms.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InTurn {
    /// The first.
    pub a: Side,
    /// The second.
    pub b: Side,
    /// Time of A over time of B, the trimmed mean of pairs; its interval is of all looks together.
    pub speedup: Option<Estimate>,
    /// What the rule says.
    pub outcome: Outcome,
    /// Whether the two windows of every pair gave the same tokens, in the sequences that both have.
    pub same_output: bool,
    /// Windows and what disturbed them.
    pub windows: Windows,
    /// How often both arms were built; 0 in receipts from before they were built more than once.
    #[serde(default)]
    pub builds: usize,
    /// Seconds that the comparison took.
    pub seconds: f64,
}

/// Runs both arms that `fresh` builds in turn until `rule` has seen enough, or too much was disturbed. `fresh` is to build the one
/// first that it built second the time before.
///
/// # Errors
/// What an arm says, or what keeps it from being built.
pub fn in_turn(
    fresh: &mut dyn FnMut() -> Result<Arms, String>,
    rule: &Rule,
    witness: &mut dyn Witness,
) -> Result<InTurn, String> {
    let started = Instant::now();
    let mut bench = Workbench::new(fresh)?;
    let looks = rule.looks();
    let mut seen = Seen { same_output: true, ..Seen::default() };
    let (mut estimate, mut outcome) = (None, Outcome::Undecided);
    for round in 0.. {
        let out_of_time = started.elapsed().as_secs_f64() > rule.max_seconds;
        if out_of_time || seen.windows.discarded > DISCARDS_PER_PAIR * rule.max_pairs {
            break;
        }
        if bench.is_worn(seen.block(), rule) {
            bench.renew()?;
            seen.blocks.push(0);
        }
        witness.begin();
        let pair = bench.pair(round)?;
        if !seen.add(pair, witness.end()) {
            continue;
        }
        if looks.contains(&seen.ratios.len()) {
            estimate = rule.estimate(&seen.ratios, &seen.blocks);
            outcome = estimate.as_ref().map_or(Outcome::Undecided, |e| rule.outcome(e));
            if outcome != Outcome::Undecided || seen.ratios.len() == rule.max_pairs {
                break;
            }
        }
    }
    if outcome == Outcome::Undecided {
        // Time ran out between two looks: what is there is looked at once more.
        estimate = rule.estimate(&seen.ratios, &seen.blocks).or(estimate);
        outcome = estimate.as_ref().map_or(Outcome::Undecided, |e| rule.outcome(e));
    }
    let Seen { seconds, extra, mut windows, same_output, .. } = seen;
    windows.steal_pct = witness.steal_percent();
    let [a_seconds, b_seconds] = seconds;
    let invert = |e: Estimate| Estimate { mean: (-e.mean).exp(), low: (-e.high).exp(), high: (-e.low).exp(), ..e };
    Ok(InTurn {
        a: Side::of(a_seconds, &extra[0]),
        b: Side::of(b_seconds, &extra[1]),
        speedup: estimate.map(invert),
        outcome,
        same_output,
        windows,
        builds: bench.builds,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Two arms that run, and how to build others like them.
struct Workbench<'a> {
    fresh: &'a mut dyn FnMut() -> Result<Arms, String>,
    arms: Option<Arms>,
    builds: usize,
    build_seconds: f64,
    built: Instant,
}

impl<'a> Workbench<'a> {
    fn new(fresh: &'a mut dyn FnMut() -> Result<Arms, String>) -> Result<Self, String> {
        let mut bench = Workbench { fresh, arms: None, builds: 0, build_seconds: 0.0, built: Instant::now() };
        bench.renew()?;
        Ok(bench)
    }

    /// Builds both arms, and lets them warm up.
    fn renew(&mut self) -> Result<(), String> {
        // There may be no room for four.
        self.arms = None;
        let started = Instant::now();
        let arms = self.arms.insert((self.fresh)()?);
        for _ in 0..WARM_UP_PAIRS {
            for arm in arms.iter_mut() {
                arm.window()?;
            }
        }
        self.builds += 1;
        self.build_seconds = started.elapsed().as_secs_f64();
        self.built = Instant::now();
        Ok(())
    }

    fn is_worn(&self, pairs: usize, rule: &Rule) -> bool {
        let running = self.built.elapsed().as_secs_f64();
        pairs >= BLOCK_PAIRS && running >= rule.running_per_building * self.build_seconds
    }

    /// A window of each. Whoever is second finds the caches as the first left them: each is second as often.
    fn pair(&mut self, round: usize) -> Result<[Sample; 2], String> {
        let [a, b] = self.arms.as_mut().expect("renew() built them");
        if round.is_multiple_of(2) {
            let first = a.window()?;
            Ok([first, b.window()?])
        } else {
            let first = b.window()?;
            Ok([a.window()?, first])
        }
    }
}

/// What pairs have shown.
#[derive(Default)]
struct Seen {
    seconds: [Vec<f64>; 2],
    extra: [BTreeMap<String, Vec<f64>>; 2],
    ratios: Vec<f64>,
    /// Pairs of each build.
    blocks: Vec<usize>,
    windows: Windows,
    same_output: bool,
}

impl Seen {
    /// Takes a pair; whether it counts.
    fn add(&mut self, pair: [Sample; 2], taint: Option<Taint>) -> bool {
        // Arms of different batches have their first sequences in common.
        self.same_output &= pair[0].output.iter().zip(&pair[1].output).all(|(a, b)| a == b);
        if let Some(taint) = taint {
            self.windows.discarded += 1;
            *self.windows.reasons.entry(taint).or_default() += 1;
            return false;
        }
        self.windows.kept += 1;
        self.ratios.push((pair[1].seconds / pair[0].seconds).ln());
        if self.blocks.is_empty() {
            self.blocks.push(0);
        }
        *self.blocks.last_mut().expect("there is one") += 1;
        for (side, sample) in pair.into_iter().enumerate() {
            self.seconds[side].push(sample.seconds);
            for (name, value) in sample.extra {
                self.extra[side].entry(name).or_default().push(value);
            }
        }
        true
    }

    /// Pairs of the arms that run now.
    fn block(&self) -> usize {
        self.blocks.last().copied().unwrap_or(0)
    }
}

/// The taint that spoiled most pairs, in words; `None` where none was spoiled.
pub fn main_taint(windows: &Windows) -> Option<&'static str> {
    windows.reasons.iter().max_by_key(|(_, count)| **count).map(|(taint, _)| match taint {
        Taint::Steal => "the hypervisor gave CPU time to others",
        Taint::OtherPrograms => "other programs ran",
        Taint::Clock => "the processor's clock changed",
        Taint::Throttled => "the processor throttled itself",
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_tensor::rng::SplitMix64;

    struct Simulated {
        seconds: f64,
        rng: SplitMix64,
        token: u32,
    }

    impl Simulated {
        fn new(seconds: f64, seed: u64, token: u32) -> Self {
            Simulated { seconds, rng: SplitMix64::new(seed), token }
        }
    }

    impl Arm for Simulated {
        fn window(&mut self) -> Result<Sample, String> {
            let seconds = self.seconds * (1.0 + 0.05 * self.rng.next_f64());
            let extra = BTreeMap::from([("tokens".to_owned(), 3.0)]);
            Ok(Sample { seconds, output: vec![vec![self.token]], extra })
        }
    }

    /// Taints every third window.
    #[derive(Default)]
    struct Restless {
        asked: usize,
    }

    impl Witness for Restless {
        fn begin(&mut self) {}

        fn end(&mut self) -> Option<Taint> {
            self.asked += 1;
            self.asked.is_multiple_of(3).then_some(Taint::Steal)
        }

        fn steal_percent(&self) -> f64 {
            1.5
        }
    }

    /// Builds two arms with these times, seeds and tokens.
    fn two(a: (f64, u32), b: (f64, u32)) -> impl FnMut() -> Result<Arms, String> {
        move || Ok([Box::new(Simulated::new(a.0, 1, a.1)), Box::new(Simulated::new(b.0, 2, b.1))])
    }

    #[test]
    fn a_gain_is_found_soon_and_disturbed_windows_do_not_count() {
        let mut arms = two((1.3e-3, 7), (1.0e-3, 7));
        let result = in_turn(&mut arms, &Rule::default(), &mut Restless::default()).unwrap();
        assert_eq!(result.outcome, Outcome::Faster);
        let speedup = result.speedup.unwrap();
        // One build says no more than what builds differ by.
        assert!(speedup.low > 1.22 && speedup.low < 1.27 && speedup.high < 1.39 && speedup.high > 1.34, "{speedup:?}");
        assert_eq!((result.windows.kept, result.windows.discarded), (10, 4));
        assert_eq!(result.windows.reasons, BTreeMap::from([(Taint::Steal, 4)]));
        assert_eq!((result.a.samples_s.len(), result.b.extra["tokens"]), (10, 3.0));
        assert!(result.same_output);
    }

    #[test]
    fn other_tokens_are_noticed() {
        let mut arms = two((1e-3, 7), (1e-3, 8));
        let result = in_turn(&mut arms, &Rule::default(), &mut Restless::default()).unwrap();
        assert!(!result.same_output);
        assert_eq!(result.outcome, Outcome::Equal);
    }

    #[test]
    fn what_an_engine_owes_to_its_place_in_memory_is_no_gain() {
        // Built anew after so many pairs, however long that takes here.
        let endless = Rule { max_seconds: f64::INFINITY, running_per_building: 0.0, ..Rule::default() };
        let rule = Rule { min_pairs: 320, max_pairs: 320, ..endless };
        let compare = |spread: f64| {
            let mut builds = 0;
            let mut fresh = || -> Result<Arms, String> {
                builds += 1;
                // B is faster by 1.5 %, and each build by something of its own.
                let own = [0.0, spread, -spread, 1.1 * spread, 0.1 * spread, -0.8 * spread, 0.6 * spread, -spread];
                let b = 1e-3 * (1.0 + own[builds % own.len()]) / 1.015;
                Ok([Box::new(Simulated::new(1e-3, 1, 7)), Box::new(Simulated::new(b, builds as u64, 7))])
            };
            in_turn(&mut fresh, &rule, &mut Restless::default()).unwrap()
        };
        let (steady, scattered) = (compare(0.0), compare(0.03));
        assert_eq!((steady.outcome, steady.builds), (Outcome::Faster, 320 / BLOCK_PAIRS));
        assert_eq!((scattered.outcome, scattered.builds), (Outcome::Undecided, 320 / BLOCK_PAIRS));
    }
}
