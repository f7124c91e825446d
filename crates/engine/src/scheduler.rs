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
    for (sequence, demand) in demands.iter().enumerate().filter(|(_, demand)| !demand.decoding) {
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
    /// Seconds of a step that only decodes.
    decode_seconds: Option<f64>,
    /// Seconds that one prompt token adds to a step.
    token_seconds: Option<f64>,
}

/// Prompt tokens of the first step that decodes beside a prompt, when nothing is known of their time.
const FIRST_CHUNK: usize = 8;

impl ChunkGovernor {
    /// Steps that decode may take `max_slowdown` times as long with prompt tokens in them as without.
    pub fn new(max_slowdown: f64, max_chunk: usize) -> Self {
        ChunkGovernor { max_slowdown, max_chunk, decode_seconds: None, token_seconds: None }
    }

    /// Prompt tokens for the next step that decodes.
    pub fn chunk(&self) -> usize {
        let (Some(decode), Some(token)) = (self.decode_seconds, self.token_seconds) else {
            return self.max_chunk.min(FIRST_CHUNK);
        };
        let chunk = (self.max_slowdown - 1.0) * decode / token.max(1e-9);
        // One at least: a token far behind in a long prompt can take longer than the step beside it, on a processor, and
        // more of them would be a delay that nobody bounds.
        (chunk as usize).clamp(1, self.max_chunk)
    }

    /// Learns from a step.
    pub fn observe(&mut self, decode_rows: usize, prefill_rows: usize, seconds: f64) {
        let blend = |old: Option<f64>, new: f64| Some(old.map_or(new, |old| 0.8 * old + 0.2 * new));
        match (decode_rows, prefill_rows) {
            (0, 0) => {}
            (_, 0) => self.decode_seconds = blend(self.decode_seconds, seconds),
            (decode_rows, prefill_rows) => {
                let others = if decode_rows > 0 { self.decode_seconds.unwrap_or(0.0) } else { 0.0 };
                let token = (seconds - others).max(0.0) / prefill_rows as f64;
                self.token_seconds = blend(self.token_seconds, token);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LIMITS: StepLimits = StepLimits { max_tokens: 16, max_logit_rows: 8, max_prefill_beside_decodes: 6 };

    fn prompt(num_tokens: usize) -> Demand {
        Demand { num_tokens, decoding: false, all_logits: false, drafts: 0 }
    }

    fn decode() -> Demand {
        Demand { num_tokens: 1, decoding: true, all_logits: false, drafts: 0 }
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
