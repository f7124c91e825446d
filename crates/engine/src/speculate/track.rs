//! What speculation knows of one sequence.

use super::estimate::{Counts, Estimate};
use super::follow::FEW_ROWS;
use super::head::Drafted;
use super::suffix::{Follower, Place, SuffixIndex};
use super::{Corpora, Experience, MAX_DEPTH, Source, agreement_class};

/// Tokens that a sequence's own index keeps.
const MAX_INDEXED: usize = 1 << 18;

/// A running sequence shows its text to others in pieces of this many tokens.
const SHARED_PIECE: usize = 64;

/// Tokens before a piece that are shown again, so that it can be found by what stood before.
const OVERLAP: usize = 8;

/// Trials that the experience with other sequences counts as.
const OTHERS: f64 = 6.0;

/// Share of a sequence's evidence that one more trial leaves.
const MEMORY: f64 = 0.97;

/// Drafts that a source offers, and the chance that they are right up to each.
#[derive(Debug, Default)]
pub(crate) struct Offer {
    pub(crate) source: Option<Source>,
    pub(crate) tokens: Vec<u32>,
    /// Of the means, never rising.
    pub(crate) chances: Vec<f64>,
}

impl Offer {
    fn value(&self) -> f64 {
        self.chances.iter().sum()
    }
}

/// Speculation's view of a sequence.
#[derive(Debug, Default)]
pub(crate) struct SequenceTrack {
    /// Drafts that the next step verifies.
    pub(crate) drafts: Vec<u32>,
    pub(crate) source: Option<Source>,
    pub(crate) accepted_drafts: usize,
    own: Option<SuffixIndex>,
    in_own: Follower,
    in_others: Follower,
    /// Tokens that others may see.
    shared: usize,
    /// By agreement: short, middling, long.
    suffix: [Counts; 3],
    pub(crate) head: HeadTrack,
}

/// What the head sees of a sequence: its text from some position on. A head learns most from the newest hidden states, so
/// where rows are missing, or cost more than they are worth, it begins anew instead of computing them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Window {
    /// The position that the head counts as 0.
    pub(crate) first: usize,
    /// The block whose first slot holds that position's row: of the sequence alone unless `first` is 0.
    pub(crate) block: usize,
}

impl Window {
    /// Whether it is the whole text, so that other sequences that begin alike can read its rows.
    pub(crate) fn is_whole(self) -> bool {
        self.first == 0
    }
}

/// A sequence's dealings with the head.
#[derive(Debug, Default)]
pub(crate) struct HeadTrack {
    /// Position of the next row that the head is to get; `None` while it does not follow.
    pub(crate) next_row: Option<usize>,
    /// Steps for which nobody asks whether it should.
    pub(crate) rest: usize,
    /// What it sees while it follows.
    pub(crate) window: Window,
    /// How likely this sequence's most likely tokens were, lately: no draft is right more often.
    certainty: Certainty,
    /// Drafts for the tokens after the newest.
    pub(crate) drafted: Vec<Drafted>,
    counts: Vec<Counts>,
    /// Steps since the last draft.
    pub(crate) idle_steps: usize,
    /// Steps without a draft after which one is made only to see whether it would have been right.
    pub(crate) patience: usize,
}

/// The chance of the likeliest token, averaged over the newest choices. It costs nothing to know and bounds every drafter:
/// a draft is one token, and the sampler takes that token with no more than this probability.
#[derive(Debug, Clone, Copy, Default)]
struct Certainty {
    sum: f64,
    weight: f64,
    greedy: bool,
}

/// Choices after which a certainty is known.
const FEW_CHOICES: f64 = 3.0;

/// What a certainty may be below the truth.
const CERTAINTY_MARGIN: f64 = 0.05;

impl SequenceTrack {
    /// Learns how likely the likeliest token was when one was drawn; 1 where none is drawn.
    pub(crate) fn learn_certainty(&mut self, chance: f32) {
        let certainty = &mut self.head.certainty;
        certainty.greedy = chance >= 1.0 && certainty.greedy_so_far();
        certainty.sum = MEMORY * certainty.sum + f64::from(chance);
        certainty.weight = MEMORY * certainty.weight + 1.0;
    }

    /// Begins with what is known: the tokens of the prompt.
    pub(crate) fn begin(&mut self, tokens: &[u32]) {
        if self.own.is_none() {
            let mut own = SuffixIndex::new(MAX_INDEXED);
            own.extend(tokens);
            self.own = Some(own);
        }
    }

    /// Learns that `token` follows, before it is appended; `text` ends with it.
    pub(crate) fn learn_suffix(&mut self, text: &[u32], others: Option<&SuffixIndex>, experience: &mut Experience) {
        let Some(token) = text.last() else { return };
        if let Some((place, index)) = self.best_place(others) {
            let hit = index.continuation(place, 1) == [*token];
            self.suffix[evidence_class(place.agreement)].record(hit, MEMORY);
            experience.suffix[agreement_class(place.agreement)].record(hit, Experience::MEMORY);
        }
        if let Some(own) = &mut self.own {
            self.in_own.follow(own, text);
            own.extend(&[*token]);
        }
        match others {
            Some(others) => self.in_others.follow(others, text),
            None => self.in_others = Follower::default(),
        }
    }

    /// What the text that was seen says next.
    pub(crate) fn suffix_offer(&self, others: Option<&SuffixIndex>, experience: &Experience, depth: usize) -> Offer {
        let Some((place, index)) = self.best_place(others) else { return Offer::default() };
        let tokens = index.continuation(place, depth).to_vec();
        let mut chance = 1.0;
        // Every right draft is one more token that agrees.
        let chances = (place.agreement..).take(tokens.len()).map(|agreement| {
            let known = experience.suffix(agreement_class(agreement));
            chance *= self.suffix[evidence_class(agreement)].estimate(known.mean, OTHERS).lower();
            chance
        });
        Offer { source: Some(Source::Suffix), chances: chances.collect(), tokens }
    }

    /// What the head has drafted.
    pub(crate) fn head_offer(&self, experience: &Experience, depth: usize) -> Offer {
        let mut chance = 1.0;
        let drafted = &self.head.drafted[..self.head.drafted.len().min(depth)];
        let chances = drafted.iter().enumerate().map(|(depth, drafted)| {
            chance *= self.head.chance_of(depth, *drafted, experience);
            chance
        });
        Offer {
            chances: chances.collect(),
            tokens: drafted.iter().map(|drafted| drafted.token).collect(),
            source: Some(Source::Head),
        }
    }

    /// The better of two offers.
    pub(crate) fn better(a: Offer, b: Offer) -> Offer {
        if b.value() > a.value() { b } else { a }
    }

    /// Lets others see new text, all of it at the end.
    pub(crate) fn share(&mut self, tokens: &[u32], salt: Option<&String>, corpora: &mut Corpora, ended: bool) {
        let new = tokens.len().saturating_sub(self.shared);
        if self.own.is_some() && (new >= SHARED_PIECE || (ended && new > 0)) {
            corpora.add(salt, &tokens[self.shared.saturating_sub(OVERLAP)..]);
            self.shared = tokens.len();
        }
    }

    fn best_place<'a>(&'a self, others: Option<&'a SuffixIndex>) -> Option<(Place, &'a SuffixIndex)> {
        let own = self.own.as_ref().and_then(|own| Some((self.in_own.place()?, own)));
        let others = others.and_then(|others| Some((self.in_others.place()?, others)));
        // A place that was forgotten continues with nothing.
        let alive = |(place, index): &(Place, &SuffixIndex)| !index.continuation(*place, 1).is_empty();
        let (own, others) = (own.filter(alive), others.filter(alive));
        match (own, others) {
            (Some(own), Some(others)) => Some(if others.0.agreement > own.0.agreement { others } else { own }),
            (own, others) => own.or(others),
        }
    }
}

impl Certainty {
    fn greedy_so_far(self) -> bool {
        self.greedy || self.weight == 0.0
    }

    /// The largest chance that a draft can have; `None` while too little is known.
    fn ceiling(self) -> Option<f64> {
        if self.greedy {
            return Some(1.0);
        }
        (self.weight >= FEW_CHOICES).then(|| (self.sum / self.weight + CERTAINTY_MARGIN).min(1.0))
    }
}

impl HeadTrack {
    /// The largest chance that a draft can have; `None` while too little is known.
    pub(crate) fn ceiling(&self) -> Option<f64> {
        self.certainty.ceiling()
    }

    /// Whether it is about to be asked in any case, to see what it would say.
    pub(crate) fn is_soon(&self) -> bool {
        self.idle_steps + FEW_ROWS >= self.patience
    }

    /// Whether enough is known of the text to say that drafts are not out of the question.
    pub(crate) fn is_known(&self) -> bool {
        self.certainty.ceiling().is_some()
    }

    /// The chance of a draft at `depth` (from 0) before it is made, given that those before it are right.
    pub(crate) fn chance(&self, depth: usize, experience: &Experience) -> Estimate {
        let counts = self.counts.get(depth).copied().unwrap_or_default();
        // What is right for greedy texts is what the likeliest token is; here it is drawn with some chance only.
        let ceiling = self.certainty.ceiling().unwrap_or(1.0);
        let estimate = counts.estimate(experience.head(depth).mean * ceiling, OTHERS);
        Estimate { mean: estimate.mean.min(ceiling), ..estimate }
    }

    /// Whether it neither follows nor is thought about in this step.
    pub(crate) fn rests(&mut self) -> bool {
        let rests = self.next_row.is_none() && self.rest > 0;
        self.rest = self.rest.saturating_sub(1);
        rests
    }

    /// Whether its window up to position `end` holds enough to draft from.
    pub(crate) fn sees_enough(&self, end: usize) -> bool {
        self.window.is_whole() || end >= self.window.first + FEW_ROWS
    }

    /// The head stops following: its next context begins anew.
    pub(crate) fn stop(&mut self) {
        self.next_row = None;
    }

    /// The chance of a draft that was made.
    pub(crate) fn chance_of(&self, depth: usize, drafted: Drafted, experience: &Experience) -> f64 {
        let known = self.chance(depth, experience);
        match drafted.confidence {
            None => known.lower(),
            Some(confidence) => {
                // This sequence may be easier or harder than others.
                let ease = known.mean / experience.head(depth).mean.max(0.01);
                (experience.confidence(confidence).mean * ease.clamp(0.3, 1.1)).min(0.995)
            }
        }
    }

    /// Trials of first drafts that still count.
    pub(crate) fn trials(&self) -> f64 {
        self.counts.first().map_or(0.0, Counts::trials)
    }

    /// Compares what was drafted with what came. Calls `outcome` with each depth that is known.
    pub(crate) fn learn(&mut self, came: &[u32], experience: &mut Experience, outcome: &mut dyn FnMut(usize, bool)) {
        for (depth, (drafted, token)) in self.drafted.iter().zip(came).enumerate().take(MAX_DEPTH) {
            let hit = drafted.token == *token;
            if self.counts.len() <= depth {
                self.counts.resize(depth + 1, Counts::default());
            }
            self.counts[depth].record(hit, MEMORY);
            experience.head[depth].record(hit, Experience::MEMORY);
            if let Some(confidence) = drafted.confidence {
                experience.confidence[super::confidence_class(confidence)].record(hit, Experience::MEMORY);
            }
            outcome(depth, hit);
            if !hit {
                break;
            }
        }
        self.drafted.clear();
    }
}

/// Short, middling and long agreement are different things within one text too.
fn evidence_class(agreement: usize) -> usize {
    match agreement {
        0..=5 => 0,
        6..=15 => 1,
        _ => 2,
    }
}
