//! Products of one row side by side: two weights, or two pairs, that read the same row are one dispatch (`kernels/beside.wgsl`). Alone each
//! would wait for the other, and few of them have work for a whole adapter.

use super::WgpuBackend;
use super::forms::{Input, OutputForms, Parts};
use super::products::{Factors, Jobs, WeightRef, activation_args, lanes_of};
use crate::device::Memory;
use crate::kernels::{Code, Kernel, SHARED_LANES, Weights, team_rows};
use crate::weights::DeviceWeight;
use moellon_ops::{GateUp, LinearHeads, MoeDown, MoeGateUp, Result, Tensor, Weight};

/// One of the two.
struct Side {
    factors: Factors,
    out: OutputForms,
    offset: usize,
}

impl WgpuBackend {
    /// Whether two products of one row can be one dispatch.
    fn can_be_beside(&self, first: Factors, second: Factors) -> bool {
        if !self.device.binds_many {
            return false;
        }
        let weights = |factors: Factors| {
            let second = factors.second().map(|(weight, _)| self.weight(weight));
            [Some(self.weight(factors.first())), second].into_iter().flatten()
        };
        let of_one_kind = match (first.second(), second.second()) {
            (None, None) => true,
            (Some((_, a)), Some((_, b))) => activation_args(a) == activation_args(b),
            _ => false,
        };
        let w = self.weight(first.first());
        let alike = |other: &DeviceWeight| {
            let shape = |w: &DeviceWeight| (w.code, w.chunks, w.block_columns, w.scale_words);
            shape(other) == shape(w) && other.shards.len() == 1
        };
        of_one_kind && weights(first).chain(weights(second)).all(alike)
    }

    /// Two products of the row in `x`; of the first weight's matrices `chosen` ones: memory, offset and number of their ids.
    fn beside(&mut self, x: &Input, sides: [Side; 2], chosen: Option<(Memory, usize, usize)>) -> Result<()> {
        let pair = sides[0].factors.second();
        let weights = if pair.is_some() { Weights::Pair } else { Weights::One };
        let (kind, alpha, limit) = pair.map_or((0, 0.0, 0.0), |(_, activation)| activation_args(activation));
        let w = self.weight(sides[0].factors.first());
        let code = w.code;
        let (top_k, ids_offset) = chosen.as_ref().map_or((0, 0), |(_, offset, top_k)| (*top_k, *offset));
        let mut arguments = [w.chunks, w.block_columns, w.scale_words, kind].map(|n| n as u32).to_vec();
        arguments.extend([alpha.to_bits(), limit.to_bits(), top_k as u32, ids_offset as u32]);
        let (mut groups, mut of_weights) = (0, Vec::new());
        for (side, matrices) in sides.iter().zip([top_k.max(1), 1]) {
            let w = self.weight(side.factors.first());
            let second = side.factors.second().map(|(second, _)| self.weight(second));
            let lanes = lanes_of(w, weights);
            let here = w.rows.div_ceil(team_rows(weights, 1)).div_ceil(256 / lanes);
            groups += here * matrices;
            let [has, bias] = [DeviceWeight::has, DeviceWeight::bias_offset].map(|of| (of(w), second.map_or(0, of)));
            let words = [w.rows, lanes, here, side.offset, has.0 + 4 * has.1, bias.0, bias.1];
            arguments.extend(words.map(|n| n as u32));
            let [forms, _, stride, cols, chunks, per_byte] = side.out.arguments;
            arguments.extend([forms, stride, cols, chunks, per_byte]);
            for w in [Some(w), second].into_iter().flatten() {
                of_weights.extend([&w.shards[0].codes, &w.shards[0].scales, &w.extra].map(Memory::clone));
            }
        }
        let [first, second] = &sides;
        let ids = chosen.map_or_else(|| self.nothing.clone(), |(ids, ..)| ids);
        let mut memories = vec![&first.out.memory, first.out.form(), &second.out.memory, second.out.form()];
        memories.extend([&x.memory, &ids]);
        memories.extend(&of_weights);
        self.run(Kernel::Beside(code, weights), &memories, &arguments, [groups, 1, 1])
    }

    fn side(&mut self, factors: Factors, out: Tensor) -> Result<Side> {
        let weights = factors.second().map_or(Weights::One, |_| Weights::Pair);
        let writes = self.writes(factors.first(), weights, &Jobs::All { num_tokens: 1 });
        Ok(Side { factors, out: self.output_forms(out, writes)?, offset: out.offset })
    }

    /// What `latent_heads.wgsl` and `join_heads.wgsl` take about the heads' product behind their other arguments: format, outputs, arguments,
    /// and how many workgroups. `x_part_step`: from one head of its input to the next.
    pub(super) fn head_arguments(
        &mut self,
        op: &LinearHeads,
        x_part_step: usize,
    ) -> Result<(Code, OutputForms, [u32; 15], usize)> {
        let side = self.side(Factors::One(WeightRef::Linear(op.weight)), op.out)?;
        let w = self.weight(WeightRef::Linear(op.weight));
        let lanes = lanes_of(w, Weights::One);
        let groups = w.rows.div_ceil(team_rows(Weights::One, 1)).div_ceil(256 / lanes);
        let [forms, _, stride, cols, chunks, per_byte] = side.out.arguments;
        let words =
            [w.chunks, w.block_columns, w.scale_words, x_part_step, w.rows, lanes, groups, side.offset, w.has()];
        let mut arguments = [0; 15];
        for (to, word) in arguments.iter_mut().zip(words.into_iter().chain([w.bias_offset()])) {
            *to = word as u32;
        }
        arguments[10..].copy_from_slice(&[forms, stride, cols, chunks, per_byte]);
        Ok((w.code, side.out, arguments, groups * op.weight.count))
    }

    /// Codes, scales and the rest of a weight that is one shard.
    pub(super) fn first_shard(&self, weight: Weight) -> [Memory; 3] {
        let w = self.weight(WeightRef::Linear(weight));
        [&w.shards[0].codes, &w.shards[0].scales, &w.extra].map(Memory::clone)
    }

    /// Weights that read one row `x`, two at a time where they can be.
    pub(super) fn linear_beside(&mut self, x: Tensor, parts: &[(Weight, Tensor)]) -> Result<()> {
        let mut rest = parts;
        while let [(first, first_out), more @ ..] = rest {
            let of = |weight: &Weight| Factors::One(WeightRef::Linear(*weight));
            match more {
                [(second, second_out), more @ ..] if self.can_be_beside(of(first), of(second)) => {
                    let input = self.spread(x, Parts::whole(x), self.weight(WeightRef::Linear(*first)).code)?;
                    let sides = [self.side(of(first), *first_out)?, self.side(of(second), *second_out)?];
                    self.beside(&input, sides, None)?;
                    rest = more;
                }
                _ => {
                    self.linear_parts(&moellon_ops::Linear { x, parts: &rest[..1] })?;
                    rest = more;
                }
            }
        }
        Ok(())
    }

    /// Whether one token's experts and the shared expert can be two dispatches: gates and ups, then everything that is added.
    pub(super) fn has_shared_beside(
        &self,
        shared: &GateUp,
        shared_down: Weight,
        experts: &MoeGateUp,
        down: &MoeDown,
    ) -> bool {
        let [pair, shared_pair] = Self::pairs(shared, experts);
        let (w, of_shared) = (self.weight(WeightRef::Down(down.experts)), self.weight(WeightRef::Linear(shared_down)));
        // Where sums go through registers the shared expert's product has invocations of its own, and nobody waits for others.
        let fits = !self.device.self_test.subgroups || (w.lanes <= 32 && of_shared.lanes <= SHARED_LANES);
        let alike = fits
            && w.code == of_shared.code
            && w.block_columns == of_shared.block_columns
            && of_shared.shards.len() == 1;
        shared.x == experts.x
            && experts.x.rows == 1
            && self.is_one_tokens_down(down)
            && alike
            && self.can_be_beside(pair, shared_pair)
    }

    fn pairs(shared: &GateUp, experts: &MoeGateUp) -> [Factors; 2] {
        [Self::pair_of(experts), Self::pair_of_dense(shared)]
    }

    /// The experts of one token and the shared expert, `shared_down` of whose activations is added to theirs; `adds`: to what `down.out`
    /// holds.
    pub(super) fn experts_and_shared(
        &mut self,
        shared: &GateUp,
        shared_down: Weight,
        experts: &MoeGateUp,
        down: &MoeDown,
        adds: bool,
    ) -> Result<()> {
        let [pair, shared_pair] = Self::pairs(shared, experts);
        let x = self.spread(experts.x, Parts::whole(experts.x), self.weight(pair.first()).code)?;
        let ids = self.memory(experts.ids)?;
        let sides = [self.side(pair, experts.out)?, self.side(shared_pair, shared.out)?];
        self.beside(&x, sides, Some((ids, experts.ids.offset, experts.ids.cols)))?;
        let code = self.weight(WeightRef::Down(down.experts)).code;
        let h = self.spread(down.h, Self::slot_parts(down), code)?;
        let shared_h = self.spread(shared.out, Parts::whole(shared.out), code)?;
        self.one_tokens_experts_down(down, &h, Some((&shared_h, shared_down)), adds)
    }
}
