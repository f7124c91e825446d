//! The engine's part in speculation: propose drafts before a step, learn from it, and run the head after it.

use super::governor::{depths_worth_drafting, drafts_worth_verifying};
use super::head::{Drafted, HeadKind, Tables, Tip};
use super::track::Offer;
use super::{CostCurve, Policy, SequenceTrack, Source, Speculation};
use crate::engine::{Engine, EngineError};
use crate::scheduler::Share;
use crate::sequence::Sequence;
use std::time::Instant;

/// Drafts of a head in a row: each is a guess on guesses.
const MAX_HEAD_DEPTH: usize = 8;

/// Rows that may wait for the head while nothing is drafted.
const MANY_WAITING: usize = 64;

/// Steps without a draft after which a head is tried again, at first and at most.
const PATIENCE: (usize, usize) = (16, 256);

/// Trials of an engine that has hardly seen its head draft.
const FEW_TRIALS: f64 = 16.0;

/// Trials after which a sequence's evidence against the head counts.
const ENOUGH_TRIALS: f64 = 6.0;

/// Where the head does not pay, one sequence of this many tries it again.
const EXPLORERS: u64 = 8;

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
                let counts = drafts_worth_verifying(&chances, rows, spare, &speculation.cost);
                let added: usize = counts.iter().sum();
                let (plain, verify) = (speculation.cost.plain(rows), speculation.cost.verify(rows + added));
                if speculation.ledger.allows(verify - plain, plain) { counts } else { vec![0; offers.len()] }
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
        let depths = self.head_depths(ended);
        self.draft(&depths)?;
        // What ends now leaves its blocks to others: with all rows.
        let leaves_rows = |engine: &Self| {
            let head = engine.speculation.as_ref().and_then(|s| s.head.as_ref());
            head.is_some_and(|head| ended.iter().any(|index| head.waits_for(engine.running[*index].number)))
        };
        if leaves_rows(self) {
            self.head_catches_up(&[])?;
        }
        if let Some(speculation) = &mut self.speculation {
            speculation.drafting += started.elapsed().as_secs_f64();
        }
        Ok(())
    }

    /// Runs the rows that wait, before blocks change hands.
    pub(crate) fn settle_head(&mut self) -> Result<(), EngineError> {
        let waiting = self.speculation.as_ref().and_then(|s| s.head.as_ref()).is_some_and(|h| h.num_waiting() > 0);
        if waiting { self.head_catches_up(&[]).map(|_| ()) } else { Ok(()) }
    }

    /// Says whether the head can follow a sequence that begins with `computed` cached tokens.
    pub(crate) fn begin_head(&mut self, sequence: &mut Sequence) {
        let Some(speculation) = &mut self.speculation else { return };
        let Some(head) = &speculation.head else { return };
        let covered = head.covers(&sequence.blocks, sequence.computed);
        let governed = speculation.options.policy == Policy::Governed;
        let hopeless = governed && speculation.is_hopeless(None) && !sequence.number.is_multiple_of(EXPLORERS);
        sequence.track.head.next_row = (speculation.enabled && covered && !hopeless).then_some(sequence.computed);
        sequence.track.head.patience = PATIENCE.0;
        sequence.track.head.drafted.clear();
    }

    /// A running sequence took cached blocks of others.
    pub(crate) fn move_head(&mut self, index: usize) {
        let Some(Speculation { head: Some(head), .. }) = &self.speculation else { return };
        let sequence = &mut self.running[index];
        let next_row = &mut sequence.track.head.next_row;
        *next_row = next_row.filter(|_| head.covers(&sequence.blocks, sequence.computed)).map(|_| sequence.computed);
    }

    /// The rows that the head gets of a share whose first row is `row` of the step.
    fn hand_to_head(&mut self, index: usize, row: usize, computed: usize) -> Result<(), EngineError> {
        let Some(Speculation { head: Some(head), enabled, replay, .. }) = &mut self.speculation else { return Ok(()) };
        let sequence = &mut self.running[index];
        let Some(mut first) = sequence.track.head.next_row else { return Ok(()) };
        if replay.is_some() {
            // What rows hold is of no consequence, so none are lost while drafting is switched off.
            if !*enabled {
                return Ok(());
            }
            first = sequence.computed;
        }
        let kind = head.kind();
        // The positions that the step computed are `start .. end`; a token after them is known.
        let (start, end) = (sequence.computed, sequence.computed + computed);
        let last = match kind {
            HeadKind::Mtp => end,
            HeadKind::Model => end + 1,
        };
        // Rows are lost while drafting is switched off, and with them the rest.
        let follows = *enabled && (kind == HeadKind::Model || first == start) && last <= sequence.tokens.len();
        if !follows {
            sequence.track.head.next_row = None;
            return Ok(());
        }
        let next_of = |position: usize| match kind {
            HeadKind::Mtp => position + 1,
            HeadKind::Model => position,
        };
        let mut position = first;
        while position < last {
            let Some(Speculation { head: Some(head), .. }) = &mut self.speculation else { return Ok(()) };
            let sequence = &self.running[index];
            let room = head.max_waiting() - head.num_waiting();
            let slots = (sequence.blocks.len() * self.limits.block_size).saturating_sub(position);
            let count = (last - position).min(room).min(slots);
            if slots == 0 {
                // The draft model's newest row begins a block. Without one it comes with the next step.
                let Some(block) = self.alloc_free() else { break };
                self.running[index].blocks.push(block);
                continue;
            }
            if count == 0 {
                self.head_catches_up(&[])?;
                continue;
            }
            let tokens = sequence.tokens[next_of(position)..next_of(position) + count].to_vec();
            let first_hidden = (row + position).saturating_sub(start) as u32;
            head.wait_for(
                sequence.number,
                position,
                &tokens,
                first_hidden..first_hidden + count as u32,
                &mut self.decoder,
                self.backend.as_mut(),
            )?;
            position += count;
        }
        self.running[index].track.head.next_row = Some(position);
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
        let rooms: Vec<usize> = may_draft
            .iter()
            .map(|index| {
                let sequence = &self.running[*index];
                let due = sequence.tokens.len() - usize::from(kind == HeadKind::Mtp);
                let ready = sequence.track.head.next_row == Some(due) && sequence.track.head.drafted.is_empty();
                if ready { sequence.room_for_drafts().min(max_depth) } else { 0 }
            })
            .collect();
        if speculation.options.policy == Policy::Always {
            may_draft.iter().zip(rooms).for_each(|(index, room)| depths[*index] = room);
            return depths;
        }
        let others = &speculation.corpora;
        let chances: Vec<Vec<f64>> = may_draft
            .iter()
            .zip(&rooms)
            .map(|(index, room)| {
                let sequence = &self.running[*index];
                let track = &sequence.track;
                let mut chance = 1.0;
                let head = (0..*room).map(|depth| {
                    chance *= track.head.chance(depth, &speculation.experience).lower();
                    chance
                });
                let head: Vec<f64> = head.collect();
                // Text that was seen costs nothing: where it promises as much, the head is not asked.
                let others = others.get(sequence.salt());
                let seen = track.suffix_offer(others, &speculation.experience, speculation.options.max_depth);
                if seen.chances.iter().sum::<f64>() >= head.iter().sum::<f64>() { Vec::new() } else { head }
            })
            .collect();
        let worth = depths_worth_drafting(&chances, may_draft.len(), usize::MAX, &speculation.cost);
        let rows = may_draft.len();
        let plain = speculation.cost.plain(rows);
        let total: usize = worth.iter().sum();
        let worst = speculation.cost.verify(rows + total) - plain
            + worth.iter().max().map_or(0.0, |depth| *depth as f64 * speculation.cost.draft(rows));
        let allowed = total > 0 && speculation.ledger.allows(worst, plain);
        for (place, index) in may_draft.iter().enumerate() {
            let drafts = if allowed { worth[place] } else { 0 };
            let track = &mut self.running[*index].track.head;
            if drafts > 0 {
                (track.idle_steps, track.patience) = (0, PATIENCE.0);
                depths[*index] = drafts;
                continue;
            }
            track.idle_steps += 1;
            if rooms[place] == 0 {
                continue;
            }
            // To see what it would have said: often while nothing is known, then ever more seldom.
            let unknown = speculation.experience.head[0].trials() < FEW_TRIALS;
            let due = track.idle_steps >= if unknown { 1 } else { track.patience };
            let price = speculation.cost.draft(speculation.head.as_ref().map_or(1, |h| h.num_waiting().max(1)));
            if due && speculation.ledger.allows(price, plain) {
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
        let Some(speculation) = &mut self.speculation else { return Ok(()) };
        let Some(head) = &speculation.head else { return Ok(()) };
        if deepest == 0 {
            let waiting = head.num_waiting();
            if waiting < MANY_WAITING.min(head.max_waiting()) {
                return Ok(());
            }
            let plain = speculation.cost.plain(self.running.len().max(1));
            let decodes = waiting < 2 * MANY_WAITING;
            if speculation.options.policy == Policy::Governed
                && decodes
                && (speculation.is_hopeless_for_all(&self.running)
                    || !speculation.ledger.allows(speculation.cost.draft(waiting), plain))
            {
                return self.give_up_waiting();
            }
            return self.head_catches_up(&[]).map(|_| ());
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

    fn head_catches_up(&mut self, wanted: &[u64]) -> Result<Vec<Tip>, EngineError> {
        let Some(Speculation { head: Some(head), cost, expected_drafting, .. }) = &mut self.speculation else {
            return Ok(Vec::new());
        };
        let rows = head.num_waiting();
        *expected_drafting += cost.draft(rows);
        let started = Instant::now();
        let tables: Tables<'_> = self.running.iter().map(|s| (s.number, s.blocks.as_slice())).collect();
        let tips = head.catch_up(wanted, &tables, &mut self.decoder, self.backend.as_mut())?;
        if !wanted.is_empty() && rows <= 2 * wanted.len() {
            cost.observe_draft(rows, started.elapsed().as_secs_f64());
        }
        Ok(tips)
    }

    fn head_goes_on(&mut self, tips: &[Tip]) -> Result<Vec<Tip>, EngineError> {
        let Some(Speculation { head: Some(head), cost, expected_drafting, .. }) = &mut self.speculation else {
            return Ok(Vec::new());
        };
        *expected_drafting += cost.draft(tips.len());
        let started = Instant::now();
        let tables: Tables<'_> = self.running.iter().map(|s| (s.number, s.blocks.as_slice())).collect();
        let next = head.chain(tips, &tables, &mut self.decoder, self.backend.as_mut())?;
        cost.observe_draft(tips.len(), started.elapsed().as_secs_f64());
        Ok(next)
    }

    /// Forgets the rows that wait: the sequences that they belong to go on without the head.
    fn give_up_waiting(&mut self) -> Result<(), EngineError> {
        let Some(Speculation { head: Some(head), .. }) = &mut self.speculation else { return Ok(()) };
        for sequence in self.running.iter_mut().filter(|s| head.waits_for(s.number)) {
            sequence.track.head.next_row = None;
        }
        head.drop_waiting();
        Ok(())
    }

    /// Counts a step: what it would have taken without speculation, and what it took.
    pub(crate) fn settle(
        &mut self,
        decodes: usize,
        drafts: usize,
        prefill_rows: usize,
        generated: usize,
        seconds: f64,
    ) {
        let Some(speculation) = &mut self.speculation else { return };
        let drafting = std::mem::take(&mut speculation.drafting);
        let expected_drafting = std::mem::take(&mut speculation.expected_drafting);
        speculation.stats.draft_seconds += drafting;
        speculation.stats.sequence_steps += decodes as u64;
        if decodes == 0 || prefill_rows > 0 {
            return;
        }
        let Speculation { cost, ledger, .. } = speculation;
        if drafts > 0 {
            cost.observe_verify(decodes + drafts, seconds - drafting);
        } else {
            cost.observe_plain(decodes, seconds - drafting);
        }
        // By what steps take on average: what else slowed this one down is not speculation's doing.
        let plain = cost.plain(decodes);
        if drafts == 0 {
            ledger.settle(plain, plain + expected_drafting, plain);
        } else {
            let took = cost.verify(decodes + drafts) + expected_drafting;
            ledger.settle(plain * generated as f64 / decodes as f64, took, plain);
        }
    }
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

    /// Whether drafting with the head would not pay even if it were as good as the evidence allows: the sequence's, or that
    /// of all.
    fn is_hopeless(&self, sequence: Option<&Sequence>) -> bool {
        let trials = match sequence {
            Some(sequence) => sequence.track.head.trials() - ENOUGH_TRIALS,
            None => self.experience.head[0].trials() - 2.0 * FEW_TRIALS,
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
        depths_worth_drafting(&[best], 1, usize::MAX, &self.cost) == [0]
    }

    fn is_hopeless_for_all(&self, running: &[Sequence]) -> bool {
        running.iter().filter(|s| s.track.head.next_row.is_some()).all(|s| self.is_hopeless(Some(s)))
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
