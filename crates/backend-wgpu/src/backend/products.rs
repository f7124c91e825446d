//! Products with weights: which kernel, which grid.

use super::forms::{Form, Input, OutputForms, Parts, Writes};
use super::{WgpuBackend, place};
use crate::device::Memory;
use crate::kernels::{Kernel, ROWS, Weights, team_rows};
use crate::weights::{DeviceWeight, Shard};
use moellon_ops::{Activation, Experts, GateUp, Linear, LinearHeads, MoeDown, MoeGateUp, Result, Tensor, Weight};

/// What a work list was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WorkListKey {
    pub(super) ids: Tensor,
    pub(super) num_experts: usize,
    pub(super) item_rows: usize,
}

/// Which rows of x meet which matrices.
#[derive(Clone)]
pub(super) enum Jobs {
    /// Every row with every matrix (one, or heads that are side by side in the output).
    All { num_tokens: usize },
    /// The choices of one token: its ids are the work list.
    OneToken { ids: Memory, offset: usize, top_k: usize, slots_in_x: bool },
    /// Items of a work list.
    List {
        list: Memory,
        num_tokens: usize,
        max_items: usize,
        item_rows: usize,
        sorted_offset: usize,
        top_k: usize,
        slots_in_x: bool,
    },
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
    pub(super) fn of(forms: OutputForms, tensor: Tensor, matrix_step: usize) -> Self {
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

    pub(super) fn weights(self) -> Weights {
        self.second().map_or(Weights::One, |_| Weights::Pair)
    }

    /// Kind and parameters of the activation, as kernels take them.
    pub(super) fn activation_words(self) -> [u32; 3] {
        let (kind, alpha, limit) = self.second().map_or((0, 0.0, 0.0), |(_, activation)| activation_args(activation));
        [kind as u32, alpha.to_bits(), limit.to_bits()]
    }

    pub(super) fn second(self) -> Option<(WeightRef, Activation)> {
        match self {
            Factors::One(_) => None,
            Factors::Pair(_, second, activation) => Some((second, activation)),
        }
    }
}

/// What a kernel of products takes about one shard of its weights, in front of its own arguments and behind its own bindings.
pub(super) struct ShardLaunch {
    pub(super) arguments: Vec<u32>,
    pub(super) memories: Vec<Memory>,
    pub(super) num_rows: usize,
    pub(super) num_matrices: usize,
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
    pub(super) fn tokens_at_once(&self, rows: usize) -> usize {
        let kernels = self.device.tokens();
        kernels.iter().copied().find(|tokens| *tokens >= rows).unwrap_or(kernels[kernels.len() - 1])
    }

    /// Memories of a shard of one weight or two.
    pub(super) fn shard_memories(&self, which: Factors, shard: usize) -> Vec<Memory> {
        let second = which.second().map(|(second, _)| self.weight(second));
        let weights = [Some(self.weight(which.first())), second].into_iter().flatten();
        weights.flat_map(|w| [&w.shards[shard].codes, &w.shards[shard].scales, &w.extra].map(Memory::clone)).collect()
    }

    /// One weight, or two that meet in an activation, all shards.
    pub(super) fn product(&mut self, which: Factors, x: &Input, out: &Output, jobs: &Jobs) -> Result<()> {
        match jobs {
            Jobs::All { num_tokens } => self.product_of_all(which, x, out, *num_tokens),
            _ => self.product_of_chosen(which, None, x, out, jobs),
        }
    }

    /// All matrices times `num_tokens` rows.
    fn product_of_all(&mut self, which: Factors, x: &Input, out: &Output, num_tokens: usize) -> Result<()> {
        let weights = which.weights();
        let w = self.weight(which.first());
        let tokens = self.tokens_for(&[w], num_tokens);
        let (code, lanes) = (w.code, lanes_of(w, weights));
        // Nothing gains where a lane has two chunks: 13.3 instead of 8.8 us on an H200, where 23 instead of 26 were measured with four.
        let is_long = w.chunks >= 4 * lanes && w.count == 1 && matches!(self.form_for(code), Form::Integers { .. });
        let kernel = match (weights, tokens) {
            (Weights::One, 1) if is_long => Kernel::ProductAhead(code),
            _ => Kernel::Product(code, weights, tokens),
        };
        for mut shard in self.shards(which, out, num_tokens) {
            let groups = shard.num_rows.div_ceil(team_rows(weights, tokens)).div_ceil(256 / lanes);
            shard.arguments.extend([x.token_step, x.part_step].map(|n| n as u32));
            shard.arguments.extend(out.forms.arguments);
            let mut memories = vec![&out.forms.memory, out.forms.form(), &x.memory];
            memories.extend(&shard.memories);
            let grid = [groups, shard.num_matrices, num_tokens.div_ceil(tokens)];
            self.run(kernel, &memories, &shard.arguments, grid)?;
        }
        Ok(())
    }

    /// The shards of one weight, or of two that meet in an activation, with what `kernels/shard_args.wgsl` says of each.
    pub(super) fn shards(&self, which: Factors, out: &Output, num_tokens: usize) -> Vec<ShardLaunch> {
        let w = self.weight(which.first());
        let second = which.second().map(|(second, _)| self.weight(second));
        let launch = |(i, shard): (usize, &Shard)| {
            let mut arguments = [
                w.chunks,
                shard.num_rows,
                lanes_of(w, which.weights()),
                out.offset,
                out.stride,
                out.matrix_step,
                num_tokens,
                shard.first_row,
                shard.first_matrix,
                shard.num_matrices,
                w.rows,
                w.bias_offset(),
                second.map_or(0, DeviceWeight::bias_offset),
                w.has() + 4 * second.map_or(0, DeviceWeight::has) + 16 * usize::from(out.adds),
                w.block_columns,
                w.scale_words,
            ]
            .map(|n| n as u32)
            .to_vec();
            arguments.extend(which.activation_words());
            let (num_rows, num_matrices) = (shard.num_rows, shard.num_matrices);
            ShardLaunch { arguments, memories: self.shard_memories(which, i), num_rows, num_matrices }
        };
        w.shards.iter().enumerate().map(launch).collect()
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
        let tokens = self.tokens_of(w, jobs);
        let group_rows = match jobs {
            Jobs::All { .. } => 256 / lanes_of(w, weights) * team_rows(weights, tokens),
            _ => self.passes_of_chosen(w, weights, tokens).1,
        };
        let whole = w.shards.iter().all(|s| s.num_rows.is_multiple_of(32) && s.first_row.is_multiple_of(32));
        // Integers of up to 256 rows wait in workgroup memory.
        let possible = whole && group_rows <= 256 && w.rows.is_multiple_of(32);
        Writes::One { whole_columns: if possible { group_rows } else { 1 } }
    }

    /// Rows of x that weights of so many rows are read once for where every row meets them: fewer where workgroups would be so few that
    /// most of an adapter had nothing to do. Each of eight rows took a router's 20 workgroups 2 us.
    pub(super) fn tokens_for(&self, weights: &[&DeviceWeight], num_tokens: usize) -> usize {
        const FEW_WORKGROUPS: usize = 128;
        let groups = |w: &&DeviceWeight| w.count * w.rows.div_ceil(ROWS).div_ceil(256 / w.lanes);
        let groups: usize = weights.iter().map(groups).sum();
        let most = self.tokens_at_once(num_tokens);
        let fill = |tokens: &usize| groups * num_tokens.div_ceil(*tokens) >= FEW_WORKGROUPS;
        let smallest = self.device.tokens().first().copied().unwrap_or(most);
        let mut fewer = self.device.tokens().iter().rev().copied().filter(|tokens| *tokens <= most);
        fewer.find(fill).unwrap_or(smallest)
    }

    /// Rows of x of the kernel that does some jobs with a weight.
    pub(super) fn tokens_of(&self, w: &DeviceWeight, jobs: &Jobs) -> usize {
        match jobs {
            Jobs::All { num_tokens } => self.tokens_for(&[w], *num_tokens),
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

    /// Scratch memory for `rows` rows of `cols` sums.
    pub(super) fn sums(&mut self, which: usize, rows: usize, cols: usize) -> Result<Output> {
        let memory = self.scratch[which].get("scratch of a step", 4 * (rows * cols) as u64, &mut self.device)?;
        Ok(Output { forms: OutputForms::plain(memory), offset: 0, stride: cols, matrix_step: 0, adds: false })
    }

    /// Whether two weights can meet inside one kernel.
    pub(super) fn are_pair(&self, gate: WeightRef, up: WeightRef) -> bool {
        let (gate, up) = (self.weight(gate), self.weight(up));
        gate.code == up.code && gate.block_columns == up.block_columns && gate.shards.len() == up.shards.len()
    }

    /// `out = f(x gate^T, x up^T)`; `rows` rows of sums, `top_k` of them a row of `out`.
    pub(super) fn gated(
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
