//! One request on its way: its tokens, its blocks, and what decides its next token.

use crate::events::EventSender;
use crate::kv_pool::{BlockId, KvPool};
use crate::prefix_cache::{BlockHash, Cursor, PrefixCache};
use crate::request::{
    CacheMiss, Event, FinishReason, Finished, PromptScore, Request, RequestError, SampledToken, Started,
};
use crate::sampler::{PickError, Sampler, log_probabilities};
use crate::scheduler::Demand;
use crate::speculate::SequenceTrack;
use crate::thinking::ThinkingState;
use moellon_ops::Draw;
use moellon_text::constraint::{Constraint, TokenMask};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Counts a request as waiting until it is dropped.
#[derive(Debug)]
pub(crate) struct QueueTicket(Arc<AtomicUsize>);

impl QueueTicket {
    pub(crate) fn new(waiting: &Arc<AtomicUsize>) -> Self {
        waiting.fetch_add(1, Ordering::Relaxed);
        QueueTicket(Arc::clone(waiting))
    }
}

impl Drop for QueueTicket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Blocks that come from disk while a request waits.
#[derive(Debug)]
pub(crate) enum Restore {
    /// Nobody has looked.
    Untried,
    /// Rows of one block after the other.
    Reading(Receiver<Vec<u8>>),
    /// All that could be read is there.
    Done,
}

/// Blocks that became findable.
#[derive(Debug, Default)]
pub(crate) struct Published {
    /// Places in the block table of those that the tree did not have, with their names.
    pub(crate) new_blocks: Vec<(usize, BlockHash)>,
    /// Equal blocks of others that the sequence now holds instead of its own.
    pub(crate) exchanged: Vec<BlockId>,
}

/// A request, waiting or running.
pub(crate) struct Sequence {
    pub(crate) id: String,
    /// Unlike any other sequence's of the process.
    pub(crate) number: u64,
    /// What speculation knows of it.
    pub(crate) track: SequenceTrack,
    /// Prompt and output.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_tokens: usize,
    /// Tokens whose rows are cached.
    pub(crate) computed: usize,
    /// Block table: enough for `computed`, mostly for more.
    pub(crate) blocks: Vec<BlockId>,
    /// Full blocks that the prefix cache knows, from the first on.
    pub(crate) published: usize,
    pub(crate) cursor: Cursor,
    /// Of the prompt, when it started.
    pub(crate) cached_tokens: usize,
    pub(crate) miss: Option<CacheMiss>,
    pub(crate) started: Option<Instant>,
    pub(crate) preemptions: usize,
    pub(crate) prompt_logprobs: Option<Vec<Option<PromptScore>>>,
    pub(crate) events: EventSender,
    pub(crate) ticket: Option<QueueTicket>,
    pub(crate) restore: Restore,
    /// Masks computed since the engine asked last, and their time.
    masks: (u64, Duration),
    salt: Option<String>,
    sampler: Sampler,
    max_tokens: usize,
    min_tokens: usize,
    /// Tokens of a whole sequence.
    max_context: usize,
    stop_token_ids: Vec<u32>,
    logprobs: Option<usize>,
    constraint: Option<Box<dyn Constraint>>,
    thinking: Option<ThinkingState>,
    submitted: Instant,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Sequence {
    /// A checked request.
    pub(crate) fn new(request: Request, max_context: usize, events: EventSender, ticket: QueueTicket) -> Self {
        static NUMBERS: AtomicU64 = AtomicU64::new(0);
        let prompt_tokens = request.prompt.len();
        Sequence {
            id: request.id,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            track: SequenceTrack::default(),
            prompt_tokens,
            computed: 0,
            blocks: Vec::new(),
            published: 0,
            cursor: Cursor::start(request.cache_salt.as_deref()),
            cached_tokens: 0,
            miss: None,
            started: None,
            preemptions: 0,
            prompt_logprobs: request.prompt_logprobs.then(|| vec![None; prompt_tokens]),
            events,
            ticket: Some(ticket),
            restore: Restore::Untried,
            masks: (0, Duration::ZERO),
            salt: request.cache_salt,
            sampler: Sampler::new(request.sampling, &request.prompt),
            tokens: request.prompt,
            max_tokens: request.max_tokens,
            min_tokens: request.min_tokens,
            max_context,
            stop_token_ids: request.stop_token_ids,
            logprobs: request.logprobs,
            constraint: request.constraint,
            thinking: request.thinking_budget.map(ThinkingState::new),
            submitted: Instant::now(),
            first_token: None,
            last_token: None,
        }
    }

    /// Tokens generated so far.
    pub(crate) fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Alternatives to report with each token.
    pub(crate) fn num_alternatives(&self) -> usize {
        self.logprobs.unwrap_or(0)
    }

    /// Tokens whose rows may come from the prefix cache: all but the last, whose logits are wanted.
    pub(crate) fn reusable_tokens(&self) -> usize {
        if self.prompt_logprobs.is_some() { 0 } else { self.tokens.len() - 1 }
    }

    /// Whether only the newest token is missing.
    pub(crate) fn is_decoding(&self) -> bool {
        self.generated() > 0 && self.computed + 1 == self.tokens.len()
    }

    /// What the next step could do for it.
    pub(crate) fn demand(&self) -> Demand {
        let all_logits = self.prompt_logprobs.is_some() && self.computed < self.prompt_tokens;
        let decoding = self.is_decoding();
        let drafts = if decoding { self.track.drafts.len() } else { 0 };
        Demand { num_tokens: self.tokens.len() - self.computed, decoding, all_logits, drafts, follows: false }
    }

    /// The block of tokens that it computes now, if others can take it: its place in the tree and the tokens.
    pub(crate) fn next_block(&self, block_size: usize) -> Option<(&Cursor, &[u32])> {
        if self.is_decoding() {
            return None;
        }
        let tokens = self.tokens.get(self.published * block_size..(self.published + 1) * block_size)?;
        Some((&self.cursor, tokens))
    }

    /// Whether a block of tokens that another one computes would spare it computing them: it stands before that block.
    pub(crate) fn can_take_next_block(&self, block_size: usize) -> bool {
        let first = self.published * block_size;
        self.computed == first && first + block_size <= self.reusable_tokens()
    }

    /// Tells the asker, once, that computing begins.
    pub(crate) fn start(&mut self) -> bool {
        if self.started.is_some() {
            return false;
        }
        let now = Instant::now();
        self.started = Some(now);
        self.cached_tokens = self.computed;
        self.events.send(Event::Started(Started {
            prompt_tokens: self.prompt_tokens,
            cached_tokens: self.cached_tokens,
            miss: self.miss.clone(),
            queued: now - self.submitted,
        }));
        true
    }

    /// Whether the next token is simply the largest logit, which the device can find.
    pub(crate) fn takes_argmax(&self) -> bool {
        self.sampler.params().is_greedy() && self.needs_no_logits()
    }

    /// Whether nothing but the next token is wanted of its row of logits, so that the device can choose it.
    pub(crate) fn needs_no_logits(&self) -> bool {
        self.sampler.params().takes_plain_logits()
            && self.logprobs.is_none()
            && self.constraint.is_none()
            && (self.stop_token_ids.is_empty() || self.generated() >= self.min_tokens)
            && self.thinking.as_ref().is_none_or(|thinking| !thinking.restricts())
    }

    /// Takes the token that the device chose.
    pub(crate) fn accept_argmax(&mut self, token: u32) -> SampledToken {
        self.sampler.accept(token);
        self.track.learn_certainty(1.0);
        SampledToken { id: token, logprob: None, top_logprobs: Vec::new(), forced: false }
    }

    /// How the next tokens are drawn, one after the other.
    pub(crate) fn next_draws(&self) -> impl Iterator<Item = Draw> + '_ {
        self.sampler.next_bits().map(|bits| self.sampler.params().draw(bits))
    }

    /// Takes the token that the device drew with the next random bits.
    pub(crate) fn accept_drawn(&mut self, token: u32, certainty: f32) -> SampledToken {
        self.sampler.accept_drawn(token, certainty);
        self.track.learn_certainty(certainty);
        SampledToken { id: token, logprob: None, top_logprobs: Vec::new(), forced: false }
    }

    /// Chooses the next token from its row of logits.
    pub(crate) fn choose(&mut self, logits: &[f32], mask: &mut TokenMask) -> Result<SampledToken, RequestError> {
        let forced = self.thinking.as_ref().and_then(ThinkingState::forced);
        let id = match forced {
            Some(token) => {
                self.sampler.accept(token);
                token
            }
            None => {
                let masked = self.mask(mask)?;
                let picked = self.sampler.pick_allowed(logits, masked.then_some(mask));
                self.track.learn_certainty(self.sampler.certainty());
                picked.map_err(|error| match error {
                    PickError::Nan { .. } => self.bad_logits(&error),
                    PickError::NothingAllowed => RequestError::Constraint(error.to_string()),
                })?
            }
        };
        let (logprob, top_logprobs) = match self.logprobs {
            None => (None, Vec::new()),
            Some(count) => {
                let (logprob, top) = log_probabilities(logits, id, count);
                (Some(logprob), top)
            }
        };
        Ok(SampledToken { id, logprob, top_logprobs, forced: forced.is_some() })
    }

    /// Masks computed since the last call, and their time.
    pub(crate) fn take_masks(&mut self) -> (u64, Duration) {
        std::mem::take(&mut self.masks)
    }

    /// The error of logits that no token can be chosen from.
    pub(crate) fn bad_logits(&self, reason: &dyn std::fmt::Display) -> RequestError {
        RequestError::Logits { position: self.tokens.len(), reason: reason.to_string() }
    }

    /// Writes what is allowed; `false` if everything is.
    fn mask(&mut self, mask: &mut TokenMask) -> Result<bool, RequestError> {
        let too_short = self.generated() < self.min_tokens && !self.stop_token_ids.is_empty();
        let thinking = self.thinking.as_ref().filter(|thinking| thinking.restricts());
        if self.constraint.is_none() && thinking.is_none() && !too_short {
            return Ok(false);
        }
        mask.set_all();
        let mut may_end = !too_short;
        if let Some(constraint) = &mut self.constraint {
            let started = Instant::now();
            constraint.allow(mask).map_err(|error| RequestError::Constraint(error.to_string()))?;
            self.masks.0 += 1;
            self.masks.1 += started.elapsed();
            // Where the grammar allows nothing more, ending is better than failing for want of tokens.
            may_end = constraint.may_end() && (may_end || mask.is_empty());
            let change = if may_end { TokenMask::set } else { TokenMask::clear };
            self.stop_token_ids.iter().for_each(|token| change(mask, *token));
        } else if !may_end {
            self.stop_token_ids.iter().for_each(|token| mask.clear(*token));
        }
        if let Some(thinking) = thinking {
            thinking.restrict(mask);
        }
        Ok(true)
    }

    /// Appends a chosen token and says whether it was the last.
    pub(crate) fn append(&mut self, token: &SampledToken) -> Result<Option<FinishReason>, RequestError> {
        let now = Instant::now();
        self.first_token.get_or_insert(now);
        self.last_token = Some(now);
        self.tokens.push(token.id);
        if self.stop_token_ids.contains(&token.id) && !token.forced {
            return Ok(Some(FinishReason::Stop));
        }
        if let Some(thinking) = &mut self.thinking {
            thinking.consume(token.id);
        }
        if let Some(constraint) = &mut self.constraint {
            constraint.consume(token.id).map_err(|error| RequestError::Constraint(error.to_string()))?;
            if constraint.is_complete() {
                return Ok(Some(FinishReason::Stop));
            }
        }
        Ok(self.is_full().then_some(FinishReason::Length))
    }

    /// Whether nothing more may be generated.
    pub(crate) fn is_full(&self) -> bool {
        self.generated() >= self.max_tokens || self.tokens.len() >= self.max_context
    }

    /// Drafts that can be of use: one token is chosen in any case.
    pub(crate) fn room_for_drafts(&self) -> usize {
        let to_generate = self.max_tokens.saturating_sub(self.generated());
        let positions = self.max_context.saturating_sub(self.tokens.len());
        to_generate.min(positions).saturating_sub(1)
    }

    /// How many of `drafts` the constraint would take, the first ones. It is left as it was.
    pub(crate) fn allowed_drafts(&mut self, drafts: &[u32]) -> usize {
        let Some(constraint) = &mut self.constraint else { return drafts.len() };
        let mut taken = 0;
        for token in drafts {
            if self.stop_token_ids.contains(token) || constraint.consume(*token).is_err() {
                break;
            }
            taken += 1;
            if constraint.is_complete() {
                break;
            }
        }
        match constraint.rollback(taken) {
            Ok(()) => taken,
            // The next real token will say what is wrong with it.
            Err(_) => 0,
        }
    }

    pub(crate) fn salt(&self) -> Option<&String> {
        self.salt.as_ref()
    }

    /// Speculation's knowledge beside the tokens and the salt.
    pub(crate) fn track_and_text(&mut self) -> (&mut SequenceTrack, &[u32], Option<&String>) {
        (&mut self.track, &self.tokens, self.salt.as_ref())
    }

    /// Makes the computed full blocks findable.
    pub(crate) fn publish(&mut self, cache: &mut PrefixCache, pool: &mut KvPool) -> Published {
        let block_size = pool.block_size();
        let mut published = Published::default();
        while (self.published + 1) * block_size <= self.computed {
            let index = self.published;
            let tokens = &self.tokens[index * block_size..(index + 1) * block_size];
            let kept = cache.publish(&mut self.cursor, tokens, self.blocks[index], pool);
            if kept == self.blocks[index] {
                published.new_blocks.extend(cache.hash_of(&self.cursor).map(|hash| (index, hash)));
            } else {
                published.exchanged.push(kept);
            }
            self.blocks[index] = kept;
            self.published += 1;
        }
        published
    }

    /// Lets go of all blocks, after making the last, partly filled one findable.
    pub(crate) fn release(&mut self, cache: &mut PrefixCache, pool: &mut KvPool) {
        let full = self.published * pool.block_size();
        if let (Some(block), true) = (self.blocks.get(self.published), self.computed > full) {
            cache.publish_tail(&self.cursor, &self.tokens[full..self.computed], *block, pool);
        }
        self.let_go(pool);
        cache.shrink(pool);
    }

    /// Lets go of all blocks and makes them unfindable: what the model computed is not to be trusted.
    pub(crate) fn forget(&mut self, cache: &mut PrefixCache, pool: &mut KvPool) {
        let cursor = self.cursor.clone();
        self.let_go(pool);
        cache.forget(&cursor, pool);
    }

    fn let_go(&mut self, pool: &mut KvPool) {
        self.blocks.drain(..).for_each(|block| pool.release(block));
        self.lose_blocks();
    }

    /// Begins anew: the blocks are gone with their pool.
    pub(crate) fn lose_blocks(&mut self) {
        self.blocks.clear();
        self.computed = 0;
        self.published = 0;
        self.restore = Restore::Untried;
        self.cursor = Cursor::start(self.salt.as_deref());
    }

    /// What the asker is told at the end.
    pub(crate) fn finished(&mut self, reason: FinishReason) -> Finished {
        let since = |later: Option<Instant>, earlier: Option<Instant>| match (later, earlier) {
            (Some(later), Some(earlier)) => later - earlier,
            _ => Duration::ZERO,
        };
        Finished {
            reason,
            completion_tokens: self.generated(),
            accepted_draft_tokens: self.track.accepted_drafts,
            preemptions: self.preemptions,
            prompt_logprobs: self.prompt_logprobs.take(),
            prefill: since(self.first_token, self.started),
            decode: since(self.last_token, self.first_token),
        }
    }
}
