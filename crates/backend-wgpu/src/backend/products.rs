//! Products with weights: the form that activations take, work lists of experts, which kernel, which grid.

use super::{WgpuBackend, place};
use crate::device::{Memory, device_error};
use crate::kernels::{Kernel, ROWS};
use crate::weights::DeviceWeight;
use moellon_ops::{Activation, Experts, GateUp, Linear, LinearHeads, MoeDown, MoeGateUp, Result, Tensor, Weight};

/// How the rows of an input are cut: heads, or the slots of a token's experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    count: usize,
    stride: usize,
    cols: usize,
}

impl Parts {
    fn whole(x: Tensor) -> Self {
        Parts { count: 1, stride: x.cols, cols: x.cols }
    }

    fn chunks(&self) -> usize {
        self.cols.div_ceil(32)
    }
}

/// A view of a buffer in the form of `spread.wgsl`.
struct Spread {
    offset: usize,
    stride: usize,
    parts: Parts,
    memory: Memory,
    /// Rows that hold what the buffer holds.
    current_rows: usize,
}

/// The views of a buffer that were ever read by a product.
#[derive(Default)]
pub(super) struct Spreads(Vec<Spread>);

impl Spreads {
    /// The buffer was written.
    pub(super) fn forget(&mut self) {
        self.0.iter_mut().for_each(|spread| spread.current_rows = 0);
    }

    pub(super) fn memories(&self) -> impl Iterator<Item = &Memory> {
        self.0.iter().map(|spread| &spread.memory)
    }
}

/// An input of a product.
#[derive(Clone)]
struct Input {
    memory: Memory,
    /// 16-byte elements between rows and between parts of a row.
    token_step: usize,
    part_step: usize,
}

/// What a work list was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct WorkListKey {
    pub(super) ids: Tensor,
    num_experts: usize,
    item_rows: usize,
}

/// Which rows of x meet which matrices.
#[derive(Clone)]
enum Jobs {
    /// Every row with every matrix (one, or heads that are side by side in the output).
    All { num_tokens: usize },
    /// The choices of one token: its ids are the work list.
    OneToken { ids: Memory, offset: usize, top_k: usize, slots_in_x: bool },
    /// Items of a work list.
    List { list: Memory, max_items: usize, item_rows: usize, sorted_offset: usize, top_k: usize, slots_in_x: bool },
}

/// Where sums go: offset, elements between rows and between matrices.
#[derive(Clone)]
struct Output {
    memory: Memory,
    offset: usize,
    stride: usize,
    matrix_step: usize,
}

/// A weight among those of the back end.
#[derive(Clone, Copy)]
enum WeightRef {
    Linear(Weight),
    Gate(Experts),
    Up(Experts),
    Down(Experts),
}

impl WgpuBackend {
    fn weight(&self, which: WeightRef) -> &DeviceWeight {
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

    /// `x` in the form that products read, made now unless it is there.
    fn spread(&mut self, x: Tensor, parts: Parts) -> Result<Input> {
        let row_quads = 8 * parts.chunks() * parts.count;
        let source = self.memory(x)?;
        let device = &mut self.device;
        let buffer = self.buffers.get_mut(&x.buffer.id);
        let Some(buffer) = buffer else { return Err(device_error(format!("buffer {} was freed", x.buffer.id))) };
        let stride = if x.rows == 1 { x.cols } else { x.stride };
        let same = |s: &Spread| s.offset == x.offset && (s.stride == stride || x.rows == 1) && s.parts == parts;
        let bytes = (x.rows * row_quads * 16) as u64;
        let spreads = &mut buffer.spreads.0;
        let index = match spreads.iter().position(same) {
            Some(index) => index,
            None => {
                let memory = device.alloc("activations for products", bytes)?;
                spreads.push(Spread { offset: x.offset, stride, parts, memory, current_rows: 0 });
                spreads.len() - 1
            }
        };
        let spread = &mut spreads[index];
        if spread.memory.bytes < bytes {
            device.forget(&spread.memory);
            spread.memory = device.alloc("activations for products", bytes)?;
            spread.current_rows = 0;
        }
        let stale = spread.current_rows < x.rows;
        spread.current_rows = spread.current_rows.max(x.rows);
        let input = Input { memory: spread.memory.clone(), token_step: row_quads, part_step: 8 * parts.chunks() };
        if stale {
            let arguments = [
                x.offset as u32,
                x.stride as u32,
                parts.stride as u32,
                parts.count as u32,
                parts.cols as u32,
                parts.chunks() as u32,
            ];
            let grid = [(8 * parts.chunks()).div_ceil(256), parts.count, x.rows];
            self.run(Kernel::Spread, &[&source, &input.memory], &arguments, grid)?;
        }
        Ok(input)
    }

    /// One weight, all its shards.
    fn product(&mut self, which: WeightRef, x: &Input, out: &Output, jobs: &Jobs) -> Result<()> {
        let w = self.weight(which);
        let (tokens, mode, slots_in_x, top_k, list_offset, sorted_offset, num_tokens) = match jobs {
            Jobs::All { num_tokens } => (self.tokens_at_once(*num_tokens), 0, false, 1, 0, 0, *num_tokens),
            Jobs::OneToken { offset, top_k, slots_in_x, .. } => (1, 2, *slots_in_x, *top_k, *offset, 0, *top_k),
            Jobs::List { item_rows, sorted_offset, top_k, slots_in_x, .. } => {
                (*item_rows, 1, *slots_in_x, *top_k, 0, *sorted_offset, 0)
            }
        };
        let list = match jobs {
            Jobs::All { .. } => self.nothing.clone(),
            Jobs::OneToken { ids, .. } => ids.clone(),
            Jobs::List { list, .. } => list.clone(),
        };
        let (code, lanes, extra) = (w.code, w.lanes, w.extra.clone());
        let mut launches = Vec::with_capacity(w.shards.len());
        for shard in &w.shards {
            let teams = shard.num_rows.div_ceil(ROWS);
            let groups = teams.div_ceil(256 / lanes);
            let grid = match jobs {
                Jobs::All { num_tokens } => [groups, shard.num_matrices, num_tokens.div_ceil(tokens)],
                Jobs::OneToken { top_k, .. } => [groups, *top_k, 1],
                Jobs::List { max_items, .. } => [groups, *max_items, 1],
            };
            let arguments = [
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
                if w.has_global { w.count } else { 0 },
                usize::from(w.has_bias),
                usize::from(w.has_global),
                w.block_columns,
                w.scale_words,
            ]
            .map(|n| n as u32);
            launches.push((shard.codes.clone(), shard.scales.clone(), arguments, grid));
        }
        for (codes, scales, arguments, grid) in launches {
            let memories = [&out.memory, &x.memory, &codes, &scales, &extra, &list];
            self.run(Kernel::Product(code, tokens), &memories, &arguments, grid)?;
        }
        Ok(())
    }

    pub(super) fn linear_parts(&mut self, op: &Linear<'_>) -> Result<()> {
        let x = self.spread(op.x, Parts::whole(op.x))?;
        for (weight, out) in op.parts {
            let [offset, stride] = place(*out).map(|n| n as usize);
            let out = Output { memory: self.output(*out)?, offset, stride, matrix_step: 0 };
            self.product(WeightRef::Linear(*weight), &x, &out, &Jobs::All { num_tokens: op.x.rows })?;
        }
        Ok(())
    }

    pub(super) fn product_of_heads(&mut self, op: &LinearHeads) -> Result<()> {
        let x = self.spread(op.x, Parts { count: op.weight.count, stride: op.x_head_stride, cols: op.weight.cols })?;
        let out = Output {
            memory: self.output(op.out)?,
            offset: op.out.offset,
            stride: op.out.stride,
            matrix_step: op.weight.rows,
        };
        self.product(WeightRef::Linear(op.weight), &x, &out, &Jobs::All { num_tokens: op.x.rows })
    }

    /// The distinct experts of a batch, as work for products.
    fn jobs(&mut self, ids: Tensor, num_experts: usize, slots_in_x: bool) -> Result<Jobs> {
        let top_k = ids.cols;
        if ids.rows == 1 {
            return Ok(Jobs::OneToken { ids: self.memory(ids)?, offset: ids.offset, top_k, slots_in_x });
        }
        if num_experts > 1024 {
            return Err(device_error(format!("{num_experts} experts, expected at most 1024")));
        }
        let num_choices = ids.rows * top_k;
        // An expert has so many rows on average, at least two where it has more than one at all.
        let item_rows = self.tokens_at_once(num_choices.div_ceil(num_experts).max(2));
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
        Ok(Output { memory, offset: 0, stride: cols, matrix_step: 0 })
    }

    /// `out = f(gate, up)` of two scratch matrices, `top_k` of whose rows are a row of `out`.
    fn activate(&mut self, rows: usize, top_k: usize, cols: usize, activation: Activation, out: Tensor) -> Result<()> {
        let (gate, up) = (self.sums(0, rows, cols)?.memory, self.sums(1, rows, cols)?.memory);
        let (kind, alpha, limit) = match activation {
            Activation::SwiGlu => (0, 0.0, 0.0),
            Activation::ClampedSwiGlu { alpha, limit } => (1, alpha, limit),
        };
        let memory = self.output(out)?;
        let [offset, stride] = place(out);
        let arguments = [offset, stride, top_k as u32, cols as u32, kind, f32::to_bits(alpha), f32::to_bits(limit)];
        self.run(Kernel::Activate, &[&gate, &up, &memory], &arguments, [cols.div_ceil(256), rows, 1])
    }

    pub(super) fn experts_gate_up(&mut self, op: &MoeGateUp) -> Result<()> {
        let (top_k, width) = (op.ids.cols, op.experts.intermediate_size);
        let rows = op.x.rows * top_k;
        if rows == 0 {
            return Ok(());
        }
        let x = self.spread(op.x, Parts::whole(op.x))?;
        let jobs = self.jobs(op.ids, op.experts.num_experts, false)?;
        let (gate, up) = (self.sums(0, rows, width)?, self.sums(1, rows, width)?);
        self.product(WeightRef::Gate(op.experts), &x, &gate, &jobs)?;
        self.product(WeightRef::Up(op.experts), &x, &up, &jobs)?;
        self.activate(rows, top_k, width, op.activation, op.out)
    }

    pub(super) fn experts_down(&mut self, op: &MoeDown) -> Result<()> {
        let (top_k, width, hidden) = (op.ids.cols, op.experts.intermediate_size, op.experts.hidden_size);
        let rows = op.h.rows * top_k;
        if rows == 0 {
            return Ok(());
        }
        let x = self.spread(op.h, Parts { count: top_k, stride: width, cols: width })?;
        let jobs = self.jobs(op.ids, op.experts.num_experts, true)?;
        let y = self.sums(0, rows, hidden)?;
        self.product(WeightRef::Down(op.experts), &x, &y, &jobs)?;
        let weights = self.memory(op.weights)?;
        let (plus, plus_place) = self.optional(op.plus)?;
        let out = self.output(op.out)?;
        let rest = [top_k as u32, hidden as u32, u32::from(op.plus.is_some())];
        let arguments = [&place(op.weights)[..], &plus_place, &place(op.out), &rest].concat();
        let grid = [hidden.div_ceil(256), op.h.rows, 1];
        self.run(Kernel::Combine, &[&y.memory, &weights, &plus, &out], &arguments, grid)
    }

    pub(super) fn dense_gate_up(&mut self, op: &GateUp) -> Result<()> {
        let (rows, width) = (op.x.rows, op.gate.rows);
        if rows == 0 {
            return Ok(());
        }
        let x = self.spread(op.x, Parts::whole(op.x))?;
        let (gate, up) = (self.sums(0, rows, width)?, self.sums(1, rows, width)?);
        self.product(WeightRef::Linear(op.gate), &x, &gate, &Jobs::All { num_tokens: rows })?;
        self.product(WeightRef::Linear(op.up), &x, &up, &Jobs::All { num_tokens: rows })?;
        self.activate(rows, 1, width, op.activation, op.out)
    }
}
