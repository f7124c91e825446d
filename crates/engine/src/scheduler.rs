//! Who runs in the next step, and how many tokens of each. Counts only.
//!
//! Every running sequence whose next token is due gets its row first; what is left of the step goes to prompts, first come
//! first served, in chunks that keep the step short while others decode.

/// What a running sequence could use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Tokens whose keys are not cached yet, at least 1.
    pub num_tokens: usize,
    /// Whether its prompt is done: someone waits for its next token.
    pub decoding: bool,
    /// Whether every row needs logits, not only the last.
    pub all_logits: bool,
    /// Drafts to verify beside the token of a sequence that decodes; each is a row with logits.
    pub drafts: usize,
    /// Whether another one computes what it needs next: it takes that in a later step.
    pub follows: bool,
}

/// What a sequence gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// Which of the demands.
    pub sequence: usize,
    /// Tokens of it, at least 1, drafts included.
    pub num_tokens: usize,
    /// Of them drafts, the last ones.
    pub num_drafts: usize,
}

/// Caps of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepLimits {
    /// Rows.
    pub max_tokens: usize,
    /// Rows that need logits.
    pub max_logit_rows: usize,
    /// Rows of prompts in a step that also decodes.
    pub max_prefill_beside_decodes: usize,
}

/// Shares out a step among `demands`, which are in the order of arrival.
pub fn plan(demands: &[Demand], limits: StepLimits) -> Vec<Share> {
    let mut tokens = limits.max_tokens;
    let mut logit_rows = limits.max_logit_rows;
    let mut shares = Vec::new();
    // Drafts get what is left when everybody has a row.
    let decodes = demands.iter().filter(|demand| demand.decoding).count();
    let mut spare = tokens.min(logit_rows).saturating_sub(decodes);
    for (sequence, demand) in demands.iter().enumerate().filter(|(_, demand)| demand.decoding) {
        if tokens == 0 || logit_rows == 0 {
            break;
        }
        let num_drafts = demand.drafts.min(spare);
        shares.push(Share { sequence, num_tokens: 1 + num_drafts, num_drafts });
        spare -= num_drafts;
        tokens -= 1 + num_drafts;
        logit_rows -= 1 + num_drafts;
    }
    if !shares.is_empty() {
        tokens = tokens.min(limits.max_prefill_beside_decodes);
    }
    for (sequence, demand) in demands.iter().enumerate().filter(|(_, demand)| !demand.decoding && !demand.follows) {
        let rows = if demand.all_logits { logit_rows } else { tokens };
        let num_tokens = demand.num_tokens.min(tokens).min(rows);
        if num_tokens == 0 || logit_rows == 0 {
            break;
        }
        shares.push(Share { sequence, num_tokens, num_drafts: 0 });
        tokens -= num_tokens;
        logit_rows -= if demand.all_logits { num_tokens } else { 1 };
    }
    shares
}

/// Chooses how many prompt tokens may ride in a step that decodes, from how long steps took.
///
/// Only speed depends on it: what a row computes does not depend on the rows beside it.
#[derive(Debug, Clone)]
pub struct ChunkGovernor {
    max_slowdown: f64,
    max_chunk: usize,
    /// Seconds of steps that only decoded.
    decode_seconds: Recent,
    /// Seconds that one prompt token added to a step.
    token_seconds: Recent,
    /// Steps with both since one that only decoded.
    mixed_steps: usize,
}

/// Prompt tokens of the first step that decodes beside a prompt, when nothing is known of their time.
const FIRST_CHUNK: usize = 8;

/// Of so many steps beside a prompt, one only decodes: what is compared with must be of the same moment, of as many rows,
/// with the same neighbours on the machine. It costs a prompt 2 % of its time.
const REFERENCE_INTERVAL: usize = 24;

impl ChunkGovernor {
    /// Steps that decode may take `max_slowdown` times as long with prompt tokens in them as without.
    pub fn new(max_slowdown: f64, max_chunk: usize) -> Self {
        let (decode_seconds, token_seconds) = (Recent::default(), Recent::default());
        ChunkGovernor { max_slowdown, max_chunk, decode_seconds, token_seconds, mixed_steps: 0 }
    }

    /// Prompt tokens of a step that decodes.
    pub fn chunk(&self) -> usize {
        let (Some(decode), Some(token)) = (self.decode_seconds.median(), self.token_seconds.median()) else {
            return self.max_chunk.min(FIRST_CHUNK);
        };
        let chunk = (self.max_slowdown - 1.0) * decode / token.max(1e-9);
        // One at least: a token far behind in a long prompt can take longer than the step beside it, on a processor, and
        // more of them would be a delay that nobody bounds.
        (chunk as usize).clamp(1, self.max_chunk)
    }

    /// Prompt tokens of the next step, if it decodes: [`ChunkGovernor::chunk`], or none where it is time to see what
    /// decoding takes by itself.
    pub fn next_chunk(&self) -> usize {
        if self.mixed_steps >= REFERENCE_INTERVAL { 0 } else { self.chunk() }
    }

    /// Learns from a step.
    pub fn observe(&mut self, decode_rows: usize, prefill_rows: usize, seconds: f64) {
        match (decode_rows, prefill_rows) {
            (0, 0) => {}
            (_, 0) => {
                self.decode_seconds.push(seconds);
                self.mixed_steps = 0;
            }
            (decode_rows, prefill_rows) => {
                let others = if decode_rows > 0 { self.decode_seconds.median().unwrap_or(0.0) } else { 0.0 };
                self.token_seconds.push((seconds - others).max(0.0) / prefill_rows as f64);
                self.mixed_steps += usize::from(decode_rows > 0);
            }
        }
    }
}

/// The last few measurements. Their median does not follow the one that a neighbour disturbed.
#[derive(Debug, Clone, Default)]
struct Recent {
    values: [f64; Recent::LEN],
    count: usize,
}

impl Recent {
    const LEN: usize = 7;

    fn push(&mut self, value: f64) {
        self.values[self.count % Recent::LEN] = value;
        self.count += 1;
    }

    /// `None` before the first.
    fn median(&self) -> Option<f64> {
        let mut known = self.values;
        let known = &mut known[..self.count.min(Recent::LEN)];
        known.sort_by(f64::total_cmp);
        known.get(known.len() / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: StepLimits = StepLimits { max_tokens: 16, max_logit_rows: 8, max_prefill_beside_decodes: 6 };

    fn prompt(num_tokens: usize) -> Demand {
        Demand { num_tokens, decoding: false, all_logits: false, drafts: 0, follows: false }
    }

    fn decode() -> Demand {
        Demand { num_tokens: 1, decoding: true, all_logits: false, drafts: 0, follows: false }
    }

    fn shares(demands: &[Demand]) -> Vec<(usize, usize)> {
        plan(demands, LIMITS).into_iter().map(|share| (share.sequence, share.num_tokens)).collect()
    }

    #[test]
    fn decodes_come_first_and_cap_the_prompts_beside_them() {
        assert_eq!(shares(&[prompt(100)]), [(0, 16)]);
        assert_eq!(shares(&[prompt(100), decode(), decode()]), [(1, 1), (2, 1), (0, 6)]);
        assert_eq!(shares(&[prompt(4), decode(), prompt(100)]), [(1, 1), (0, 4), (2, 2)]);
        assert_eq!(shares(&[]), []);
    }

    #[test]
    fn who_follows_another_leaves_the_step_to_those_that_do_not() {
        let follower = Demand { follows: true, ..prompt(100) };
        assert_eq!(shares(&[prompt(100), follower, decode()]), [(2, 1), (0, 6)]);
        assert_eq!(shares(&[prompt(4), follower, prompt(100)]), [(0, 4), (2, 12)]);
    }

    #[test]
    fn drafts_take_rows_that_nobody_waits_for() {
        let drafting = |drafts| Demand { drafts, ..decode() };
        assert_eq!(shares(&[drafting(3), decode(), prompt(100)]), [(0, 4), (1, 1), (2, 6)]);
        // Eight rows of logits.
        assert_eq!(shares(&[drafting(9), decode(), drafting(9)]), [(0, 6), (1, 1), (2, 1)]);
        assert_eq!(shares(&[drafting(7), prompt(100)]), [(0, 8)]);
    }

    #[test]
    fn prompts_that_need_all_logits_stay_within_their_rows() {
        let scored = Demand { all_logits: true, ..prompt(100) };
        assert_eq!(shares(&[scored]), [(0, 8)]);
        assert_eq!(shares(&[scored, prompt(100)]), [(0, 8)]);
        assert_eq!(shares(&[Demand { num_tokens: 3, ..scored }, prompt(100)]), [(0, 3), (1, 13)]);
    }

    #[test]
    fn the_chunk_follows_the_time_that_steps_take() {
        let mut governor = ChunkGovernor::new(2.5, 512);
        assert_eq!(governor.chunk(), 8);
        governor.observe(4, 0, 0.010);
        governor.observe(4, 32, 0.042);
        assert_eq!(governor.chunk(), 15);
        // Tokens that are slower than the step beside them go one by one.
        let mut slow = governor.clone();
        for _ in 0..50 {
            slow.observe(4, 4, 0.010 + 4.0 * 0.020);
        }
        assert_eq!(slow.chunk(), 1);
        governor.observe(0, 512, 0.0);
        for _ in 0..50 {
            governor.observe(0, 512, 0.001);
        }
        assert_eq!(governor.chunk(), 512);
    }

    #[test]
    fn a_disturbed_step_changes_nothing_and_a_slower_batch_is_noticed() {
        let mut governor = ChunkGovernor::new(2.5, 512);
        for _ in 0..7 {
            governor.observe(4, 0, 0.010);
            governor.observe(4, 5, 0.015);
        }
        assert_eq!(governor.chunk(), 15);
        governor.observe(4, 0, 0.500);
        governor.observe(4, 5, 0.500);
        assert_eq!(governor.chunk(), 15);
        // Beside a prompt without an end, a step now and then only decodes: twice as many rows, twice the time.
        for _ in 0..10 * REFERENCE_INTERVAL {
            match governor.next_chunk() {
                0 => governor.observe(8, 0, 0.020),
                chunk => governor.observe(8, chunk, 0.020 + 0.001 * chunk as f64),
            }
        }
        assert!((29..=30).contains(&governor.chunk()), "{}", governor.chunk());
    }

    proptest! {
        #[test]
        fn every_cap_holds_and_somebody_runs(
            demands in proptest::collection::vec((1usize..40, any::<bool>(), any::<bool>(), 0usize..6), 1..20),
            max_tokens in 1usize..32, max_logit_rows in 1usize..16, beside in 1usize..16,
        ) {
            let demands: Vec<Demand> = demands
                .into_iter()
                .map(|(num_tokens, decoding, all_logits, drafts)| Demand {
                    num_tokens: if decoding { 1 } else { num_tokens },
                    decoding,
                    all_logits: all_logits && !decoding,
                    drafts: if decoding { drafts } else { 0 },
                    follows: false,
                })
                .collect();
            let limits = StepLimits { max_tokens, max_logit_rows, max_prefill_beside_decodes: beside };
            let shares = plan(&demands, limits);
            prop_assert!(!shares.is_empty());
            let rows: usize = shares.iter().map(|s| s.num_tokens).sum();
            prop_assert!(rows <= max_tokens);
            let logits: usize = shares
                .iter()
                .map(|s| if demands[s.sequence].all_logits { s.num_tokens } else { 1 + s.num_drafts })
                .sum();
            prop_assert!(logits <= max_logit_rows);
            // Drafts never take the row of one who decodes.
            let decodes = demands.iter().filter(|d| d.decoding).count();
            let served = shares.iter().filter(|s| demands[s.sequence].decoding).count();
            prop_assert_eq!(served, decodes.min(max_tokens).min(max_logit_rows));
            for share in &shares {
                let demand = demands[share.sequence];
                prop_assert!(share.num_drafts <= demand.drafts);
                prop_assert!(share.num_tokens > share.num_drafts);
                prop_assert!(share.num_tokens - share.num_drafts <= demand.num_tokens);
            }
        }
    }
}
