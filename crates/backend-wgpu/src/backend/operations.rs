//! The operations that are a kernel each: which one, with which arguments, on which grid.

use super::forms::{Parts, Writes};
use super::products::WeightRef;
use super::{DeviceCache, MOST_ARRIVALS, WgpuBackend, place};
use crate::device::device_error;
use crate::kernels::{Kernel, Weights, team_rows};
use moellon_ops::program::Op;
use moellon_ops::{
    Add, Argmax, CacheDtype, Embed, GatherRows, IndexTopk, KvStore, LayerNorm, Linear, Result, RmsNorm, Rope,
    RopePairs, RopeTable, Route, Scoring, Tensor, Weight,
};

impl WgpuBackend {
    /// Launches an operation whose contract was checked.
    pub(super) fn execute(&mut self, op: &Op) -> Result<()> {
        match op {
            Op::Embed(op) => self.embed_now(op),
            Op::RopeTable(op) => self.rope_table_now(op),
            Op::RmsNorm(op) => self.rms_norm_now(op),
            Op::LayerNorm(op) => self.layer_norm_now(op),
            Op::Linear { x, parts } => self.linear_parts(&Linear { x: *x, parts }),
            Op::LinearHeads(op) => self.product_of_heads(op),
            Op::Rope(op) => self.rope_now(op),
            Op::KvStore { parts, slots, cache } => self.kv_store_now(&KvStore { parts, slots: *slots, cache: *cache }),
            Op::AttendGqa(op) => self.attend_heads(op),
            Op::AttendMla(op) => self.attend_latent(op),
            Op::IndexScore(op) => self.score_positions(op),
            Op::IndexTopk(op) => self.index_topk_now(op),
            Op::Route(op) => self.route_now(op),
            Op::MoeGateUp(op) => self.experts_gate_up(op),
            Op::MoeDown(op) => self.experts_down(op, false),
            Op::GateUp(op) => self.dense_gate_up(op),
            Op::Add(op) => self.add_now(op),
            Op::GatherRows(op) => self.gather_rows_now(op),
            Op::Argmax(op) => self.argmax_now(op),
            // `Caps::samples` says so.
            Op::Sample(_) => Err(device_error("this back end draws no tokens")),
        }
    }

    pub(super) fn embed_now(&mut self, op: &Embed) -> Result<()> {
        let (ids, out) = (self.memory(op.token_ids)?, self.output(op.out)?);
        let table = &self.weights[op.table.id as usize];
        let (code, chunks, extra) = (table.code, table.chunks, table.extra.clone());
        let rest = [table.block_columns as u32, table.scale_words as u32, u32::from(table.has_global)];
        let shards: Vec<_> = table
            .shards
            .iter()
            .map(|s| (s.codes.clone(), s.scales.clone(), [s.first_row as u32, s.num_rows as u32]))
            .collect();
        for (codes, scales, [first_row, num_rows]) in shards {
            let [out_offset, out_stride] = place(op.out);
            let head = [op.token_ids.offset as u32, out_offset, out_stride, op.out.cols as u32, chunks as u32];
            let arguments = [&head[..], &[first_row, num_rows], &rest[..]].concat();
            let grid = [chunks.div_ceil(64), op.token_ids.cols, 1];
            self.run(Kernel::Embed(code), &[&out, &ids, &codes, &scales, &extra], &arguments, grid)?;
        }
        Ok(())
    }

    pub(super) fn rope_table_now(&mut self, op: &RopeTable) -> Result<()> {
        let (positions, inverse) = (self.memory(op.positions)?, self.memory(op.inverse_frequencies)?);
        let table = self.output(op.table)?;
        let [offset, stride] = place(op.table);
        let arguments = [
            op.positions.offset as u32,
            op.inverse_frequencies.offset as u32,
            offset,
            stride,
            (op.table.cols / 2) as u32,
            op.scale.to_bits(),
        ];
        self.run(Kernel::RopeTable, &[&positions, &inverse, &table], &arguments, [op.table.rows, 1, 1])
    }

    pub(super) fn rms_norm_now(&mut self, op: &RmsNorm) -> Result<()> {
        self.norm(op, true)
    }

    /// `rows`: whether anybody reads the result as rows.
    pub(super) fn norm(&mut self, op: &RmsNorm, rows: bool) -> Result<()> {
        let x = if op.delta.is_some() { self.output(op.x)? } else { self.memory(op.x)? };
        let (delta, [delta_offset, delta_stride]) = self.optional(op.delta, &x)?;
        let (weight, mut out) = (self.memory(op.weight)?, self.output_forms(op.out, Writes::Both)?);
        if !rows && self.has_every_form(op.out) {
            out = out.without_rows();
        }
        let [x_offset, x_stride] = place(op.x);
        let [out_offset, out_stride] = place(op.out);
        let mut arguments = vec![x_offset, x_stride, delta_offset, delta_stride, out_offset, out_stride];
        arguments.extend([op.weight.offset as u32, op.x.cols as u32, u32::from(op.delta.is_some()), op.eps.to_bits()]);
        arguments.extend(out.arguments);
        // Who writes where others read has the row alone.
        let is_alone = op.delta.is_some() || (out.has_rows() && op.out.buffer.id == op.x.buffer.id);
        let groups = if is_alone { 1 } else { op.x.cols.div_ceil(256) };
        let memories = [&x, &delta, &out.memory, &out.floats, &out.integers, &weight];
        self.run(Kernel::RmsNorm, &memories, &arguments, [groups, op.x.rows, 1])
    }

    pub(super) fn layer_norm_now(&mut self, op: &LayerNorm) -> Result<()> {
        let (x, weight, bias) = (self.memory(op.x)?, self.memory(op.weight)?, self.memory(op.bias)?);
        let out = self.output(op.out)?;
        let ([x_offset, x_stride], [out_offset, out_stride]) = (place(op.x), place(op.out));
        let arguments = [
            x_offset,
            x_stride,
            out_offset,
            out_stride,
            op.weight.offset as u32,
            op.bias.offset as u32,
            op.x.cols as u32,
            op.eps.to_bits(),
        ];
        self.run(Kernel::LayerNorm, &[&x, &out, &weight, &bias], &arguments, [op.x.rows, 1, 1])
    }

    pub(super) fn rope_now(&mut self, op: &Rope) -> Result<()> {
        let (table, x) = (self.memory(op.table)?, self.rotated(op)?);
        let ([x_offset, x_stride], [table_offset, table_stride]) = (place(op.x), place(op.table));
        let half = op.table.cols / 2;
        let arguments = [
            x_offset,
            x_stride,
            table_offset,
            table_stride,
            op.num_heads as u32,
            op.head_stride as u32,
            half as u32,
            u32::from(op.pairs == RopePairs::Interleaved),
        ];
        self.run(Kernel::Rope, &[&x, &table], &arguments, [(op.num_heads * half).div_ceil(128), op.x.rows, 1])
    }

    pub(super) fn kv_store_now(&mut self, op: &KvStore<'_>) -> Result<()> {
        if op.parts.len() > 4 {
            return Err(device_error(format!("{} parts of a cache row, expected at most 4", op.parts.len())));
        }
        let slots = self.memory(op.slots)?;
        let DeviceCache { memory: cache, row_words } = &self.caches[op.cache.id as usize];
        let (cache, row_words) = (cache.clone(), *row_words);
        let mut memories = Vec::new();
        let mut arguments = Vec::new();
        let mut end = 0;
        for i in 0..4 {
            let (memory, view) = self.optional(op.parts.get(i).copied(), &cache)?;
            memories.push(memory);
            end += op.parts.get(i).map_or(0, |part| part.cols);
            arguments.extend(view);
            if i < 3 {
                arguments.push(end as u32);
            }
        }
        let is_bf16 = u32::from(op.cache.dtype == CacheDtype::Bf16);
        arguments.extend([op.slots.offset as u32, op.cache.width as u32, row_words as u32, is_bf16]);
        let [a, b, c, d] = &memories[..] else { unreachable!("four parts were pushed") };
        let grid = [row_words.div_ceil(128), op.slots.cols, 1];
        self.run(Kernel::KvStore, &[a, b, c, d, &slots, &cache], &arguments, grid)
    }

    pub(super) fn index_topk_now(&mut self, op: &IndexTopk) -> Result<()> {
        let (scores, positions) = (self.memory(op.scores)?, self.memory(op.positions)?);
        let (ids, counts) = (self.output(op.ids)?, self.output(op.counts)?);
        let ([scores_offset, scores_stride], [ids_offset, ids_stride]) = (place(op.scores), place(op.ids));
        let arguments = [
            scores_offset,
            scores_stride,
            op.positions.offset as u32,
            ids_offset,
            ids_stride,
            op.counts.offset as u32,
            op.ids.cols as u32,
        ];
        self.run(Kernel::IndexTopk, &[&scores, &positions, &ids, &counts], &arguments, [op.scores.rows, 1, 1])
    }

    pub(super) fn route_now(&mut self, op: &Route) -> Result<()> {
        let rest = self.route_arguments(op)?;
        let logits = self.memory(op.logits)?;
        let (bias, [bias_offset, _]) = self.optional(op.correction_bias, &logits)?;
        let (ids, weights) = (self.output(op.ids)?, self.output(op.weights)?);
        let ([ids_offset, ids_stride], [weights_offset, weights_stride]) = (place(op.ids), place(op.weights));
        let places = [bias_offset, ids_offset, ids_stride, weights_offset, weights_stride];
        let arguments = [&place(op.logits)[..], &places, &rest].concat();
        self.run(Kernel::Route, &[&logits, &bias, &ids, &weights], &arguments, [op.logits.rows, 1, 1])
    }

    /// What a choice needs to know beside where everything lies.
    fn route_arguments(&self, op: &Route) -> Result<[u32; 8]> {
        let (num_experts, top_k) = (op.logits.cols, op.ids.cols);
        if num_experts > 1024 || top_k > 64 || op.n_group > 256 {
            return Err(device_error(format!(
                "{num_experts} experts in {} groups, {top_k} of them a token: expected at most 1024, 256 and 64",
                op.n_group
            )));
        }
        Ok([
            num_experts as u32,
            top_k as u32,
            match op.scoring {
                Scoring::Sigmoid => 0,
                Scoring::SoftmaxThenTopk => 1,
                Scoring::TopkThenSoftmax => 2,
            },
            op.n_group as u32,
            op.topk_group as u32,
            u32::from(op.correction_bias.is_some()),
            u32::from(op.norm_topk_prob),
            op.routed_scaling_factor.to_bits(),
        ])
    }

    /// Whether one row's router and its choice can be one kernel.
    pub(super) fn can_choose_at_once(&self, x: Tensor, router: Weight, logits: Tensor, op: &Route) -> bool {
        let in_one_piece = self.weight(WeightRef::Linear(router)).shards.len() == 1;
        self.device.orders_memory && x.rows == 1 && op.logits == logits && in_one_piece
    }

    /// The product that makes one row's logits, and [`WgpuBackend::route_now`].
    pub(super) fn router(&mut self, x: Tensor, router: Weight, op: &Route) -> Result<()> {
        let rest = self.route_arguments(op)?;
        let weight = WeightRef::Linear(router);
        let x = self.spread(x, Parts::whole(x), self.weight(weight).code)?;
        let logits = self.output(op.logits)?;
        let (bias, [bias_offset, _]) = self.optional(op.correction_bias, &logits)?;
        let (ids, weights) = (self.output(op.ids)?, self.output(op.weights)?);
        let ([ids_offset, ids_stride], [weights_offset, weights_stride]) = (place(op.ids), place(op.weights));
        let w = self.weight(weight);
        let groups = w.rows.div_ceil(team_rows(Weights::One, 1)).div_ceil(256 / w.lanes);
        let product = [
            w.chunks,
            w.block_columns,
            w.scale_words,
            w.rows,
            w.lanes,
            groups,
            w.has(),
            w.bias_offset(),
            op.logits.offset,
        ];
        let places = [bias_offset, ids_offset, ids_stride, weights_offset, weights_stride];
        let arguments = [&product.map(|n| n as u32)[..], &places, &rest].concat();
        let code = w.code;
        let [codes, scales, extra] = self.first_shard(router);
        let arrivals = self.arrivals.clone();
        let memories = [&logits, &bias, &ids, &weights, &arrivals, &x.memory, &codes, &scales, &extra];
        self.run(Kernel::Router(code), &memories, &arguments, [groups, 1, 1])
    }

    pub(super) fn add_now(&mut self, op: &Add) -> Result<()> {
        let (y, x) = (self.memory(op.y)?, self.output(op.x)?);
        let arguments = [place(op.x), place(op.y)].concat();
        let arguments = [&arguments[..], &[op.x.cols as u32]].concat();
        self.run(Kernel::Add, &[&x, &y], &arguments, [op.x.cols.div_ceil(256), op.x.rows, 1])
    }

    pub(super) fn gather_rows_now(&mut self, op: &GatherRows) -> Result<()> {
        let (x, rows, out) = (self.memory(op.x)?, self.memory(op.rows)?, self.output(op.out)?);
        let ([x_offset, x_stride], [out_offset, out_stride]) = (place(op.x), place(op.out));
        let arguments = [x_offset, x_stride, op.rows.offset as u32, out_offset, out_stride, op.x.cols as u32];
        self.run(Kernel::GatherRows, &[&x, &rows, &out], &arguments, [op.x.cols.div_ceil(256), op.rows.cols, 1])
    }

    pub(super) fn argmax_now(&mut self, op: &Argmax) -> Result<()> {
        const PART_COLUMNS: usize = 1024;
        let (rows, num_parts) = (op.logits.rows, op.logits.cols.div_ceil(PART_COLUMNS));
        let (logits, out) = (self.memory(op.logits)?, self.output(op.out)?);
        let parts = self.parts.get("parts of rows", (8 * rows * num_parts) as u64, &mut self.device)?;
        let [offset, stride] = place(op.logits);
        let arguments = [offset, stride, op.logits.cols as u32, num_parts as u32];
        if self.device.orders_memory && rows <= MOST_ARRIVALS {
            let arguments = [&arguments[..], &place(op.out)].concat();
            let memories = [&parts, &out, &self.arrivals.clone(), &logits];
            return self.run(Kernel::ArgmaxAtOnce, &memories, &arguments, [num_parts, rows, 1]);
        }
        self.run(Kernel::ArgmaxPart, &[&parts, &logits], &arguments, [num_parts, rows, 1])?;
        let [offset, stride] = place(op.out);
        self.run(Kernel::Argmax, &[&out, &parts], &[offset, stride, num_parts as u32], [rows, 1, 1])
    }
}
