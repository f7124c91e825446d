//! Speculation on a model whose own text means nothing (random weights): a coin says whether a draft is accepted, and the
//! tokens follow each other in the vocabulary, where a synthetic embedding puts related tokens side by side. Everything
//! else - drafting, verifying, rewinding, the governor - is as always, so that it can be measured. A measuring
//! instrument: it changes what is generated.

use moellon_tensor::rng::SplitMix64;
use std::ops::Range;

/// How outcomes are replayed.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// Chance that a draft is accepted, given that those before it were.
    pub acceptance: f64,
    /// Tokens that the text walks through, over and over.
    pub tokens: Range<u32>,
    /// Seed of the coin.
    pub seed: u64,
}

/// A replay on its way.
#[derive(Debug)]
pub(crate) struct Replaying {
    replay: Replay,
    rng: SplitMix64,
}

impl Replaying {
    pub(crate) fn new(replay: Replay) -> Self {
        let rng = SplitMix64::new(replay.seed);
        Replaying { replay, rng }
    }

    /// Chance that a draft is accepted: known here, where free drafts that are not verified teach nothing.
    pub(crate) fn acceptance(&self) -> f64 {
        self.replay.acceptance
    }

    /// The token that a draft proposes after `previous`.
    pub(crate) fn draft(&self, previous: u32) -> u32 {
        self.after(previous, 1)
    }

    /// The token that comes after `previous`, where `draft` was proposed.
    pub(crate) fn choose(&mut self, previous: u32, draft: Option<u32>) -> u32 {
        match draft {
            Some(draft) if self.rng.next_f64() < self.replay.acceptance => draft,
            // Elsewhere, but as related to what came before.
            Some(_) => self.after(previous, 2),
            None => self.after(previous, 1),
        }
    }

    fn after(&self, token: u32, distance: u32) -> u32 {
        let Range { start, end } = self.replay.tokens;
        start + (token.saturating_sub(start) + distance) % (end - start)
    }
}
