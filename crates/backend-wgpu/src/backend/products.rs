//! Products with weights: work lists of experts, which kernel, which grid.

use super::forms::{Input, OutputForms, Parts, Writes};
use super::{WgpuBackend, place};
use crate::device::{Memory, device_error};
use crate::kernels::{Kernel, TILE_TOKENS, Weights, team_rows};
use crate::weights::DeviceWeight;
use moellon_ops::{Activation, Experts, GateUp, Linear, LinearHeads, MoeDown, MoeGateUp, Result, Tensor, Weight};

/// What a work list was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WorkListKey {
    pub(super) ids: Tensor,
    num_experts: usize,
    item_rows: usize,
}

/// Which rows of x meet which matrices.
#[derive(Clone)]
pub(super) enum Jobs {
    /// Every row with every matrix (one, or heads that are side by side in the output).
    All { num_tokens: usize },
    /// The choices of one token: its ids are the work list.
    OneToken { ids: Memory, offset: usize, top_k: usize, slots_in_x: bool },
    /// Items of a work list.
    List { list: Memory, max_items: usize, item_rows: usize, sorted_offset: usize, top_k: usize, slots_in_x: bool },
}

/// Where sums go: offset, elements between rows and between matrices.
#[derive(Clone)]
pub(super) struct Output {
    pub(super) forms: OutputForms,
    pub(super) offset: usize,
    pub(super) stride: usize,
    pub(super) matrix_step: usize,
    /// Adds to what is there.
    pub(super) adds: bool,
}

impl Output {
    fn of(forms: OutputForms, tensor: Tensor, matrix_step: usize) -> Self {
        Output { forms, offset: tensor.offset, stride: tensor.stride, matrix_step, adds: false }
    }
}

/// A weight among those of the back end.
#[derive(Clone, Copy)]
pub(super) enum WeightRef {
    Linear(Weight),
    Gate(Experts),
    Up(Experts),
    Down(Experts),
}

/// What a product multiplies with.
#[derive(Clone, Copy)]
pub(super) enum Factors {
    One(WeightRef),
    /// Gate and up.
    Pair(WeightRef, WeightRef, Activation),
}

impl Factors {
    pub(super) fn first(self) -> WeightRef {
        match self {
            Factors::One(first) | Factors::Pair(first, ..) => first,
        }
    }

    pub(super) fn second(self) -> Option<(WeightRef, Activation)> {
        match self {
            Factors::One(_) => None,
            Factors::Pair(_, second, activation) => Some((second, activation)),
        }
    }
}

impl WgpuBackend {
    pub(super) fn weight(&self, which: WeightRef) -> &DeviceWeight {
        match which {
            WeightRef::Linear(w) => &self.weights[w.id as usize],
            WeightRef::Gate(e) => &self.experts[e.id as usize].gate,
            WeightRef::Up(e) => &self.experts[e.id as usize].up,
            WeightRef::Down(e) => &self.experts[e.id as usize].down,
        }
    }

    /// Rows of x that weights are read once for: the smallest kernel that takes `rows` of them, or the largest.
    fn tokens_at_once(&self, rows: usize) -> usize {
        let kernels = self.device.tokens();
        kernels.iter().copied().find(|tokens| *tokens >= rows).unwrap_or(kernels[kernels.len() - 1])
    }

    /// One weight, or two that meet in an activation, all shards.
    fn product(&mut self, which: Factors, x: &Input, out: &Output, jobs: &Jobs) -> Result<()> {
        let w = self.weight(which.first());
        let second = which.second().map(|(second, _)| self.weight(second));
        let weights = second.map_or(Weights::One, |_| Weights::Pair);
        let tokens = self.tokens_of(jobs);
        let (mode, slots_in_x, top_k, list_offset, sorted_offset, num_tokens) = match jobs {
            Jobs::All { num_tokens } => (0, false, 1, 0, 0, *num_tokens),
            Jobs::OneToken { offset, top_k, slots_in_x, .. } => (2, *slots_in_x, *top_k, *offset, 0, *top_k),
            Jobs::List { sorted_offset, top_k, slots_in_x, .. } => (1, *slots_in_x, *top_k, 0, *sorted_offset, 0),
        };
        let list = match jobs {
            Jobs::All { .. } => self.nothing.clone(),
            Jobs::OneToken { ids, .. } => ids.clone(),
            Jobs::List { list, .. } => list.clone(),
        };
        let (kind, alpha, limit) = which.second().map_or((0, 0.0, 0.0), |(_, activation)| activation_args(activation));
        let (code, lanes) = (w.code, lanes_of(w, weights));
        let mut launches = Vec::with_capacity(w.shards.len());
        for (i, shard) in w.shards.iter().enumerate() {
            let groups = shard.num_rows.div_ceil(team_rows(weights, tokens)).div_ceil(256 / lanes);
            let grid = match jobs {
                Jobs::All { num_tokens } => [groups, shard.num_matrices, num_tokens.div_ceil(tokens)],
                Jobs::OneToken { top_k, .. } => [groups, *top_k, 1],
                Jobs::List { max_items, .. } => [groups, *max_items, 1],
            };
            let mut arguments = [
                x.token_step,
                x.part_step,
                w.chunks,
                shard.num_rows,
                lanes,
                out.offset,
                out.stride,
                out.matrix_step,
                num_tokens,
                shard.first_row,
                shard.first_matrix,
                shard.num_matrices,
                w.rows,
                mode,
                usize::from(slots_in_x),
                top_k,
                list_offset,
                sorted_offset,
                w.bias_offset(),
                second.map_or(0, DeviceWeight::bias_offset),
                w.has() + 4 * second.map_or(0, DeviceWeight::has) + 16 * usize::from(out.adds),
                w.block_columns,
                w.scale_words,
            ]
            .map(|n| n as u32)
            .to_vec();
            arguments.extend(out.forms.arguments);
            arguments.extend([kind as u32, f32::to_bits(alpha), f32::to_bits(limit)]);
            let mut memories = vec![shard.codes.clone(), shard.scales.clone(), w.extra.clone()];
            if let Some(second) = second {
                let shard = &second.shards[i];
                memories.extend([shard.codes.clone(), shard.scales.clone(), second.extra.clone()]);
            }
            launches.push((memories, arguments, grid));
        }
        for (weights_memory, arguments, grid) in launches {
            let mut memories = vec![&out.forms.memory, out.forms.form(), &x.memory, &list];
            memories.extend(&weights_memory);
            self.run(Kernel::Product(code, weights, tokens), &memories, &arguments, grid)?;
        }
        Ok(())
    }

    pub(super) fn linear_parts(&mut self, op: &Linear<'_>) -> Result<()> {
        for (weight, out) in op.parts {
            let (weight, jobs) = (WeightRef::Linear(*weight), Jobs::All { num_tokens: op.x.rows });
            if self.takes_tiles(Factors::One(weight), op.x.rows, None) {
                let to = Output::of(OutputForms::plain(self.output(*out)?), *out, 0);
                self.product_of_tiles(Factors::One(weight), op.x, Parts::whole(op.x), &to, &jobs)?;
                continue;
            }
            let x = self.spread(op.x, Parts::whole(op.x), self.weight(weight).code)?;
            let writes = self.writes(weight, Weights::One, &jobs);
            let out = Output::of(self.output_forms(*out, writes)?, *out, 0);
            self.product(Factors::One(weight), &x, &out, &jobs)?;
        }
        Ok(())
    }

    /// `out += x W^T`: what a product writes that only the norm after it would read, added as that norm would.
    pub(super) fn linear_residual(&mut self, x: Tensor, weight: Weight, out: Tensor) -> Result<()> {
        let (weight, jobs) = (WeightRef::Linear(weight), Jobs::All { num_tokens: x.rows });
        let mut to = Output::of(OutputForms::plain(self.output(out)?), out, 0);
        to.adds = true;
        if self.takes_tiles(Factors::One(weight), x.rows, None) {
            return self.product_of_tiles(Factors::One(weight), x, Parts::whole(x), &to, &jobs);
        }
        let input = self.spread(x, Parts::whole(x), self.weight(weight).code)?;
        self.product(Factors::One(weight), &input, &to, &jobs)
    }

    /// What a product with `weight` can write beside rows: integers where workgroups have whole chunks.
    pub(super) fn writes(&self, weight: WeightRef, weights: Weights, jobs: &Jobs) -> Writes {
        let w = self.weight(weight);
        let tokens = self.tokens_of(jobs);
        let group_rows = 256 / lanes_of(w, weights) * team_rows(weights, tokens);
        let whole = w.shards.iter().all(|s| s.num_rows.is_multiple_of(32) && s.first_row.is_multiple_of(32));
        // Integers of up to 256 rows wait in workgroup memory.
        let possible = whole && group_rows <= 256 && w.rows.is_multiple_of(32);
        Writes::One { whole_columns: if possible { group_rows } else { 1 } }
    }

    /// Rows of x of the kernel that does some jobs.
    fn tokens_of(&self, jobs: &Jobs) -> usize {
        match jobs {
            Jobs::All { num_tokens } => self.tokens_at_once(*num_tokens),
            Jobs::OneToken { .. } => 1,
            Jobs::List { item_rows, .. } => *item_rows,
        }
    }

    /// How the heads of an input lie.
    pub(super) fn head_parts(op: &LinearHeads) -> Parts {
        Parts { count: op.weight.count, stride: op.x_head_stride, cols: op.weight.cols }
    }

    /// The heads as their product reads them.
    pub(super) fn head_input(&mut self, op: &LinearHeads) -> Result<Input> {
        self.spread(op.x, Self::head_parts(op), self.weight(WeightRef::Linear(op.weight)).code)
    }

    pub(super) fn product_of_heads(&mut self, op: &LinearHeads) -> Result<()> {
        let (weight, jobs) = (WeightRef::Linear(op.weight), Jobs::All { num_tokens: op.x.rows });
        if self.takes_tiles(Factors::One(weight), op.x.rows, None) {
            let to = Output::of(OutputForms::plain(self.output(op.out)?), op.out, op.weight.rows);
            return self.product_of_tiles(Factors::One(weight), op.x, Self::head_parts(op), &to, &jobs);
        }
        let x = self.head_input(op)?;
        let writes = self.writes(weight, Weights::One, &jobs);
        let out = Output::of(self.output_forms(op.out, writes)?, op.out, op.weight.rows);
        self.product(Factors::One(weight), &x, &out, &jobs)
    }

    /// The distinct experts of a batch, as work for products, by tiles or not.
    fn jobs(&mut self, ids: Tensor, num_experts: usize, slots_in_x: bool, by_tiles: bool) -> Result<Jobs> {
        let top_k = ids.cols;
        if ids.rows == 1 && !by_tiles {
            return Ok(Jobs::OneToken { ids: self.memory(ids)?, offset: ids.offset, top_k, slots_in_x });
        }
        if num_experts > 1024 {
            return Err(device_error(format!("{num_experts} experts, expected at most 1024")));
        }
        let num_choices = ids.rows * top_k;
        // An expert has so many rows on average, at least two where it has more than one at all.
        let item_rows = match by_tiles {
            true => TILE_TOKENS,
            false => self.tokens_at_once(num_choices.div_ceil(num_experts).max(2)),
        };
        // Every expert may leave one item unfilled.
        let max_items = num_choices.min(num_experts + num_choices / item_rows);
        let sorted_offset = 4 + 4 * max_items;
        let bytes = 4 * (sorted_offset + num_choices) as u64;
        let before = self.list.memory.as_ref().map(|m| m.id);
        let list = self.list.get("work lists", bytes, &mut self.device)?;
        let key = WorkListKey { ids, num_experts, item_rows };
        if self.listed != Some(key) || before != Some(list.id) {
            let memory = self.memory(ids)?;
            let arguments =
                [ids.offset, ids.stride, ids.rows, top_k, num_experts, item_rows, sorted_offset].map(|n| n as u32);
            self.run(Kernel::WorkList, &[&memory, &list], &arguments, [1, 1, 1])?;
            self.listed = Some(key);
        }
        Ok(Jobs::List { list, max_items, item_rows, sorted_offset, top_k, slots_in_x })
    }

    /// Scratch memory for `rows` rows of `cols` sums.
    fn sums(&mut self, which: usize, rows: usize, cols: usize) -> Result<Output> {
        let memory = self.scratch[which].get("scratch of a step", 4 * (rows * cols) as u64, &mut self.device)?;
        Ok(Output { forms: OutputForms::plain(memory), offset: 0, stride: cols, matrix_step: 0, adds: false })
    }

    /// Whether two weights can meet inside one kernel.
    pub(super) fn are_pair(&self, gate: WeightRef, up: WeightRef) -> bool {
        let (gate, up) = (self.weight(gate), self.weight(up));
        gate.code == up.code && gate.block_columns == up.block_columns && gate.shards.len() == up.shards.len()
    }

    /// `out = f(x gate^T, x up^T)`; `rows` rows of sums, `top_k` of them a row of `out`.
    fn gated(
        &mut self,
        [gate, up]: [WeightRef; 2],
        x: Tensor,
        jobs: &Jobs,
        [rows, top_k]: [usize; 2],
        activation: Activation,
        out: Tensor,
    ) -> Result<()> {
        let whole = Parts::whole(x);
        if self.are_pair(gate, up) {
            let x = &self.spread(x, whole, self.weight(gate).code)?;
            let writes = self.writes(gate, Weights::Pair, jobs);
            let out = Output::of(self.output_forms(out, writes)?, out, 0);
            return self.product(Factors::Pair(gate, up, activation), x, &out, jobs);
        }
        let cols = self.weight(gate).rows;
        let sums = [self.sums(0, rows, cols)?, self.sums(1, rows, cols)?];
        for (weight, sums) in [gate, up].into_iter().zip(&sums) {
            let x = self.spread(x, whole, self.weight(weight).code)?;
            self.product(Factors::One(weight), &x, sums, jobs)?;
        }
        let (kind, alpha, limit) = activation_args(activation);
        let memory = self.output(out)?;
        let [offset, stride] = place(out);
        let arguments =
            [offset, stride, top_k as u32, cols as u32, kind as u32, f32::to_bits(alpha), f32::to_bits(limit)];
        let memories = [&sums[0].forms.memory, &sums[1].forms.memory, &memory];
        self.run(Kernel::Activate, &memories, &arguments, [cols.div_ceil(256), rows, 1])
    }

    pub(super) fn experts_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        let top_k = op.ids.cols;
        let rows = op.x.rows * top_k;
        if rows == 0 {
            return Ok(());
        }
        let by_tiles = self.experts_take_tiles(Self::pair_of(op), op.ids, op.experts.num_experts);
        let jobs = self.jobs(op.ids, op.experts.num_experts, false, by_tiles)?;
        if by_tiles {
            let to = Output::of(OutputForms::plain(self.output(op.out)?), op.out, 0);
            return self.product_of_tiles(Self::pair_of(op), op.x, Parts::whole(op.x), &to, &jobs);
        }
        let pair = [WeightRef::Gate(op.experts), WeightRef::Up(op.experts)];
        self.gated(pair, op.x, &jobs, [rows, top_k], op.activation, op.out)
    }

    /// Gate and up of experts.
    pub(super) fn pair_of(op: &MoeGateUp) -> Factors {
        Factors::Pair(WeightRef::Gate(op.experts), WeightRef::Up(op.experts), op.activation)
    }

    /// Gate and up that every row meets.
    pub(super) fn pair_of_dense(op: &GateUp) -> Factors {
        Factors::Pair(WeightRef::Linear(op.gate), WeightRef::Linear(op.up), op.activation)
    }

    /// How the slots of the experts' activations lie.
    pub(super) fn slot_parts(op: &MoeDown) -> Parts {
        let width = op.experts.intermediate_size;
        Parts { count: op.ids.cols, stride: width, cols: width }
    }

    /// `adds`: to what `op.out` holds.
    pub(super) fn experts_down(&mut self, op: &MoeDown, adds: bool) -> Result<()> {
        let (top_k, hidden) = (op.ids.cols, op.experts.hidden_size);
        let rows = op.h.rows * top_k;
        if rows == 0 {
            return Ok(());
        }
        let down = Factors::One(WeightRef::Down(op.experts));
        let by_tiles = self.experts_take_tiles(down, op.ids, op.experts.num_experts);
        let y = if by_tiles {
            let jobs = self.jobs(op.ids, op.experts.num_experts, true, true)?;
            let y = self.sums(0, rows, hidden)?;
            self.product_of_tiles(down, op.h, Self::slot_parts(op), &y, &jobs)?;
            y
        } else {
            let x = self.spread(op.h, Self::slot_parts(op), self.weight(down.first()).code)?;
            if self.is_one_tokens_down(op) {
                return self.one_tokens_experts_down(op, &x, None, adds);
            }
            let jobs = self.jobs(op.ids, op.experts.num_experts, true, false)?;
            let y = self.sums(0, rows, hidden)?;
            self.product(down, &x, &y, &jobs)?;
            y
        };
        let weights = self.memory(op.weights)?;
        let out = self.output(op.out)?;
        let (plus, plus_place) = self.optional(op.plus, &out)?;
        let rest = [top_k as u32, hidden as u32, u32::from(op.plus.is_some()), u32::from(adds)];
        let arguments = [&place(op.weights)[..], &plus_place, &place(op.out), &rest].concat();
        let grid = [hidden.div_ceil(256), op.h.rows, 1];
        self.run(Kernel::Combine, &[&y.forms.memory, &weights, &plus, &out], &arguments, grid)
    }

    /// Whether products and weighted sum can be one kernel: the results of 64 experts have room in a workgroup.
    pub(super) fn is_one_tokens_down(&self, op: &MoeDown) -> bool {
        op.h.rows == 1 && op.ids.cols <= 64 && self.weight(WeightRef::Down(op.experts)).shards.len() == 1
    }

    /// Products and weighted sum in one kernel, `shared` among them: the input and the weight whose product is `plus`.
    pub(super) fn one_tokens_experts_down(
        &mut self,
        op: &MoeDown,
        x: &Input,
        shared: Option<(&Input, Weight)>,
        adds: bool,
    ) -> Result<()> {
        let (ids, weights) = (self.memory(op.ids)?, self.memory(op.weights)?);
        let out = self.output(op.out)?;
        let (plus, [plus_offset, _]) = self.optional(op.plus.filter(|_| shared.is_none()), &out)?;
        let w = self.weight(WeightRef::Down(op.experts));
        let plus_kind = if shared.is_some() { 2 } else { usize::from(op.plus.is_some()) };
        let mut arguments = vec![
            x.part_step,
            w.chunks,
            w.rows,
            w.lanes,
            op.out.offset,
            plus_offset as usize,
            plus_kind,
            op.ids.cols,
            op.ids.offset,
            op.weights.offset,
            w.bias_offset(),
            w.has() + 16 * usize::from(adds),
            w.block_columns,
            w.scale_words,
        ];
        let (code, groups) = (w.code, w.rows.div_ceil(team_rows(Weights::One, 1)));
        let [codes, scales, extra] = [&w.shards[0].codes, &w.shards[0].scales, &w.extra].map(Memory::clone);
        let mut memories = vec![&out, &plus, &x.memory, &ids, &weights, &codes, &scales, &extra];
        let of_shared;
        if let Some((x, weight)) = shared {
            let w = self.weight(WeightRef::Linear(weight));
            arguments.extend([w.chunks, w.lanes, w.bias_offset(), w.has(), w.scale_words]);
            of_shared = [&x.memory, &w.shards[0].codes, &w.shards[0].scales, &w.extra].map(Memory::clone);
            memories.extend(&of_shared);
        }
        let arguments: Vec<u32> = arguments.into_iter().map(|n| n as u32).collect();
        self.run(Kernel::ExpertsDown(code, shared.is_some()), &memories, &arguments, [groups, 1, 1])
    }

    pub(super) fn dense_gate_up(&mut self, op: &GateUp) -> Result<()> {
        let rows = op.x.rows;
        if rows == 0 {
            return Ok(());
        }
        let both = Self::pair_of_dense(op);
        if self.takes_tiles(both, rows, None) {
            let to = Output::of(OutputForms::plain(self.output(op.out)?), op.out, 0);
            let jobs = Jobs::All { num_tokens: rows };
            return self.product_of_tiles(both, op.x, Parts::whole(op.x), &to, &jobs);
        }
        let pair = [WeightRef::Linear(op.gate), WeightRef::Linear(op.up)];
        self.gated(pair, op.x, &Jobs::All { num_tokens: rows }, [rows, 1], op.activation, op.out)
    }
}

/// Invocations of a team: a pair's are few, so that a workgroup has the whole chunks that its output is read in.
pub(super) fn lanes_of(w: &DeviceWeight, weights: Weights) -> usize {
    match weights {
        Weights::One => w.lanes,
        Weights::Pair => w.lanes.min(32),
    }
}

/// Kind and parameters of an activation, as kernels take them.
pub(super) fn activation_args(activation: Activation) -> (usize, f32, f32) {
    match activation {
        Activation::SwiGlu => (0, 0.0, 0.0),
        Activation::ClampedSwiGlu { alpha, limit } => (1, alpha, limit),
    }
}
