//! A draw from a row of logits on the device, with the arithmetic that makes it the same draw everywhere: weights come from an
//! exponential function of our own, and they are added as integers, so that no order of summation changes a bit.

use crate::Result;
use crate::buffer::Tensor;
use crate::conformance::{Case, Tolerance, ids, normal_rows, upload, upload_ids, zero_ids};
use crate::error::expect;
use crate::reference::Memory;
use moellon_tensor::rng::SplitMix64;
use std::cmp::Ordering;

/// Largest vocabulary: its weights add up to less than 2^63 units.
pub const MOST_LOGITS: usize = 1 << 19;

/// Units of the most likely token's weight. A token that is less than 2^-44 as likely has none and is never drawn.
pub const UNITS: u64 = 1 << 44;

/// How one row's token is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Draw {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the smallest set of most likely tokens whose weights reach this share; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely as the most likely; 0 keeps all.
    pub min_p: f32,
    /// Uniform random bits: which of the tokens that are left.
    pub bits: u64,
}

impl Draw {
    /// Words of a row of [`Sample::draws`].
    pub const WORDS: usize = 6;

    /// The row of [`Sample::draws`]: temperature, top-k, top-p as [`Draw::top_p_share`], min-p, low and high bits.
    pub fn words(&self) -> [u32; Self::WORDS] {
        let top_k = u32::try_from(self.top_k).unwrap_or(u32::MAX);
        let top_p = self.top_p_share().unwrap_or(0);
        [self.temperature.to_bits(), top_k, top_p, self.min_p.to_bits(), self.bits as u32, (self.bits >> 32) as u32]
    }

    /// Top-p in parts of 2^32; `None` where all are kept.
    pub fn top_p_share(&self) -> Option<u32> {
        (self.top_p < 1.0).then(|| ((f64::from(self.top_p) * 4_294_967_296.0).round() as u32).max(1))
    }

    /// Units that the most likely tokens must reach: top-p of `total`, at least one.
    pub fn wanted(share: u32, total: u64) -> u64 {
        (((u128::from(total) * u128::from(share)) >> 32) as u64).max(1)
    }

    /// The unit that is drawn of `total`, counted from the lowest token on.
    pub fn unit(&self, total: u64) -> u64 {
        ((u128::from(self.bits) * u128::from(total)) >> 64) as u64
    }
}

/// `exp((logit - max) / temperature)`, the same bits on every machine: 1 for the maximum, 0 for what is far below it.
pub fn weight(logit: f32, max: f32, temperature: f32) -> f32 {
    // An infinite maximum leaves only its equals.
    if logit == max { 1.0 } else { exp_of_negative((logit - max) / temperature) }
}

/// The exponential of a number that is not positive, within two units in the last place; 0 below -80. Additions and products alone,
/// each rounded: kernels do the same. Coefficients: Cephes, `expf`.
fn exp_of_negative(x: f32) -> f32 {
    // Not a number, from an infinite maximum, too.
    if x.is_nan() || x < -80.0 {
        return 0.0;
    }
    // Adding 1.5 * 2^23 rounds to an integer.
    const MAGIC: f32 = 12_582_912.0;
    let n = (x * std::f32::consts::LOG2_E + MAGIC) - MAGIC;
    // ln 2 in two parts; the product with the first is exact.
    let r = (x - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    for coefficient in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + coefficient;
    }
    let y = (p * (r * r) + r) + 1.0;
    y * f32::from_bits(((n as i32 + 127) as u32) << 23)
}

/// A weight in integers.
pub fn units(weight: f32) -> u64 {
    (weight * UNITS as f32) as u64
}

/// How likely the most likely token was, of the units that were left.
pub fn certainty(total: u64) -> f32 {
    (UNITS as f64 / total as f64) as f32
}

/// Larger logit first, lower token first where equal: a total order, so that choices are reproducible.
pub fn more_likely(a: &(u32, f32), b: &(u32, f32)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

/// One token a row: of the `top_k` most likely, those with `min_p` of the likeliest one's weight, and of these the most likely that
/// reach `top_p` of the units of the `top_k`; then the token that has the drawn unit, in the order of tokens. The second column is the
/// [`certainty`] as bits: 1 where nothing is drawn, NaN where a logit is NaN, whose first column is then the token. Where no logit is
/// above negative infinity, the lowest token.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// `[num_rows, vocab_size]`.
    pub logits: Tensor,
    /// `[num_rows, 6]` u32, [`Draw::words`] of each row.
    pub draws: Tensor,
    /// `[num_rows, 2]` u32.
    pub out: Tensor,
}

impl Sample {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let (rows, cols) = (self.logits.rows, self.logits.cols);
        self.logits.check_f32("sample", "logits", [rows, cols])?;
        let fits = (1..=MOST_LOGITS).contains(&cols);
        expect("sample", fits, "columns of logits", cols, format_args!("1 to {MOST_LOGITS}"))?;
        self.draws.check_u32("sample", "draws", [rows, Draw::WORDS])?;
        self.out.check_u32("sample", "out", [rows, 2])
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.logits.rows * (self.logits.cols + Draw::WORDS + 2) * 4) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let rows = memory.rows(self.logits).into_iter().zip(memory.ids(self.draws));
        let chosen: Vec<Vec<u32>> = rows
            .map(|(logits, words)| {
                let (token, certainty) = draw_row(&logits, &words);
                vec![token, certainty.to_bits()]
            })
            .collect();
        memory.set_ids(self.out, &chosen);
    }
}

/// The reference for one row: its token and [`certainty`], for `words` as [`Draw::words`] gives them. Slow.
///
/// # Panics
/// If there are fewer words.
pub fn draw_row(logits: &[f32], words: &[u32]) -> (u32, f32) {
    let [temperature, min_p] = [f32::from_bits(words[0]), f32::from_bits(words[3])];
    let bits = u64::from(words[4]) | (u64::from(words[5]) << 32);
    if let Some(token) = logits.iter().position(|x| x.is_nan()) {
        return (token as u32, f32::NAN);
    }
    let mut order: Vec<(u32, f32)> = (0u32..).zip(logits.iter().copied()).collect();
    // The first of equals, zeros of either sign among them.
    let best = order.iter().fold(order[0], |best, candidate| if candidate.1 > best.1 { *candidate } else { best });
    if temperature == 0.0 || best.1 == f32::NEG_INFINITY {
        return (best.0, 1.0);
    }
    order.sort_by(more_likely);
    if words[1] > 0 {
        order.truncate(words[1] as usize);
    }
    let units_of = |logit: f32| units(weight(logit, best.1, temperature));
    let total: u64 = order.iter().map(|(_, logit)| units_of(*logit)).sum();
    order.retain(|(_, logit)| units_of(*logit) > 0 && weight(*logit, best.1, temperature) >= min_p);
    if words[2] > 0 {
        let wanted = Draw::wanted(words[2], total);
        let mut sum = 0;
        let reached = order.iter().position(|(_, logit)| {
            sum += units_of(*logit);
            sum >= wanted
        });
        order.truncate(reached.map_or(order.len(), |last| last + 1));
    }
    order.sort_by_key(|(token, _)| *token);
    let left: u64 = order.iter().map(|(_, logit)| units_of(*logit)).sum();
    let unit = Draw { temperature, top_k: 0, top_p: 1.0, min_p, bits }.unit(left);
    let mut sum = 0;
    let drawn = order.iter().find(|(_, logit)| {
        sum += units_of(*logit);
        sum > unit
    });
    (drawn.expect("the unit is one of those that are left").0, certainty(left))
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str, logits: Vec<Vec<f32>>, draws: Vec<Draw>| {
        Case::new("sample", name, logits.len(), Tolerance::exact(1), move |backend, picked| {
            let words: Vec<Vec<u32>> = picked.iter().map(|row| draws[*row].words().to_vec()).collect();
            let draws = upload_ids(backend, &words)?;
            let logits = upload(backend, &logits, picked)?;
            let out = zero_ids(backend, picked.len(), 2)?;
            backend.sample(&Sample { logits, draws, out })?;
            Ok(vec![ids(backend, "out", out)?])
        })
    };
    let mut rng = SplitMix64::new(71);
    let open = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, bits: 0 };
    let mut drawn = |draw: Draw| Draw { bits: rng.next_u64(), ..draw };
    let scaled = |seed: u64, rows: usize, cols: usize, factor: f32| -> Vec<Vec<f32>> {
        let mut rows = normal_rows(seed, rows, cols);
        rows.iter_mut().flatten().for_each(|x| *x *= factor);
        rows
    };
    let kinds = [
        open,
        Draw { temperature: 0.7, ..open },
        Draw { temperature: 0.0, ..open },
        Draw { top_k: 1, ..open },
        Draw { top_k: 40, ..open },
        Draw { top_p: 0.9, ..open },
        Draw { top_p: 0.01, ..open },
        Draw { min_p: 0.05, ..open },
        Draw { temperature: 1.3, top_k: 50, top_p: 0.95, min_p: 0.02, ..open },
        Draw { temperature: 0.6, top_k: 20_000, top_p: 0.8, ..open },
    ];
    let every: Vec<Draw> = kinds.iter().cycle().take(2 * kinds.len()).map(|kind| drawn(*kind)).collect();
    // Logits that are rounded to few values: ties everywhere, at thresholds too.
    let mut tied = scaled(72, every.len(), 3000, 2.0);
    tied.iter_mut().flatten().for_each(|x| *x = x.round());
    let mut special = normal_rows(73, 6, 300);
    special[0].fill(f32::NEG_INFINITY);
    special[1][200] = f32::NAN;
    special[1][7] = f32::NAN;
    special[2][9] = f32::INFINITY;
    special[2][250] = f32::INFINITY;
    special[3].fill(0.0);
    special[3][3] = -0.0;
    special[4].fill(f32::NEG_INFINITY);
    special[4][299] = -5.0;
    special[5].fill(-3.0e38);
    special[5][17] = 3.0e38;
    let ends = [0, u64::MAX, 1 << 63].map(|bits| Draw { bits, ..open });
    vec![
        case("each way, a vocabulary", scaled(70, every.len(), 33_001, 4.0), every.clone()),
        case("ties", tied, every.clone()),
        case("flat", scaled(74, every.len(), 5000, 0.01), every.clone()),
        case("small", normal_rows(75, every.len(), 5), every.clone()),
        case("one token", normal_rows(76, 2, 1), vec![drawn(open), drawn(Draw { top_k: 3, top_p: 0.5, ..open })]),
        case("first, last and middle unit", normal_rows(77, 3, 1000), ends.to_vec()),
        case(
            "infinities and NaN",
            special,
            vec![
                drawn(open),
                drawn(open),
                drawn(Draw { top_p: 0.5, ..open }),
                drawn(Draw { top_k: 7, ..open }),
                drawn(open),
                drawn(open),
            ],
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exponential_is_one() {
        for step in 0..8000 {
            let x = -0.01 * step as f32;
            let expected = f64::from(x).exp();
            let found = f64::from(exp_of_negative(x));
            let ulp = expected * f64::from(f32::EPSILON);
            assert!((found - expected).abs() <= 2.0 * ulp, "exp({x}) is {found}, expected {expected}");
        }
        assert_eq!(exp_of_negative(0.0), 1.0);
        assert_eq!(exp_of_negative(-1e-30), 1.0);
        assert_eq!([f32::NEG_INFINITY, -90.0, f32::NAN].map(exp_of_negative), [0.0; 3]);
        assert_eq!(weight(f32::INFINITY, f32::INFINITY, 1.0), 1.0);
        assert_eq!(weight(3.0, f32::INFINITY, 1.0), 0.0);
    }

    #[test]
    fn units_and_shares_are_whole() {
        assert_eq!(units(1.0), UNITS);
        assert_eq!(units(0.5), UNITS / 2);
        assert_eq!(units(2.0f32.powi(-44)), 1);
        assert_eq!(units(2.0f32.powi(-45)), 0);
        assert_eq!(Draw::wanted(1 << 31, 10), 5);
        assert_eq!(Draw::wanted(1, 10), 1);
        let draw = |top_p| Draw { temperature: 1.0, top_k: 0, top_p, min_p: 0.0, bits: u64::MAX };
        assert_eq!(draw(1.0).top_p_share(), None);
        assert_eq!(draw(0.5).top_p_share(), Some(1 << 31));
        assert_eq!(draw(1e-20).top_p_share(), Some(1));
        assert_eq!(draw(1.0).unit(10), 9);
        // A vocabulary of the largest size, all tokens as likely.
        assert!((MOST_LOGITS as u64).checked_mul(UNITS).is_some_and(|total| total <= 1 << 63));
    }

    #[test]
    fn a_row_is_cut_and_drawn() {
        let logits = [2.0f32, 1.0, 0.0, -1.0];
        let reach = |draw: Draw| {
            let mut rng = SplitMix64::new(9);
            let mut seen: Vec<u32> =
                (0..2000).map(|_| draw_row(&logits, &Draw { bits: rng.next_u64(), ..draw }.words()).0).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        let open = Draw { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, bits: 0 };
        assert_eq!(reach(open), [0, 1, 2, 3]);
        assert_eq!(reach(Draw { top_k: 2, ..open }), [0, 1]);
        assert_eq!(reach(Draw { top_p: 0.7, ..open }), [0, 1]);
        assert_eq!(reach(Draw { min_p: 0.1, ..open }), [0, 1, 2]);
        assert_eq!(reach(Draw { temperature: 0.0, ..open }), [0]);
        let (_, certainty) = draw_row(&logits, &open.words());
        let total: f32 = logits.iter().map(|x| (x - 2.0).exp()).sum();
        assert!((certainty - 1.0 / total).abs() < 1e-6);
    }
}
