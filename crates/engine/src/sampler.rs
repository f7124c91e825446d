//! Logits to a token. The order of the steps is that of most servers: penalties, bias, mask, then top-k, temperature, top-p
//! and min-p, then one draw. Same seed, same logits: same tokens, on every machine and where the device draws: weights, their sums and
//! the draw are those of [`moellon_ops::Sample`].

use moellon_ops::Draw;
use moellon_ops::sample::{self, more_likely};
use moellon_tensor::rng::SplitMix64;
use moellon_text::constraint::TokenMask;
use std::collections::HashMap;

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Keep the smallest set of most likely tokens whose probabilities reach this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many most likely tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep tokens at least this many times as likely as the most likely; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens that were seen (CTRL); 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of a seen token, times how often it was generated.
    pub frequency_penalty: f32,
    /// Subtracted once from the logit of a generated token.
    pub presence_penalty: f32,
    /// Added to single logits.
    pub logit_bias: Vec<(u32, f32)>,
    /// Start of the random sequence.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        SamplingParams {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {found}, expected {expected}")]
pub struct SettingError {
    /// The parameter, as requests name it.
    pub name: &'static str,
    /// The value found.
    pub found: String,
    /// The values allowed.
    pub expected: &'static str,
}

impl SamplingParams {
    /// Checks every parameter against its range.
    ///
    /// # Errors
    /// The first one outside, by name.
    pub fn validate(&self, vocab_size: usize) -> Result<(), SettingError> {
        let check = |name, value: f32, holds: bool, expected| {
            if holds && value.is_finite() {
                Ok(())
            } else {
                Err(SettingError { name, found: value.to_string(), expected })
            }
        };
        check("temperature", self.temperature, self.temperature >= 0.0, "a number of at least 0")?;
        check("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0, at most 1")?;
        check("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "0 to 1")?;
        check("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0.0, "a positive number")?;
        check("frequency_penalty", self.frequency_penalty, self.frequency_penalty.abs() <= 2.0, "-2 to 2")?;
        check("presence_penalty", self.presence_penalty, self.presence_penalty.abs() <= 2.0, "-2 to 2")?;
        for (token, bias) in &self.logit_bias {
            check("logit_bias", *bias, bias.abs() <= 100.0, "-100 to 100")?;
            if *token as usize >= vocab_size {
                return Err(SettingError {
                    name: "logit_bias",
                    found: format!("token {token}"),
                    expected: "token ids of the vocabulary",
                });
            }
        }
        Ok(())
    }

    /// Whether the most likely token is taken without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Whether the logits are changed by what was seen.
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Whether the choice depends on the logits as they are: then the device can make it.
    pub fn takes_plain_logits(&self) -> bool {
        !self.has_penalties() && self.logit_bias.is_empty()
    }

    /// A choice with these random bits.
    pub fn draw(&self, bits: u64) -> Draw {
        Draw { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p, min_p: self.min_p, bits }
    }
}

/// Logits from which no token can be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PickError {
    /// The model computed something that is not a number.
    #[error("the logit of token {token} is NaN")]
    Nan {
        /// The first such token.
        token: u32,
    },
    /// The mask is empty.
    #[error("no token is allowed")]
    NothingAllowed,
}

/// A token that may be chosen.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    token: u32,
    logit: f32,
    /// Relative to the likeliest one's.
    weight: f32,
}

/// The state of one sequence's sampling.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: SplitMix64,
    /// Tokens of the prompt and the output, for the repetition penalty; how often each was generated.
    seen: HashMap<u32, u32>,
    /// Work space: logits after penalties and bias.
    logits: Vec<f32>,
    /// Work space.
    candidates: Vec<Candidate>,
    certainty: f32,
}

impl Sampler {
    /// A sampler whose repetition penalty knows the prompt.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let rng = SplitMix64::new(params.seed);
        let seen =
            if params.has_penalties() { prompt.iter().map(|token| (*token, 0)).collect() } else { HashMap::new() };
        Sampler { params, rng, seen, logits: Vec::new(), candidates: Vec::new(), certainty: 1.0 }
    }

    /// How tokens are chosen.
    pub fn params(&self) -> &SamplingParams {
        &self.params
    }

    /// The probability that the likeliest token had in the last choice: 1 where nothing is drawn.
    pub(crate) fn certainty(&self) -> f32 {
        self.certainty
    }

    /// Chooses a token from `logits` `[vocab_size]` and remembers it. NaN never wins: it counts as the smallest.
    pub fn pick(&mut self, logits: &[f32]) -> u32 {
        self.logits.clear();
        self.logits.extend(logits.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x }));
        let token = self.choose(None).expect("without a mask every token is allowed");
        self.accept(token);
        token
    }

    /// Chooses among the tokens in `mask` (all, if `None`) and remembers the choice.
    ///
    /// # Errors
    /// NaN among the logits, or an empty mask.
    pub fn pick_allowed(&mut self, logits: &[f32], mask: Option<&TokenMask>) -> Result<u32, PickError> {
        if let Some(token) = logits.iter().position(|x| x.is_nan()) {
            return Err(PickError::Nan { token: token as u32 });
        }
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        let token = self.choose(mask).ok_or(PickError::NothingAllowed)?;
        self.accept(token);
        Ok(token)
    }

    /// Remembers a token that was chosen elsewhere: forced, or picked on the device.
    pub fn accept(&mut self, token: u32) {
        if self.params.has_penalties() {
            *self.seen.entry(token).or_insert(0) += 1;
        }
    }

    /// The random bits of the next tokens.
    pub(crate) fn next_bits(&self) -> impl Iterator<Item = u64> + use<> {
        let mut rng = self.rng.clone();
        std::iter::repeat_with(move || rng.next_u64())
    }

    /// Remembers a token that was drawn elsewhere with the next random bits, and how likely the likeliest was.
    pub(crate) fn accept_drawn(&mut self, token: u32, certainty: f32) {
        self.rng.next_u64();
        self.certainty = certainty;
        self.accept(token);
    }

    fn choose(&mut self, mask: Option<&TokenMask>) -> Option<u32> {
        // One draw a token, whatever becomes of it, so that bits belong to tokens.
        let bits = if self.params.is_greedy() { 0 } else { self.rng.next_u64() };
        self.penalize();
        let candidate = |(token, logit): (u32, &f32)| Candidate { token, logit: *logit, weight: 0.0 };
        let tokens = (0u32..).zip(&self.logits).map(candidate);
        self.candidates.clear();
        match mask {
            None => self.candidates.extend(tokens),
            Some(mask) => self.candidates.extend(tokens.filter(|c| mask.contains(c.token))),
        }
        let first = *self.candidates.first()?;
        let best = self.candidates.iter().fold(first, |best, c| if c.logit > best.logit { *c } else { best });
        // With no candidate above negative infinity all are as likely: the lowest.
        if self.params.is_greedy() || best.logit == f32::NEG_INFINITY {
            return Some(best.token);
        }
        let draw = self.params.draw(bits);
        self.keep_most_likely(&draw, best.logit);
        Some(self.pick_unit(&draw))
    }

    fn penalize(&mut self) {
        let params = &self.params;
        for (token, generated) in &self.seen {
            let Some(logit) = self.logits.get_mut(*token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
            *logit -= params.frequency_penalty * *generated as f32;
            *logit -= if *generated > 0 { params.presence_penalty } else { 0.0 };
        }
        for (token, bias) in &params.logit_bias {
            if let Some(logit) = self.logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    /// Leaves the candidates that top-k, top-p and min-p keep, with weights relative to the most likely one's.
    fn keep_most_likely(&mut self, draw: &Draw, max: f32) {
        if draw.top_k > 0 && draw.top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(draw.top_k - 1, by_likelihood);
            self.candidates.truncate(draw.top_k);
        }
        for candidate in &mut self.candidates {
            candidate.weight = sample::weight(candidate.logit, max, draw.temperature);
        }
        let total = self.total_units();
        self.candidates.retain(|c| sample::units(c.weight) > 0 && c.weight >= draw.min_p);
        if let Some(share) = draw.top_p_share() {
            let kept = self.sort_until(Draw::wanted(share, total));
            self.candidates.truncate(kept);
        }
        // A draw walks the candidates in order of their ids: the same for the same set, however it was found.
        self.candidates.sort_unstable_by_key(|c| c.token);
    }

    fn total_units(&self) -> u64 {
        self.candidates.iter().map(|c| sample::units(c.weight)).sum()
    }

    /// Sorts the most likely candidates to the front until their units reach `wanted`; returns how many that takes.
    ///
    /// A vocabulary has 150,000 tokens and a nucleus some dozens, so ever larger fronts are sorted, not everything.
    fn sort_until(&mut self, wanted: u64) -> usize {
        let (mut sorted, mut sum) = (0, 0);
        while sorted < self.candidates.len() {
            let front = (sorted * 8).max(64).min(self.candidates.len());
            let rest = &mut self.candidates[sorted..];
            if front < sorted + rest.len() {
                rest.select_nth_unstable_by(front - sorted, by_likelihood);
            }
            rest[..front - sorted].sort_unstable_by(by_likelihood);
            for (index, candidate) in rest[..front - sorted].iter().enumerate() {
                sum += sample::units(candidate.weight);
                if sum >= wanted {
                    return sorted + index + 1;
                }
            }
            sorted = front;
        }
        sorted
    }

    /// The candidate that has the drawn unit.
    fn pick_unit(&mut self, draw: &Draw) -> u32 {
        let total = self.total_units();
        self.certainty = sample::certainty(total);
        let mut rest = draw.unit(total);
        let drawn = self.candidates.iter().find(|c| {
            let units = sample::units(c.weight);
            let here = rest < units;
            rest = rest.saturating_sub(units);
            here
        });
        drawn.expect("the unit is one of those that are left").token
    }
}

fn by_likelihood(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    more_likely(&(a.token, a.logit), &(b.token, b.logit))
}

/// Log-probabilities of one row of logits: the chosen token's, and the `count` most likely tokens with theirs, best first.
pub fn log_probabilities(logits: &[f32], chosen: u32, count: usize) -> (f32, Vec<(u32, f32)>) {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|x| f64::from(x - max).exp()).sum();
    let log_total = f64::from(max) + total.ln();
    let log_probability = |logit: f32| (f64::from(logit) - log_total) as f32;
    let mut top: Vec<(u32, f32)> = Vec::new();
    if count > 0 {
        top.extend((0u32..).zip(logits.iter().copied()));
        if count < top.len() {
            top.select_nth_unstable_by(count, more_likely);
            top.truncate(count);
        }
        top.sort_unstable_by(more_likely);
        top.iter_mut().for_each(|(_, value)| *value = log_probability(*value));
    }
    (logits.get(chosen as usize).map_or(f32::NEG_INFINITY, |logit| log_probability(*logit)), top)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(params: SamplingParams) -> Sampler {
        Sampler::new(params, &[])
    }

    #[test]
    fn greedy_takes_the_largest_and_the_lowest_of_equals() {
        let mut greedy = sampler(SamplingParams::default());
        assert_eq!(greedy.pick(&[0.0, 3.0, 3.0, -1.0]), 1);
        assert_eq!(greedy.pick(&[f32::NAN, f32::NEG_INFINITY, -7.0]), 2);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let params = SamplingParams { temperature: 0.5, seed: 7, ..SamplingParams::default() };
        let mut sampler = sampler(params);
        let logits = [0.0f32, 0.5, 1.0];
        let draws = 20_000;
        let mut counts = [0u32; 3];
        (0..draws).for_each(|_| counts[sampler.pick(&logits) as usize] += 1);
        let weights = logits.map(|l| (l / 0.5).exp());
        let total: f32 = weights.iter().sum();
        for (count, weight) in counts.into_iter().zip(weights) {
            let expected = weight / total;
            // Five standard deviations of a binomial: one failure in two million seeds, and the seed is fixed.
            let deviation = 5.0 * (expected * (1.0 - expected) / draws as f32).sqrt();
            let found = count as f32 / draws as f32;
            assert!((found - expected).abs() < deviation, "found {found}, expected {expected} within {deviation}");
        }
    }

    #[test]
    fn top_k_top_p_and_min_p_cut_the_tail() {
        let logits = [2.0f32, 1.0, 0.0, -1.0];
        let reach = |params: SamplingParams| {
            let mut sampler = sampler(SamplingParams { temperature: 1.0, seed: 1, ..params });
            let mut seen: Vec<u32> = (0..2000).map(|_| sampler.pick(&logits)).collect();
            seen.sort_unstable();
            seen.dedup();
            seen
        };
        let open = SamplingParams::default();
        assert_eq!(reach(open.clone()), [0, 1, 2, 3]);
        assert_eq!(reach(SamplingParams { top_k: 2, ..open.clone() }), [0, 1]);
        // Probabilities 0.64, 0.24, 0.09, 0.03.
        assert_eq!(reach(SamplingParams { top_p: 0.7, ..open.clone() }), [0, 1]);
        assert_eq!(reach(SamplingParams { top_p: 0.01, ..open.clone() }), [0]);
        assert_eq!(reach(SamplingParams { min_p: 0.1, ..open }), [0, 1, 2]);
    }

    #[test]
    fn penalties_count_prompt_and_output() {
        let repetition = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        assert_eq!(Sampler::new(repetition.clone(), &[1]).pick(&[1.5, 2.0]), 0);
        assert_eq!(Sampler::new(repetition, &[1]).pick(&[-3.0, -2.0]), 0);
        let mut frequency = sampler(SamplingParams { frequency_penalty: 1.0, ..SamplingParams::default() });
        assert_eq!([frequency.pick(&[0.0, 1.5]), frequency.pick(&[0.0, 1.5]), frequency.pick(&[0.0, 1.5])], [1, 1, 0]);
        let biased = SamplingParams { logit_bias: vec![(0, 5.0)], ..SamplingParams::default() };
        assert_eq!(sampler(biased).pick(&[0.0, 4.0]), 0);
    }

    #[test]
    fn settings_outside_their_range_are_named() {
        let error = |params: SamplingParams| params.validate(10).unwrap_err().to_string();
        let open = SamplingParams::default;
        assert_eq!(
            error(SamplingParams { temperature: -1.0, ..open() }),
            "temperature is -1, expected a number of at least 0"
        );
        assert_eq!(error(SamplingParams { top_p: 0.0, ..open() }), "top_p is 0, expected above 0, at most 1");
        assert_eq!(error(SamplingParams { min_p: f32::NAN, ..open() }), "min_p is NaN, expected 0 to 1");
        assert_eq!(
            error(SamplingParams { logit_bias: vec![(10, 1.0)], ..open() }),
            "logit_bias is token 10, expected token ids of the vocabulary"
        );
    }

    #[test]
    fn masks_bind_and_broken_logits_are_named() {
        let mut mask = TokenMask::all(4);
        mask.clear(1);
        let mut greedy = sampler(SamplingParams::default());
        assert_eq!(greedy.pick_allowed(&[0.0, 9.0, 2.0, 1.0], Some(&mask)), Ok(2));
        assert_eq!(greedy.pick_allowed(&[f32::NEG_INFINITY; 4], Some(&mask)), Ok(0));
        let mut hot = sampler(SamplingParams { temperature: 2.0, ..SamplingParams::default() });
        for _ in 0..100 {
            assert_ne!(hot.pick_allowed(&[0.0, 9.0, 2.0, 1.0], Some(&mask)), Ok(1));
        }
        mask.intersect(&[]);
        assert_eq!(greedy.pick_allowed(&[0.0; 4], Some(&mask)), Err(PickError::NothingAllowed));
        assert_eq!(greedy.pick_allowed(&[0.0, f32::NAN], None), Err(PickError::Nan { token: 1 }));
    }

    #[test]
    fn log_probabilities_are_of_the_plain_softmax() {
        let logits = [1.0f32, 3.0, 2.0, 3.0];
        let total: f32 = logits.iter().map(|x| x.exp()).sum();
        let (chosen, top) = log_probabilities(&logits, 2, 3);
        assert!((chosen - (2.0 - total.ln())).abs() < 4.0 * f32::EPSILON);
        assert_eq!(top.iter().map(|t| t.0).collect::<Vec<_>>(), [1, 3, 2]);
        assert_eq!(top[2].1, chosen);
        assert_eq!(log_probabilities(&logits, 0, 99).1.len(), 4);
        assert!(log_probabilities(&logits, 0, 0).1.is_empty());
    }

    proptest! {
        #[test]
        fn a_choice_is_the_reference_of_the_operation(
            logits in proptest::collection::vec(prop_oneof![-8f32..8.0, (-4i8..4).prop_map(f32::from)], 1..600),
            temperature in prop_oneof![Just(0f32), 0.1f32..3.0], top_p in prop_oneof![Just(1f32), 0.01f32..1.0],
            top_k in prop_oneof![Just(0usize), 1usize..300], min_p in prop_oneof![Just(0f32), 0f32..0.3], seed: u64,
        ) {
            let params = SamplingParams { temperature, top_p, top_k, min_p, seed, ..SamplingParams::default() };
            let mut sampler = sampler(params.clone());
            for bits in sampler.next_bits().take(4) {
                let (token, certainty) = sample::draw_row(&logits, &params.draw(bits).words());
                prop_assert_eq!(sampler.pick(&logits), token);
                prop_assert_eq!(sampler.certainty(), certainty);
            }
        }

        #[test]
        fn any_logits_give_a_token_and_the_same_one_again(
            logits in proptest::collection::vec(prop_oneof![-50f32..50.0, Just(f32::NAN), Just(f32::NEG_INFINITY), Just(f32::INFINITY)], 1..200),
            temperature in 0f32..2.0, top_p in 0.01f32..=1.0, top_k in 0usize..300, min_p in 0f32..=1.0, seed: u64,
        ) {
            let params = SamplingParams { temperature, top_p, top_k, min_p, seed, ..SamplingParams::default() };
            let (mut a, mut b) = (sampler(params.clone()), sampler(params));
            for _ in 0..3 {
                let token = a.pick(&logits);
                prop_assert!((token as usize) < logits.len());
                prop_assert_eq!(token, b.pick(&logits));
            }
        }
    }
}
