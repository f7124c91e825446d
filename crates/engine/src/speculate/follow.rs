//! Which rows of a sequence the head gets.
//!
//! A head follows only from where drafting may pay: the last rows of a prompt, or the newest rows of a running text. An MTP layer
//! or an EAGLE-3 head reads the model's own hidden states, which say most of what it needs. A draft model sees nothing else, so
//! it reads whole prompts once its drafts have proved worth their time. Rows that a head would have to compute and nobody would
//! draft from are never computed, and a head that does not follow costs nothing at all. ([`Policy::Always`], for experiments,
//! follows everything.)

use super::head::HeadKind;
use super::step::PATIENCE;
use super::track::Window;
use super::{Policy, Speculation};
use crate::engine::{Engine, EngineError};
use crate::kv_pool::BlockId;
use crate::sequence::Sequence;

/// Rows of a prompt that a head begins with, at most, and those that it gets whatever they cost: with a handful the bundled
/// model's MTP layer is right half as often as with all rows, with some dozens as often.
const WINDOW: (usize, usize) = (64, 16);

/// Rows that a head must see before it is asked.
pub(super) const FEW_ROWS: usize = 16;

/// Rows of a sequence that wait while nothing is drafted; with more of them it is better to begin anew.
const MANY_WAITING: usize = 64;

/// Steps for which a head that is not to follow is not thought about again: thinking takes 5 us, which on the bundled model is
/// 1 % of a step.
const REST: usize = 8;

impl Engine {
    /// Says whether the head can follow a sequence that begins with `computed` cached tokens.
    pub(crate) fn begin_head(&mut self, sequence: &mut Sequence) {
        let Some(speculation) = &mut self.speculation else { return };
        let Some(head) = &speculation.head else { return };
        let covered = head.covers(&sequence.blocks, sequence.computed);
        let short = sequence.tokens.len() - sequence.computed <= speculation.window_rows();
        let reads_prompts = head.kind() == HeadKind::Model && speculation.is_proven();
        let begins_whole = reads_prompts || (short && !speculation.is_hopeless(None));
        let whole = covered && (speculation.follows_all() || begins_whole);
        sequence.track.head.window = Window::default();
        sequence.track.head.next_row = (speculation.enabled && whole).then_some(sequence.computed);
        sequence.track.head.patience = PATIENCE.0;
        sequence.track.head.drafted.clear();
    }

    /// A running sequence took cached blocks of others.
    pub(crate) fn move_head(&mut self, index: usize) {
        let Some(Speculation { head: Some(head), .. }) = &mut self.speculation else { return };
        let sequence = &mut self.running[index];
        let track = &mut sequence.track.head;
        let covered = track.window.is_whole() && head.covers(&sequence.blocks, sequence.computed);
        track.next_row = track.next_row.filter(|_| covered).map(|_| sequence.computed);
        if track.next_row.is_none() {
            head.drop_waiting_of(sequence.number);
        }
    }

    /// Full blocks of a running sequence were exchanged for equal ones of others, whose rows of the head may be missing or
    /// counted from elsewhere.
    pub(crate) fn exchanged_blocks(&mut self, index: usize, blocks: &[BlockId]) {
        let Some(Speculation { head: Some(head), .. }) = &mut self.speculation else { return };
        let sequence = &mut self.running[index];
        let whole = sequence.track.head.window.is_whole();
        if !whole || blocks.iter().any(|block| head.filled(*block) < self.limits.block_size) {
            sequence.track.head.stop();
            head.drop_waiting_of(sequence.number);
        }
    }

    /// Runs the rows that wait, before blocks change hands.
    pub(crate) fn settle_head(&mut self) -> Result<(), EngineError> {
        let Some(speculation) = &self.speculation else { return Ok(()) };
        let waiting = speculation.head.as_ref().is_some_and(|head| head.num_waiting() > 0);
        if waiting && speculation.follows_all() { self.head_catches_up(&[]).map(|_| ()) } else { Ok(()) }
    }

    /// What ends now leaves its blocks to others: with all rows, if the head follows all.
    pub(super) fn leave_rows(&mut self, ended: &[usize]) -> Result<(), EngineError> {
        let Some(speculation) = &mut self.speculation else { return Ok(()) };
        let follows_all = speculation.follows_all();
        let Some(head) = &mut speculation.head else { return Ok(()) };
        let mut any = false;
        for index in ended {
            let number = self.running[*index].number;
            if follows_all {
                any |= head.waits_for(number);
            } else {
                head.drop_waiting_of(number);
            }
        }
        if any { self.head_catches_up(&[]).map(|_| ()) } else { Ok(()) }
    }

    /// Nothing is drafted: rows wait, until there are so many that it is better to begin anew.
    pub(super) fn let_rows_wait(&mut self) -> Result<(), EngineError> {
        let Some(speculation) = &mut self.speculation else { return Ok(()) };
        let follows_all = speculation.follows_all();
        let Some(head) = &mut speculation.head else { return Ok(()) };
        let following = self.running.iter().filter(|s| head.waits_for(s.number)).count();
        if head.num_waiting() < (MANY_WAITING * following.max(1)).min(head.max_waiting()) {
            return Ok(());
        }
        if follows_all {
            return self.head_catches_up(&[]).map(|_| ());
        }
        for sequence in self.running.iter_mut().filter(|s| head.waits_for(s.number)) {
            sequence.track.head.stop();
        }
        head.drop_waiting();
        Ok(())
    }

    /// The rows that the head gets of a share whose first row is `row` of the step.
    pub(super) fn hand_to_head(&mut self, index: usize, row: usize, computed: usize) -> Result<(), EngineError> {
        let Some(speculation) = &mut self.speculation else { return Ok(()) };
        let Some(kind) = speculation.head.as_ref().map(super::head::Head::kind) else { return Ok(()) };
        if self.running[index].track.head.rests() {
            return Ok(());
        }
        // The positions that the step computed are `start .. end`; a token after them is known.
        let start = self.running[index].computed;
        let end = start + computed;
        let last = match kind {
            HeadKind::Hidden => end,
            HeadKind::Model => end + 1,
        };
        let first = match (kind, self.running[index].track.head.next_row) {
            (HeadKind::Model, Some(first)) if speculation.enabled => Some(first),
            (HeadKind::Hidden, Some(first)) if speculation.enabled && first == start => Some(first),
            _ => None,
        };
        let first = match first {
            Some(first) if last <= self.running[index].tokens.len() => first,
            _ => {
                let sequence = &mut self.running[index];
                sequence.track.head.stop();
                if let Some(head) = &mut speculation.head {
                    head.drop_waiting_of(sequence.number);
                }
                match self.begin_window(index, start, end) {
                    Some(first) => first,
                    None => return Ok(()),
                }
            }
        };
        self.wait_for_rows(index, kind, first..last, start, row)
    }

    /// Begins a new window with the newest rows of a step that computed `start .. end`, if drafting may pay; its first row.
    fn begin_window(&mut self, index: usize, start: usize, end: usize) -> Option<usize> {
        let speculation = self.speculation.as_mut()?;
        let sequence = &self.running[index];
        let decodes = sequence.generated() > 0 && sequence.tokens.len() == end + 1;
        if !speculation.enabled || !decodes {
            return None;
        }
        if !speculation.wants_to_follow(sequence) {
            self.running[index].track.head.rest = REST;
            return None;
        }
        let rows = if speculation.options.policy == Policy::Always { end } else { speculation.window_rows() };
        let first = start.max(end.saturating_sub(rows));
        let block = if first == 0 { 0 } else { first / self.limits.block_size };
        if let Some(head) = speculation.head.as_mut().filter(|_| first > 0) {
            // Rows that are counted from elsewhere are no use to others.
            sequence.blocks[block..].iter().for_each(|block| head.set_filled(*block, 0));
        }
        self.running[index].track.head.window = Window { first, block };
        Some(first)
    }

    /// Hands over rows at positions `rows` of a sequence, whose step computed positions from `start` on in its rows from
    /// `row` on.
    fn wait_for_rows(
        &mut self,
        index: usize,
        kind: HeadKind,
        rows: std::ops::Range<usize>,
        start: usize,
        row: usize,
    ) -> Result<(), EngineError> {
        let next_of = |position: usize| match kind {
            HeadKind::Hidden => position + 1,
            HeadKind::Model => position,
        };
        let mut position = rows.start;
        while position < rows.end {
            let Some(Speculation { head: Some(head), .. }) = &mut self.speculation else { return Ok(()) };
            let sequence = &self.running[index];
            let room = head.max_waiting() - head.num_waiting();
            let slots = (sequence.blocks.len() * self.limits.block_size).saturating_sub(position);
            let count = (rows.end - position).min(room).min(slots);
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
                position - sequence.track.head.window.first,
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
}

impl Speculation {
    /// Whether a smaller model drafts that reads whole prompts.
    pub(super) fn reads_prompts(&self) -> bool {
        let is_model = self.head.as_ref().is_some_and(|head| head.kind() == HeadKind::Model);
        is_model && (self.follows_all() || self.is_proven())
    }

    /// Whether the head gets every row of every text.
    pub(super) fn follows_all(&self) -> bool {
        self.options.policy == Policy::Always
    }

    /// Rows of a prompt that a head begins with: as many as cost no more than a plain step.
    pub(super) fn window_rows(&self) -> usize {
        let (most, least) = WINDOW;
        let plain = self.cost.plain(1);
        let affordable = (least..=most).rev().find(|rows| self.cost.draft(*rows) <= plain);
        affordable.unwrap_or(least)
    }

    /// Whether the head is to follow a sequence from now on.
    fn wants_to_follow(&self, sequence: &Sequence) -> bool {
        if self.options.policy == Policy::Always {
            return true;
        }
        let plain = self.cost.plain(1);
        let hopeful = !self.is_hopeless(Some(sequence)) && !self.is_hopeless(None);
        let soon = sequence.track.head.is_soon() && !self.is_out_of_question(sequence);
        (soon || hopeful) && self.ledger.allows(self.cost.draft(self.window_rows()), plain)
    }
}
