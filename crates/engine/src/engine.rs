//! The loop: admit, propose drafts, plan, forward, choose, commit. One step serves every running request; what a request gets does not
//! depend on the others, bit for bit, so how steps are put together is a matter of speed only.
//!
//! The file is one piece: the phases of a step share the same few fields, and splitting them would only hide that.
//!
//! An engine belongs to one thread ([`crate::thread`]); tests and batch programs may call [`Engine::step`] themselves.

use crate::block_rows::BlockRows;
use crate::device_draws::{DeviceDraws, Drawn};
use crate::disk_cache::{DiskCache, DiskCacheError, DiskCacheOptions, WantedBlock};
use crate::events::{EventReceiver, channel};
use crate::kv_pool::{BlockId, KvPool};
use crate::prefix_cache::PrefixCache;
use crate::request::{Event, FinishReason, PromptScore, Request, RequestError, SampledToken};
use crate::sampler::{PickError, SettingError, log_probabilities};
use crate::scheduler::{ChunkGovernor, Demand, Share, StepLimits, plan};
use crate::sequence::{Published, QueueTicket, Restore, Sequence};
use crate::speculate::{Drafter, Speculation, SpeculationOptions};
use crate::stats::{CountedStep, EngineStats, Rate};
use moellon_model::batch::{Batch, LogitRows};
use moellon_model::session::greedy;
use moellon_model::{Decoder, Error as ModelError};
use moellon_ops::profile::{Profile, Profiler};
use moellon_ops::{Backend, ElementType, Tensor};
use moellon_text::constraint::TokenMask;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant};

/// How often the bytes of a decode step are counted. Counting waits for the device after every operation.
const COUNT_INTERVAL: Duration = Duration::from_secs(2);

/// How long a step waits for a block from disk, at least: the time of a few copies.
const RESTORE_WAIT: Duration = Duration::from_millis(2);

/// How an engine shares its decoder.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Bytes of finished sequences that stay cached; `None` for all the room there is.
    pub max_prefix_cache_bytes: Option<u64>,
    /// How many times as long a step that decodes may take when a prompt is computed beside it.
    pub max_decode_slowdown: f64,
    /// Cached prefixes on disk.
    pub disk_cache: Option<DiskCacheOptions>,
    /// What drafts tokens; `None` decodes them one by one. The output is the same.
    pub speculation: Option<SpeculationOptions>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        // Inter-token latency within 3x of undisturbed is the requirement; the estimate has some noise.
        EngineOptions {
            max_waiting: 256,
            max_prefix_cache_bytes: None,
            max_decode_slowdown: 2.0,
            disk_cache: None,
            speculation: None,
        }
    }
}

/// Why an engine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The device has no room for the engine's own buffer, or failed.
    #[error(transparent)]
    Ops(#[from] moellon_ops::Error),
    /// The draft model is not one for this decoder.
    #[error("draft model: {what} is {found}, expected {expected}, as the model has")]
    DraftModel {
        /// What differs.
        what: &'static str,
        /// The draft model's.
        found: usize,
        /// The model's.
        expected: usize,
    },
    /// The decoder refused a batch or its device failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The folder for cached prefixes.
    #[error(transparent)]
    DiskCache(#[from] DiskCacheError),
    /// The operating system gave no thread.
    #[error("the engine's thread does not start: {0}")]
    Thread(std::io::Error),
    /// A sequence alone in the cache has no block to grow into.
    #[error("no cache block is left for a sequence alone in the cache of {num_blocks} blocks")]
    NoBlock {
        /// Blocks of the cache.
        num_blocks: usize,
    },
}

/// What requests are checked against before they are queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestLimits {
    /// Tokens of the model.
    pub vocab_size: usize,
    /// Positions of a sequence.
    pub max_context: usize,
    /// Slots of a cache block.
    pub block_size: usize,
    /// Cache blocks.
    pub num_blocks: usize,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Requests that may wait.
    pub max_waiting: usize,
}

impl RequestLimits {
    /// Checks a request.
    ///
    /// # Errors
    /// What does not fit, with numbers.
    pub fn check(&self, request: &Request, waiting: usize) -> Result<(), RequestError> {
        let prompt_tokens = request.prompt.len();
        if prompt_tokens == 0 {
            return Err(RequestError::EmptyPrompt);
        }
        if prompt_tokens >= self.max_context {
            return Err(RequestError::PromptTooLong { prompt_tokens, max_prompt_tokens: self.max_context - 1 });
        }
        let needed_blocks = (prompt_tokens + 1).div_ceil(self.block_size);
        if needed_blocks > self.num_blocks {
            return Err(RequestError::CacheTooSmall {
                needed_bytes: needed_blocks as u64 * self.block_bytes,
                total_bytes: self.num_blocks as u64 * self.block_bytes,
            });
        }
        let unknown = |token: &u32| *token as usize >= self.vocab_size;
        if let Some(position) = request.prompt.iter().position(unknown) {
            let token = request.prompt[position];
            return Err(RequestError::UnknownToken { token, position, vocab_size: self.vocab_size });
        }
        request.sampling.validate(self.vocab_size)?;
        let setting = |name, found: String, expected| Err(SettingError { name, found, expected }.into());
        if let Some(count) = request.logprobs.filter(|count| *count > self.vocab_size) {
            return setting("logprobs", count.to_string(), "at most the tokens of the vocabulary");
        }
        if let Some(budget) = &request.thinking_budget {
            if let Some(token) = budget.end_token_ids.iter().find(|token| unknown(token)) {
                return setting("thinking budget", format!("end token {token}"), "token ids of the vocabulary");
            }
            if budget.end_token_ids.last() != Some(&budget.close_token_id) {
                return setting(
                    "thinking budget",
                    "another last end token".to_owned(),
                    "the token that closes a thought",
                );
            }
        }
        if waiting >= self.max_waiting {
            return Err(RequestError::QueueFull { waiting, limit: self.max_waiting });
        }
        Ok(())
    }
}

/// A decoder with its requests.
pub struct Engine {
    pub(crate) decoder: Decoder,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) limits: RequestLimits,
    pub(crate) step_limits: StepLimits,
    max_sequences: usize,
    max_prefix_blocks: usize,
    pub(crate) pool: KvPool,
    prefix_cache: PrefixCache,
    disk_cache: Option<DiskCache>,
    block_rows: BlockRows,
    /// In order of arrival.
    waiting: VecDeque<Sequence>,
    /// In order of arrival.
    pub(crate) running: Vec<Sequence>,
    /// Requests that are queued anywhere.
    num_waiting: Arc<AtomicUsize>,
    pub(crate) governor: ChunkGovernor,
    /// u32 `[max_logit_rows, 1]`: tokens that the device chose.
    chosen: moellon_ops::Buffer,
    pub(crate) draws: Option<DeviceDraws>,
    /// Work space: one row of logits `[vocab_size]`.
    logits: Vec<f32>,
    mask: TokenMask,
    pub(crate) speculation: Option<Speculation>,
    stats: EngineStats,
    prefill_rate: Rate,
    generated_rate: Rate,
    /// When a decode step is counted next; `None` for the first that comes.
    next_count: Option<Instant>,
}

impl Engine {
    /// An engine that uses all of the decoder's cache.
    ///
    /// # Errors
    /// If the device has no room for the engine's buffer, or the disk cache's folder is not usable.
    pub fn new(decoder: Decoder, backend: Box<dyn Backend>, options: EngineOptions) -> Result<Self, EngineError> {
        Engine::with_drafter(decoder, None, backend, options)
    }

    /// [`Engine::new`] with a network of its own that drafts, built on the same back end for the same sizes.
    ///
    /// # Errors
    /// As [`Engine::new`], and a draft model of other sizes.
    pub fn with_drafter(
        mut decoder: Decoder,
        drafter: Option<Drafter>,
        mut backend: Box<dyn Backend>,
        options: EngineOptions,
    ) -> Result<Self, EngineError> {
        let sizes = *decoder.options();
        if let Some(Drafter::Model(draft)) = &drafter {
            check_draft_model(&decoder, draft)?;
        }
        let speculation = match options.speculation {
            None => None,
            Some(options) => Some(Speculation::new(options, &mut decoder, drafter, backend.as_mut())?),
        };
        let block_rows =
            BlockRows::new(&decoder, speculation.as_ref().map_or_else(Vec::new, Speculation::draft_caches));
        let block_bytes = block_rows.block_bytes() as u64;
        let chosen = backend.alloc("chosen tokens", ElementType::U32, sizes.max_logit_rows)?;
        let draws = DeviceDraws::new(sizes.max_logit_rows, backend.as_mut())?;
        let caps = backend.caps();
        // Rows of another back end or precision are not bit for bit the same.
        let head = if speculation.as_ref().is_some_and(Speculation::has_head) { " drafting" } else { "" };
        let layout = format!("{} {:?} {}{head}", caps.name, caps.activations, block_rows.describe());
        let disk_cache = options.disk_cache.as_ref().map(|disk| DiskCache::open(disk, &layout)).transpose()?;
        let max_prefix_blocks =
            options.max_prefix_cache_bytes.map_or(sizes.num_blocks, |bytes| (bytes / block_bytes.max(1)) as usize);
        let vocab_size = decoder.config().vocab_size;
        let limits = RequestLimits {
            vocab_size,
            max_context: sizes.max_context,
            block_size: sizes.block_size,
            num_blocks: sizes.num_blocks,
            block_bytes,
            max_waiting: options.max_waiting,
        };
        Ok(Engine {
            limits,
            step_limits: StepLimits {
                max_tokens: sizes.max_batch_tokens,
                max_logit_rows: sizes.max_logit_rows,
                max_prefill_beside_decodes: sizes.max_batch_tokens,
            },
            max_sequences: sizes.max_sequences.min(sizes.max_batch_tokens).min(sizes.max_logit_rows),
            max_prefix_blocks,
            pool: KvPool::new(sizes.num_blocks, sizes.block_size, block_bytes),
            prefix_cache: PrefixCache::new(max_prefix_blocks),
            disk_cache,
            block_rows,
            waiting: VecDeque::new(),
            running: Vec::new(),
            num_waiting: Arc::new(AtomicUsize::new(0)),
            governor: ChunkGovernor::new(options.max_decode_slowdown, sizes.max_batch_tokens),
            chosen,
            draws,
            logits: vec![0.0; vocab_size],
            mask: TokenMask::all(vocab_size),
            speculation,
            stats: EngineStats { total_blocks: sizes.num_blocks, block_bytes, ..EngineStats::default() },
            prefill_rate: Rate::new(),
            generated_rate: Rate::new(),
            next_count: None,
            decoder,
            backend,
        })
    }

    /// What requests are checked against.
    pub fn limits(&self) -> RequestLimits {
        self.limits
    }

    /// Queues a request.
    ///
    /// # Errors
    /// What does not fit, with numbers.
    pub fn submit(&mut self, request: Request) -> Result<EventReceiver, RequestError> {
        let admitted = self.limits.check(&request, self.num_waiting.load(Ordering::Relaxed));
        admitted.inspect_err(|_| self.stats.rejected += 1)?;
        let (sender, receiver) = channel();
        let ticket = QueueTicket::new(&self.num_waiting);
        self.enqueue(Sequence::new(request, self.max_sequence_tokens(), sender, ticket));
        Ok(receiver)
    }

    /// Runs one step. `false` if there was nothing to do.
    ///
    /// # Errors
    /// A failing device or a broken invariant: no request in flight can go on, see [`Engine::restart`].
    pub fn step(&mut self) -> Result<bool, EngineError> {
        self.drop_cancelled();
        let restored = self.restore()?;
        self.admit()?;
        self.reuse_what_others_published()?;
        let started = Instant::now();
        self.propose();
        let shares = self.plan()?;
        if shares.is_empty() {
            return Ok(restored);
        }
        let decodes = shares.iter().filter(|share| self.running[share.sequence].is_decoding()).count();
        let batch = self.batch(&shares);
        let drafts = shares.iter().map(|share| share.num_drafts).sum();
        let (logits, profile) = self.forward(&batch, decodes + drafts, started)?;
        let outcomes = self.choose(&shares, &batch, logits)?;
        if let Some(profile) = profile {
            self.count(&profile, decodes + drafts, started);
        }
        let generated = self.commit(&shares, outcomes)?;
        self.observe(batch.num_tokens(), decodes, drafts, generated, started);
        Ok(true)
    }

    /// Whether no request waits or runs.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// Fails every running request and begins anew with empty caches; waiting requests stay.
    pub fn restart(&mut self, reason: &str) {
        tracing::error!(reason, failed = self.running.len(), "engine step failed, restarting with empty caches");
        for sequence in self.running.drain(..) {
            sequence.events.send(Event::Failed(RequestError::Engine(reason.to_owned())));
            self.stats.failed += 1;
        }
        self.waiting.iter_mut().for_each(Sequence::lose_blocks);
        self.pool = KvPool::new(self.limits.num_blocks, self.limits.block_size, self.limits.block_bytes);
        self.prefix_cache = PrefixCache::new(self.max_prefix_blocks);
        if let Some(speculation) = &mut self.speculation {
            speculation.restart();
        }
        self.stats.restarts += 1;
        self.stats.failures_in_a_row += 1;
    }

    /// Forgets the prefixes that are cached in memory, as a new start would; those on disk stay. For measuring.
    ///
    /// # Panics
    /// If requests are running or waiting: they hold cached blocks.
    pub fn forget_prefixes(&mut self) {
        assert!(self.is_idle(), "prefixes are forgotten between requests");
        self.pool = KvPool::new(self.limits.num_blocks, self.limits.block_size, self.limits.block_bytes);
        self.prefix_cache = PrefixCache::new(self.max_prefix_blocks);
    }

    /// Ends every request, running or waiting, with `error`.
    pub fn fail_all(&mut self, error: &RequestError) {
        let running = self.running.drain(..);
        for mut sequence in running.chain(self.waiting.drain(..)) {
            sequence.events.send(Event::Failed(error.clone()));
            sequence.release(&mut self.prefix_cache, &mut self.pool);
            self.stats.failed += 1;
        }
    }

    /// A snapshot; `since_progress` is the thread's to fill in.
    pub fn stats(&mut self) -> EngineStats {
        let now = Instant::now();
        let evictable = self.pool.num_evictable();
        EngineStats {
            running: self.running.len(),
            waiting: self.num_waiting.load(Ordering::Relaxed),
            used_blocks: self.limits.num_blocks - self.pool.num_free() - evictable,
            reusable_blocks: evictable,
            disk: self.disk_cache.as_ref().map(DiskCache::stats),
            prefill_tokens_per_s: self.prefill_rate.per_second(now),
            generated_tokens_per_s: self.generated_rate.per_second(now),
            prefill_chunk: self.governor.chunk(),
            speculation: self.speculation.as_ref().map(Speculation::stats),
            ..self.stats.clone()
        }
    }

    /// Waits until cached blocks that are to be written are on disk.
    pub fn flush(&self) {
        self.disk_cache.iter().for_each(DiskCache::flush);
    }

    /// Checks that every block is held by whom the counts say: nothing leaks.
    ///
    /// # Errors
    /// The first block whose count is wrong.
    pub fn check(&self) -> Result<(), String> {
        let sequences = self.running.iter().chain(&self.waiting).flat_map(|s| s.blocks.iter().copied());
        self.pool.check(sequences.chain(self.prefix_cache.blocks()))
    }

    /// How the thread queues what was checked elsewhere.
    pub(crate) fn enqueue(&mut self, sequence: Sequence) {
        self.waiting.push_back(sequence);
    }

    pub(crate) fn num_waiting(&self) -> Arc<AtomicUsize> {
        Arc::clone(&self.num_waiting)
    }

    /// Tokens that a sequence may have: the context, or all of the cache.
    pub(crate) fn max_sequence_tokens(&self) -> usize {
        self.limits.max_context.min(self.limits.num_blocks * self.limits.block_size)
    }

    fn drop_cancelled(&mut self) {
        let (pool, cache) = (&mut self.pool, &mut self.prefix_cache);
        let mut stays = |sequence: &mut Sequence| {
            let cancelled = sequence.events.is_cancelled();
            if cancelled {
                sequence.release(cache, pool);
                let finished = sequence.finished(FinishReason::Cancelled);
                sequence.events.send(Event::Finished(finished));
                self.stats.cancelled += 1;
            }
            !cancelled
        };
        self.running.retain_mut(&mut stays);
        self.waiting.retain_mut(stays);
    }

    /// Moves requests from the queue into the cache, first come first served, while there is room for their prompts. Those
    /// that wait for a disk are passed by.
    fn admit(&mut self) -> Result<(), EngineError> {
        let mut index = 0;
        while self.running.len() < self.max_sequences {
            let Some(mut sequence) = self.waiting.remove(index) else { return Ok(()) };
            self.settle_head()?;
            self.look_on_disk(&mut sequence);
            if matches!(sequence.restore, Restore::Reading(_)) {
                self.waiting.insert(index, sequence);
                index += 1;
            } else if self.reserve_prompt(&mut sequence)? {
                sequence.ticket = None;
                self.begin_head(&mut sequence);
                self.running.push(sequence);
            } else {
                self.waiting.insert(index, sequence);
                return Ok(());
            }
        }
        Ok(())
    }

    /// Begins to read what memory does not have of a sequence's prompt and the disk does.
    fn look_on_disk(&mut self, sequence: &mut Sequence) {
        if !matches!(sequence.restore, Restore::Untried) {
            return;
        }
        sequence.restore = Restore::Done;
        let Some(disk_cache) = &self.disk_cache else { return };
        let reusable = sequence.reusable_tokens();
        let tokens = &sequence.tokens[..reusable];
        let mut found = self.prefix_cache.lookup(&mut sequence.cursor, tokens, 0, &mut self.pool);
        found.tail.iter().for_each(|(block, _)| self.pool.release(*block));
        sequence.blocks.append(&mut found.blocks);
        let block_size = self.limits.block_size;
        let rest = &tokens[sequence.blocks.len() * block_size..];
        let names = self.prefix_cache.hashes_after(&sequence.cursor, rest, block_size);
        let on_disk = names.take_while(|(hash, _)| disk_cache.contains(hash));
        let wanted: Vec<WantedBlock> =
            on_disk.map(|(hash, tokens)| WantedBlock { hash, tokens: tokens.to_vec() }).collect();
        if !wanted.is_empty() {
            sequence.restore = Restore::Reading(disk_cache.read(wanted, self.block_rows.block_bytes()));
        }
    }

    /// Takes blocks that have come from disk: for a part of a step's time while others run, else as they come. `false` if
    /// there were none.
    fn restore(&mut self) -> Result<bool, EngineError> {
        let started = Instant::now();
        let limit = match self.running.is_empty() {
            true => RESTORE_WAIT * 8,
            false => (self.stats.last_step / 2).max(RESTORE_WAIT),
        };
        let mut any = false;
        for index in 0..self.waiting.len() {
            while let Restore::Reading(rows) = &self.waiting[index].restore {
                let left = limit.saturating_sub(started.elapsed());
                let next = match self.running.is_empty() {
                    true => rows.recv_timeout(left.min(RESTORE_WAIT)),
                    false if left.is_zero() => return Ok(any),
                    false => rows.try_recv().map_err(|error| match error {
                        TryRecvError::Empty => RecvTimeoutError::Timeout,
                        TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
                    }),
                };
                match next {
                    Ok(rows) => any |= self.take_restored(index, &rows)?,
                    Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => self.waiting[index].restore = Restore::Done,
                }
            }
        }
        Ok(any)
    }

    /// Puts a block from disk behind those that a waiting sequence holds; `false` if there is no room for it.
    fn take_restored(&mut self, index: usize, rows: &[u8]) -> Result<bool, EngineError> {
        let Some(block) = self.alloc() else {
            self.waiting[index].restore = Restore::Done;
            return Ok(false);
        };
        self.block_rows.write(block, rows, self.backend.as_mut())?;
        if let Some(speculation) = &mut self.speculation {
            speculation.restored_block(block, self.limits.block_size);
        }
        let block_size = self.limits.block_size;
        let sequence = &mut self.waiting[index];
        let done = sequence.blocks.len() * block_size;
        let tokens = &sequence.tokens[done..done + block_size];
        let kept = self.prefix_cache.publish(&mut sequence.cursor, tokens, block, &mut self.pool);
        sequence.blocks.push(kept);
        self.stats.disk_hit_tokens += block_size as u64;
        Ok(true)
    }

    /// Finds what is cached of a sequence's tokens and reserves blocks for the rest; `false` if there are not enough.
    fn reserve_prompt(&mut self, sequence: &mut Sequence) -> Result<bool, EngineError> {
        let block_size = self.limits.block_size;
        let reusable = sequence.reusable_tokens();
        // What came from disk is held already.
        let done = sequence.blocks.len() * block_size;
        let tokens = &sequence.tokens[done..reusable.max(done)];
        let mut found = self.prefix_cache.lookup(&mut sequence.cursor, tokens, done, &mut self.pool);
        // Held again below: until then it may be what makes room.
        found.tail.iter().for_each(|(block, _)| self.pool.release(*block));
        sequence.blocks.append(&mut found.blocks);
        let wanted = self.pool.blocks_for(sequence.tokens.len() + 1).min(self.limits.num_blocks);
        // A block for each running sequence to grow into, so that admission does not lead to preemption at once.
        let room = self.pool.num_free() + self.pool.num_evictable();
        if room < wanted - sequence.blocks.len() + self.running.len() {
            sequence.release(&mut self.prefix_cache, &mut self.pool);
            return Ok(false);
        }
        sequence.published = sequence.blocks.len();
        sequence.computed = sequence.published * block_size;
        if let Some((shared, num_slots)) = found.tail {
            self.pool.retain(shared);
            // With every other block in use there is none to copy it to; the tail may then be evicted below.
            if let Some(own) = self.alloc() {
                self.block_rows.copy(shared, own, num_slots, self.backend.as_mut())?;
                if let Some(speculation) = &mut self.speculation {
                    speculation.copied_block(shared, own, num_slots);
                }
                sequence.blocks.push(own);
                sequence.computed += num_slots;
            }
            self.pool.release(shared);
        }
        sequence.miss = found.miss.filter(|_| sequence.computed < reusable);
        while sequence.blocks.len() < wanted {
            let block = self.alloc().ok_or(EngineError::NoBlock { num_blocks: self.limits.num_blocks })?;
            sequence.blocks.push(block);
        }
        Ok(true)
    }

    /// Sequences that stand at the end of a block take what others computed meanwhile: many that begin alike are computed
    /// once.
    fn reuse_what_others_published(&mut self) -> Result<(), EngineError> {
        let block_size = self.limits.block_size;
        let mut moved = Vec::new();
        for (index, sequence) in self.running.iter_mut().enumerate().filter(|(_, s)| !s.is_decoding()) {
            let (done, end) = (sequence.computed, sequence.reusable_tokens());
            if done != sequence.published * block_size || done + block_size > end {
                continue;
            }
            let rest = &sequence.tokens[done..end];
            let found = self.prefix_cache.lookup(&mut sequence.cursor, rest, done, &mut self.pool);
            found.tail.iter().for_each(|(block, _)| self.pool.release(*block));
            if !found.blocks.is_empty() {
                moved.push(index);
            }
            for shared in found.blocks {
                let own = std::mem::replace(&mut sequence.blocks[sequence.published], shared);
                self.pool.release(own);
                sequence.published += 1;
                sequence.computed += block_size;
                sequence.miss.clone_from(&found.miss);
            }
        }
        if !moved.is_empty() {
            self.settle_head()?;
            moved.into_iter().for_each(|index| self.move_head(index));
        }
        Ok(())
    }

    /// Who runs how many tokens, with blocks for them; the youngest give way when there are not enough.
    fn plan(&mut self) -> Result<Vec<Share>, EngineError> {
        self.step_limits.max_prefill_beside_decodes = self.governor.next_chunk();
        loop {
            let mut demands: Vec<Demand> = self.running.iter().map(Sequence::demand).collect();
            self.mark_followers(&mut demands);
            let shares = plan(&demands, self.step_limits);
            if shares.iter().all(|share| self.reserve(*share)) {
                return Ok(shares);
            }
            // Nobody gives way to a guess.
            if self.drop_drafts() {
                continue;
            }
            if self.running.len() < 2 {
                return Err(EngineError::NoBlock { num_blocks: self.limits.num_blocks });
            }
            self.settle_head()?;
            self.preempt_youngest();
        }
    }

    /// Lets those wait whose next block an earlier one is computing: answers to one prompt (`n`) share its prefill from the first
    /// step on. Nobody waits for one that waits: the first of those that begin alike goes on.
    fn mark_followers(&self, demands: &mut [Demand]) {
        let block_size = self.limits.block_size;
        for (index, demand) in demands.iter_mut().enumerate().filter(|(_, demand)| !demand.decoding) {
            let sequence = &self.running[index];
            if !sequence.can_take_next_block(block_size) {
                continue;
            }
            let next = sequence.next_block(block_size);
            demand.follows = self.running[..index].iter().any(|leader| leader.next_block(block_size) == next);
        }
    }

    /// Makes sure that a share has blocks.
    fn reserve(&mut self, share: Share) -> bool {
        let sequence = &self.running[share.sequence];
        let needed = self.pool.blocks_for(sequence.computed + share.num_tokens);
        while self.running[share.sequence].blocks.len() < needed {
            let Some(block) = self.alloc() else { return false };
            self.running[share.sequence].blocks.push(block);
        }
        true
    }

    /// A free block, or the least recently used one that only the prefix cache holds.
    fn alloc(&mut self) -> Option<BlockId> {
        if self.pool.num_free() == 0 {
            self.prefix_cache.evict(&mut self.pool);
        }
        self.alloc_free()
    }

    /// A free block.
    pub(crate) fn alloc_free(&mut self) -> Option<BlockId> {
        let block = self.pool.alloc()?;
        if let Some(speculation) = &mut self.speculation {
            speculation.forget_block(block);
        }
        Some(block)
    }

    /// Puts the youngest running request back to the front of the queue. What it computed stays cached while there is room.
    fn preempt_youngest(&mut self) {
        let Some(mut sequence) = self.running.pop() else { return };
        tracing::debug!(id = sequence.id, computed = sequence.computed, "preempted for want of cache blocks");
        sequence.release(&mut self.prefix_cache, &mut self.pool);
        sequence.preemptions += 1;
        sequence.ticket = Some(QueueTicket::new(&self.num_waiting));
        self.stats.preemptions += 1;
        self.waiting.push_front(sequence);
    }

    /// Computes a step; one in a while that only decodes is counted.
    fn forward(
        &mut self,
        batch: &Batch,
        decode_rows: usize,
        now: Instant,
    ) -> Result<(Tensor, Option<Profile>), EngineError> {
        let is_due = self.next_count.is_none_or(|next| now >= next);
        if !is_due || decode_rows != batch.num_tokens() {
            return Ok((self.decoder.forward(batch, self.backend.as_mut())?, None));
        }
        self.next_count = Some(now + COUNT_INTERVAL);
        let mut profiler = Profiler::new(self.backend.as_mut());
        let logits = self.decoder.forward(batch, &mut profiler)?;
        Ok((logits, Some(profiler.profile().clone())))
    }

    fn count(&mut self, profile: &Profile, rows: usize, started: Instant) {
        let distinct = |_| profile.distinct_experts as f64 / profile.moe_layers as f64;
        self.stats.counted_step = Some(CountedStep {
            rows,
            bytes: profile.total_bytes(),
            elapsed: started.elapsed(),
            distinct_experts: (profile.moe_layers > 0).then_some(()).map(distinct),
        });
    }

    fn batch(&mut self, shares: &[Share]) -> Batch {
        let mut batch = Batch::default();
        for share in shares {
            let sequence = &mut self.running[share.sequence];
            if sequence.start() {
                self.stats.prefix_queried_tokens += sequence.prompt_tokens as u64;
                self.stats.prefix_hit_tokens += sequence.cached_tokens as u64;
            }
            let (first, end) = (sequence.computed, sequence.computed + share.num_tokens);
            let rows = match sequence.demand() {
                Demand { all_logits: true, .. } => LogitRows::All,
                _ if share.num_drafts > 0 => LogitRows::All,
                Demand { num_tokens, .. } if num_tokens == share.num_tokens => LogitRows::Last,
                _ => LogitRows::None,
            };
            let blocks = &sequence.blocks[..self.pool.blocks_for(end)];
            let mut tokens = sequence.tokens[first..end - share.num_drafts].to_vec();
            tokens.extend_from_slice(&sequence.track.drafts[..share.num_drafts]);
            batch.push_sequence(&tokens, first, blocks, self.limits.block_size, rows);
        }
        batch
    }

    /// The next tokens of every share that reaches the end of its sequence, or why there are none. They are appended.
    fn choose(&mut self, shares: &[Share], batch: &Batch, logits: Tensor) -> Result<Vec<Outcome>, EngineError> {
        let (mut row, mut logit_row) = (0, 0);
        let mut first_rows = Vec::new();
        for share in shares {
            let end = row + share.num_tokens;
            let first_logit_row = logit_row;
            logit_row += batch.logit_rows[logit_row..].iter().take_while(|r| (**r as usize) < end).count();
            row = end;
            self.score_prompt(share, first_logit_row..logit_row, logits)?;
            let due = self.is_due(share) && !self.running[share.sequence].is_full();
            first_rows.push(due.then(|| logit_row - 1 - share.num_drafts));
        }
        let drawn = self.draw_on_device(shares, &first_rows, logits)?;
        let mut chosen = Chosen { drawn, largest: None };
        let mut outcomes = Vec::new();
        for (share, first_row) in shares.iter().zip(first_rows) {
            outcomes.push(match first_row {
                Some(row) => self.next_tokens(share, row, logits, &mut chosen)?,
                None => Outcome { tokens: Vec::new(), end: Ok(None) },
            });
        }
        Ok(outcomes)
    }

    /// Whether a share reaches the end of its sequence.
    fn is_due(&self, share: &Share) -> bool {
        let sequence = &self.running[share.sequence];
        sequence.computed + share.num_tokens - share.num_drafts == sequence.tokens.len()
    }

    /// Goes through a share's rows from `row` on for as long as the drafts are what would have been chosen anyway: each token
    /// is chosen from its own row, by the same sampler and in the same state as without drafts.
    fn next_tokens(
        &mut self,
        share: &Share,
        row: usize,
        logits: Tensor,
        chosen: &mut Chosen,
    ) -> Result<Outcome, EngineError> {
        let mut drafts = std::mem::take(&mut self.running[share.sequence].track.drafts);
        drafts.truncate(share.num_drafts);
        let mut outcome = Outcome { tokens: Vec::new(), end: Ok(None) };
        for index in 0..=drafts.len() {
            let draft = drafts.get(index).copied();
            match self.next_token(share.sequence, row + index, draft, logits, chosen)? {
                Err(error) => {
                    outcome.end = Err(error);
                    break;
                }
                Ok(token) => {
                    let (id, end) = (token.id, self.running[share.sequence].append(&token));
                    outcome.tokens.push(token);
                    if !matches!(end, Ok(None)) {
                        outcome.end = end;
                        break;
                    }
                    if draft != Some(id) {
                        break;
                    }
                }
            }
        }
        self.learn(share.sequence, &drafts, outcome.tokens.len());
        Ok(outcome)
    }

    fn next_token(
        &mut self,
        sequence: usize,
        row: usize,
        draft: Option<u32>,
        logits: Tensor,
        chosen: &mut Chosen,
    ) -> Result<Result<SampledToken, RequestError>, EngineError> {
        let sequence = &mut self.running[sequence];
        if let Some(drawn) = chosen.drawn[row]
            && sequence.needs_no_logits()
            && drawn.bits.is_none_or(|bits| sequence.next_draws().next().is_some_and(|draw| draw.bits == bits))
        {
            let token = drawn.token;
            if drawn.certainty.is_nan() {
                return Ok(Err(sequence.bad_logits(&PickError::Nan { token })));
            }
            if drawn.bits.is_some() {
                return Ok(Ok(sequence.accept_drawn(token, drawn.certainty)));
            }
            let previous = sequence.tokens[sequence.tokens.len() - 1];
            let replayed = self.speculation.as_mut().and_then(|s| s.replayed(previous, draft));
            return Ok(Ok(sequence.accept_argmax(replayed.unwrap_or(token))));
        }
        if sequence.takes_argmax() {
            let chosen = match &mut chosen.largest {
                Some(chosen) => chosen,
                None => {
                    chosen.largest.insert(greedy(logits, self.chosen.tensor(logits.rows, 1), self.backend.as_mut())?)
                }
            };
            let token = chosen[row];
            // A row with a NaN anywhere gives the column of a NaN: the chosen logit tells.
            let mut logit = [f32::NAN];
            if (token as usize) < logits.cols {
                self.backend.read_f32(logits.row_range(row, 1).columns(token as usize, 1), &mut logit)?;
            }
            if logit[0].is_nan() {
                return Ok(Err(sequence.bad_logits(&PickError::Nan { token })));
            }
            let previous = sequence.tokens[sequence.tokens.len() - 1];
            let replayed = self.speculation.as_mut().and_then(|s| s.replayed(previous, draft));
            return Ok(Ok(sequence.accept_argmax(replayed.unwrap_or(token))));
        }
        self.backend.read_f32(logits.row_range(row, 1), &mut self.logits)?;
        let chosen = sequence.choose(&self.logits, &mut self.mask);
        let (masks, mask_time) = sequence.take_masks();
        self.stats.masks += masks;
        self.stats.mask_time += mask_time;
        Ok(chosen)
    }

    /// Log-probabilities of the prompt's tokens, where wanted: row `i` of a share predicts the token after its `i`-th.
    fn score_prompt(&mut self, share: &Share, rows: std::ops::Range<usize>, logits: Tensor) -> Result<(), EngineError> {
        let sequence = &mut self.running[share.sequence];
        if rows.len() != share.num_tokens {
            return Ok(());
        }
        let count = sequence.num_alternatives();
        let Some(scores) = &mut sequence.prompt_logprobs else { return Ok(()) };
        for (row, position) in rows.zip(sequence.computed + 1..) {
            let Some(score) = scores.get_mut(position) else { break };
            self.backend.read_f32(logits.row_range(row, 1), &mut self.logits)?;
            let (logprob, top_logprobs) = log_probabilities(&self.logits, sequence.tokens[position], count);
            *score = Some(PromptScore { logprob, top_logprobs });
        }
        Ok(())
    }

    /// Tells the askers their tokens, counts rows as cached, publishes full blocks, and lets finished requests go. Returns how
    /// many tokens were generated.
    fn commit(&mut self, shares: &[Share], outcomes: Vec<Outcome>) -> Result<usize, EngineError> {
        let (mut computed, mut ends, mut generated) = (Vec::new(), Vec::new(), 0);
        for (share, outcome) in shares.iter().zip(outcomes) {
            let sequence = &mut self.running[share.sequence];
            // Rows of drafts count as far as they gave tokens.
            let rows = share.num_tokens - share.num_drafts + outcome.tokens.len().saturating_sub(1);
            let done = sequence.computed + rows;
            // A preempted request that computes its prompt again has said so before.
            if sequence.computed < sequence.prompt_tokens && sequence.generated() == outcome.tokens.len() {
                let done_tokens = done.min(sequence.prompt_tokens);
                sequence.events.send(Event::Prefill { done_tokens, prompt_tokens: sequence.prompt_tokens });
            }
            let is_full = outcome.tokens.is_empty() && done == sequence.tokens.len();
            let end = match outcome.end {
                Ok(None) if is_full => Ok(Some(FinishReason::Length)),
                end => end,
            };
            generated += outcome.tokens.len();
            if !outcome.tokens.is_empty() {
                sequence.events.send(Event::Tokens(outcome.tokens));
            }
            computed.push(rows);
            ends.push(end);
        }
        let is_end = |end: &Result<Option<FinishReason>, RequestError>| !matches!(end, Ok(None));
        let ended: Vec<usize> =
            shares.iter().zip(&ends).filter(|(_, end)| is_end(end)).map(|(share, _)| share.sequence).collect();
        self.run_head(shares, &computed, &ended)?;
        for ((share, rows), end) in shares.iter().zip(computed).zip(&ends) {
            self.running[share.sequence].computed += rows;
            if end.is_ok() {
                self.publish(share.sequence)?;
            }
        }
        let mut ended: Vec<_> = shares.iter().map(|share| share.sequence).zip(ends).collect();
        ended.sort_unstable_by_key(|(index, _)| std::cmp::Reverse(*index));
        for (index, end) in ended {
            if let Some(end) = end.transpose() {
                self.end(index, end);
            }
        }
        Ok(generated)
    }

    /// Makes a sequence's full blocks findable, in memory and on disk.
    fn publish(&mut self, index: usize) -> Result<(), EngineError> {
        let sequence = &mut self.running[index];
        let Published { new_blocks, exchanged } = sequence.publish(&mut self.prefix_cache, &mut self.pool);
        if !exchanged.is_empty() {
            self.exchanged_blocks(index, &exchanged);
        }
        if self.disk_cache.is_none() || new_blocks.is_empty() {
            return Ok(());
        }
        // What is written has all its rows.
        self.settle_head()?;
        let sequence = &mut self.running[index];
        let Some(disk_cache) = &self.disk_cache else { return Ok(()) };
        for (block, hash) in new_blocks.into_iter().filter(|(_, hash)| !disk_cache.contains(hash)) {
            let rows = self.block_rows.read(sequence.blocks[block], self.backend.as_mut())?;
            let block_size = self.limits.block_size;
            disk_cache.write(&hash, &sequence.tokens[block * block_size..(block + 1) * block_size], &rows);
        }
        Ok(())
    }

    fn end(&mut self, index: usize, end: Result<FinishReason, RequestError>) {
        let mut sequence = self.running.remove(index);
        if let Some(speculation) = &mut self.speculation {
            speculation.end(&mut sequence);
        }
        match end {
            Ok(reason) => {
                sequence.release(&mut self.prefix_cache, &mut self.pool);
                match reason {
                    FinishReason::Stop => self.stats.finished_stop += 1,
                    FinishReason::Length => self.stats.finished_length += 1,
                    FinishReason::Cancelled => self.stats.cancelled += 1,
                }
                let finished = sequence.finished(reason);
                sequence.events.send(Event::Finished(finished));
            }
            Err(error) => {
                tracing::warn!(id = sequence.id, %error, "request failed");
                if matches!(error, RequestError::Logits { .. }) {
                    sequence.forget(&mut self.prefix_cache, &mut self.pool);
                } else {
                    sequence.release(&mut self.prefix_cache, &mut self.pool);
                }
                self.stats.failed += 1;
                sequence.events.send(Event::Failed(error));
            }
        }
    }

    fn observe(&mut self, num_tokens: usize, decodes: usize, drafts: usize, generated: usize, started: Instant) {
        let now = Instant::now();
        let elapsed = now - started;
        let decode_rows = decodes + drafts;
        let prefill_rows = num_tokens.saturating_sub(decode_rows);
        self.settle(decodes, drafts, prefill_rows, elapsed.as_secs_f64());
        self.governor.observe(decode_rows, prefill_rows, elapsed.as_secs_f64());
        self.prefill_rate.add(prefill_rows, now);
        self.stats.prefill_tokens += prefill_rows as u64;
        self.stats.generated_tokens += generated as u64;
        self.generated_rate.add(generated, now);
        self.stats.steps += 1;
        self.stats.last_step = elapsed;
        self.stats.last_step_tokens = num_tokens;
        self.stats.failures_in_a_row = 0;
    }
}

/// What the device chose of the rows of a step.
struct Chosen {
    /// One a row of logits, where it was asked to.
    drawn: Vec<Option<Drawn>>,
    /// The largest logits of all rows, once any is wanted.
    largest: Option<Vec<u32>>,
}

/// What a share gave.
struct Outcome {
    /// In order; all but the last were drafted.
    tokens: Vec<SampledToken>,
    end: Result<Option<FinishReason>, RequestError>,
}

/// A draft model must speak of the same tokens and slots.
fn check_draft_model(model: &Decoder, draft: &Decoder) -> Result<(), EngineError> {
    let (sizes, own) = (model.options(), draft.options());
    let pairs = [
        ("vocab_size", draft.config().vocab_size, model.config().vocab_size),
        ("block_size", own.block_size, sizes.block_size),
        ("num_blocks", own.num_blocks, sizes.num_blocks),
        ("max_context", own.max_context, sizes.max_context),
        ("max_batch_tokens", own.max_batch_tokens, sizes.max_batch_tokens),
        ("max_sequences", own.max_sequences, sizes.max_sequences),
        ("max_logit_rows", own.max_logit_rows, sizes.max_logit_rows),
    ];
    match pairs.into_iter().find(|(_, found, expected)| found != expected) {
        Some((what, found, expected)) => Err(EngineError::DraftModel { what, found, expected }),
        None => Ok(()),
    }
}
