//! Two arms of an experiment in turn: A B, B A, A B, .. until the rule has seen enough.

use crate::disturbance::{Taint, Windows, Witness};
use crate::statistics::{Estimate, Outcome, Rule, median, quantile};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// Pairs that only warm up.
const WARM_UP_PAIRS: usize = 2;

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
    /// Seconds that the comparison took.
    pub seconds: f64,
}

/// Runs `a` and `b` in turn until `rule` has seen enough, or too much was disturbed.
///
/// # Errors
/// What an arm says.
pub fn in_turn(a: &mut dyn Arm, b: &mut dyn Arm, rule: &Rule, witness: &mut dyn Witness) -> Result<InTurn, String> {
    let started = Instant::now();
    for _ in 0..WARM_UP_PAIRS {
        a.window()?;
        b.window()?;
    }
    let looks = rule.looks();
    let mut seconds: [Vec<f64>; 2] = Default::default();
    let mut extra: [BTreeMap<String, Vec<f64>>; 2] = Default::default();
    let mut ratios = Vec::new();
    let mut windows = Windows::default();
    let mut same_output = true;
    let (mut estimate, mut outcome) = (None, Outcome::Undecided);
    for round in 0.. {
        let out_of_time = started.elapsed().as_secs_f64() > rule.max_seconds;
        if out_of_time || windows.discarded > DISCARDS_PER_PAIR * rule.max_pairs {
            break;
        }
        witness.begin();
        // Whoever is second finds the caches as the first left them: each is second as often.
        let pair = if round % 2 == 0 {
            let first = a.window()?;
            [first, b.window()?]
        } else {
            let first = b.window()?;
            [a.window()?, first]
        };
        // Arms of different batches have their first sequences in common.
        same_output &= pair[0].output.iter().zip(&pair[1].output).all(|(a, b)| a == b);
        if let Some(taint) = witness.end() {
            windows.discarded += 1;
            *windows.reasons.entry(taint).or_default() += 1;
            continue;
        }
        windows.kept += 1;
        ratios.push((pair[1].seconds / pair[0].seconds).ln());
        for (side, sample) in pair.into_iter().enumerate() {
            seconds[side].push(sample.seconds);
            for (name, value) in sample.extra {
                extra[side].entry(name).or_default().push(value);
            }
        }
        if looks.contains(&ratios.len()) {
            estimate = rule.estimate(&ratios);
            outcome = estimate.as_ref().map_or(Outcome::Undecided, |e| rule.outcome(e));
            if outcome != Outcome::Undecided || ratios.len() == rule.max_pairs {
                break;
            }
        }
    }
    if outcome == Outcome::Undecided {
        // Time ran out between two looks: what is there is looked at once more.
        estimate = rule.estimate(&ratios).or(estimate);
        outcome = estimate.as_ref().map_or(Outcome::Undecided, |e| rule.outcome(e));
    }
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
        seconds: started.elapsed().as_secs_f64(),
    })
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

    #[test]
    fn a_gain_is_found_soon_and_disturbed_windows_do_not_count() {
        let (mut a, mut b) = (Simulated::new(1.3e-3, 1, 7), Simulated::new(1.0e-3, 2, 7));
        let result = in_turn(&mut a, &mut b, &Rule::default(), &mut Restless::default()).unwrap();
        assert_eq!(result.outcome, Outcome::Faster);
        let speedup = result.speedup.unwrap();
        assert!(speedup.low > 1.27 && speedup.high < 1.33 && speedup.low < speedup.high, "{speedup:?}");
        assert_eq!((result.windows.kept, result.windows.discarded), (10, 4));
        assert_eq!(result.windows.reasons, BTreeMap::from([(Taint::Steal, 4)]));
        assert_eq!((result.a.samples_s.len(), result.b.extra["tokens"]), (10, 3.0));
        assert!(result.same_output);
    }

    #[test]
    fn other_tokens_are_noticed() {
        let (mut a, mut b) = (Simulated::new(1e-3, 1, 7), Simulated::new(1e-3, 2, 8));
        let result = in_turn(&mut a, &mut b, &Rule::default(), &mut Restless::default()).unwrap();
        assert!(!result.same_output);
        assert_eq!(result.outcome, Outcome::Equal);
    }
}
