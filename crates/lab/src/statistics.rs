//! Medians, spreads, intervals, and when a comparison has seen enough.
//!
//! Times of windows have heavy tails to one side: a neighbour, an interrupt, a page fault. So a comparison looks at the
//! logarithm of the ratio of two windows that ran one after the other, and its interval is Tukey and McLaughlin's: the mean
//! without the outer fifths, with the standard error of the winsorized values and Student's t. It looks a few times while
//! windows come in ([`Rule::looks`]); the chance of an error is shared out among the looks (Bonferroni), so that stopping early
//! costs no honesty.

use serde::{Deserialize, Serialize};

/// The median; the mean of the middle two for an even count. 0 for nothing.
pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The value below which a `fraction` of the values lies, interpolated. 0 for nothing.
pub fn quantile(values: &[f64], fraction: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let at = fraction.clamp(0.0, 1.0) * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (sorted[high] - sorted[low]) * (at - low as f64)
}

/// Share of the values that is cut off at each end of a trimmed mean.
const TRIM: f64 = 0.2;

/// A mean and the interval that holds the true one with some confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Trimmed mean.
    pub mean: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Chance that the interval holds the truth.
    pub confidence: f64,
}

/// The trimmed mean of `values` with its two-sided interval; `None` for fewer than five values, of which nothing can be cut.
pub fn trimmed_interval(values: &[f64], confidence: f64) -> Option<Estimate> {
    let count = values.len();
    let cut = (count as f64 * TRIM) as usize;
    if cut == 0 {
        return None;
    }
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let kept = &sorted[cut..count - cut];
    let mean = kept.iter().sum::<f64>() / kept.len() as f64;
    let winsorized: Vec<f64> = sorted.iter().map(|x| x.clamp(kept[0], kept[kept.len() - 1])).collect();
    let centre = winsorized.iter().sum::<f64>() / count as f64;
    let variance = winsorized.iter().map(|x| (x - centre).powi(2)).sum::<f64>() / (count - 1) as f64;
    let standard_error = variance.sqrt() / ((1.0 - 2.0 * TRIM) * (count as f64).sqrt());
    let half = t_quantile(0.5 + confidence / 2.0, (kept.len() - 1) as f64) * standard_error;
    Some(Estimate { mean, low: mean - half, high: mean + half, confidence })
}

/// Blocks below which nothing can be said about how they differ.
const LEAST_BLOCKS: usize = 4;

/// What the logarithms of two builds' ratios are taken to differ by (a standard deviation) before [`LEAST_BLOCKS`] have shown it:
/// with nothing assumed, 4 of 20 comparisons of an engine with its twin found a difference (receipt 2026-11-30-lever-check).
const BLOCK_SPREAD: f64 = 0.025;

/// How many times as wide an interval of `values` is, for their blocks differ by more than the values within a block explain:
/// the root of the ratio of both mean squares (the F of an analysis of variance), 1 at least. Of winsorized values, as the
/// interval itself.
fn block_factor(values: &[f64], blocks: &[usize]) -> f64 {
    if blocks.len() < LEAST_BLOCKS || values.len() <= blocks.len() {
        return 1.0;
    }
    let (low, high) = (quantile(values, TRIM), quantile(values, 1.0 - TRIM));
    let values: Vec<f64> = values.iter().map(|x| x.clamp(low, high)).collect();
    let mean = |of: &[f64]| of.iter().sum::<f64>() / of.len().max(1) as f64;
    let centre = mean(&values);
    let (mut between, mut within, mut at) = (0.0, 0.0, 0);
    for count in blocks {
        let block = &values[at..at + count];
        let own = mean(block);
        between += *count as f64 * (own - centre).powi(2);
        within += block.iter().map(|x| (x - own).powi(2)).sum::<f64>();
        at += count;
    }
    between /= (blocks.len() - 1) as f64;
    within /= (values.len() - blocks.len()) as f64;
    if within > 0.0 { (between / within).sqrt().max(1.0) } else { 1.0 }
}

/// The value that Student's t with `freedom` degrees stays below with the chance `probability` (0.5 to 1): bisection over the
/// angle `atan(t / sqrt(freedom))`, in which the density is a power of a cosine, integrated by Simpson's rule.
pub fn t_quantile(probability: f64, freedom: f64) -> f64 {
    const STEPS: usize = 200;
    let area = |to: f64| {
        let width = to / STEPS as f64;
        let value = |i: usize| (i as f64 * width).cos().max(0.0).powf(freedom - 1.0);
        let inner: f64 = (1..STEPS).map(|i| value(i) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
        (value(0) + inner + value(STEPS)) * width / 3.0
    };
    let wanted = (probability - 0.5) * 2.0 * area(std::f64::consts::FRAC_PI_2);
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
    for _ in 0..48 {
        let middle = 0.5 * (low + high);
        if area(middle) < wanted { low = middle } else { high = middle }
    }
    (0.5 * (low + high)).tan() * freedom.sqrt()
}

/// When a comparison has seen enough, and what it then says.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rule {
    /// Share of time that is worth having: a gain counts from half of it, and a difference within it is none.
    pub minimum_effect: f64,
    /// Chance that the interval holds the truth, over all looks together.
    pub confidence: f64,
    /// Pairs of windows before the first look.
    pub min_pairs: usize,
    /// Pairs of windows at most.
    pub max_pairs: usize,
    /// Seconds at most.
    pub max_seconds: f64,
    /// Arms are built anew when they have run at least this many times as long as building them took: a large model is not read again and again.
    pub running_per_building: f64,
}

impl Default for Rule {
    fn default() -> Self {
        Rule {
            minimum_effect: 0.02,
            confidence: 0.95,
            min_pairs: 10,
            max_pairs: 320,
            max_seconds: 15.0,
            running_per_building: 3.0,
        }
    }
}

/// What a comparison of two times says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The second takes less time, by at least half the minimum effect.
    Faster,
    /// The second takes more time, by at least half the minimum effect.
    Slower,
    /// Whatever the difference is, it is within the minimum effect.
    Equal,
    /// The interval is too wide to say.
    Undecided,
}

impl Rule {
    /// Numbers of pairs after which the comparison looks: each twice as many.
    pub fn looks(&self) -> Vec<usize> {
        let mut looks = vec![self.min_pairs.clamp(5, self.max_pairs.max(5))];
        while let Some(last) = looks.last().copied().filter(|last| *last < self.max_pairs) {
            looks.push((last * 2).min(self.max_pairs));
        }
        looks
    }

    /// The interval of one look at `log_ratios` (logarithm of second over first), of which `blocks` gives how many each build of
    /// the arms gave, in order.
    pub fn estimate(&self, log_ratios: &[f64], blocks: &[usize]) -> Option<Estimate> {
        let each = 1.0 - (1.0 - self.confidence) / self.looks().len() as f64;
        let estimate = trimmed_interval(log_ratios, each)?;
        let factor = block_factor(log_ratios, blocks);
        let unknown =
            if blocks.len() < LEAST_BLOCKS { 2.0 * BLOCK_SPREAD / (blocks.len().max(1) as f64).sqrt() } else { 0.0 };
        let half = |end: f64| (factor * (end - estimate.mean)).hypot(unknown);
        let (low, high) = (estimate.mean - half(estimate.low), estimate.mean + half(estimate.high));
        Some(Estimate { low, high, ..estimate })
    }

    /// What an interval of the logarithm of a ratio of times says.
    pub fn outcome(&self, estimate: &Estimate) -> Outcome {
        let (edge, half) = ((1.0 + self.minimum_effect).ln(), (1.0 + self.minimum_effect / 2.0).ln());
        match estimate {
            e if e.high <= -half => Outcome::Faster,
            e if e.low >= half => Outcome::Slower,
            e if e.low >= -edge && e.high <= edge => Outcome::Equal,
            _ => Outcome::Undecided,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BLOCK_SPREAD, Outcome, Rule, median, quantile, t_quantile, trimmed_interval};
    use crate::in_turn::BLOCK_PAIRS;
    use moellon_tensor::rng::SplitMix64;

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!([quantile(&[1.0, 2.0], 0.25), quantile(&[], 0.5)], [1.25, 0.0]);
    }

    #[test]
    fn students_t_is_that_of_tables() {
        // Two-sided 95 % and 99 %, from any table of t.
        let table = [(0.975, 1.0, 12.706), (0.975, 5.0, 2.571), (0.975, 30.0, 2.042), (0.995, 10.0, 3.169)];
        for (probability, freedom, expected) in table {
            let found = t_quantile(probability, freedom);
            assert!((found - expected).abs() < 0.002 * expected, "{probability} {freedom}: {found}");
        }
    }

    #[test]
    fn a_trimmed_interval_by_hand() {
        // 1..=9 and an outlier: two are cut at each end, 3..=8 stay; winsorized 3 3 3 4 5 6 7 8 8 8, variance 42.5 / 9.
        let values = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1000.0];
        let estimate = trimmed_interval(&values, 0.95).unwrap();
        assert_eq!(estimate.mean, 5.5);
        let half = 2.5706 * (42.5f64 / 9.0).sqrt() / (0.6 * 10.0f64.sqrt());
        assert!((estimate.high - 5.5 - half).abs() < 1e-3, "{estimate:?} {half}");
        assert_eq!(trimmed_interval(&values[..4], 0.95), None);
    }

    #[test]
    fn blocks_that_differ_widen_the_interval() {
        let own = [0.0, 1.0, 2.0, 1.0];
        let values: Vec<f64> = (0..40).map(|i| own[i / 10] + [0.1, -0.1][i % 2]).collect();
        // Winsorized to 0.1 .. 1.9 and 1 in between, by hand: means 0.1, 1, 1.9, 1, so 10 * 2 * 0.81 / 3 over 20 * 0.01 / 36.
        let factor = super::block_factor(&values, &[10; 4]);
        assert!((factor - (5.4f64 / (0.2 / 36.0)).sqrt()).abs() < 1e-6, "{factor}");
        // Blocks that are alike, and too few of them, widen nothing.
        let alike: Vec<f64> = (0..40).map(|i| [0.1, -0.1][i % 2]).collect();
        assert_eq!([super::block_factor(&alike, &[10; 4]), super::block_factor(&values, &[20; 2])], [1.0, 1.0]);
    }

    #[test]
    fn few_builds_say_little() {
        let rule = Rule::default();
        // 3 % with hardly a spread: a build may owe that to its place, four builds that agree do not.
        let ratios: Vec<f64> = (0..80).map(|i| 0.03 + [1e-4, -1e-4][i % 2]).collect();
        let width = |blocks: &[usize]| {
            let estimate = rule.estimate(&ratios, blocks).unwrap();
            (rule.outcome(&estimate), estimate.high - estimate.low)
        };
        let (one, two, four) = (width(&[80]), width(&[40; 2]), width(&[20; 4]));
        assert_eq!((one.0, two.0, four.0), (Outcome::Undecided, Outcome::Undecided, Outcome::Slower));
        assert!(
            (one.1 - 4.0 * BLOCK_SPREAD).abs() < 1e-3 && (two.1 - one.1 / 2f64.sqrt()).abs() < 1e-3,
            "{one:?} {two:?}"
        );
    }

    /// Windows of a noisy machine: a normal spread of 2 %, and one in ten with up to 40 % more.
    fn noisy(rng: &mut SplitMix64) -> f64 {
        let normal = (0..12).map(|_| rng.next_f64()).sum::<f64>() - 6.0;
        let disturbed = if rng.next_f64() < 0.1 { 0.4 * rng.next_f64() } else { 0.0 };
        0.02 * normal + disturbed
    }

    /// What the rule says of a second arm that takes `factor` times as long, looking as it may.
    fn simulated(factor: f64, rule: &Rule, rng: &mut SplitMix64) -> (Outcome, usize) {
        let mut ratios = Vec::new();
        for look in rule.looks() {
            while ratios.len() < look {
                ratios.push(factor.ln() + noisy(rng) - noisy(rng));
            }
            let blocks: Vec<usize> = ratios.chunks(BLOCK_PAIRS).map(<[f64]>::len).collect();
            let outcome = rule.outcome(&rule.estimate(&ratios, &blocks).unwrap());
            if outcome != Outcome::Undecided || look == rule.max_pairs {
                return (outcome, look);
            }
        }
        unreachable!("the last look is at the most pairs")
    }

    #[test]
    fn a_planted_loss_is_found_and_nothing_is_found_in_nothing() {
        let rule = Rule::default();
        let rng = &mut SplitMix64::new(8);
        let mut count = |factor: f64, expected: &[Outcome]| {
            (0..200).filter(|_| expected.contains(&simulated(factor, &rule, rng).0)).count()
        };
        // 3 % slower is a loss, 3 % faster a gain, the same is the same or undecided: at least 19 times of 20.
        assert!(count(1.03, &[Outcome::Slower]) >= 190);
        assert!(count(1.0 / 1.03, &[Outcome::Faster]) >= 190);
        assert!(count(1.0, &[Outcome::Equal, Outcome::Undecided]) >= 190);
        // What is large is found at the first look.
        assert_eq!(simulated(1.5, &rule, rng), (Outcome::Slower, rule.min_pairs));
    }
}
