//! Whose turn it is in attention: units of heads and tokens that threads take, and the loops over chunks of a context.
//!
//! A prefill's neighbouring tokens attend to nearly the same rows, so a unit holds several of them and goes through the
//! context once: chunk by chunk, and in each chunk token by token, while the chunk's rows stay in L2. A token's chunks
//! are its own (they start at its first position), so its result does not depend on who shares the unit.
//!
//! `unsafe`: threads write disjoint heads of the output.
#![allow(unsafe_code)]

use crate::attention::{CHUNK, Heads, KeysAndValues, attend_chunk, heads_floats};
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
/// Floats of queries and sums of a unit of several tokens, about: they and a chunk's rows share L2.
const UNIT_FLOATS: usize = 40 * 1024;

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
    /// `[num_tokens][num_key_heads * heads_per_key * value_dim]`
    pub(crate) out: Floats,
}

/// One token of a unit: its positions in order are `first + i`, or `chosen[i]`.
struct Token<'a> {
    number: usize,
    heads: Heads<'a>,
    blocks: &'a [u32],
    chosen: Option<&'a [u32]>,
    first: usize,
    num_keys: usize,
}

/// Slots of the chunk of the token before, mostly those of the next one too.
struct ChunkSlots {
    slots: [u32; CHUNK],
    count: usize,
    /// The block table and the first position that they are of.
    of: Option<(*const u32, usize)>,
}

impl ChunkSlots {
    /// Slots of `token`'s positions from `start` on, and whether they were asked for before.
    fn of_token(&mut self, pages: &Pages, token: &Token<'_>, start: usize) -> (&[u32], bool) {
        let count = CHUNK.min(token.num_keys - start);
        if let Some(chosen) = token.chosen {
            for (slot, position) in self.slots.iter_mut().zip(&chosen[start..start + count]) {
                *slot = pages.slot(token.blocks, *position as usize);
            }
            self.of = None;
            return (&self.slots[..count], false);
        }
        let of = (token.blocks.as_ptr(), token.first + start);
        let known = self.of == Some(of);
        if !known {
            (self.of, self.count) = (Some(of), 0);
        }
        for i in self.count..count {
            self.slots[i] = pages.slot(token.blocks, token.first + start + i);
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
        let unit_tokens = if self.num_tokens > UNIT_TOKENS { UNIT_TOKENS } else { 1 };
        let token_blocks = self.num_tokens.div_ceil(unit_tokens);
        // A unit has all heads of a key head, unless that leaves threads without work or is too much for L2.
        let head_groups = self.heads_per_key.div_ceil(UNIT_HEADS);
        let for_threads = pool.num_threads().div_ceil((token_blocks * self.num_key_heads).max(1));
        let group_floats = unit_tokens * heads_floats(UNIT_HEADS, self.dims[0], self.dims[1]);
        let for_l2 = if unit_tokens == 1 { 1 } else { head_groups.div_ceil((UNIT_FLOATS / group_floats).max(1)) };
        let head_parts = for_threads.max(for_l2).min(head_groups);
        let unit_heads = head_groups.div_ceil(head_parts) * UNIT_HEADS;
        let floats = unit_tokens * heads_floats(unit_heads, self.dims[0], self.dims[1]);
        let space = scratch.per_thread(pool.num_threads(), floats);
        queues.fill(token_blocks * self.num_key_heads * head_parts, pool.num_threads());
        let queues = &*queues;
        pool.run(|index, _| {
            // SAFETY: each thread takes its own part.
            let space = unsafe { space.part(index) };
            // Pieces of one key head and part of its heads are neighbours: a thread keeps its rows in L2.
            while let Some(unit) = queues.take(index) {
                let (heads, block) = (unit / token_blocks, unit % token_blocks);
                let (key_head, part) = (heads / head_parts, heads % head_parts);
                let groups = partition(head_groups, head_parts, part, 1);
                let end = (groups.end * UNIT_HEADS).min(self.heads_per_key);
                let heads = groups.start * UNIT_HEADS..end;
                let tokens = block * unit_tokens..((block + 1) * unit_tokens).min(self.num_tokens);
                self.unit(key_head, heads, tokens, space);
            }
        });
    }

    /// Heads `heads` of a key head and tokens `tokens`.
    fn unit(&self, key_head: usize, heads: Range<usize>, tokens: Range<usize>, mut space: &mut [f32]) {
        let shared = (self.keys)(key_head);
        let first_head = key_head * self.heads_per_key + heads.start;
        let [key_dim, value_dim] = self.dims;
        let mut unit: [Option<Token<'_>>; UNIT_TOKENS] = [const { None }; UNIT_TOKENS];
        for (slot, number) in unit.iter_mut().zip(tokens) {
            let (part, rest) = space.split_at_mut(heads_floats(heads.len(), key_dim, value_dim));
            space = rest;
            let sinks = self.sinks.map(|sinks| &sinks[first_head..][..heads.len()]);
            let mut state = Heads::new(part, heads.len(), self.dims, sinks);
            for head in 0..heads.len() {
                (self.write_query)(number, first_head + head, state.query_mut(head, key_dim));
            }
            let (position, chosen) = (self.pages.position(number), (self.chosen)(number));
            let first = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let num_keys = chosen.map_or(position + 1 - first, <[u32]>::len);
            *slot = Some(Token { number, heads: state, blocks: self.pages.blocks(number), chosen, first, num_keys });
        }
        let longest = unit.iter().flatten().map(|token| token.num_keys).max().unwrap_or(0);
        let mut slots = ChunkSlots { slots: [0; CHUNK], count: 0, of: None };
        for start in (0..longest).step_by(CHUNK) {
            for token in unit.iter_mut().flatten().filter(|token| start < token.num_keys) {
                let (slots, known) = slots.of_token(&self.pages, token, start);
                attend_chunk(self.level, &shared, self.scale, &mut token.heads, slots, !known);
            }
        }
        for token in unit.iter().flatten() {
            for head in 0..heads.len() {
                // SAFETY: units are different heads or tokens.
                let out = unsafe { self.out.part_mut(token.number, (first_head + head) * value_dim, value_dim) };
                token.heads.write_average(head, out);
            }
        }
    }
}
