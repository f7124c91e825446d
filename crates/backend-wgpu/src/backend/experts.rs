//! Products with the matrices of the experts that rows chose, and beside them with the shared expert's (`kernels/chosen.wgsl`,
//! `kernels/experts_down.wgsl`): work lists, which kernel, which grid.

use super::forms::{Form, Input, OutputForms, Parts};
use super::products::{Factors, Jobs, Output, WeightRef, WorkListKey, lanes_of};
use super::{WgpuBackend, place};
use crate::device::{Memory, device_error};
use crate::kernels::{Kernel, MOST_RESULTS, SHARED_LANES, TILE_TOKENS, Weights, chosen_passes, team_rows};
use crate::weights::DeviceWeight;
use moellon_ops::{GateUp, MoeDown, MoeGateUp, Result, Tensor, Weight};

impl WgpuBackend {
    /// The distinct experts of a batch, as work for products, by tiles or not.
    pub(super) fn jobs(&mut self, ids: Tensor, num_experts: usize, slots_in_x: bool, by_tiles: bool) -> Result<Jobs> {
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
        Ok(Jobs::List { list, num_tokens: ids.rows, max_items, item_rows, sorted_offset, top_k, slots_in_x })
    }

    /// How often a workgroup takes new rows of a chosen matrix, and how many it has then.
    pub(super) fn passes_of_chosen(&self, w: &DeviceWeight, weights: Weights, tokens: usize) -> (usize, usize) {
        let integers = matches!(self.form_for(w.code), Form::Integers { .. });
        chosen_passes(integers, weights, team_rows(weights, tokens), lanes_of(w, weights), w.rows)
    }

    /// The matrices that rows chose, all shards; `shared`: and the shared expert's, which every row meets.
    pub(super) fn product_of_chosen(
        &mut self,
        which: Factors,
        shared: Option<Factors>,
        x: &Input,
        out: &Output,
        jobs: &Jobs,
    ) -> Result<()> {
        let weights = which.weights();
        let w = self.weight(which.first());
        let tokens = self.tokens_of(w, jobs);
        let second = which.second().map(|(second, _)| self.weight(second));
        let (is_list, slots_in_x, top_k, list, list_offset, sorted_offset, num_tokens, items) = match jobs {
            Jobs::OneToken { ids, offset, top_k, slots_in_x } => {
                (false, *slots_in_x, *top_k, ids, *offset, 0, 1, *top_k)
            }
            Jobs::List { list, max_items, sorted_offset, top_k, slots_in_x, num_tokens, .. } => {
                (true, *slots_in_x, *top_k, list, 0, *sorted_offset, *num_tokens, *max_items)
            }
            Jobs::All { .. } => return Err(device_error("rows choose no matrices of this weight")),
        };
        let (passes, group_rows) = self.passes_of_chosen(w, weights, tokens);
        let (code, lanes) = (w.code, lanes_of(w, weights));
        let mut launches = Vec::with_capacity(w.shards.len());
        for (i, shard) in w.shards.iter().enumerate() {
            let mut arguments = [
                x.token_step,
                x.part_step,
                w.chunks,
                shard.num_rows,
                lanes,
                passes,
                out.offset,
                out.stride,
                num_tokens,
                usize::from(is_list),
                usize::from(slots_in_x),
                top_k,
                list_offset,
                sorted_offset,
                w.bias_offset(),
                second.map_or(0, DeviceWeight::bias_offset),
                w.has() + 4 * second.map_or(0, DeviceWeight::has),
                w.block_columns,
                w.scale_words,
            ]
            .map(|n| n as u32)
            .to_vec();
            arguments.extend(out.forms.arguments);
            arguments.extend(which.activation_words());
            let mut memories = self.shard_memories(which, i);
            let mut grid_items = items;
            let more = match shared {
                None => [shard.first_row, shard.first_matrix, shard.num_matrices, w.rows],
                Some(shared) => {
                    let w = self.weight(shared.first());
                    let second = shared.second().map(|(second, _)| self.weight(second));
                    memories.extend(self.shard_memories(shared, 0));
                    grid_items += num_tokens.div_ceil(tokens);
                    let has = w.has() + 4 * second.map_or(0, DeviceWeight::has);
                    [items, w.bias_offset(), second.map_or(w.lanes, DeviceWeight::bias_offset), has]
                }
            };
            arguments.extend(more.map(|n| n as u32));
            launches.push((memories, arguments, [shard.num_rows.div_ceil(group_rows), grid_items, 1]));
        }
        let list = list.clone();
        for (weights_memory, arguments, grid) in launches {
            let mut memories = vec![&out.forms.memory, out.forms.form(), &x.memory, &list];
            memories.extend(&weights_memory);
            self.run(Kernel::Chosen(code, weights, tokens, shared.is_some()), &memories, &arguments, grid)?;
        }
        Ok(())
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

    /// Whether rows' experts and the shared expert can share kernels: gates and ups, then what is added up.
    pub(super) fn has_shared_beside(
        &self,
        shared: &GateUp,
        shared_down: Weight,
        experts: &MoeGateUp,
        down: &MoeDown,
    ) -> bool {
        let (pair, shared_pair) = (Self::pair_of(experts), Self::pair_of_dense(shared));
        let (first, second) = (WeightRef::Down(down.experts), WeightRef::Linear(shared_down));
        let (Some((up, activation)), Some((shared_up, shared_activation))) = (pair.second(), shared_pair.second())
        else {
            return false;
        };
        let same_kernels = [(pair.first(), up), (pair.first(), shared_pair.first()), (up, shared_up), (first, second)]
            .into_iter()
            .all(|(a, b)| self.are_alike(a, b));
        let same_rows = self.weight(pair.first()).rows == self.weight(shared_pair.first()).rows
            && self.weight(first).rows == self.weight(second).rows;
        let same_views = shared.x == experts.x && down.h == experts.out;
        let by_tiles = self.experts_take_tiles(pair, experts.ids, experts.experts.num_experts)
            || self.takes_tiles(shared_pair, shared.x.rows, None)
            || self.takes_tiles(Factors::One(second), shared.x.rows, None);
        // Kernels write activations as the second products read them, and nothing else.
        let width = down.experts.intermediate_size;
        let form = self.form_for(self.weight(first).code);
        let tokens = self.tokens_at_once(if experts.x.rows == 1 { 1 } else { 2 });
        let whole = self.passes_of_chosen(self.weight(pair.first()), Weights::Pair, tokens).1.is_multiple_of(32);
        let writes = width.is_multiple_of(32) && (form == Form::Floats || whole);
        self.device.binds_many
            && activation == shared_activation
            && same_kernels
            && same_rows
            && same_views
            && writes
            && !by_tiles
            && experts.x.rows > 0
    }

    /// Rows' experts and the shared expert, `shared_down` of whose activations is added to theirs; `adds`: to what `down.out` holds.
    pub(super) fn experts_and_shared(
        &mut self,
        shared: &GateUp,
        shared_down: Weight,
        experts: &MoeGateUp,
        down: &MoeDown,
        adds: bool,
    ) -> Result<()> {
        let (rows, top_k, width) = (experts.x.rows, experts.ids.cols, down.experts.intermediate_size);
        let pair = Self::pair_of(experts);
        let second = Factors::One(WeightRef::Down(down.experts));
        let x = self.spread(experts.x, Parts::whole(experts.x), self.weight(pair.first()).code)?;
        let jobs = self.jobs(experts.ids, experts.experts.num_experts, false, false)?;
        // Slots of a row, the shared expert's behind them.
        let parts = Parts { count: top_k + 1, stride: width, cols: width };
        let form = self.form_for(self.weight(second.first()).code);
        let row_quads = form.row_quads(parts);
        let memory = self.gated.get("activations of experts", (16 * rows * row_quads) as u64, &mut self.device)?;
        let forms = OutputForms::only(memory.clone(), form, parts);
        let to = Output { forms, offset: 0, stride: 0, matrix_step: 0, adds: false };
        self.product_of_chosen(pair, Some(Self::pair_of_dense(shared)), &x, &to, &jobs)?;
        let h = Input { memory, token_step: row_quads, part_step: row_quads / parts.count };
        if self.is_one_tokens_down(down) && self.adds_shared_at_once(down, shared_down) {
            return self.one_tokens_experts_down(down, &h, Some(shared_down), adds);
        }
        let jobs = self.jobs(experts.ids, experts.experts.num_experts, true, false)?;
        let hidden = down.experts.hidden_size;
        let y = self.sums(0, rows * (top_k + 1), hidden)?;
        let shared_down = Factors::One(WeightRef::Linear(shared_down));
        self.product_of_chosen(second, Some(shared_down), &h, &y, &jobs)?;
        let plus = (y.forms.memory.clone(), [(rows * top_k * hidden) as u32, hidden as u32]);
        self.combine(down, &y, Some(plus), adds)
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
        let plus = op.plus.map(|plus| self.memory(plus).map(|memory| (memory, place(plus)))).transpose()?;
        self.combine(op, &y, plus, adds)
    }

    /// The weighted sums of the rows of `y`; `plus`: what is added to them, memory, offset and stride.
    fn combine(&mut self, op: &MoeDown, y: &Output, plus: Option<(Memory, [u32; 2])>, adds: bool) -> Result<()> {
        let (weights, out) = (self.memory(op.weights)?, self.output(op.out)?);
        let hidden = op.experts.hidden_size;
        let has_plus = u32::from(plus.is_some());
        let (plus, plus_place) = plus.unwrap_or_else(|| (out.clone(), [0, 0]));
        let rest = [op.ids.cols as u32, hidden as u32, has_plus, u32::from(adds)];
        let arguments = [&place(op.weights)[..], &plus_place, &place(op.out), &rest].concat();
        let grid = [hidden.div_ceil(256), op.h.rows, 1];
        self.run(Kernel::Combine, &[&y.forms.memory, &weights, &plus, &out], &arguments, grid)
    }

    /// Whether products and weighted sum can be one kernel: the sums of all experts have room in a workgroup.
    fn is_one_tokens_down(&self, op: &MoeDown) -> bool {
        op.h.rows == 1 && op.ids.cols <= MOST_RESULTS && self.weight(WeightRef::Down(op.experts)).shards.len() == 1
    }

    /// Whether one token's second products and the shared expert's can be one kernel: sums of both go through registers alone.
    fn adds_shared_at_once(&self, op: &MoeDown, shared: Weight) -> bool {
        let (w, of_shared) = (self.weight(WeightRef::Down(op.experts)), self.weight(WeightRef::Linear(shared)));
        self.device.self_test.subgroups && w.lanes <= 32 && of_shared.lanes <= SHARED_LANES
    }

    /// Products and weighted sum in one kernel; `shared`: the weight whose product with the last part of `x` is added to them instead of
    /// `plus`.
    fn one_tokens_experts_down(&mut self, op: &MoeDown, x: &Input, shared: Option<Weight>, adds: bool) -> Result<()> {
        let (ids, weights) = (self.memory(op.ids)?, self.memory(op.weights)?);
        let out = self.output(op.out)?;
        let (plus, [plus_offset, _]) = self.optional(op.plus.filter(|_| shared.is_none()), &out)?;
        let w = self.weight(WeightRef::Down(op.experts));
        let teams = w.rows.div_ceil(team_rows(Weights::One, 1));
        let plus_kind = if shared.is_some() { 2 } else { usize::from(op.plus.is_some()) };
        let shared_weight = shared.map(|weight| self.weight(WeightRef::Linear(weight)));
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
        arguments
            .extend(shared_weight.map_or([0; 5], |w| [w.chunks, w.lanes, w.bias_offset(), w.has(), w.scale_words]));
        let code = w.code;
        let mut of_weights = self.shard_memories(Factors::One(WeightRef::Down(op.experts)), 0);
        if let Some(weight) = shared {
            of_weights.extend(self.shard_memories(Factors::One(WeightRef::Linear(weight)), 0));
        }
        let mut memories = vec![&out, &plus, &x.memory, &ids, &weights];
        memories.extend(&of_weights);
        let arguments: Vec<u32> = arguments.into_iter().map(|n| n as u32).collect();
        let grid = [teams, 1, 1];
        self.run(Kernel::ExpertsDown(code, shared.is_some()), &memories, &arguments, grid)
    }
}
