//! Logits to a token. The order of the steps is that of most servers: penalties, bias, then temperature, top-k, top-p,
//! min-p on the sorted rest, then one draw. Same seed, same logits: same tokens, on every machine.

use moellon_tensor::rng::SplitMix64;
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
            if holds && value.is_finite() { Ok(()) } else { Err(SettingError { name, found: value.to_string(), expected }) }
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
                return Err(SettingError { name: "logit_bias", found: format!("token {token}"), expected: "token ids of the vocabulary" });
            }
        }
        Ok(())
    }

    /// Whether the most likely token is taken without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }
}

/// The state of one sequence's sampling.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    rng: SplitMix64,
    /// Tokens of the prompt and the output, for the repetition penalty; how often each was generated.
    seen: HashMap<u32, u32>,
    /// Work space: candidates `(token, logit or probability)`.
    candidates: Vec<(u32, f32)>,
}

impl Sampler {
    /// A sampler whose repetition penalty knows the prompt.
    pub fn new(params: SamplingParams, prompt: &[u32]) -> Self {
        let rng = SplitMix64::new(params.seed);
        let seen = prompt.iter().map(|token| (*token, 0)).collect();
        Sampler { params, rng, seen, candidates: Vec::new() }
    }

    /// Chooses a token from `logits` `[vocab_size]` and remembers it.
    pub fn pick(&mut self, logits: &[f32]) -> u32 {
        let token = self.choose(logits);
        *self.seen.entry(token).or_insert(0) += 1;
        token
    }

    fn choose(&mut self, logits: &[f32]) -> u32 {
        self.candidates.clear();
        // NaN never wins: it compares as the smallest.
        self.candidates.extend((0u32..).zip(logits.iter().map(|x| if x.is_nan() { f32::NEG_INFINITY } else { *x })));
        self.penalize();
        if self.params.is_greedy() {
            return self.candidates.iter().fold(self.candidates[0], |best, c| if c.1 > best.1 { *c } else { best }).0;
        }
        self.keep_most_likely();
        self.draw()
    }

    fn penalize(&mut self) {
        let params = &self.params;
        let penalties = params.repetition_penalty != 1.0 || params.frequency_penalty != 0.0 || params.presence_penalty != 0.0;
        if penalties {
            for (token, generated) in &self.seen {
                let Some((_, logit)) = self.candidates.get_mut(*token as usize) else { continue };
                *logit = if *logit > 0.0 { *logit / params.repetition_penalty } else { *logit * params.repetition_penalty };
                *logit -= params.frequency_penalty * *generated as f32;
                *logit -= if *generated > 0 { params.presence_penalty } else { 0.0 };
            }
        }
        for (token, bias) in &params.logit_bias {
            if let Some((_, logit)) = self.candidates.get_mut(*token as usize) {
                *logit += bias;
            }
        }
    }

    /// Leaves the candidates that top-k, top-p and min-p keep, most likely first, with probabilities that sum to 1.
    fn keep_most_likely(&mut self) {
        // Larger logit first, lower token first where equal: a total order, so that a draw is reproducible.
        let order = |a: &(u32, f32), b: &(u32, f32)| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        let top_k = self.params.top_k;
        if top_k > 0 && top_k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(top_k - 1, order);
            self.candidates.truncate(top_k);
        }
        self.candidates.sort_unstable_by(order);
        let max = self.candidates[0].1;
        let temperature = self.params.temperature;
        for (_, value) in &mut self.candidates {
            // An infinite maximum leaves only its equals.
            *value = if *value == max { 1.0 } else { ((*value - max) / temperature).exp() };
        }
        let total: f32 = self.candidates.iter().map(|c| c.1).sum();
        let (mut sum, mut kept) = (0.0, 0);
        for (_, value) in &self.candidates {
            let likely_enough = *value >= self.params.min_p;
            if kept > 0 && (sum >= self.params.top_p * total || !likely_enough) {
                break;
            }
            sum += value;
            kept += 1;
        }
        self.candidates.truncate(kept);
        self.candidates.iter_mut().for_each(|(_, value)| *value /= sum);
    }

    fn draw(&mut self) -> u32 {
        let mut rest = self.rng.next_f32();
        for (token, probability) in &self.candidates {
            rest -= probability;
            if rest < 0.0 {
                return *token;
            }
        }
        // Rounding may leave a crumb: it belongs to the last candidate.
        self.candidates[self.candidates.len() - 1].0
    }
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
        assert_eq!(error(SamplingParams { temperature: -1.0, ..open() }), "temperature is -1, expected a number of at least 0");
        assert_eq!(error(SamplingParams { top_p: 0.0, ..open() }), "top_p is 0, expected above 0, at most 1");
        assert_eq!(error(SamplingParams { min_p: f32::NAN, ..open() }), "min_p is NaN, expected 0 to 1");
        assert_eq!(error(SamplingParams { logit_bias: vec![(10, 1.0)], ..open() }), "logit_bias is token 10, expected token ids of the vocabulary");
    }

    proptest! {
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
