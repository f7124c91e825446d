//! Products of many rows by tiles (`kernels/tiles.wgsl`): which products, their input in tiles, grids. The bits are those of other products.

use super::WgpuBackend;
use super::forms::Parts;
use super::products::{Factors, Jobs, Output, WeightRef, WorkListKey};
use crate::device::Memory;
use crate::kernels::{Company, Kernel, TILE_TOKENS, Weights, block_quads, digits, half_word_codes};
use crate::weights::DeviceWeight;
use moellon_ops::program::Op;
use moellon_ops::{Result, Tensor, Weight};

/// Rows of x from which products go by tiles.
#[derive(Debug, Clone, Copy)]
pub(super) struct FewestRows {
    /// Of all heads side by side.
    heads: usize,
    /// Of every other weight that is no expert's.
    others: Option<usize>,
    /// Rows that an expert has on average.
    of_expert: Option<usize>,
}

impl FewestRows {
    /// Where tiles were faster than products that read weights once for eight rows, on an H200: 0.68 against 0.82 ms for heads of 512 rows.
    /// Most others took 1.3 to 1.6 times as long (receipt 2026-11-30-wgpu-matrices).
    pub(super) const MEASURED: FewestRows = FewestRows { heads: 16, others: None, of_expert: None };
    /// As often as possible.
    pub(super) const ALWAYS: FewestRows = FewestRows { heads: 2, others: Some(2), of_expert: Some(0) };

    /// Whether weights of that company are ever multiplied by tiles.
    pub(super) fn are_for(self, company: Company) -> bool {
        match company {
            Company::Heads => true,
            Company::Alone => self.others.is_some(),
            Company::Experts => self.of_expert.is_some(),
        }
    }
}

/// An input in tiles: what it was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TiledKey {
    x: Tensor,
    parts: Parts,
    digits: usize,
    half_word_codes: usize,
    list: Option<(WorkListKey, bool)>,
}

impl TiledKey {
    pub(super) fn is_of(&self, buffer: u32) -> bool {
        self.x.buffer.id == buffer || self.list.is_some_and(|(list, _)| list.ids.buffer.id == buffer)
    }
}

impl WgpuBackend {
    /// Whether a product of `rows` rows goes by tiles; `choices`: one of the experts, so many choices of so many experts.
    pub(super) fn takes_tiles(&self, which: Factors, rows: usize, choices: Option<(usize, usize)>) -> bool {
        let are_pair = which.second().is_none_or(|(up, _)| self.are_pair(which.first(), up));
        let w = self.weight(which.first());
        let (Some(_), true, Some(digits)) = (self.device.matrices, are_pair && rows > 1, digits(w.code)) else {
            return false;
        };
        let fewest = self.fewest_rows;
        let (many, tiles) = match choices {
            Some((choices, experts)) => {
                let many = fewest.of_expert.is_some_and(|rows| choices >= rows * experts);
                (many, choices.min(experts + choices / TILE_TOKENS))
            }
            None => {
                let fewest = if w.count > 1 { Some(fewest.heads) } else { fewest.others };
                (fewest.is_some_and(|fewest| rows >= fewest), rows.div_ceil(TILE_TOKENS) * w.count)
            }
        };
        many && tiled_bytes(tiles, w, digits) <= self.device.max_binding_bytes()
    }

    /// The same of products of the experts that `ids` chooses.
    pub(super) fn experts_take_tiles(&self, which: Factors, ids: Tensor, num_experts: usize) -> bool {
        self.takes_tiles(which, ids.rows, Some((ids.rows * ids.cols, num_experts)))
    }

    /// The same of products whose input would be read in another form.
    pub(super) fn op_takes_tiles(&self, op: &Op) -> bool {
        let linear = |weight: Weight, rows| self.takes_tiles(Factors::One(WeightRef::Linear(weight)), rows, None);
        match op {
            Op::Linear { x, parts } => parts.iter().any(|(weight, _)| linear(*weight, x.rows)),
            Op::LinearHeads(op) => linear(op.weight, op.x.rows),
            Op::GateUp(op) => self.takes_tiles(Self::pair_of_dense(op), op.x.rows, None),
            Op::MoeGateUp(op) => self.experts_take_tiles(Self::pair_of(op), op.ids, op.experts.num_experts),
            Op::MoeDown(op) => {
                let down = Factors::One(WeightRef::Down(op.experts));
                self.experts_take_tiles(down, op.ids, op.experts.num_experts)
            }
            _ => false,
        }
    }

    /// `x` in tiles, made now unless it is there.
    fn tiled(&mut self, x: Tensor, parts: Parts, which: WeightRef, jobs: &Jobs) -> Result<Memory> {
        let w = self.weight(which);
        let (chunks, code) = (w.chunks, w.code);
        let digits = digits(code).expect("takes_tiles has seen it");
        let (num_tiles, slots_in_x, list) = match jobs {
            Jobs::List { list, max_items, sorted_offset, top_k, slots_in_x, .. } => {
                (*max_items, *slots_in_x, Some((list.clone(), *sorted_offset, *top_k)))
            }
            _ => (x.rows.div_ceil(TILE_TOKENS), false, None),
        };
        let count = if list.is_some() { 1 } else { parts.count };
        let bytes = tiled_bytes(num_tiles * count, w, digits);
        let before = self.tiles.memory.as_ref().map(|m| m.id);
        let memory = self.tiles.get("activations in tiles", bytes, &mut self.device)?;
        let of_list = list.is_some().then(|| (self.listed.expect("a list was just made"), slots_in_x));
        let key = TiledKey { x, parts, digits, half_word_codes: half_word_codes(code), list: of_list };
        if self.tiled == Some(key) && before == Some(memory.id) {
            return Ok(memory);
        }
        let source = self.memory(x)?;
        let (list_memory, sorted_offset, top_k) = list.clone().unwrap_or((source.clone(), 0, 1));
        let arguments = [
            x.offset,
            x.stride,
            parts.stride,
            num_tiles,
            x.rows,
            parts.cols,
            chunks,
            key.half_word_codes,
            usize::from(list.is_some()),
            usize::from(slots_in_x),
            top_k,
            sorted_offset,
        ]
        .map(|n| n as u32);
        let grid = [chunks.div_ceil(8), num_tiles, TILE_TOKENS * count];
        self.run(Kernel::WriteTiles(digits), &[&memory, &source, &list_memory], &arguments, grid)?;
        self.tiled = Some(key);
        Ok(memory)
    }

    /// One weight, or two that meet in an activation, all shards, by tiles.
    pub(super) fn product_of_tiles(
        &mut self,
        which: Factors,
        x: Tensor,
        parts: Parts,
        out: &Output,
        jobs: &Jobs,
    ) -> Result<()> {
        let tiled = self.tiled(x, parts, which.first(), jobs)?;
        let weights = which.weights();
        let rows_of_group = if weights == Weights::Pair { 32 } else { 64 };
        let (list, num_tokens, num_tiles, more) = match jobs {
            Jobs::List { list, max_items, sorted_offset, top_k, .. } => {
                (list.clone(), 0, *max_items, [1, *top_k, *sorted_offset])
            }
            _ => (self.nothing.clone(), x.rows, x.rows.div_ceil(TILE_TOKENS), [0, 1, 0]),
        };
        let code = self.weight(which.first()).code;
        for mut shard in self.shards(which, out, num_tokens) {
            let matrices = if more[0] == 1 { 1 } else { shard.num_matrices };
            let grid = [shard.num_rows.div_ceil(rows_of_group), num_tiles, matrices];
            shard.arguments.extend(more.map(|n| n as u32));
            let mut memories = vec![&out.forms.memory, &tiled, &tiled, &list];
            memories.extend(&shard.memories);
            self.run(Kernel::Tiles(code, weights), &memories, &shard.arguments, grid)?;
        }
        Ok(())
    }
}

/// Bytes of so many tiles of the input of a weight.
fn tiled_bytes(tiles: usize, w: &DeviceWeight, digits: usize) -> u64 {
    (tiles * (TILE_TOKENS / 16) * w.chunks * block_quads(digits) * 16) as u64
}
