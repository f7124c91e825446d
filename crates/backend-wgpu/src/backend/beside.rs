//! Products side by side: two weights that read the same rows are one dispatch (`kernels/beside.wgsl`). Alone each would wait for the other,
//! and few of them have work for a whole adapter.

use super::WgpuBackend;
use super::forms::{OutputForms, Parts};
use super::products::{Jobs, WeightRef, lanes_of};
use crate::device::Memory;
use crate::kernels::{Code, Kernel, Weights, team_rows};
use crate::weights::DeviceWeight;
use moellon_ops::{LinearHeads, Result, Tensor, Weight};

/// One of the two.
struct Side {
    weight: WeightRef,
    forms: OutputForms,
    out: Tensor,
}

impl WgpuBackend {
    /// Whether kernels read the words of both weights alike.
    pub(super) fn are_alike(&self, first: WeightRef, second: WeightRef) -> bool {
        let shape = |w: &DeviceWeight| (w.code, w.chunks, w.block_columns, w.scale_words);
        let (first, second) = (self.weight(first), self.weight(second));
        shape(first) == shape(second) && first.shards.len() == 1 && second.shards.len() == 1
    }

    /// Two products of the rows `x`.
    fn beside(&mut self, x: Tensor, sides: [Side; 2]) -> Result<()> {
        let code = self.weight(sides[0].weight).code;
        let tokens = self.tokens_for(&[0, 1].map(|i| self.weight(sides[i].weight)), x.rows);
        let input = self.spread(x, Parts::whole(x), code)?;
        let w = self.weight(sides[0].weight);
        let head = [w.chunks, w.block_columns, w.scale_words, input.token_step, x.rows];
        let mut arguments = head.map(|n| n as u32).to_vec();
        let (mut groups, mut of_weights) = (0, Vec::new());
        for Side { weight, forms, out } in &sides {
            let w = self.weight(*weight);
            let lanes = lanes_of(w, Weights::One);
            let here = w.rows.div_ceil(team_rows(Weights::One, tokens)).div_ceil(256 / lanes);
            groups += here;
            let words = [w.rows, lanes, here, out.offset, out.stride, w.has(), w.bias_offset()];
            arguments.extend(words.map(|n| n as u32));
            arguments.extend(forms.arguments);
            of_weights.extend([&w.shards[0].codes, &w.shards[0].scales, &w.extra].map(Memory::clone));
        }
        let [first, second] = sides.map(|side| side.forms);
        let mut memories = vec![&first.memory, first.form(), &second.memory, second.form(), &input.memory];
        memories.extend(&of_weights);
        self.run(Kernel::Beside(code, tokens), &memories, &arguments, [groups, 1, x.rows.div_ceil(tokens)])
    }

    fn side(&mut self, weight: WeightRef, out: Tensor) -> Result<Side> {
        let writes = self.writes(weight, Weights::One, &Jobs::All { num_tokens: out.rows });
        Ok(Side { weight, forms: self.output_forms(out, writes)?, out })
    }

    /// What `latent_heads.wgsl` and `join_heads.wgsl` take about the heads' product behind their other arguments: format, outputs, arguments,
    /// and how many workgroups. `x_part_step`: from one head of its input to the next.
    pub(super) fn head_arguments(
        &mut self,
        op: &LinearHeads,
        x_part_step: usize,
    ) -> Result<(Code, OutputForms, [u32; 15], usize)> {
        let side = self.side(WeightRef::Linear(op.weight), op.out)?;
        let w = self.weight(WeightRef::Linear(op.weight));
        let lanes = lanes_of(w, Weights::One);
        let groups = w.rows.div_ceil(team_rows(Weights::One, 1)).div_ceil(256 / lanes);
        let [forms, _, stride, cols, chunks, per_byte] = side.forms.arguments;
        let words =
            [w.chunks, w.block_columns, w.scale_words, x_part_step, w.rows, lanes, groups, op.out.offset, w.has()];
        let mut arguments = [0; 15];
        for (to, word) in arguments.iter_mut().zip(words.into_iter().chain([w.bias_offset()])) {
            *to = word as u32;
        }
        arguments[10..].copy_from_slice(&[forms, stride, cols, chunks, per_byte]);
        Ok((w.code, side.forms, arguments, groups * op.weight.count))
    }

    /// Codes, scales and the rest of a weight that is one shard.
    pub(super) fn first_shard(&self, weight: Weight) -> [Memory; 3] {
        let w = self.weight(WeightRef::Linear(weight));
        [&w.shards[0].codes, &w.shards[0].scales, &w.extra].map(Memory::clone)
    }

    /// Weights that read the rows `x`, two at a time where they can be.
    pub(super) fn linear_beside(&mut self, x: Tensor, parts: &[(Weight, Tensor)]) -> Result<()> {
        let mut rest = parts;
        while let [(first, first_out), more @ ..] = rest {
            let of = |weight: &Weight| WeightRef::Linear(*weight);
            match more {
                [(second, second_out), more @ ..]
                    if self.device.binds_many && self.are_alike(of(first), of(second)) =>
                {
                    let sides = [self.side(of(first), *first_out)?, self.side(of(second), *second_out)?];
                    self.beside(x, sides)?;
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
}
