//! Whose turn it is in attention: units of heads and tokens that threads take, and the loops over chunks of a context.
//!
//! A prefill's neighbouring tokens attend to nearly the same rows, so a unit holds several of them and goes through the
//! context once: chunk by chunk, and in each chunk token by token, while the chunk's rows stay in L2. A token's chunks
//! are its own (they start at its first position), so its result does not depend on who shares the unit.
//!
//! Where a step has fewer tokens and key heads than there are threads, a unit is a part of a context: threads that took
//! heads instead would all read the same rows. Parts of a token are joined by whoever is there after a barrier, in the order
//! in which one thread would have joined them.
//!
//! `unsafe`: threads write disjoint heads of the output.
#![allow(unsafe_code)]

use crate::attention::{CHUNK, Heads, KeysAndValues, PART_KEYS, Sums, heads_floats, sums_floats};
use crate::chunk_rows::{ChunkRows, query_floats};
use crate::memory::Floats;
use crate::paged::Pages;
use crate::scratch::Scratch;
use crate::simd::Level;
use crate::work::Queues;
use moellon_tensor::pool::{Pool, partition};
use std::ops::Range;

/// Tokens of a unit, where a batch has more.
const UNIT_TOKENS: usize = 8;
/// Heads that kernels take at once: units hold multiples, except the last of a key head.
const UNIT_HEADS: usize = 4;
/// The same for tile registers, which have only whole tiles.
const TILE_HEADS: usize = 16;
/// Heads that read a row at once, at most ([`crate::attention`]): with more of them, or several tokens, rows are widened first.
const WIDE_HEADS: usize = 8;
/// Floats of queries and sums of a unit of several tokens, about: they and a chunk's rows share L2.
const UNIT_FLOATS: usize = 40 * 1024;
/// The same for tile registers: the more heads and tokens multiply a chunk, the less it costs to make tiles of it.
const TILE_UNIT_FLOATS: usize = 256 * 1024;

/// What attention is over, for both kinds.
pub(crate) struct Attend<'a, K, C, Q> {
    pub(crate) level: Level,
    pub(crate) scale: f32,
    pub(crate) num_tokens: usize,
    /// Key heads, and query heads of each.
    pub(crate) num_key_heads: usize,
    pub(crate) heads_per_key: usize,
    /// Elements of a key and of a value.
    pub(crate) dims: [usize; 2],
    pub(crate) pages: Pages,
    /// Positions that a token sees, itself included.
    pub(crate) window: Option<usize>,
    /// One logit a query head.
    pub(crate) sinks: Option<&'a [f32]>,
    /// `keys(key_head)`
    pub(crate) keys: K,
    /// `chosen(token)`: the only positions that it sees, if not all.
    pub(crate) chosen: C,
    /// `write_query(token, head, to)`
    pub(crate) write_query: Q,
    /// Whether tile registers multiply; only if [`crate::chunk_rows::tiles_fit`].
    pub(crate) tiles: bool,
    /// `[num_tokens][num_key_heads * heads_per_key * value_dim]`
    pub(crate) out: Floats,
}

/// How work is cut into units.
#[derive(Clone, Copy)]
struct Split {
    /// Heads of a group.
    group_heads: usize,
    /// Tokens of a unit, and units that all tokens are.
    unit_tokens: usize,
    token_blocks: usize,
    num_key_heads: usize,
    /// Groups of heads of a key head, and units that they are.
    head_groups: usize,
    head_parts: usize,
    /// Parts of the longest context, each a unit; 1 if units have whole contexts.
    context_parts: usize,
}

impl Split {
    fn num_units(&self) -> usize {
        self.token_blocks * self.num_key_heads * self.head_parts * self.context_parts
    }

    /// Heads of a unit, at most.
    fn unit_heads(&self) -> usize {
        self.head_groups.div_ceil(self.head_parts) * self.group_heads
    }
}

/// What one thread does at a time.
struct Unit {
    key_head: usize,
    /// Of the key head.
    heads: Range<usize>,
    tokens: Range<usize>,
    /// Which part of the context; 0 for a whole one.
    part: usize,
}

/// What a token sees: its positions in order are `first + i`, or `chosen[i]`.
struct Context<'a> {
    blocks: &'a [u32],
    chosen: Option<&'a [u32]>,
    first: usize,
    num_keys: usize,
}

/// One token of a unit.
struct Token<'a> {
    number: usize,
    heads: Heads<'a>,
    /// The parts before the current one, if there are any.
    joined: Sums<'a>,
    parts_joined: usize,
    context: Context<'a>,
}

impl Token<'_> {
    /// Joins the current part to those before; the next one begins.
    fn end_part(&mut self, level: Level) {
        if self.parts_joined == 0 {
            self.joined.copy_from(&self.heads.sums);
        } else {
            self.joined.join(level, &self.heads.sums);
        }
        self.parts_joined += 1;
        self.heads.sums.clear(None);
    }
}

/// Slots of the chunk of the token before, mostly those of the next one too.
struct ChunkSlots {
    slots: [u32; CHUNK],
    count: usize,
    /// The block table and the first position that they are of.
    of: Option<(*const u32, usize)>,
}

impl Default for ChunkSlots {
    fn default() -> Self {
        ChunkSlots { slots: [0; CHUNK], count: 0, of: None }
    }
}

impl ChunkSlots {
    /// Slots of the positions from `start` on that are before `end`, which is their chunk's or further; none where there are none.
    fn before(&mut self, pages: &Pages, context: &Context<'_>, start: usize, end: usize) -> &[u32] {
        if start < end { self.of_context(pages, context, start).0 } else { &[] }
    }

    /// Slots of the positions of `context` from `start` on, and whether they were asked for before.
    fn of_context(&mut self, pages: &Pages, context: &Context<'_>, start: usize) -> (&[u32], bool) {
        let count = CHUNK.min(context.num_keys - start);
        if let Some(chosen) = context.chosen {
            for (slot, position) in self.slots.iter_mut().zip(&chosen[start..start + count]) {
                *slot = pages.slot(context.blocks, *position as usize);
            }
            self.of = None;
            return (&self.slots[..count], false);
        }
        let of = (context.blocks.as_ptr(), context.first + start);
        let known = self.of == Some(of);
        if !known {
            (self.of, self.count) = (Some(of), 0);
        }
        for i in self.count..count {
            self.slots[i] = pages.slot(context.blocks, context.first + start + i);
        }
        self.count = self.count.max(count);
        (&self.slots[..count], known)
    }
}

impl<'a, K, C, Q> Attend<'a, K, C, Q>
where
    K: Fn(usize) -> KeysAndValues + Sync,
    C: Fn(usize) -> Option<&'a [u32]> + Sync,
    Q: Fn(usize, usize, &mut [f32]) + Sync,
{
    /// Runs it on all threads.
    pub(crate) fn run(&self, pool: &Pool, scratch: &mut Scratch, queues: &mut Queues) {
        let num_threads = pool.num_threads();
        let split = self.split(num_threads);
        let space_floats = self.rows_floats(&split) + split.unit_tokens * self.token_floats(split.unit_heads());
        let parts_floats = if split.context_parts == 1 { 0 } else { split.num_units() * self.part_floats(&split) };
        let (space, parts) = scratch.per_thread_and_shared(num_threads, space_floats, parts_floats);
        queues.fill(split.num_units(), num_threads);
        let queues = &*queues;
        pool.run(|index, _| {
            #[cfg(target_arch = "x86_64")]
            let _tiles = crate::simd::amx::Use;
            // SAFETY: each thread takes its own part.
            let space = unsafe { space.part(index) };
            // Pieces of one key head and part of its heads are neighbours: a thread keeps its rows in L2.
            while let Some(number) = queues.take(index) {
                let (rows, space) = space.split_at_mut(self.rows_floats(&split));
                let rows = ChunkRows::new(rows, self.tiles);
                if split.context_parts == 1 {
                    self.whole_contexts(&self.unit(&split, number), rows, space);
                } else {
                    // SAFETY: this unit's part, by the thread that took it; others are read after the barrier.
                    let sums = unsafe { parts.part(self.part_range(&split, number)) };
                    self.part_of_context(&self.unit(&split, number), rows, space, sums);
                }
            }
            if split.context_parts > 1 {
                pool.barrier();
                let contexts = split.num_units() / split.context_parts;
                for context in partition(contexts, num_threads, index, 1) {
                    let first = context * split.context_parts;
                    // SAFETY: written before the barrier; this thread alone joins them.
                    let sums = |part: usize| unsafe { parts.part(self.part_range(&split, first + part)) };
                    self.join_parts(&self.unit(&split, first), sums);
                }
            }
        });
    }

    /// How to share the work among `num_threads` threads.
    fn split(&self, num_threads: usize) -> Split {
        let unit_tokens = if self.num_tokens > UNIT_TOKENS { UNIT_TOKENS } else { 1 };
        let token_blocks = self.num_tokens.div_ceil(unit_tokens);
        let (group_heads, unit_floats) =
            if self.tiles { (TILE_HEADS, TILE_UNIT_FLOATS) } else { (UNIT_HEADS, UNIT_FLOATS) };
        let head_groups = self.heads_per_key.div_ceil(group_heads);
        let whole = Split {
            group_heads,
            unit_tokens,
            token_blocks,
            num_key_heads: self.num_key_heads,
            head_groups,
            head_parts: 1,
            context_parts: 1,
        };
        // A unit has all heads of a key head, unless that is too much for L2.
        let group_floats = unit_tokens * self.token_floats(group_heads);
        let for_l2 = if unit_tokens == 1 { 1 } else { head_groups.div_ceil((unit_floats / group_floats).max(1)) };
        if whole.num_units() >= num_threads {
            return Split { head_parts: for_l2, ..whole };
        }
        let most_keys = (0..self.num_tokens).map(|token| self.context(token).num_keys).max().unwrap_or(0);
        let context_parts = if unit_tokens == 1 { most_keys.div_ceil(PART_KEYS).max(1) } else { 1 };
        let parted = Split { context_parts, ..whole };
        // Heads apart as well, where threads would have no work, or some of them a good deal more than others.
        let is_even = |split: &Split| {
            let most = split.num_units().div_ceil(num_threads) * num_threads;
            8 * (most - split.num_units()) <= split.num_units()
        };
        let mut candidates = (for_l2..=head_groups).map(|head_parts| Split { head_parts, ..parted });
        candidates.find(is_even).unwrap_or(Split { head_parts: head_groups, ..parted })
    }

    /// Unit `number` of all.
    fn unit(&self, split: &Split, number: usize) -> Unit {
        let (rest, part) = (number / split.context_parts, number % split.context_parts);
        let (heads, block) = (rest / split.token_blocks, rest % split.token_blocks);
        let (key_head, head_part) = (heads / split.head_parts, heads % split.head_parts);
        let groups = partition(split.head_groups, split.head_parts, head_part, 1);
        let tokens = block * split.unit_tokens..((block + 1) * split.unit_tokens).min(self.num_tokens);
        let heads = groups.start * split.group_heads..(groups.end * split.group_heads).min(self.heads_per_key);
        Unit { key_head, heads, tokens, part }
    }

    /// What token `token` sees.
    fn context(&self, token: usize) -> Context<'_> {
        let (position, chosen) = (self.pages.position(token), (self.chosen)(token));
        let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
        let num_keys = chosen.map_or(position + 1 - first, <[u32]>::len);
        Context { blocks: self.pages.blocks(token), chosen, first, num_keys }
    }

    /// Floats for keys and values of a chunk as tiles or f32; none where they are so already, or one group of heads alone reads them.
    fn rows_floats(&self, split: &Split) -> usize {
        let groups = split.unit_tokens * split.unit_heads().div_ceil(WIDE_HEADS);
        ChunkRows::num_floats(&(self.keys)(0), self.tiles, split.unit_heads(), groups > 1)
    }

    /// Floats of one token with `num_heads` heads: queries, sums of the current part and of those before.
    fn token_floats(&self, num_heads: usize) -> usize {
        heads_floats(num_heads, query_floats(self.dims[0], self.tiles), self.dims[1])
            + sums_floats(num_heads, self.dims[1])
    }

    /// Floats of a unit's part of a context, whole cache lines.
    fn part_floats(&self, split: &Split) -> usize {
        sums_floats(split.unit_heads(), self.dims[1]).next_multiple_of(16)
    }

    fn part_range(&self, split: &Split, number: usize) -> Range<usize> {
        let floats = self.part_floats(split);
        number * floats..(number + 1) * floats
    }

    /// Token `number` of `unit` with its queries, at the start of `space`, and the rest of it.
    fn token<'s>(
        &'s self,
        unit: &Unit,
        number: usize,
        rows: &mut ChunkRows<'_>,
        space: &'s mut [f32],
    ) -> (Token<'s>, &'s mut [f32]) {
        let (num_heads, [key_dim, value_dim]) = (unit.heads.len(), self.dims);
        let query_floats = query_floats(key_dim, self.tiles);
        let (heads, rest) = space.split_at_mut(heads_floats(num_heads, query_floats, value_dim));
        let (joined, rest) = rest.split_at_mut(sums_floats(num_heads, value_dim));
        let mut heads = Heads::new(heads, num_heads, [query_floats, value_dim]);
        let first_head = unit.key_head * self.heads_per_key + unit.heads.start;
        for head in 0..num_heads {
            let (query, padding) = heads.query_mut(head, query_floats).split_at_mut(key_dim);
            (self.write_query)(number, first_head + head, query);
            padding.fill(0.0);
        }
        rows.pack_queries(self.level, &(self.keys)(unit.key_head), heads.queries);
        // A sink is there before the first position.
        let sinks = self.sinks.filter(|_| unit.part == 0).map(|sinks| &sinks[first_head..][..num_heads]);
        heads.sums.clear(sinks);
        let joined = Sums::new(joined, num_heads, value_dim);
        (Token { number, heads, joined, parts_joined: 0, context: self.context(number) }, rest)
    }

    /// Whole contexts of the unit's tokens.
    fn whole_contexts<'s>(&'s self, unit: &Unit, mut rows: ChunkRows<'_>, mut space: &'s mut [f32]) {
        let shared = (self.keys)(unit.key_head);
        let mut tokens: [Option<Token<'_>>; UNIT_TOKENS] = [const { None }; UNIT_TOKENS];
        for (slot, number) in tokens.iter_mut().zip(unit.tokens.clone()) {
            let (token, rest) = self.token(unit, number, &mut rows, space);
            space = rest;
            *slot = Some(token);
        }
        let longest = tokens.iter().flatten().map(|token| token.context.num_keys).max().unwrap_or(0);
        let (mut slots, mut ahead) = (ChunkSlots::default(), ChunkSlots::default());
        for start in (0..longest).step_by(CHUNK) {
            for token in tokens.iter_mut().flatten().filter(|token| start < token.context.num_keys) {
                if start > 0 && start.is_multiple_of(PART_KEYS) {
                    token.end_part(self.level);
                }
                // Other tokens ask for rows of their own, mostly these.
                let end = if unit.tokens.len() == 1 { token.context.num_keys } else { 0 };
                let next = ahead.before(&self.pages, &token.context, start + CHUNK, end);
                let (slots, known) = slots.of_context(&self.pages, &token.context, start);
                rows.extend(self.level, &shared, slots, known);
                rows.attend(self.level, &shared, self.scale, &mut token.heads, (slots, known), next);
            }
        }
        for token in tokens.iter_mut().flatten() {
            if token.parts_joined > 0 {
                token.end_part(self.level);
            }
            let sums = if token.parts_joined > 0 { &token.joined } else { &token.heads.sums };
            self.write(unit, token.number, sums);
        }
    }

    /// The unit's part of the context of its one token, into `sums`.
    fn part_of_context(&self, unit: &Unit, mut rows: ChunkRows<'_>, space: &mut [f32], sums: &mut [f32]) {
        let shared = (self.keys)(unit.key_head);
        let (mut slots, mut ahead) = (ChunkSlots::default(), ChunkSlots::default());
        let context = self.context(unit.tokens.start);
        let end = ((unit.part + 1) * PART_KEYS).min(context.num_keys);
        rows.fetch(&shared, slots.before(&self.pages, &context, unit.part * PART_KEYS, end));
        let (mut token, _) = self.token(unit, unit.tokens.start, &mut rows, space);
        for start in (unit.part * PART_KEYS..end).step_by(CHUNK) {
            let next = ahead.before(&self.pages, &context, start + CHUNK, end);
            let (slots, _) = slots.of_context(&self.pages, &context, start);
            rows.extend(self.level, &shared, slots, false);
            rows.attend(self.level, &shared, self.scale, &mut token.heads, (slots, false), next);
        }
        Sums::new(sums, unit.heads.len(), self.dims[1]).copy_from(&token.heads.sums);
    }

    /// Joins the parts that `sums(part)` holds, and writes the result.
    fn join_parts<'p>(&self, unit: &Unit, sums: impl Fn(usize) -> &'p mut [f32]) {
        let (num_heads, value_dim) = (unit.heads.len(), self.dims[1]);
        let mut all = Sums::new(sums(0), num_heads, value_dim);
        for part in 1..self.context(unit.tokens.start).num_keys.div_ceil(PART_KEYS) {
            all.join(self.level, &Sums::new(sums(part), num_heads, value_dim));
        }
        self.write(unit, unit.tokens.start, &all);
    }

    /// Writes the unit's heads of token `number`.
    fn write(&self, unit: &Unit, number: usize, sums: &Sums<'_>) {
        let (first_head, value_dim) = (unit.key_head * self.heads_per_key + unit.heads.start, self.dims[1]);
        for head in 0..unit.heads.len() {
            // SAFETY: units are different heads or tokens, and parts of one context are joined by one thread.
            let out = unsafe { self.out.part_mut(number, (first_head + head) * value_dim, value_dim) };
            sums.write_average(head, out);
        }
    }
}
