//! The engine's part in speculation: propose drafts before a step, learn from it, and draft with the head after it.

use super::governor::{depths_worth_drafting, drafts_worth_verifying};
use super::head::{Drafted, HeadKind, Tip, tables};
use super::track::Offer;
use super::{CostCurve, Policy, Replay, SequenceTrack, Source, Speculation};
use crate::engine::{Engine, EngineError};
use crate::scheduler::Share;
use crate::sequence::Sequence;
use std::time::Instant;

/// Drafts of a head in a row: each is a guess on guesses.
const MAX_HEAD_DEPTH: usize = 8;

/// Steps without a draft after which a head is tried again, at first and at most.
pub(super) const PATIENCE: (usize, usize) = (32, 256);

/// The same while an engine has hardly seen its head draft.
const FIRST_PATIENCE: usize = 4;

/// Trials of an engine that has hardly seen its head draft.
const FEW_TRIALS: f64 = 16.0;

/// Trials after which a sequence's evidence against the head counts.
const ENOUGH_TRIALS: f64 = 6.0;

impl Engine {
    /// What steps cost, as measured at the start; `None` without speculation.
    pub fn cost_curve(&self) -> Option<&CostCurve> {
        self.speculation.as_ref().map(Speculation::curve)
    }

    /// Switches drafting off and on again, to compare. Output does not depend on it.
    pub fn set_speculating(&mut self, speculating: bool) {
        if let Some(speculation) = &mut self.speculation {
            speculation.set_enabled(speculating);
        }
    }

    /// Replays other outcomes from now on, as if nothing had been learned. For measuring.
    pub fn set_replay(&mut self, replay: Replay) {
        if let Some(speculation) = &mut self.speculation {
            speculation.set_replay(replay);
        }
    }

    /// Gives every sequence that decodes the drafts that the next step shall verify.
    pub(crate) fn propose(&mut self) {
        let Some(speculation) = &mut self.speculation else { return };
        let decoding: Vec<usize> = (0..self.running.len()).filter(|i| self.running[*i].is_decoding()).collect();
        let mut offers: Vec<Offer> = Vec::new();
        for index in &decoding {
            let sequence = &mut self.running[*index];
            sequence.track.drafts.clear();
            offers.push(if speculation.enabled { speculation.offer(sequence) } else { Offer::default() });
        }
        if offers.iter().all(|offer| offer.tokens.is_empty()) {
            return;
        }
        let limits = self.step_limits;
        let spare = limits.max_tokens.min(limits.max_logit_rows).saturating_sub(decoding.len());
        let prompts = self.running.iter().filter(|s| !s.is_decoding()).map(|s| s.demand().num_tokens).sum::<usize>();
        let rows = decoding.len() + prompts.min(self.governor.chunk());
        let counts = match speculation.options.policy {
            Policy::Always => {
                let mut spare = spare;
                offers.iter().map(|offer| take(offer.tokens.len(), &mut spare)).collect()
            }
            Policy::Governed => {
                let chances: Vec<Vec<f64>> = offers.iter_mut().map(|o| std::mem::take(&mut o.chances)).collect();
                let budget = speculation.ledger.budget(speculation.cost.plain(decoding.len()));
                drafts_worth_verifying(&chances, rows, spare, budget, &speculation.cost)
            }
        };
        for ((index, offer), count) in decoding.into_iter().zip(offers).zip(counts) {
            let sequence = &mut self.running[index];
            let count = sequence.allowed_drafts(&offer.tokens[..count]);
            sequence.track.drafts.extend_from_slice(&offer.tokens[..count]);
            sequence.track.source = offer.source;
        }
    }

    /// Takes the drafts back: there are no blocks for them. `false` if there were none.
    pub(crate) fn drop_drafts(&mut self) -> bool {
        let mut dropped = false;
        for sequence in &mut self.running {
            dropped |= !sequence.track.drafts.is_empty();
            sequence.track.drafts.clear();
        }
        dropped
    }

    /// Learns from the tokens that a step gave a sequence; `drafts` were verified.
    pub(crate) fn learn(&mut self, index: usize, drafts: &[u32], came: usize) {
        let Some(speculation) = &mut self.speculation else { return };
        speculation.learn(&mut self.running[index], drafts, came);
    }

    /// Keeps the head's rows in step with a step's rows and drafts for the next one. `computed` are the rows of each share
    /// that count. Sequences that have `ended` are still there.
    pub(crate) fn run_head(
        &mut self,
        shares: &[Share],
        computed: &[usize],
        ended: &[usize],
    ) -> Result<(), EngineError> {
        if self.speculation.as_ref().is_none_or(|s| s.head.is_none()) {
            return Ok(());
        }
        let started = Instant::now();
        let mut row = 0;
        for (share, computed) in shares.iter().zip(computed) {
            self.hand_to_head(share.sequence, row, *computed)?;
            row += share.num_tokens;
        }
        let prompts = shares.iter().any(|share| self.running[share.sequence].generated() < 2);
        let reads_prompts = prompts && self.speculation.as_ref().is_some_and(Speculation::reads_prompts);
        if reads_prompts {
            self.head_catches_up(&[])?;
        }
        let depths = self.head_depths(ended);
        self.draft(&depths)?;
        self.leave_rows(ended)?;
        if reads_prompts {
            // A draft model that pays reads prompts too: that is the price of having one, not of drafting.
            if let Some(speculation) = &mut self.speculation {
                speculation.expected_drafting = 0.0;
            }
        }
        if let Some(speculation) = &mut self.speculation {
            speculation.drafting += started.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// How deep to draft each running sequence now.
    fn head_depths(&mut self, ended: &[usize]) -> Vec<usize> {
        let mut depths = vec![0; self.running.len()];
        let Some(speculation) = &mut self.speculation else { return depths };
        let Some(kind) = speculation.head.as_ref().map(super::head::Head::kind) else { return depths };
        let max_depth = speculation.options.max_depth.min(MAX_HEAD_DEPTH);
        // The rows of the tokens that were just chosen count as computed.
        let may_draft: Vec<usize> = (0..self.running.len())
            .filter(|index| !ended.contains(index) && self.running[*index].generated() > 0)
            .collect();
        if may_draft.iter().all(|index| self.running[*index].track.head.next_row.is_none()) {
            may_draft.iter().for_each(|index| self.running[*index].track.head.idle_steps += 1);
            return depths;
        }
        let is_replayed = speculation.replay.is_some();
        let rooms: Vec<usize> = may_draft
            .iter()
            .map(|index| room_to_draft(&self.running[*index], kind, is_replayed).min(max_depth))
            .collect();
        if speculation.options.policy == Policy::Always {
            may_draft.iter().zip(rooms).for_each(|(index, room)| depths[*index] = room);
            return depths;
        }
        let chances: Vec<Vec<f64>> = may_draft
            .iter()
            .zip(&rooms)
            .map(|(index, room)| speculation.chances_of_head(&self.running[*index], *room))
            .collect();
        let rows = may_draft.len();
        let plain = speculation.cost.plain(rows);
        let waiting = speculation.head.as_ref().map_or(1, |head| head.num_waiting().max(1));
        let worth = depths_worth_drafting(&chances, rows, waiting, speculation.ledger.budget(plain), &speculation.cost);
        // The rows that wait are run by the first draft.
        let catch_up = speculation.cost.draft(waiting);
        for (place, index) in may_draft.iter().enumerate() {
            let drafts = worth[place];
            let track = &mut self.running[*index].track.head;
            if drafts > 0 {
                (track.idle_steps, track.patience) = (0, PATIENCE.0);
                depths[*index] = drafts;
                continue;
            }
            track.idle_steps += 1;
            let sequence = &self.running[*index];
            let hopeless = speculation.is_hopeless(Some(sequence));
            if hopeless && !sequence.track.head.is_soon() {
                if let Some(head) = &mut speculation.head {
                    head.drop_waiting_of(sequence.number);
                }
                self.running[*index].track.head.stop();
                continue;
            }
            let out_of_question = speculation.is_out_of_question(sequence);
            let track = &mut self.running[*index].track.head;
            if rooms[place] == 0 || out_of_question {
                continue;
            }
            // To see what it would have said: often while nothing is known, then ever more seldom.
            let unknown = speculation.experience.head[0].trials() < FEW_TRIALS;
            let due = track.is_known() && track.idle_steps >= if unknown { FIRST_PATIENCE } else { track.patience };
            if due && speculation.ledger.allows(catch_up, plain) {
                track.patience = (2 * track.patience).min(PATIENCE.1);
                track.idle_steps = 0;
                depths[*index] = 1;
            }
        }
        depths
    }

    /// Drafts, or lets rows wait, or gives sequences up whose rows are not worth keeping.
    fn draft(&mut self, depths: &[usize]) -> Result<(), EngineError> {
        let deepest = depths.iter().copied().max().unwrap_or(0);
        for (index, depth) in depths.iter().enumerate().filter(|(_, depth)| **depth > 0) {
            // Slots for the rows of drafts; where there are none, drafts are fewer.
            let needed = self.pool.blocks_for(self.running[index].tokens.len() + depth);
            while self.running[index].blocks.len() < needed {
                let Some(block) = self.alloc_free() else { break };
                self.running[index].blocks.push(block);
            }
        }
        if deepest == 0 {
            return self.let_rows_wait();
        }
        let wanted: Vec<(u64, usize, usize)> = depths
            .iter()
            .enumerate()
            .filter(|(_, depth)| **depth > 0)
            .map(|(index, depth)| (self.running[index].number, index, *depth))
            .collect();
        let numbers: Vec<u64> = wanted.iter().map(|(number, ..)| *number).collect();
        let mut tips = self.head_catches_up(&numbers)?;
        let sequences = self.running.len();
        for depth in 1..=deepest {
            let mut going = Vec::new();
            for mut tip in tips {
                let Some((_, index, wanted)) = wanted.iter().find(|(number, ..)| *number == tip.sequence) else {
                    continue;
                };
                let Some(speculation) = &mut self.speculation else { return Ok(()) };
                let sequence = &mut self.running[*index];
                if let Some(replay) = &speculation.replay {
                    let before = sequence.track.head.drafted.last().map(|drafted| drafted.token);
                    let previous = before.or(sequence.tokens.last().copied()).unwrap_or_default();
                    tip.drafted = Drafted { token: replay.draft(previous), confidence: None };
                }
                sequence.track.head.drafted.push(tip.drafted);
                let slots = sequence.blocks.len() * self.limits.block_size;
                let has_slot = sequence.tokens.len() + depth <= slots;
                if depth < *wanted && has_slot && speculation.goes_on(&sequence.track, sequences) {
                    going.push(tip);
                }
            }
            if going.is_empty() {
                break;
            }
            tips = self.head_goes_on(&going)?;
        }
        Ok(())
    }

    pub(super) fn head_catches_up(&mut self, wanted: &[u64]) -> Result<Vec<Tip>, EngineError> {
        let Some(Speculation { head: Some(head), cost, expected_drafting, stats, .. }) = &mut self.speculation else {
            return Ok(Vec::new());
        };
        let rows = head.num_waiting();
        stats.head_rows += rows as u64;
        *expected_drafting += cost.draft(rows);
        let started = Instant::now();
        let tables = tables(&self.running);
        let tips = head.catch_up(wanted, &tables, &mut self.decoder, self.backend.as_mut())?;
        if !wanted.is_empty() && rows <= 2 * wanted.len() {
            cost.observe_draft(rows, started.elapsed().as_secs_f64());
        }
        Ok(tips)
    }

    fn head_goes_on(&mut self, tips: &[Tip]) -> Result<Vec<Tip>, EngineError> {
        let Some(Speculation { head: Some(head), cost, expected_drafting, stats, .. }) = &mut self.speculation else {
            return Ok(Vec::new());
        };
        stats.head_rows += tips.len() as u64;
        *expected_drafting += cost.draft(tips.len());
        let started = Instant::now();
        let tables = tables(&self.running);
        let next = head.chain(tips, &tables, &mut self.decoder, self.backend.as_mut())?;
        cost.observe_draft(tips.len(), started.elapsed().as_secs_f64());
        Ok(next)
    }

    /// Counts a step: what it would have taken without speculation, and what it took.
    pub(crate) fn settle(&mut self, decodes: usize, drafts: usize, prefill_rows: usize, seconds: f64) {
        let Some(speculation) = &mut self.speculation else { return };
        let drafting = std::mem::take(&mut speculation.drafting);
        let expected_drafting = std::mem::take(&mut speculation.expected_drafting);
        let accepted = std::mem::take(&mut speculation.accepted);
        speculation.stats.draft_seconds += drafting;
        speculation.stats.sequence_steps += decodes as u64;
        let Speculation { cost, ledger, .. } = speculation;
        if decodes > 0 && prefill_rows == 0 {
            if drafts > 0 {
                cost.observe_verify(decodes + drafts, seconds - drafting);
            } else {
                cost.observe_plain(decodes, seconds - drafting);
            }
        }
        // By what steps take on average: what else slowed this one down is not speculation's doing.
        let rows = decodes + prefill_rows;
        let plain = cost.plain(decodes.max(1));
        let tokens = accepted as f64 * plain / decodes.max(1) as f64;
        let dearer = if drafts > 0 { cost.verify(rows + drafts) - cost.plain(rows) } else { 0.0 };
        let lost = dearer + expected_drafting;
        let saved = if decodes > 0 { tokens - lost } else { -lost };
        ledger.settle(saved, if decodes > 0 { plain + lost } else { lost }, plain);
    }
}

/// Drafts that the head can make for a sequence now.
fn room_to_draft(sequence: &Sequence, kind: HeadKind, is_replayed: bool) -> usize {
    let due = sequence.tokens.len() - usize::from(kind == HeadKind::Hidden);
    let head = &sequence.track.head;
    let ready = head.next_row == Some(due) && head.drafted.is_empty();
    if ready && (head.sees_enough(due) || is_replayed) { sequence.room_for_drafts() } else { 0 }
}

/// As many as there are, while there is room.
fn take(wanted: usize, room: &mut usize) -> usize {
    let taken = wanted.min(*room);
    *room -= taken;
    taken
}

impl Speculation {
    /// The better offer for a sequence.
    fn offer(&self, sequence: &Sequence) -> Offer {
        let depth = self.options.max_depth.min(sequence.room_for_drafts());
        let track = &sequence.track;
        let head = track.head_offer(&self.experience, depth);
        if let (Some(replay), None) = (&self.replay, &self.head) {
            return replayed_offer(replay, sequence, depth);
        }
        if !self.options.suffix || self.replay.is_some() {
            return head;
        }
        let seen = track.suffix_offer(self.corpora.get(sequence.salt()), &self.experience, depth);
        SequenceTrack::better(head, seen)
    }

    fn learn(&mut self, sequence: &mut Sequence, drafts: &[u32], came: usize) {
        let Speculation { experience, corpora, stats, replay, head, .. } = self;
        let first = sequence.tokens.len() - came;
        let (track, tokens, salt) = sequence.track_and_text();
        let new = &tokens[first..];
        if replay.is_some() && head.is_none() {
            // What a lookup would have proposed is what was verified.
            track.head.drafted = drafts.iter().map(|token| Drafted { token: *token, confidence: None }).collect();
        }
        track.head.learn(new, experience, &mut |depth, hit| {
            let (trials, hits) = &mut stats.head_by_depth[depth];
            *trials += 1;
            *hits += u64::from(hit);
        });
        if self.options.suffix && replay.is_none() {
            track.begin(&tokens[..first]);
            for end in first + 1..=tokens.len() {
                track.learn_suffix(&tokens[..end], corpora.get(salt), experience);
            }
            track.share(tokens, salt, corpora, false);
        }
        if drafts.is_empty() {
            return;
        }
        let accepted = drafts.iter().zip(new).take_while(|(draft, token)| draft == token).count();
        track.accepted_drafts += accepted;
        self.accepted += accepted;
        let source = match track.source {
            Some(Source::Head) => &mut stats.head,
            Some(Source::Suffix) | None => &mut stats.suffix,
        };
        source.drafts += 1;
        source.draft_tokens += drafts.len() as u64;
        source.accepted_tokens += accepted as u64;
    }

    /// A sequence ends: others may see all of it.
    pub(crate) fn end(&mut self, sequence: &mut Sequence) {
        if self.options.suffix && self.replay.is_none() {
            let (track, tokens, salt) = sequence.track_and_text();
            track.share(tokens, salt, &mut self.corpora, true);
        }
    }

    /// Whether one more draft after those that a sequence has is likely to pay.
    fn goes_on(&self, track: &SequenceTrack, sequences: usize) -> bool {
        if self.options.policy == Policy::Always {
            return true;
        }
        let offer = track.head_offer(&self.experience, MAX_HEAD_DEPTH);
        let depth = offer.tokens.len();
        let chance = offer.chances.last().copied().unwrap_or(1.0) * track.head.chance(depth, &self.experience).lower();
        // A token is worth what it costs at the best rate that drafting so far promises.
        let rows = sequences.max(1);
        let tokens = rows as f64 + offer.chances.iter().sum::<f64>();
        let spent = self.cost.verify(rows + depth) + depth as f64 * self.cost.draft(1);
        let token_seconds = (spent / tokens).min(self.cost.plain(rows) / rows as f64);
        let price = self.cost.verify(rows + depth + 1) - self.cost.verify(rows + depth) + self.cost.draft(1);
        chance * token_seconds > price
    }

    /// The chances of a sequence's next `room` drafts by the head, before they are made; none where text that was seen
    /// promises as much, for that costs nothing.
    fn chances_of_head(&self, sequence: &Sequence, room: usize) -> Vec<f64> {
        let track = &sequence.track;
        if !track.head.is_known() {
            return Vec::new();
        }
        let mut chance = 1.0;
        let head = (0..room).map(|depth| {
            chance *= track.head.chance(depth, &self.experience).lower();
            chance
        });
        let head: Vec<f64> = head.collect();
        let others = self.corpora.get(sequence.salt());
        let seen = track.suffix_offer(others, &self.experience, self.options.max_depth);
        if seen.chances.iter().sum::<f64>() >= head.iter().sum::<f64>() { Vec::new() } else { head }
    }

    /// Whether not even drafts that are always the likeliest token would pay: it is drawn too seldom, or the head is too dear.
    pub(super) fn is_out_of_question(&self, sequence: &Sequence) -> bool {
        !self.pays_at(sequence.track.head.ceiling().unwrap_or(1.0))
    }

    /// Whether drafting one sequence would pay if every draft were right with this chance.
    fn pays_at(&self, chance: f64) -> bool {
        let depth = MAX_HEAD_DEPTH.min(self.options.max_depth);
        let best = (1..=depth).map(|depth| chance.powi(depth as i32)).collect();
        depths_worth_drafting(&[best], 1, 1, f64::INFINITY, &self.cost) != [0]
    }

    /// Whether drafts of the head pay by what all sequences have shown.
    pub(super) fn is_proven(&self) -> bool {
        if self.experience.head[0].trials() < FEW_TRIALS {
            return false;
        }
        let mut chance = 1.0;
        let chances = (0..MAX_HEAD_DEPTH.min(self.options.max_depth)).map(|depth| {
            chance *= self.experience.head(depth).lower();
            chance
        });
        depths_worth_drafting(&[chances.collect()], 1, 1, f64::INFINITY, &self.cost) != [0]
    }

    /// Whether drafting with the head would not pay even if it were as good as the evidence allows: the sequence's, or that
    /// of all.
    pub(super) fn is_hopeless(&self, sequence: Option<&Sequence>) -> bool {
        let out_of_question = sequence.map_or_else(|| !self.pays_at(1.0), |sequence| self.is_out_of_question(sequence));
        if out_of_question {
            return true;
        }
        let trials = match sequence {
            Some(sequence) => sequence.track.head.trials() - ENOUGH_TRIALS,
            None => self.experience.head[0].trials() - FEW_TRIALS,
        };
        if trials < 0.0 {
            return false;
        }
        let mut chance = 1.0;
        let best = (0..MAX_HEAD_DEPTH.min(self.options.max_depth)).map(|depth| {
            chance *= match sequence {
                Some(sequence) => sequence.track.head.chance(depth, &self.experience).upper(),
                None => self.experience.head(depth).upper(),
            };
            chance
        });
        let best: Vec<f64> = best.collect();
        depths_worth_drafting(&[best], 1, 1, f64::INFINITY, &self.cost) == [0]
    }
}

/// Drafts that cost nothing, with outcomes by a coin: they count as looked up.
fn replayed_offer(replay: &super::replay::Replaying, sequence: &Sequence, depth: usize) -> Offer {
    let mut last = sequence.tokens.last().copied().unwrap_or_default();
    let mut chance = 1.0;
    let mut offer = Offer { source: Some(Source::Suffix), ..Offer::default() };
    for _ in 0..depth {
        last = replay.draft(last);
        offer.tokens.push(last);
        chance *= replay.acceptance();
        offer.chances.push(chance);
    }
    offer
}
