//! Attention and the indexer's scores: arguments, grids, partial results.

use super::forms::{Form, OutputForms, Writes};
use super::products::WeightRef;
use super::{WgpuBackend, place};
use crate::device::{Memory, device_error};
use crate::kernels::{JOINED_COLUMNS, Kernel, PAIRS, PAIRS_HEADS, Pairs, VALUE_COLUMNS};
use moellon_ops::{AttendGqa, AttendMla, Cache, CacheDtype, IndexScore, LinearHeads, Paging, Result, Stage, Tensor};

/// Keys of one part of an attention row (`PART` of attend.wgsl).
const PART: usize = 64;
/// Heads of a workgroup (`HEADS`).
const HEADS: usize = 4;
/// Where there are at most so many workgroups adapters have room for more: then every head has workgroups of its own, with the same result.
const FEW_WORKGROUPS: usize = 256;
/// Most parts that workgroups of one head join each for itself.
const MOST_JOINED: usize = 16;
/// Most bytes of partial results at a time.
const PARTIAL_BYTES: usize = 64 << 20;
/// Largest head of an indexer (`keys` of index_score.wgsl).
const INDEX_HEAD: usize = 192;

/// What grouped-query and latent attention differ in.
struct Attend {
    q: Tensor,
    q_rope: Option<Tensor>,
    rope_head_stride: usize,
    out: Tensor,
    cache: Cache,
    num_heads: usize,
    heads_per_key: usize,
    q_dim: usize,
    rope_dim: usize,
    key_step: usize,
    value_first: usize,
    value_dim: usize,
    window: Option<usize>,
    sinks: Option<Tensor>,
    index: Option<moellon_ops::IndexSet>,
    paging: Paging,
    scale: f32,
}

impl WgpuBackend {
    pub(super) fn attend_heads(&mut self, op: &AttendGqa) -> Result<()> {
        let attend = Attend {
            q: op.q,
            q_rope: None,
            rope_head_stride: 0,
            out: op.out,
            cache: op.cache,
            num_heads: op.num_heads,
            heads_per_key: op.num_heads / op.num_kv_heads,
            q_dim: op.head_dim,
            rope_dim: 0,
            key_step: op.head_dim,
            value_first: op.num_kv_heads * op.head_dim,
            value_dim: op.head_dim,
            window: op.window,
            sinks: op.sinks,
            index: None,
            paging: op.paging,
            scale: op.scale,
        };
        self.attend(&attend, None)
    }

    pub(super) fn attend_latent(&mut self, op: &AttendMla) -> Result<()> {
        self.attend(&Self::of_latent(op), None)
    }

    fn of_latent(op: &AttendMla) -> Attend {
        Attend {
            q: op.q_latent,
            q_rope: Some(op.q_rope),
            rope_head_stride: op.q_rope_head_stride,
            out: op.out,
            cache: op.cache,
            num_heads: op.num_heads,
            heads_per_key: op.num_heads,
            q_dim: op.kv_lora_rank,
            rope_dim: op.qk_rope_head_dim,
            key_step: 0,
            value_first: 0,
            value_dim: op.kv_lora_rank,
            window: None,
            sinks: None,
            index: op.index,
            paging: op.paging,
            scale: op.scale,
        }
    }

    /// Whether the join of one token's parts can be one kernel with the product of what it joins. Each workgroup of a head joins it anew,
    /// which few parts are cheap enough for.
    pub(super) fn can_join_heads(&self, op: &AttendMla, heads: &LinearHeads) -> bool {
        let few = Self::num_parts(&Self::of_latent(op)) <= MOST_JOINED;
        let w = self.weight(WeightRef::Linear(heads.weight));
        let values = op.kv_lora_rank;
        let same = heads.x == op.out && heads.x_head_stride == values && heads.weight.cols == values;
        let fits = values.is_multiple_of(32) && values <= JOINED_COLUMNS && heads.weight.count == op.num_heads;
        few && same && fits && op.out.rows == 1 && w.shards.len() == 1
    }

    /// [`WgpuBackend::attend_latent`] and the product of its heads, of `stage`.
    pub(super) fn attend_and_heads(&mut self, op: &AttendMla, heads: &LinearHeads, stage: Stage) -> Result<()> {
        self.attend(&Self::of_latent(op), Some((heads, stage)))
    }

    /// Parts of a row of attention.
    fn num_parts(op: &Attend) -> usize {
        let seen = match (op.index, op.window) {
            (Some(index), _) => index.ids.cols.min(op.paging.max_context),
            (None, Some(window)) => window.min(op.paging.max_context),
            (None, None) => op.paging.max_context,
        };
        seen.div_ceil(PART).max(1)
    }

    /// Cache, positions, sequences and block table: the bindings of paging.wgsl.
    fn paged(&self, cache: Cache, paging: &Paging) -> Result<[Memory; 4]> {
        Ok([
            self.caches[cache.id as usize].memory.clone(),
            self.memory(paging.positions)?,
            self.memory(paging.sequences)?,
            self.memory(paging.block_table)?,
        ])
    }

    /// The kernel for heads of this size, up to `heads` of them a workgroup.
    fn attend_kernel(&self, op: &Attend, heads: usize) -> Result<Kernel> {
        let (keys, values) = (op.q_dim + op.rope_dim, op.value_dim);
        let shared = op.key_step == 0 && op.value_first == 0;
        let even =
            [op.q_dim, op.rope_dim, op.value_dim, op.key_step, op.value_first].iter().all(|n| n.is_multiple_of(2));
        let bf16 = op.cache.dtype == CacheDtype::Bf16;
        let alike = |p: &Pairs| p.shared == shared && p.bf16 == bf16;
        let fits = |p: &Pairs| alike(p) && 64 * p.keys >= keys && 64 * p.values >= values;
        if self.device.self_test.subgroups
            && even
            && let Some(pairs) = PAIRS.into_iter().find(fits)
        {
            return Ok(Kernel::AttendPairs(pairs, if heads == 1 { PAIRS_HEADS[0] } else { PAIRS_HEADS[1] }));
        }
        match VALUE_COLUMNS.into_iter().find(|columns| 32 * columns >= values) {
            Some(columns) => Ok(Kernel::Attend(columns)),
            None => Err(device_error(format!("a value head has {values} elements, expected at most 512"))),
        }
    }

    /// Parts and their join, a range of rows at a time so that the parts stay within their memory.
    /// `heads`: the product that reads them, in the kernel that joins them, and its stage.
    fn attend(&mut self, op: &Attend, heads: Option<(&LinearHeads, Stage)>) -> Result<()> {
        let num_tokens = op.q.rows;
        let num_parts = Self::num_parts(op);
        let mut heads_per_group =
            (1..=HEADS.min(op.heads_per_key)).rev().find(|h| op.heads_per_key.is_multiple_of(*h)).unwrap_or(1);
        if num_parts * op.num_heads / heads_per_group * num_tokens <= FEW_WORKGROUPS {
            heads_per_group = 1;
        }
        let kernel = self.attend_kernel(op, heads_per_group)?;
        let row_bytes = op.num_heads * num_parts * (2 + op.value_dim) * 4;
        let at_once = (PARTIAL_BYTES / row_bytes).clamp(1, num_tokens.max(1));
        let parts = self.parts.get("parts of attention", (at_once * row_bytes) as u64, &mut self.device)?;
        let [cache, positions, sequences, table] = self.paged(op.cache, &op.paging)?;
        let q = self.memory(op.q)?;
        let (rope, _) = self.optional(op.q_rope, &q)?;
        let (ids, _) = self.optional(op.index.map(|i| i.ids), &positions)?;
        let (counts, _) = self.optional(op.index.map(|i| i.counts), &positions)?;
        let (sinks, [sinks_offset, _]) = self.optional(op.sinks, &parts)?;
        // Only a kernel that has all rows can write the other form of the output.
        let out = if at_once < num_tokens || heads.is_some() {
            OutputForms::plain(self.output(op.out)?)
        } else {
            self.output_forms(op.out, Writes::One { whole_columns: op.value_dim })?
        };
        let row_words = self.caches[op.cache.id as usize].row_words;
        for first in (0..num_tokens).step_by(at_once) {
            let rows = at_once.min(num_tokens - first);
            let from = |tensor: Tensor| [(tensor.offset + first * tensor.stride) as u32, tensor.stride as u32];
            let nothing = [0, 0];
            let counts_offset = op.index.map_or(0, |i| (i.counts.offset + first) as u32);
            let positions_offset = (op.paging.positions.offset + first) as u32;
            let window = op.window.unwrap_or(0) as u32;
            let mut arguments = Vec::with_capacity(28);
            arguments.extend(from(op.q));
            arguments.extend(op.q_rope.map_or(nothing, from));
            arguments.extend([op.rope_head_stride, op.q_dim, op.rope_dim, op.num_heads].map(|n| n as u32));
            arguments.extend([heads_per_group, op.heads_per_key, row_words].map(|n| n as u32));
            arguments.push(u32::from(op.cache.dtype == CacheDtype::Bf16));
            arguments.extend([op.key_step, op.value_first, op.key_step, op.value_dim].map(|n| n as u32));
            arguments.extend([window, num_parts as u32, positions_offset]);
            arguments.push((op.paging.sequences.offset + first) as u32);
            arguments.extend(place(op.paging.block_table));
            arguments.push(op.paging.block_size as u32);
            arguments.extend(op.index.map_or(nothing, |i| from(i.ids)));
            arguments.extend([counts_offset, u32::from(op.index.is_some()), op.scale.to_bits()]);
            let memories = [&cache, &positions, &sequences, &table, &q, &rope, &ids, &counts, &parts];
            let grid = [num_parts, op.num_heads / heads_per_group, rows];
            self.run(kernel, &memories, &arguments, grid)?;

            let join = [
                op.num_heads as u32,
                op.value_dim as u32,
                num_parts as u32,
                window,
                positions_offset,
                counts_offset,
                u32::from(op.index.is_some()),
                sinks_offset,
                u32::from(op.sinks.is_some()),
            ];
            if let Some((heads, stage)) = heads {
                self.stage = stage;
                self.join_heads(heads, join, [&parts, &positions, &counts, &sinks])?;
                continue;
            }
            let arguments = [&from(op.out)[..], &join, &out.arguments].concat();
            let memories = [&parts, &positions, &counts, &sinks, &out.memory, out.form()];
            self.run(Kernel::AttendJoin, &memories, &arguments, [op.num_heads, rows, 1])?;
        }
        Ok(())
    }

    fn join_heads(
        &mut self,
        op: &LinearHeads,
        join: [u32; 9],
        [parts, positions, counts, sinks]: [&Memory; 4],
    ) -> Result<()> {
        let x_per_byte = match self.form_for(self.weight(WeightRef::Linear(op.weight)).code) {
            Form::Integers { per_byte } => per_byte as u32,
            Form::Floats => 1,
        };
        let (code, out, more, groups) = self.head_arguments(op, 0)?;
        let arguments = [&join[..], &[x_per_byte], &more].concat();
        let [codes, scales, extra] = self.first_shard(op.weight);
        let memories = [parts, positions, counts, sinks, &out.memory, out.form(), &codes, &scales, &extra];
        self.run(Kernel::JoinHeads(code), &memories, &arguments, [groups, 1, 1])
    }

    pub(super) fn score_positions(&mut self, op: &IndexScore) -> Result<()> {
        if op.head_dim > INDEX_HEAD {
            return Err(device_error(format!(
                "an indexer's head has {} elements, expected at most {INDEX_HEAD}",
                op.head_dim
            )));
        }
        let [cache, positions, sequences, table] = self.paged(op.cache, &op.paging)?;
        let (q, weights, scores) = (self.memory(op.q)?, self.memory(op.weights)?, self.output(op.scores)?);
        let row_words = self.caches[op.cache.id as usize].row_words;
        let mut arguments = [place(op.q), place(op.weights), place(op.scores)].concat();
        arguments.extend([op.num_heads as u32, op.head_dim as u32, row_words as u32]);
        arguments.push(u32::from(op.cache.dtype == CacheDtype::Bf16));
        arguments.extend([op.paging.positions.offset as u32, op.paging.sequences.offset as u32]);
        arguments.extend(place(op.paging.block_table));
        arguments.extend([op.paging.block_size as u32, op.scale.to_bits()]);
        let memories = [&cache, &positions, &sequences, &table, &q, &weights, &scores];
        self.run(Kernel::IndexScore, &memories, &arguments, [op.paging.max_context.div_ceil(32), op.q.rows, 1])
    }
}
