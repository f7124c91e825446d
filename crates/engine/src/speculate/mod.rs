//! Speculation: several tokens are guessed, one step of the model checks them all, and the guesses that it would have made
//! itself are kept. Nothing else changes: every row's logits are those of plain decoding, bit for bit, and each token is
//! chosen from its row by the same sampler with the same random numbers, so a request's output is byte for byte that of
//! plain decoding, greedy or sampled, whatever is drafted.
//!
//! | file | concept |
//! |---|---|
//! | `step.rs` | the engine's part: propose before a step, learn after it, draft with the head |
//! | `follow.rs` | which rows the head gets |
//! | `suffix.rs` | drafts from text that was seen |
//! | `head.rs` | drafts by the MTP layer, an EAGLE-3 head or a smaller model, whose cache rows are kept in step |
//! | `estimate.rs` | how likely drafts are accepted |
//! | `cost.rs` | what a step costs by its rows |
//! | `governor.rs` | which drafts are worth a row, and the floor |
//! | `replay.rs` | outcomes by a coin, for measuring |

pub mod cost;
mod estimate;
mod follow;
mod governor;
mod head;
mod replay;
mod step;
pub mod suffix;
mod track;

pub use cost::CostCurve;
pub use replay::Replay;
pub(crate) use track::SequenceTrack;

use cost::RunningCost;
use estimate::{Counts, Estimate};
use governor::Ledger;
use head::{Head, Network};
use moellon_model::{Decoder, Eagle, Error as ModelError};
use moellon_ops::Backend;
use replay::Replaying;
use std::collections::HashMap;
use suffix::SuffixIndex;

/// Drafts of one step and sequence, at most.
pub const MAX_DEPTH: usize = 32;

/// What drafts and how much.
#[derive(Debug, Clone, PartialEq)]
pub struct SpeculationOptions {
    /// Whether text that was seen is looked up.
    pub suffix: bool,
    /// Whether the model's own MTP layer drafts, if it has one.
    pub mtp: bool,
    /// Who decides.
    pub policy: Policy,
    /// Drafts of one step and sequence, at most [`MAX_DEPTH`].
    pub max_depth: usize,
    /// What steps cost; measured at the start if `None`.
    pub cost: Option<CostCurve>,
    /// For measuring with random weights.
    pub replay: Option<Replay>,
}

impl Default for SpeculationOptions {
    fn default() -> Self {
        SpeculationOptions {
            suffix: true,
            mtp: true,
            policy: Policy::Governed,
            max_depth: MAX_DEPTH,
            cost: None,
            replay: None,
        }
    }
}

/// Who decides how much is drafted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The governor: only what pays.
    Governed,
    /// As much as there is, up to the depth: for tests and experiments.
    Always,
}

/// A network of its own that drafts for a model.
pub enum Drafter {
    /// A smaller model with the same tokens.
    Model(Box<Decoder>),
    /// An EAGLE-3 head that was trained for the model.
    Eagle(Box<Eagle>),
}

/// Where a draft came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Text that was seen.
    Suffix,
    /// The MTP layer or the draft model.
    Head,
}

/// What one source of drafts did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SourceStats {
    /// Steps of sequences that verified its drafts.
    pub drafts: u64,
    /// Tokens verified.
    pub draft_tokens: u64,
    /// Tokens accepted.
    pub accepted_tokens: u64,
}

/// Speculation's state, for metrics and people.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SpeculationStats {
    /// Lookups of text that was seen.
    pub suffix: SourceStats,
    /// The MTP layer or the draft model.
    pub head: SourceStats,
    /// Drafts of the head whose outcome is known, by depth, and how many of them were right: drafts that were not worth a
    /// row count too, for text showed what they were worth.
    pub head_by_depth: Vec<(u64, u64)>,
    /// Rows that the head has computed, those of drafts included.
    pub head_rows: u64,
    /// Chance that a first draft of the head is right, as the governor sees it now.
    pub head_chance: f64,
    /// Steps of sequences, with drafts or without.
    pub sequence_steps: u64,
    /// Seconds spent drafting and keeping the head's cache in step.
    pub draft_seconds: f64,
    /// Seconds saved, by the governor's reckoning; below 0 lost.
    pub saved_seconds: f64,
    /// The cost curve: rows and seconds of a step.
    pub step_cost: Vec<(usize, f64)>,
    /// Rows and seconds of a drafting step.
    pub draft_cost: Vec<(usize, f64)>,
}

impl SpeculationStats {
    /// Both sources together.
    pub fn all(&self) -> SourceStats {
        SourceStats {
            drafts: self.suffix.drafts + self.head.drafts,
            draft_tokens: self.suffix.draft_tokens + self.head.draft_tokens,
            accepted_tokens: self.suffix.accepted_tokens + self.head.accepted_tokens,
        }
    }
}

/// Lengths of agreement that are told apart: up to each of these, and above.
const AGREEMENTS: [usize; 8] = [3, 4, 6, 8, 12, 16, 24, 32];

/// What is believed of each before anything was seen.
const AGREEMENT_PRIORS: [f64; 9] = [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95];

/// Classes of a draft's own probability.
const CONFIDENCES: [f64; 6] = [0.3, 0.5, 0.7, 0.85, 0.95, 0.99];

const CONFIDENCE_PRIORS: [f64; 7] = [0.2, 0.4, 0.6, 0.75, 0.88, 0.95, 0.98];

/// A head's first drafts before anything was seen, and how many trials that counts as.
const HEAD_PRIOR: (f64, f64) = (0.65, 6.0);

fn agreement_class(agreement: usize) -> usize {
    AGREEMENTS.iter().position(|limit| agreement <= *limit).unwrap_or(AGREEMENTS.len())
}

fn confidence_class(confidence: f64) -> usize {
    CONFIDENCES.iter().position(|limit| confidence <= *limit).unwrap_or(CONFIDENCES.len())
}

/// What all sequences together have shown.
#[derive(Debug, Default)]
pub(crate) struct Experience {
    /// By class of agreement.
    suffix: [Counts; 9],
    /// By depth.
    head: [Counts; MAX_DEPTH],
    /// By class of the draft's own probability, where it is known.
    confidence: [Counts; 7],
}

impl Experience {
    const MEMORY: f64 = 0.995;

    fn suffix(&self, class: usize) -> Estimate {
        self.suffix[class].estimate(AGREEMENT_PRIORS[class], 4.0)
    }

    /// The chance of a draft at `depth` (from 0), given that those before it are right.
    fn head(&self, depth: usize) -> Estimate {
        // What is not known of deeper drafts is a little less than what is known of the one before.
        let mut prior = HEAD_PRIOR.0;
        for counts in &self.head[..depth] {
            prior = 0.95 * counts.estimate(prior, HEAD_PRIOR.1).mean;
        }
        self.head[depth].estimate(prior, HEAD_PRIOR.1)
    }

    fn confidence(&self, confidence: f64) -> Estimate {
        let class = confidence_class(confidence);
        self.confidence[class].estimate(CONFIDENCE_PRIORS[class], 4.0)
    }
}

/// Texts of other sequences, apart by salt.
#[derive(Debug)]
pub(crate) struct Corpora {
    indexes: HashMap<Option<String>, (u64, SuffixIndex)>,
    clock: u64,
}

impl Corpora {
    /// Tokens kept of one salt.
    const MAX_TOKENS: usize = 1 << 18;
    /// Salts; the least recently used one is forgotten for another.
    const MAX_SALTS: usize = 8;

    fn new() -> Self {
        Corpora { indexes: HashMap::new(), clock: 0 }
    }

    fn get(&self, salt: Option<&String>) -> Option<&SuffixIndex> {
        // A clone only where there is a salt to clone.
        self.indexes.get(&salt.cloned()).map(|(_, index)| index)
    }

    fn add(&mut self, salt: Option<&String>, tokens: &[u32]) {
        self.clock += 1;
        if !self.indexes.contains_key(&salt.cloned()) && self.indexes.len() == Self::MAX_SALTS {
            let oldest = self.indexes.iter().min_by_key(|(_, (used, _))| *used).map(|(salt, _)| salt.clone());
            oldest.map(|oldest| self.indexes.remove(&oldest));
        }
        let new = || (0, SuffixIndex::new(Self::MAX_TOKENS));
        let (used, index) = self.indexes.entry(salt.cloned()).or_insert_with(new);
        *used = self.clock;
        index.separate();
        index.extend(tokens);
    }
}

/// The engine's speculation.
pub(crate) struct Speculation {
    options: SpeculationOptions,
    /// Whether anything is drafted at all: switched off for comparing.
    enabled: bool,
    head: Option<Head>,
    cost: RunningCost,
    experience: Experience,
    ledger: Ledger,
    corpora: Corpora,
    replay: Option<Replaying>,
    stats: SpeculationStats,
    /// Seconds spent drafting since the last step was settled.
    drafting: f64,
    /// What that should have taken.
    expected_drafting: f64,
    /// Drafts accepted since then.
    accepted: usize,
}

impl Speculation {
    /// Measures what has to be measured.
    pub(crate) fn new(
        options: SpeculationOptions,
        decoder: &mut Decoder,
        drafter: Option<Drafter>,
        backend: &mut dyn Backend,
    ) -> Result<Self, ModelError> {
        let network = match (drafter, options.mtp && decoder.has_mtp()) {
            (Some(Drafter::Model(model)), _) => Some(Network::Model(model)),
            (Some(Drafter::Eagle(eagle)), _) => Some(Network::Eagle(eagle)),
            (None, true) => Some(Network::Mtp),
            (None, false) => None,
        };
        let mut head = network.map(|network| Head::new(network, decoder, backend)).transpose()?;
        let curve = match &options.cost {
            Some(curve) => curve.clone(),
            None => CostCurve::measure(decoder, head.as_mut(), backend)?,
        };
        Ok(Speculation {
            enabled: true,
            head,
            cost: RunningCost::new(curve),
            experience: Experience::default(),
            ledger: Ledger::default(),
            corpora: Corpora::new(),
            replay: options.replay.clone().map(Replaying::new),
            stats: SpeculationStats { head_by_depth: vec![(0, 0); MAX_DEPTH], ..SpeculationStats::default() },
            drafting: 0.0,
            expected_drafting: 0.0,
            accepted: 0,
            options,
        })
    }

    pub(crate) fn stats(&self) -> SpeculationStats {
        let depths = self.stats.head_by_depth.iter().take_while(|(trials, _)| *trials > 0).count();
        SpeculationStats {
            head_by_depth: self.stats.head_by_depth[..depths].to_vec(),
            head_chance: if self.head.is_some() { self.experience.head(0).mean } else { 0.0 },
            saved_seconds: self.ledger.saved(),
            step_cost: self.cost.curve().steps().to_vec(),
            draft_cost: self.cost.curve().drafts().to_vec(),
            ..self.stats.clone()
        }
    }

    pub(crate) fn curve(&self) -> &CostCurve {
        self.cost.curve()
    }

    pub(crate) fn set_replay(&mut self, replay: Replay) {
        self.cost = RunningCost::new(self.cost.curve().clone());
        self.experience = Experience::default();
        self.ledger = Ledger::default();
        self.replay = Some(Replaying::new(replay));
    }

    pub(crate) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// A block that is handed out anew holds nothing of the head's.
    pub(crate) fn forget_block(&mut self, block: u32) {
        if let Some(head) = &mut self.head {
            head.set_filled(block, 0);
        }
    }

    /// A block was copied as far as `num_slots`.
    pub(crate) fn copied_block(&mut self, from: u32, to: u32, num_slots: usize) {
        if let Some(head) = &mut self.head {
            head.set_filled(to, head.filled(from).min(num_slots));
        }
    }

    /// A block came from disk, with all its rows if the head follows all.
    pub(crate) fn restored_block(&mut self, block: u32, block_size: usize) {
        if !self.follows_all() {
            return;
        }
        if let Some(head) = &mut self.head {
            head.set_filled(block, block_size);
        }
    }

    /// All blocks are free.
    pub(crate) fn restart(&mut self) {
        if let Some(head) = &mut self.head {
            head.restart();
        }
    }

    /// The chosen token where outcomes are replayed.
    pub(crate) fn replayed(&mut self, previous: u32, draft: Option<u32>) -> Option<u32> {
        self.replay.as_mut().map(|replay| replay.choose(previous, draft))
    }

    /// Caches that belong to a draft model, to be copied with the model's own.
    pub(crate) fn draft_caches(&self) -> Vec<moellon_ops::Cache> {
        self.head.as_ref().map_or_else(Vec::new, Head::caches)
    }

    /// Whether cached rows on disk have the head's rows beside them.
    pub(crate) fn has_head(&self) -> bool {
        self.head.is_some()
    }
}
