//! Which drafts are worth a row. A step that verifies drafts costs more than one that does not, by what the cost curve says;
//! it gives more tokens, by what acceptance says. Speculation runs where the second outweighs the first, and while the
//! engine's ledger of time saved and lost allows the loss if every draft fails.

use super::cost::RunningCost;

/// A gain below this is noise.
const MARGIN: f64 = 1.02;

/// Loss that the engine may run into before anything was saved, in plain steps.
const GRANT_STEPS: f64 = 3.5;

/// Share of all time that may be lost beyond it: the floor.
const MAX_LOSS: f64 = 0.003;

/// Savings kept for later losses, in plain steps: what easy text has won is not for hard text to lose.
const MAX_SAVED_STEPS: f64 = 6.0;

/// Chooses how many of each sequence's drafts to verify.
///
/// `chances[s][d]` is the chance that drafts `0..=d` of decoding sequence `s` are all accepted, so it never rises with
/// `d`. `rows` are the rows of the step without drafts, those of prompts too; at most `max_drafts` are added, and no more than
/// may be lost in `budget` seconds. Any best choice takes the likeliest drafts first, so all choices are tried in that order.
/// A prompt's rows take their time whatever is drafted: drafts must be worth the time that they add.
pub(crate) fn drafts_worth_verifying(
    chances: &[Vec<f64>],
    rows: usize,
    max_drafts: usize,
    budget: f64,
    cost: &RunningCost,
) -> Vec<usize> {
    let mut counts = vec![0; chances.len()];
    let candidates = likeliest_first(chances);
    let plain = cost.plain(chances.len());
    let mut tokens = chances.len() as f64;
    let mut best = (MARGIN * tokens / plain, 0);
    for (added, (chance, _)) in candidates.iter().take(max_drafts).enumerate() {
        tokens += chance;
        let more = cost.verify(rows + added + 1) - cost.plain(rows);
        let rate = tokens / (plain + more);
        if rate > best.0 && more <= budget {
            best = (rate, added + 1);
        }
    }
    candidates[..best.1].iter().for_each(|(_, sequence)| counts[*sequence] += 1);
    counts
}

/// Chooses how deep to draft each sequence with a head before any draft is made: as [`drafts_worth_verifying`], with the
/// time of the drafting steps counted. The first of them also runs the rows that the head is behind, `waiting`.
pub(crate) fn depths_worth_drafting(
    chances: &[Vec<f64>],
    rows: usize,
    waiting: usize,
    budget: f64,
    cost: &RunningCost,
) -> Vec<usize> {
    let candidates = likeliest_first(chances);
    let plain = cost.plain(rows);
    let mut tokens = chances.len() as f64;
    let mut best = (MARGIN * tokens / plain, 0);
    let mut depths = vec![0; chances.len()];
    // Sequences drafted at each depth.
    let mut width: Vec<usize> = Vec::new();
    for (added, (chance, sequence)) in candidates.iter().enumerate() {
        tokens += chance;
        if width.len() == depths[*sequence] {
            width.push(0);
        }
        width[depths[*sequence]] += 1;
        depths[*sequence] += 1;
        let catch_up = cost.draft(width[0].max(waiting));
        let drafting = catch_up + width[1..].iter().map(|width| cost.draft(*width)).sum::<f64>();
        let seconds = cost.verify(rows + added + 1) + drafting;
        let rate = tokens / seconds;
        if rate > best.0 && seconds - plain <= budget {
            best = (rate, added + 1);
        }
    }
    depths.fill(0);
    candidates[..best.1].iter().for_each(|(_, sequence)| depths[*sequence] += 1);
    depths
}

/// `(chance, sequence)` of all drafts, the likeliest first; of one sequence in order.
fn likeliest_first(chances: &[Vec<f64>]) -> Vec<(f64, usize)> {
    let mut candidates: Vec<(f64, usize)> =
        chances.iter().enumerate().flat_map(|(s, c)| c.iter().map(move |chance| (*chance, s))).collect();
    candidates.sort_by(|a, b| b.0.total_cmp(&a.0));
    candidates
}

/// Time that speculation has saved and lost.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Ledger {
    /// Seconds saved less seconds lost, of which only some are kept for later.
    balance: f64,
    /// Seconds saved less seconds lost, all of them.
    total: f64,
    /// Seconds of all steps that decoded.
    busy: f64,
}

impl Ledger {
    /// Seconds whose loss keeps the floor; `plain` are those of a plain step. Nothing that costs time and can be in vain
    /// happens without asking, so what is lost in all is at most the grant and the share, whatever texts do.
    pub(crate) fn budget(&self, plain: f64) -> f64 {
        self.balance + GRANT_STEPS * plain + MAX_LOSS * self.busy
    }

    /// Whether losing `seconds` keeps the floor.
    pub(crate) fn allows(&self, seconds: f64, plain: f64) -> bool {
        self.budget(plain) >= seconds
    }

    /// Counts a step that took `took` and saved `saved` against going without speculation; below 0 it lost.
    pub(crate) fn settle(&mut self, saved: f64, took: f64, plain: f64) {
        self.busy += took;
        self.total += saved;
        self.balance = (self.balance + saved).min(MAX_SAVED_STEPS * plain);
    }

    /// Seconds saved less seconds lost.
    pub(crate) fn saved(&self) -> f64 {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::speculate::CostCurve;
    use proptest::prelude::*;

    fn cost(points: &[(usize, f64)], draft: f64) -> RunningCost {
        let drafts = if draft > 0.0 { vec![(1, draft)] } else { Vec::new() };
        RunningCost::new(CostCurve::from_points(points.to_vec(), drafts))
    }

    #[test]
    fn drafts_run_where_they_pay() {
        // The spec's costs at overlap 0.26: 1, 1.37, 1.70, 2.00.
        let moe = cost(&[(1, 1.0), (2, 1.37), (3, 1.70), (4, 2.00)], 0.0);
        let chances = |p: f64| vec![(1..=3).map(|d| p.powi(d)).collect::<Vec<f64>>()];
        assert_eq!(drafts_worth_verifying(&chances(0.35), 1, 8, 9.0, &moe), [0]);
        assert_eq!(drafts_worth_verifying(&chances(0.6), 1, 8, 9.0, &moe), [1]);
        assert_eq!(drafts_worth_verifying(&chances(0.9), 1, 8, 9.0, &moe), [3]);
        // Less is left to lose: fewer are tried, not none.
        assert_eq!(drafts_worth_verifying(&chances(0.9), 1, 8, 0.8, &moe), [2]);
        assert_eq!(drafts_worth_verifying(&chances(0.9), 1, 2, 9.0, &moe), [2]);
        let dear = cost(&[(1, 1.0), (2, 1.37), (3, 1.70), (4, 2.00)], 0.5);
        assert_eq!(depths_worth_drafting(&chances(0.8), 1, 1, 9.0, &dear), [0]);
        let cheap = cost(&[(1, 1.0), (2, 1.37), (3, 1.70), (4, 2.00)], 0.024);
        assert_eq!(depths_worth_drafting(&chances(0.9), 1, 1, 9.0, &cheap), [3]);
        assert_eq!(depths_worth_drafting(&chances(0.9), 1, 1, 0.5, &cheap), [1]);
    }

    #[test]
    fn drafts_beside_a_prompt_must_be_worth_the_time_that_they_add() {
        // Every row costs as much as a step: a draft that is right gains nothing, however many rows a prompt has.
        let dear = cost(&(1..=64).map(|rows| (rows, rows as f64)).collect::<Vec<_>>(), 0.0);
        assert_eq!(drafts_worth_verifying(&[vec![0.99]], 41, 8, 9.0, &dear), [0]);
        let flat = cost(&[(1, 1.0), (64, 2.0)], 0.0);
        assert_eq!(drafts_worth_verifying(&[vec![0.99]], 41, 8, 9.0, &flat), [1]);
    }

    #[test]
    fn the_sequence_with_the_better_drafts_gets_the_rows() {
        let cost = cost(&[(2, 1.0), (3, 1.2), (4, 1.4), (5, 1.9)], 0.0);
        let chances = vec![vec![0.1, 0.01], vec![0.9, 0.8, 0.2]];
        assert_eq!(drafts_worth_verifying(&chances, 2, 8, 9.0, &cost), [0, 2]);
    }

    #[test]
    fn the_ledger_stops_losses_at_the_floor() {
        let mut ledger = Ledger::default();
        let (mut lost, mut steps) = (0.0, 0);
        for _ in 0..10_000 {
            let took = if ledger.allows(0.4, 1.0) { 1.4 } else { 1.0 };
            lost += took - 1.0;
            steps += 1;
            ledger.settle(1.0 - took, took, 1.0);
        }
        assert!(lost <= GRANT_STEPS + MAX_LOSS * 1.4 * f64::from(steps), "{lost}");
        assert!(lost / f64::from(steps) < 0.006);
    }

    proptest! {
        /// The floor, whatever happens: prices and outcomes in any order.
        #[test]
        fn no_text_loses_more_than_the_grant_and_the_share(
            steps in proptest::collection::vec((0.0f64..3.0, -1.0f64..1.0), 1..400),
        ) {
            let (mut ledger, mut lost, mut busy) = (Ledger::default(), 0.0f64, 0.0f64);
            for (price, outcome) in steps {
                // At worst all of the price is lost; at best as much again is won.
                let saved = if ledger.allows(price, 1.0) { price * outcome } else { 0.0 };
                lost -= saved;
                busy += 1.0;
                ledger.settle(saved, 1.0, 1.0);
                prop_assert!(lost <= GRANT_STEPS + MAX_LOSS * busy + 1e-9, "{lost} of {busy}");
            }
        }

        #[test]
        fn no_other_choice_is_better(
            probabilities in proptest::collection::vec(proptest::collection::vec(0.0f64..1.0, 0..4), 1..4),
            steps in proptest::collection::vec(0.0f64..0.8, 12),
        ) {
            let chances: Vec<Vec<f64>> = probabilities.iter().map(|p| {
                p.iter().scan(1.0, |product, p| { *product *= p; Some(*product) }).collect()
            }).collect();
            let mut seconds = 1.0;
            let points: Vec<(usize, f64)> = (1..=12).zip(&steps).map(|(rows, more)| { seconds += more; (rows, seconds) }).collect();
            let cost = cost(&points, 0.0);
            let rows = chances.len();
            let rate = |counts: &[usize]| {
                let tokens: f64 = counts.iter().zip(&chances).map(|(n, c)| 1.0 + c[..*n].iter().sum::<f64>()).sum();
                tokens / cost.verify(rows + counts.iter().sum::<usize>())
            };
            let chosen = drafts_worth_verifying(&chances, rows, 99, f64::INFINITY, &cost);
            let best = rate(&chosen) * MARGIN + 1e-9;
            let mut counts = vec![0; rows];
            // Every combination, as the digits of a number.
            loop {
                prop_assert!(rate(&counts) <= best, "{counts:?} beats {chosen:?}");
                let Some(digit) = (0..rows).find(|s| counts[*s] < chances[*s].len()) else { break };
                counts[digit] += 1;
                counts[..digit].fill(0);
            }
        }
    }
}
