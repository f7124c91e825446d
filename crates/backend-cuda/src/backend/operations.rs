//! The operations: which kernel, which grid, which scratch memory. One piece: a method an operation, in the order of the trait.

use super::products::{WGMMA, WeightRef, activation_args, gemv_variant, slices};
use super::{COUNTERS, CudaBackend, DOWN_SLOTS, GEMV_ROWS, PARTIAL_BYTES, TILE, WARPS};
use crate::args;
use crate::args::{Mat, Matmul, Part, Routing};
use crate::buffers::{DIGITS_BYTES, Parts};
use crate::driver::{DevicePtr, device_error};
use crate::kernels::ATTENTION_SHARED;
use crate::weights::{format_name, product_suffix, ring_bytes};
use moellon_ops::{
    Activation, Add, Argmax, AttendGqa, AttendMla, CacheDtype, Embed, GateUp, GatherRows, IndexScore, IndexTopk,
    KvStore, LayerNorm, Linear, LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope, RopePairs, RopeTable, Route,
    Sample, Scoring, Tensor, Weight,
};
use moellon_tensor::WeightFormat;

/// Most parts that an attention row of up to `max_keys` keys is cut into: `split_of` of attend.cuh, which has fewer keys a part
/// for shorter rows.
pub(super) fn max_splits(max_keys: usize) -> usize {
    let parts = |keys: usize, split: usize| keys.min(max_keys).div_ceil(split);
    let long = if max_keys > 4096 { max_keys.div_ceil(256) } else { 0 };
    let medium = if max_keys > 1024 { parts(4096, 64) } else { 0 };
    parts(1024, 32).max(medium).max(long).max(1)
}

/// Heads of a block of `attend_mla`.
const MLA_HEADS: u32 = 16;

/// Whether latent attention has the shapes of `attend_mla`. A function of the model, so that all rows take the same way.
fn mla_by_tensor_cores(args: &args::Attend) -> bool {
    let keys = args.q_dim + args.q_rope_dim;
    let by_fours =
        [args.q_dim, args.q.stride, args.q_rope.stride, args.q_rope_stride].iter().all(|n| n.is_multiple_of(4));
    by_fours
        && args.q.p.is_multiple_of(16)
        && args.q_rope.p.is_multiple_of(16)
        && args.values_are_keys == 1
        && args.cache_bf16 == 1
        && args.num_heads.is_multiple_of(MLA_HEADS)
        && keys.is_multiple_of(16)
        && keys <= 1024
        && args.value_dim.is_multiple_of(64)
        && args.value_dim <= 512
        && args.cache_width.is_multiple_of(8)
        && args.key_first.is_multiple_of(8)
}

/// What `attend` of attend_rows.cuh needs: pairs of value columns of a lane, the type of cached rows, shared memory.
pub(super) fn attend_rows_kernel(args: &args::Attend) -> Result<(u32, &'static str, u32)> {
    let Some(lanes) = [64, 128, 256, 512].into_iter().find(|d| *d >= args.value_dim) else {
        return Err(device_error(format!("a value head has {} elements, expected at most 512", args.value_dim)));
    };
    let (dtype, size) = if args.cache_bf16 == 1 { ("bf16", 2) } else { ("f32", 4) };
    let per = 16 / size;
    let padded = (args.q_dim + args.q_rope_dim).next_multiple_of(per);
    let values = if args.values_are_keys == 1 { 0 } else { args.value_dim.next_multiple_of(per) };
    let shared = 4 * args.heads_per_block * padded + size * TILE * (padded + per + values);
    if shared > ATTENTION_SHARED - 1024 {
        return Err(device_error(format!(
            "attention needs {shared} bytes of shared memory for keys of {} elements, expected at most {}",
            args.q_dim + args.q_rope_dim,
            ATTENTION_SHARED - 1024
        )));
    }
    Ok((lanes / 64, dtype, shared))
}

/// Bytes of the parts of one row of attention.
pub(super) fn partial_row_bytes(args: &args::Attend, max_keys: usize) -> usize {
    const HEADER: usize = 4;
    args.num_heads as usize * max_splits(max_keys) * (HEADER + args.value_dim as usize) * 4
}

/// Heads of the two blocks of a row of `attend_prompt`, the most keys of a row, and shared memory (`SHARED_BYTES`): three stages of 64 keys with
/// 320 columns, and what 256 threads give each other.
const PROMPT_HEADS: u32 = 64;
const PROMPT_KEYS: usize = 4096;
const PROMPT_SHARED: u32 = 3 * 64 * 320 * 2 + 256 * (64 + 64 + 16 + 128);

/// Keys of a block of `index_score1_bf16`, twice as many of `index_score2_bf16`; its shared memory: queries of two steps.
const INDEX_KEYS: usize = 128;
const INDEX_SHARED: u32 = 2 * 3 * 32 * 160 * 2;
/// Rows that a block of `index_score2_bf16` goes through.
const INDEX_TOKENS: usize = 16;

/// Threads for a kernel that works on a row of `cols` elements with one block: a function of `cols` alone, for the same reason.
fn row_threads(cols: usize) -> u32 {
    (cols.div_ceil(8).next_multiple_of(32)).clamp(32, 1024) as u32
}

impl CudaBackend {
    /// `out = f(gate, up)` of two scratch matrices.
    pub(super) fn activate(&mut self, gate: Mat, up: Mat, out: Mat, activation: Activation) -> Result<()> {
        let kernel = self.kernels.rows("activate_rows")?;
        let args = args::Activate { gate, up, out, activation: activation_args(activation) };
        self.device.launch(&kernel, [out.cols.div_ceil(256), out.rows, 1], 256, 0, &args)
    }

    /// A kernel that has one block a row.
    pub(super) fn row_kernel<A: Copy>(
        &mut self,
        name: &str,
        rows: usize,
        block: u32,
        shared: u32,
        args: &A,
    ) -> Result<()> {
        let kernel = self.kernels.rows(name)?;
        self.device.launch(&kernel, [rows as u32, 1, 1], block, shared, args)
    }

    /// Attention in parts and their join, a range of rows at a time so that the parts stay within their memory. The result is also written
    /// as digits, a part a head, unless `digits` is 0.
    pub(super) fn attend(
        &mut self,
        whole: args::Attend,
        num_tokens: usize,
        max_keys: usize,
        index_rows: Option<usize>,
        digits: DevicePtr,
    ) -> Result<()> {
        let by_rows = num_tokens > GEMV_ROWS && digits == 0 && self.attends_by_rows(&whole, max_keys);
        if by_rows {
            return self.attend_prompt(whole, num_tokens);
        }
        let chunk = (PARTIAL_BYTES / partial_row_bytes(&whole, max_keys)).clamp(1, num_tokens.max(1));
        let join = self.kernels.attention("attend_join")?;
        for first in (0..num_tokens).step_by(chunk) {
            let rows = chunk.min(num_tokens - first);
            let mut part = whole;
            let skip = |m: Mat| Mat {
                p: if m.p == 0 { 0 } else { m.p + 4 * first as u64 * u64::from(m.stride) },
                twin: if m.twin == 0 { 0 } else { m.twin + 2 * first as u64 * u64::from(m.stride) },
                ..m
            };
            (part.q, part.q_rope, part.out) = (skip(whole.q), skip(whole.q_rope), skip(whole.out));
            part.paging.positions += 4 * first as u64;
            part.paging.sequences += 4 * first as u64;
            if let Some(stride) = index_rows {
                part.index_ids += 4 * (first * stride) as u64;
                part.index_counts += 4 * first as u64;
            }
            self.attend_parts(&mut part, rows, max_keys)?;
            let digits = match digits {
                0 => 0,
                start => start + (first * (whole.num_heads * whole.value_dim / 64) as usize * DIGITS_BYTES) as u64,
            };
            let args = args::Join { attend: part, digits };
            self.device.launch(&join, [whole.num_heads, rows as u32, 1], 64, 0, &args)?;
        }
        Ok(())
    }

    /// Whether the rows of a prompt have two blocks each (`attend_prompt`).
    fn attends_by_rows(&self, args: &args::Attend, max_keys: usize) -> bool {
        self.device.capability == WGMMA
            && mla_by_tensor_cores(args)
            && (args.q_dim, args.q_rope_dim, args.value_dim) == (512, 64, 512)
            && args.num_heads.is_multiple_of(PROMPT_HEADS)
            && max_keys <= PROMPT_KEYS
            && self.kernels.most_shared >= PROMPT_SHARED
    }

    /// Attention for the rows of a prompt, a cluster of two blocks each.
    fn attend_prompt(&mut self, attend: args::Attend, rows: usize) -> Result<()> {
        let args = args::AttendPrompt { attend, num_tokens: rows as u32, pad: 0 };
        let kernel = self.kernels.prompt_attention()?;
        self.device.launch(&kernel, [2 * rows as u32, attend.num_heads / PROMPT_HEADS, 1], 384, PROMPT_SHARED, &args)
    }

    /// The parts of attention for `rows` rows, not joined; fills in where they lie.
    pub(super) fn attend_parts(&mut self, args: &mut args::Attend, rows: usize, max_keys: usize) -> Result<()> {
        let splits = max_splits(max_keys);
        let bytes = (rows * partial_row_bytes(args, max_keys)) as u64;
        args.partial = self.partial.pointer("parts of attention", bytes, &mut self.device)?;
        args.max_splits = splits as u32;
        if mla_by_tensor_cores(args) {
            let stride = args.q_dim + args.q_rope_dim + 8;
            let shared = |tiles: u32| {
                2 * (2 * MLA_HEADS + tiles * TILE) * stride
                    + 2 * MLA_HEADS * 4 * (TILE + 1)
                    + 2 * MLA_HEADS * 2 * (TILE + 8)
            };
            let kernel = self.kernels.attention("attend_mla")?;
            let groups = (args.num_heads / MLA_HEADS) as usize * rows;
            // Where every part has a multiprocessor to itself, a block asks for two tiles of keys at a time.
            let alone =
                groups * splits <= self.device.multiprocessors as usize && shared(2) <= self.kernels.most_shared;
            let shared = shared(if alone { 2 } else { 1 });
            // No more blocks than are resident: one that goes through several parts has its queries already.
            let resident = self.device.resident_blocks(&kernel, 256, shared)?;
            let blocks = (resident / groups).clamp(1, splits);
            return self.device.launch(
                &kernel,
                [blocks as u32, args.num_heads / MLA_HEADS, rows as u32],
                256,
                shared,
                args,
            );
        }
        let (lanes, dtype, shared) = attend_rows_kernel(args)?;
        let kernel = self.kernels.attention(&format!("attend{lanes}_{dtype}"))?;
        let groups = args.num_heads / args.heads_per_block;
        self.device.launch(&kernel, [splits as u32, groups, rows as u32], 256, shared, args)
    }

    pub(super) fn embed_now(&mut self, op: &Embed) -> Result<()> {
        op.validate()?;
        let token_ids = self.address(op.token_ids)?;
        let out = self.output(op.out)?;
        let table = &self.weights[op.table.id as usize];
        let (rows, blocks) = (op.token_ids.cols as u32, op.out.cols.div_ceil(256).min(32) as u32);
        match format_name(table.format) {
            Some(name) => {
                let kernel = self.kernels.pack(&format!("embed_{name}"))?;
                let args = args::EmbedPacked { table: table.packed, token_ids, out };
                self.device.launch(&kernel, [rows, blocks, 1], 256, 0, &args)
            }
            None => {
                let kernel = self.kernels.pack("embed_plain")?;
                let kind = match table.format {
                    WeightFormat::F32 => 0,
                    WeightFormat::F16 => 1,
                    _ => 2,
                };
                let args = args::EmbedPlain { table: table.plain, token_ids, out, cols: table.cols as u32, kind };
                self.device.launch(&kernel, [rows, blocks, 1], 256, 0, &args)
            }
        }
    }

    pub(super) fn rope_table_now(&mut self, op: &RopeTable) -> Result<()> {
        op.validate()?;
        let args = args::RopeTable {
            positions: self.address(op.positions)?,
            inverse_frequencies: self.address(op.inverse_frequencies)?,
            table: self.output(op.table)?,
            scale: op.scale,
            pad: 0,
        };
        self.row_kernel("rope_table", op.table.rows, 32, 0, &args)
    }

    pub(super) fn rms_norm_now(&mut self, op: &RmsNorm) -> Result<()> {
        op.validate()?;
        let delta = self.optional(op.delta)?;
        let weight = self.address(op.weight)?;
        let x = if op.delta.is_some() { self.output(op.x)? } else { self.input(op.x)? };
        let out = self.output(op.out)?;
        let digits = self.buffer(op.out)?.digits_written(op.out);
        // The residual's own twin is never read.
        let args = args::RmsNorm { x: Mat { twin: 0, ..x }, delta, out, weight, digits, eps: op.eps, pad: 0 };
        if op.delta.is_some() {
            self.buffer(op.x)?.written_by_host();
        }
        self.row_kernel("rms_norm", op.x.rows, row_threads(op.x.cols).min(256), 0, &args)
    }

    pub(super) fn layer_norm_now(&mut self, op: &LayerNorm) -> Result<()> {
        op.validate()?;
        let args = args::LayerNorm {
            x: self.input(op.x)?,
            weight: self.address(op.weight)?,
            bias: self.address(op.bias)?,
            out: self.output(op.out)?,
            eps: op.eps,
            pad: 0,
        };
        self.row_kernel("layer_norm", op.x.rows, row_threads(op.x.cols), 0, &args)
    }

    pub(super) fn linear_now(&mut self, op: &Linear<'_>) -> Result<()> {
        op.validate()?;
        let mut rest: Vec<(Weight, Tensor)> = op.parts.to_vec();
        while let Some(first) = rest.first().copied() {
            let format = self.weights[first.0.id as usize].format;
            // Weights of one format share a launch.
            let (same, others): (Vec<_>, Vec<_>) =
                rest.into_iter().partition(|(w, _)| self.weights[w.id as usize].format == format);
            rest = others;
            let x = self.whole_input(op.x, format)?;
            if op.x.rows > GEMV_ROWS && self.takes_wgmma(format) {
                for group in same.chunks(4) {
                    let outputs: Result<Vec<_>> =
                        group.iter().map(|(w, out)| Ok((WeightRef::Linear(*w), self.output(*out)?))).collect();
                    self.prompt_product(&outputs?, x, Routing::default())?;
                }
                continue;
            }
            let fused = product_suffix(format).filter(|_| op.x.rows <= GEMV_ROWS && same.len() > 1);
            let Some(name) = fused else {
                for (weight, out) in same {
                    let out = self.output(out)?;
                    self.product(WeightRef::Linear(weight), x, out, Routing::default())?;
                }
                continue;
            };
            for group in same.chunks(4) {
                let mut args = x.args(op.x.cols, Routing::default());
                args.num_parts = group.len() as u32;
                let mut blocks = 0;
                for (i, (weight, out)) in group.iter().enumerate() {
                    args.part[i] = Part { w: self.weights[weight.id as usize].packed, out: self.output(*out)? };
                    args.first_block[i] = blocks;
                    blocks += weight.rows.div_ceil(16).div_ceil(WARPS / slices(op.x.cols)) as u32;
                    args.first_block[i + 1] = blocks;
                }
                let kernel = self.kernels.matmul(&format!("linear{}_{name}", gemv_variant(op.x.rows)))?;
                self.device.launch(&kernel, [blocks, 1, 1], 256, ring_bytes(format, 1), &args)?;
            }
        }
        Ok(())
    }

    pub(super) fn linear_heads_now(&mut self, op: &LinearHeads) -> Result<()> {
        op.validate()?;
        let format = self.weights[op.weight.id as usize].format;
        let parts = Parts { count: op.weight.count, stride: op.x_head_stride, cols: op.weight.cols };
        let x = self.product_input(op.x, format, parts)?;
        let out = self.output(op.out)?;
        self.product(WeightRef::Linear(op.weight), x, out, Routing::default())
    }

    pub(super) fn rope_now(&mut self, op: &Rope) -> Result<()> {
        op.validate()?;
        let args = args::Rope {
            table: self.input(op.table)?,
            x: self.output(op.x)?,
            num_heads: op.num_heads as u32,
            head_stride: op.head_stride as u32,
            interleaved: u32::from(op.pairs == RopePairs::Interleaved),
            pad: 0,
        };
        let pairs = op.num_heads * op.table.cols / 2;
        let kernel = self.kernels.rows("rope")?;
        self.device.launch(&kernel, [pairs.div_ceil(128) as u32, op.x.rows as u32, 1], 128, 0, &args)
    }

    pub(super) fn kv_store_now(&mut self, op: &KvStore<'_>) -> Result<()> {
        op.validate()?;
        let mut parts = [Mat::default(); 4];
        if op.parts.len() > parts.len() {
            return Err(device_error(format!("{} parts of a cache row, expected at most 4", op.parts.len())));
        }
        for (part, tensor) in parts.iter_mut().zip(op.parts) {
            *part = self.input(*tensor)?;
        }
        let args = args::KvStore {
            parts,
            slots: self.address(op.slots)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            num_parts: op.parts.len() as u32,
            width: op.cache.width as u32,
            is_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            pad: 0,
        };
        self.row_kernel("kv_store", op.slots.cols, row_threads(op.cache.width), 0, &args)
    }

    pub(super) fn attend_gqa_now(&mut self, op: &AttendGqa) -> Result<()> {
        op.validate()?;
        let (args, max_keys) = self.attend_gqa_args(op)?;
        self.attend(args, op.q.rows, max_keys, None, 0)
    }

    /// The arguments of attention with grouped queries, and the most keys that a row has.
    pub(super) fn attend_gqa_args(&mut self, op: &AttendGqa) -> Result<(args::Attend, usize)> {
        let group = op.num_heads / op.num_kv_heads;
        let heads_per_block = (1..=WARPS.min(group)).rev().find(|h| group.is_multiple_of(*h)).unwrap_or(1);
        let args = args::Attend {
            q: self.input(op.q)?,
            q_rope: Mat::default(),
            out: self.output(op.out)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            partial: 0,
            sinks: op.sinks.map_or(Ok(0), |s| self.address(s))?,
            index_ids: 0,
            index_counts: 0,
            paging: self.paging(&op.paging)?,
            index_stride: 0,
            num_heads: op.num_heads as u32,
            heads_per_block: heads_per_block as u32,
            heads_per_key: group as u32,
            q_dim: op.head_dim as u32,
            q_rope_stride: 0,
            q_rope_dim: 0,
            cache_width: op.cache.width as u32,
            cache_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            key_first: 0,
            key_step: op.head_dim as u32,
            value_first: (op.num_kv_heads * op.head_dim) as u32,
            value_step: op.head_dim as u32,
            value_dim: op.head_dim as u32,
            values_are_keys: 0,
            window: op.window.unwrap_or(0) as u32,
            max_splits: 0,
            scale: op.scale,
        };
        let max_keys = op.window.map_or(op.paging.max_context, |w| w.min(op.paging.max_context));
        Ok((args, max_keys))
    }

    pub(super) fn attend_mla_now(&mut self, op: &AttendMla) -> Result<()> {
        op.validate()?;
        let (args, max_keys) = self.attend_mla_args(op)?;
        self.attend(args, op.q_latent.rows, max_keys, op.index.map(|i| i.ids.stride), 0)
    }

    /// The arguments of latent attention, and the most keys that a row has.
    pub(super) fn attend_mla_args(&mut self, op: &AttendMla) -> Result<(args::Attend, usize)> {
        let heads_per_block =
            (1..=WARPS.min(op.num_heads)).rev().find(|h| op.num_heads.is_multiple_of(*h)).unwrap_or(1);
        let (index_ids, index_counts, index_stride) = match op.index {
            Some(index) => (self.address(index.ids)?, self.address(index.counts)?, index.ids.stride),
            None => (0, 0, 0),
        };
        let args = args::Attend {
            q: self.input(op.q_latent)?,
            q_rope: self.input(op.q_rope)?,
            out: self.output(op.out)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            partial: 0,
            sinks: 0,
            index_ids,
            index_counts,
            paging: self.paging(&op.paging)?,
            index_stride: index_stride as u32,
            num_heads: op.num_heads as u32,
            heads_per_block: heads_per_block as u32,
            heads_per_key: op.num_heads as u32,
            q_dim: op.kv_lora_rank as u32,
            q_rope_stride: op.q_rope_head_stride as u32,
            q_rope_dim: op.qk_rope_head_dim as u32,
            cache_width: op.cache.width as u32,
            cache_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            key_first: 0,
            key_step: 0,
            value_first: 0,
            value_step: 0,
            value_dim: op.kv_lora_rank as u32,
            values_are_keys: 1,
            window: 0,
            max_splits: 0,
            scale: op.scale,
        };
        let max_keys = op.index.map_or(op.paging.max_context, |i| i.ids.cols.min(op.paging.max_context));
        Ok((args, max_keys))
    }

    pub(super) fn index_score_now(&mut self, op: &IndexScore) -> Result<()> {
        op.validate()?;
        let args = args::IndexScore {
            q: self.input(op.q)?,
            weights: self.input(op.weights)?,
            scores: self.output(op.scores)?,
            cache: self.caches[op.cache.id as usize].memory.pointer(),
            paging: self.paging(&op.paging)?,
            num_heads: op.num_heads as u32,
            head_dim: op.head_dim as u32,
            cache_bf16: u32::from(op.cache.dtype == CacheDtype::Bf16),
            block_tokens: 1,
            scale: op.scale,
            num_tokens: op.q.rows as u32,
        };
        // A function of the model, so that all rows take the same way.
        let by_tensor_cores = args.cache_bf16 == 1
            && op.head_dim == 128
            && op.num_heads.is_multiple_of(32)
            && args.q.stride.is_multiple_of(4)
            && args.q.p.is_multiple_of(16);
        if by_tensor_cores {
            // A key's score does not depend on which of the two it is made by.
            let many = op.q.rows > GEMV_ROWS;
            let (name, keys, tokens) = if many {
                ("index_score2_bf16", 2 * INDEX_KEYS, INDEX_TOKENS)
            } else {
                ("index_score1_bf16", INDEX_KEYS, 1)
            };
            let args = args::IndexScore { block_tokens: tokens as u32, ..args };
            let kernel = self.kernels.attention(name)?;
            let grid = [op.paging.max_context.div_ceil(keys) as u32, op.q.rows.div_ceil(tokens) as u32, 1];
            return self.device.launch(&kernel, grid, 256, INDEX_SHARED, &args);
        }
        let shared = 4 * (op.num_heads * (op.head_dim + 1) + WARPS * op.head_dim) as u32;
        let kernel = self.kernels.attention("index_score")?;
        let grid = [op.paging.max_context.div_ceil(64) as u32, op.q.rows as u32, 1];
        self.device.launch(&kernel, grid, 256, shared, &args)
    }

    pub(super) fn index_topk_now(&mut self, op: &IndexTopk) -> Result<()> {
        op.validate()?;
        let args = args::IndexTopk {
            scores: self.input(op.scores)?,
            positions: self.address(op.positions)?,
            ids: self.address(op.ids)?,
            counts: self.address(op.counts)?,
            ids_stride: op.ids.stride as u32,
            k: op.ids.cols as u32,
        };
        let name = if op.scores.rows > GEMV_ROWS { "index_topk" } else { "index_topk_few" };
        let kernel = self.kernels.attention(name)?;
        self.device.launch(&kernel, [op.scores.rows as u32, 1, 1], 1024, 0, &args)
    }

    pub(super) fn route_now(&mut self, op: &Route) -> Result<()> {
        op.validate()?;
        if op.ids.cols > 32 {
            return Err(device_error(format!("{} experts a token, expected at most 32", op.ids.cols)));
        }
        self.sorted_for = None;
        let args = self.route_args(op)?;
        let shared = 4 * (2 * op.logits.cols + 2 * op.n_group) as u32;
        self.row_kernel("route", op.logits.rows, 32, shared, &args)
    }

    /// The arguments of a router's choice.
    pub(super) fn route_args(&mut self, op: &Route) -> Result<args::Route> {
        Ok(args::Route {
            logits: self.input(op.logits)?,
            weights: self.output(op.weights)?,
            correction_bias: op.correction_bias.map_or(Ok(0), |b| self.address(b))?,
            ids: self.address(op.ids)?,
            ids_stride: op.ids.stride as u32,
            scoring: match op.scoring {
                Scoring::Sigmoid => 0,
                Scoring::SoftmaxThenTopk => 1,
                Scoring::TopkThenSoftmax => 2,
            },
            n_group: op.n_group as u32,
            topk_group: op.topk_group as u32,
            norm_topk_prob: u32::from(op.norm_topk_prob),
            top_k: op.ids.cols as u32,
            factor: op.routed_scaling_factor,
            pad: 0,
        })
    }

    pub(super) fn moe_gate_up_now(&mut self, op: &MoeGateUp) -> Result<()> {
        op.validate()?;
        let (tokens, top_k, width) = (op.x.rows, op.ids.cols, op.experts.intermediate_size);
        if tokens == 0 {
            return Ok(());
        }
        let x = self.whole_input(op.x, op.experts.gate_format)?;
        let fused = op.experts.gate_format == op.experts.up_format && tokens <= GEMV_ROWS;
        if let Some(name) = product_suffix(op.experts.gate_format).filter(|_| fused) {
            let routing = self.routing(op.ids, false)?;
            let out = self.output(op.out)?;
            let experts = &self.experts[op.experts.id as usize];
            let mut args = x.args(op.experts.hidden_size, routing);
            args.num_parts = 2;
            args.part[0] = Part { w: experts.gate.packed, out };
            args.part[1] = Part { w: experts.up.packed, out };
            args.activation = activation_args(op.activation);
            let kernel = self.kernels.matmul(&format!("gate_up{}_{name}", gemv_variant(tokens)))?;
            let blocks = width.div_ceil(16).div_ceil(WARPS / slices(op.experts.hidden_size)) as u32;
            let shared = ring_bytes(op.experts.gate_format, 2);
            return self.device.launch(&kernel, [blocks, (tokens * top_k) as u32, 1], 256, shared, &args);
        }
        if op.out.stride != op.out.cols && tokens > 1 {
            return Err(device_error(format!(
                "out of moe_gate_up has stride {}, expected {}",
                op.out.stride, op.out.cols
            )));
        }
        let routing = self.sorted_routing(op.ids, op.experts.num_experts, false)?;
        let up_x = self.whole_input(op.x, op.experts.up_format)?;
        let gate = self.scratch(0, tokens * top_k, width)?;
        let up = self.scratch(1, tokens * top_k, width)?;
        let parts = [(WeightRef::Gate(op.experts), gate), (WeightRef::Up(op.experts), up)];
        if op.experts.gate_format == op.experts.up_format && self.takes_wgmma(op.experts.gate_format) {
            self.prompt_product(&parts, x, routing)?;
        } else {
            self.product(parts[0].0, x, gate, routing)?;
            self.product(parts[1].0, up_x, up, routing)?;
        }
        let out = self.output(op.out)?;
        let out = Mat { rows: (tokens * top_k) as u32, cols: width as u32, stride: width as u32, ..out };
        self.activate(gate, up, out, op.activation)
    }

    pub(super) fn moe_down_now(&mut self, op: &MoeDown) -> Result<()> {
        op.validate()?;
        let (tokens, top_k) = (op.h.rows, op.ids.cols);
        if tokens == 0 {
            return Ok(());
        }
        let width = op.experts.intermediate_size;
        let x = self.product_input(op.h, op.experts.down_format, Parts { count: top_k, stride: width, cols: width })?;
        let weights = self.input(op.weights)?;
        let plus = self.optional(op.plus)?;
        let results = (slices(width) * tokens * top_k * 16 * 4) as u32;
        let fused = tokens <= GEMV_ROWS && tokens * top_k <= DOWN_SLOTS;
        if let Some(name) = product_suffix(op.experts.down_format).filter(|_| fused) {
            let routing = self.routing(op.ids, true)?;
            let out = self.output(op.out)?;
            let w = self.experts[op.experts.id as usize].down.packed;
            let mut args = Matmul { weights, plus, ..x.args(width, routing) };
            args.part[0] = Part { w, out };
            let kernel = self.kernels.matmul(&format!("down{}_{name}", gemv_variant(tokens)))?;
            let blocks = op.experts.hidden_size.div_ceil(16) as u32;
            let shared = ring_bytes(op.experts.down_format, 1) + results;
            return self.device.launch(&kernel, [blocks, 1, 1], 256, shared, &args);
        }
        let routing = self.sorted_routing(op.ids, op.experts.num_experts, true)?;
        let y = self.scratch(0, tokens * top_k, op.experts.hidden_size)?;
        self.product(WeightRef::Down(op.experts), x, y, routing)?;
        let out = self.output(op.out)?;
        let args = args::Combine { y, weights, plus, out, top_k: top_k as u32, pad: 0 };
        let kernel = self.kernels.rows("moe_combine")?;
        self.device.launch(&kernel, [out.cols.div_ceil(256), out.rows, 1], 256, 0, &args)
    }

    pub(super) fn gate_up_now(&mut self, op: &GateUp) -> Result<()> {
        op.validate()?;
        let x = self.whole_input(op.x, op.gate.format)?;
        let fused = op.gate.format == op.up.format && op.x.rows <= GEMV_ROWS;
        if let Some(name) = product_suffix(op.gate.format).filter(|_| fused) {
            let out = self.output(op.out)?;
            let mut args = x.args(op.x.cols, Routing::default());
            args.num_parts = 2;
            args.part[0] = Part { w: self.weights[op.gate.id as usize].packed, out };
            args.part[1] = Part { w: self.weights[op.up.id as usize].packed, out };
            args.activation = activation_args(op.activation);
            let kernel = self.kernels.matmul(&format!("gate_up{}_{name}", gemv_variant(op.x.rows)))?;
            let blocks = op.gate.rows.div_ceil(16).div_ceil(WARPS / slices(op.x.cols)) as u32;
            return self.device.launch(&kernel, [blocks, 1, 1], 256, ring_bytes(op.gate.format, 2), &args);
        }
        let up_x = self.whole_input(op.x, op.up.format)?;
        let gate = self.scratch(0, op.x.rows, op.gate.rows)?;
        let up = self.scratch(1, op.x.rows, op.gate.rows)?;
        let parts = [(WeightRef::Linear(op.gate), gate), (WeightRef::Linear(op.up), up)];
        if op.x.rows > GEMV_ROWS && op.gate.format == op.up.format && self.takes_wgmma(op.gate.format) {
            self.prompt_product(&parts, x, Routing::default())?;
        } else {
            self.product(parts[0].0, x, gate, Routing::default())?;
            self.product(parts[1].0, up_x, up, Routing::default())?;
        }
        let out = self.output(op.out)?;
        self.activate(gate, up, out, op.activation)
    }

    pub(super) fn add_now(&mut self, op: &Add) -> Result<()> {
        op.validate()?;
        let args = args::Add { y: self.input(op.y)?, x: self.output(op.x)? };
        let kernel = self.kernels.rows("add")?;
        self.device.launch(&kernel, [op.x.cols.div_ceil(256) as u32, op.x.rows as u32, 1], 256, 0, &args)
    }

    pub(super) fn gather_rows_now(&mut self, op: &GatherRows) -> Result<()> {
        op.validate()?;
        let args = args::Gather { x: self.input(op.x)?, rows: self.address(op.rows)?, out: self.output(op.out)? };
        self.row_kernel("gather_rows", op.rows.cols, 256, 0, &args)
    }

    pub(super) fn argmax_now(&mut self, op: &Argmax) -> Result<()> {
        op.validate()?;
        let (rows, blocks) = (op.logits.rows, op.logits.cols.div_ceil(4096).clamp(1, 32));
        let best = self.scratch[0].pointer("best logits", (8 * rows * blocks) as u64, &mut self.device)?;
        let args = args::Argmax {
            logits: self.input(op.logits)?,
            out: self.address(op.out)?,
            best,
            arrived: self.counters(rows)?,
            out_stride: op.out.stride as u32,
            pad: 0,
        };
        let kernel = self.kernels.rows("argmax")?;
        self.device.launch(&kernel, [rows as u32, blocks as u32, 1], 1024, 0, &args)
    }

    pub(super) fn sample_now(&mut self, op: &Sample) -> Result<()> {
        op.validate()?;
        let args = args::Sample {
            logits: self.input(op.logits)?,
            draws: self.address(op.draws)?,
            out: self.address(op.out)?,
            draws_stride: op.draws.stride as u32,
            out_stride: op.out.stride as u32,
        };
        let kernel = self.kernels.sample("sample")?;
        self.device.launch(&kernel, [op.logits.rows as u32, 1, 1], 1024, 0, &args)
    }

    /// Counters in device memory that are zero between two kernels: each kernel leaves them so.
    pub(super) fn counters(&mut self, count: usize) -> Result<DevicePtr> {
        self.arrived.pointer("counters", 4 * count.max(COUNTERS) as u64, &mut self.device)
    }
}
