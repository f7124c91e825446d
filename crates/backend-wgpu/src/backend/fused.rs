//! Steps as a whole: what their operations write for each other, and runs of them that are one kernel, with the same bits.
//!
//! | operations | kernel |
//! |---|---|
//! | `linear` or `moe_down`, then the `rms_norm` that adds their output | the product adds it |
//! | `linear` with two weights | `beside.wgsl` |
//! | one row's `linear` and the `route` that reads it | `router.wgsl` |
//! | the shared expert and chosen experts, all six products | `chosen.wgsl`; then for one row `experts_down.wgsl`, else `chosen.wgsl` and `combine.wgsl` |
//! | `rms_norm` of the latent, `rope` of queries and key, `kv_store` | `latent.wgsl`; one row: with the heads' product, `latent_heads.wgsl` |
//! | `attend_mla` of one row and a short context, `linear_heads` | `join_heads.wgsl` instead of `attend_join.wgsl` |
//! | any that writes a view, then any that reads it as the input of a product | `forms.wgsl` instead of `spread.wgsl` |

use super::forms::Parts;
use super::products::WeightRef;
use super::{WgpuBackend, place};
use crate::kernels::Kernel;
use moellon_ops::program::Op;
use moellon_ops::{
    Cache, CacheDtype, GateUp, KvStore, LinearHeads, MoeDown, MoeGateUp, Result, RmsNorm, Rope, RopePairs, Stage,
    Tensor, Weight,
};

/// Elements of a cache row that `latent.wgsl` keeps.
const LATENT_WIDTH: usize = 1024;

impl WgpuBackend {
    /// Launches the operations of a step.
    pub(super) fn launch_step(&mut self, ops: &[(Stage, Op)]) -> Result<()> {
        let mut skipped = [usize::MAX; 2];
        for (at, (_, op)) in ops.iter().enumerate() {
            if self.are_experts_and_shared(&ops[at..]) {
                // Their second products read scratch memory.
                skipped = [at + 1, at + 3];
            }
            if !skipped.contains(&at) {
                self.expect_inputs(op)?;
            }
        }
        let mut at = 0;
        // Whether the norm that comes next finds its delta added already.
        let mut added = false;
        while at < ops.len() {
            self.stage = ops[at].0;
            if let Some((count, has_added)) = self.launch_together(&ops[at..])? {
                at += count;
                added = has_added;
                continue;
            }
            let (op, after) = (&ops[at].1, &ops[at + 1..]);
            let was_added = std::mem::take(&mut added);
            match (op, after.first()) {
                (Op::RmsNorm(norm), _) => {
                    let norm = if was_added { RmsNorm { delta: None, ..*norm } } else { *norm };
                    self.norm(&norm, self.is_read_as_rows(after, norm.out))?;
                }
                (Op::Linear { x, parts }, Some((_, Op::RmsNorm(norm)))) if is_delta_of(parts, norm) => {
                    self.linear_residual(*x, parts[0].0, norm.x)?;
                    added = true;
                }
                (Op::MoeDown(down), Some((_, Op::RmsNorm(norm)))) if norm.delta == Some(down.out) => {
                    self.experts_down(&MoeDown { out: norm.x, ..*down }, true)?;
                    added = true;
                }
                _ => self.execute(op)?,
            }
            at += 1;
        }
        Ok(())
    }

    /// Whether `x` is read in another way than as the input of products, which read the forms that its writer wrote, before it is
    /// written again. Where nobody writes it again the next step might read it.
    fn is_read_as_rows(&self, ops: &[(Stage, Op)], x: Tensor) -> bool {
        for (_, op) in ops {
            let same = |y: &Tensor| y.buffer.id == x.buffer.id;
            match op {
                Op::GateUp(GateUp { x: read, .. }) | Op::MoeGateUp(MoeGateUp { x: read, .. })
                    if same(read) && self.op_takes_tiles(op) =>
                {
                    return true;
                }
                Op::Linear { x: read, parts } => {
                    if same(read) && (*read != x || self.op_takes_tiles(op)) {
                        return true;
                    }
                    if parts.iter().any(|(_, out)| same(out)) {
                        return false;
                    }
                }
                Op::GateUp(op) if same(&op.x) => {
                    if op.x != x || !self.are_pair(WeightRef::Linear(op.gate), WeightRef::Linear(op.up)) {
                        return true;
                    }
                }
                Op::MoeGateUp(op) if same(&op.x) => {
                    if op.x != x {
                        return true;
                    }
                }
                Op::RmsNorm(op) if same(&op.x) || op.delta.as_ref().is_some_and(same) => return true,
                Op::RmsNorm(op) if same(&op.out) => return false,
                Op::GateUp(_) | Op::MoeGateUp(_) | Op::RmsNorm(_) => {}
                other => {
                    if other.reads().iter().any(same) {
                        return true;
                    }
                }
            }
        }
        true
    }

    /// Says in which form an operation will read its input, before anybody writes it.
    fn expect_inputs(&mut self, op: &Op) -> Result<()> {
        if self.op_takes_tiles(op) {
            return Ok(());
        }
        match op {
            Op::Linear { x, parts } => {
                parts.iter().try_for_each(|(weight, _)| self.expect(*x, Parts::whole(*x), WeightRef::Linear(*weight)))
            }
            Op::GateUp(op) => {
                self.expect(op.x, Parts::whole(op.x), WeightRef::Linear(op.gate))?;
                self.expect(op.x, Parts::whole(op.x), WeightRef::Linear(op.up))
            }
            Op::MoeGateUp(op) => {
                self.expect(op.x, Parts::whole(op.x), WeightRef::Gate(op.experts))?;
                self.expect(op.x, Parts::whole(op.x), WeightRef::Up(op.experts))
            }
            Op::LinearHeads(op) => self.expect(op.x, Self::head_parts(op), WeightRef::Linear(op.weight)),
            Op::MoeDown(op) => self.expect(op.h, Self::slot_parts(op), WeightRef::Down(op.experts)),
            _ => Ok(()),
        }
    }

    fn expect(&mut self, x: Tensor, parts: Parts, weight: WeightRef) -> Result<()> {
        let form = self.form_for(self.weight(weight).code);
        self.expect_spread(x, parts, form)
    }

    /// Whether the operations in front are the shared expert's and the chosen experts', which can share kernels.
    fn are_experts_and_shared(&self, ops: &[(Stage, Op)]) -> bool {
        let [
            (_, Op::GateUp(shared)),
            (_, Op::Linear { x, parts }),
            (_, Op::MoeGateUp(experts)),
            (_, Op::MoeDown(down)),
            after @ ..,
        ] = ops
        else {
            return false;
        };
        let is_added = matches!(parts[..], [(weight, out)] if down.plus == Some(out)
            && self.has_shared_beside(shared, weight, experts, down));
        let is_read = is_read_again(after, shared.out) || is_read_again(after, experts.out);
        *x == shared.out && is_added && !is_read
    }

    /// Launches the operations in front together, if there are kernels for that, and says how many they were and whether the norm behind
    /// them finds its delta added.
    fn launch_together(&mut self, ops: &[(Stage, Op)]) -> Result<Option<(usize, bool)>> {
        match ops {
            [
                (_, Op::RmsNorm(norm)),
                (_, Op::Rope(q)),
                (_, Op::Rope(k)),
                (_, Op::KvStore { parts, slots, cache }),
                after @ ..,
            ] if stores_latent(norm, [q, k], parts, *cache) => {
                let store = KvStore { parts, slots: *slots, cache: *cache };
                match after.first() {
                    Some((_, Op::LinearHeads(heads))) if self.is_beside_latent(q, heads) => {
                        self.latent(norm, [q, k], &store, Some(heads))?;
                        Ok(Some((5, false)))
                    }
                    _ => {
                        self.latent(norm, [q, k], &store, None)?;
                        Ok(Some((4, false)))
                    }
                }
            }
            [
                (_, Op::GateUp(shared)),
                (_, Op::Linear { parts, .. }),
                (stage, Op::MoeGateUp(experts)),
                (_, Op::MoeDown(down)),
                after @ ..,
            ] if self.are_experts_and_shared(ops) => {
                self.stage = *stage;
                let norm = match after.first() {
                    Some((_, Op::RmsNorm(norm))) if norm.delta == Some(down.out) => Some(norm),
                    _ => None,
                };
                let down = MoeDown { out: norm.map_or(down.out, |norm| norm.x), ..*down };
                self.experts_and_shared(shared, parts[0].0, experts, &down, norm.is_some())?;
                Ok(Some((4, norm.is_some())))
            }
            [(_, Op::AttendMla(attend)), (stage, Op::LinearHeads(heads)), after @ ..]
                if self.can_join_heads(attend, heads) && !is_read_again(after, attend.out) =>
            {
                self.attend_and_heads(attend, heads, *stage)?;
                Ok(Some((2, false)))
            }
            [(_, Op::Linear { x, parts }), (_, Op::Route(route)), ..] if matches!(parts[..], [(router, logits)] if self.can_choose_at_once(*x, router, logits, route)) =>
            {
                self.router(*x, parts[0].0, route)?;
                Ok(Some((2, false)))
            }
            [(_, op @ Op::Linear { x, parts }), ..] if parts.len() > 1 && x.rows > 0 && !self.op_takes_tiles(op) => {
                self.linear_beside(*x, parts)?;
                Ok(Some((1, false)))
            }
            _ => Ok(None),
        }
    }

    /// Whether the product of the heads can be one kernel with `latent`: it reads columns of the same row that are not rotated.
    fn is_beside_latent(&self, q: &Rope, heads: &LinearHeads) -> bool {
        let w = self.weight(WeightRef::Linear(heads.weight));
        let apart = heads.x.buffer.id == q.x.buffer.id && heads.out.buffer.id != q.x.buffer.id;
        let rotated = q.x.offset % q.head_stride;
        let is_before =
            heads.x.offset % q.head_stride + heads.weight.cols <= rotated && heads.x_head_stride == q.head_stride;
        self.device.binds_many && apart && is_before && heads.x.rows == 1 && w.shards.len() == 1
    }

    /// `heads`: their product too.
    fn latent(
        &mut self,
        norm: &RmsNorm,
        [q, k]: [&Rope; 2],
        store: &KvStore<'_>,
        heads: Option<&LinearHeads>,
    ) -> Result<()> {
        // Before the rows are rotated: the form of the other columns is made out of them if nobody has made it yet.
        let x = heads.map(|op| self.head_input(op)).transpose()?;
        let (latent, key, queries) = (self.output(norm.x)?, self.output(k.x)?, self.rotated(q)?);
        let (table, slots, weight) = (self.memory(q.table)?, self.memory(store.slots)?, self.memory(norm.weight)?);
        let cache = &self.caches[store.cache.id as usize];
        let (memory, row_words) = (cache.memory.clone(), cache.row_words as u32);
        let half = q.table.cols / 2;
        let mut arguments = place(norm.x).to_vec();
        arguments.extend([norm.x.cols as u32, norm.weight.offset as u32, norm.eps.to_bits()]);
        arguments.extend(place(k.x));
        arguments.extend(place(q.x));
        arguments.extend([q.num_heads as u32, q.head_stride as u32]);
        arguments.extend(place(q.table));
        let is_bf16 = store.cache.dtype == CacheDtype::Bf16;
        let flags = u32::from(q.pairs == RopePairs::Interleaved) + 2 * u32::from(is_bf16);
        arguments.extend([half as u32, store.slots.offset as u32, row_words, flags]);
        let groups = 1 + (q.num_heads * half).div_ceil(256);
        let memories = [&latent, &key, &queries, &memory, &table, &slots, &weight];
        let (Some(op), Some(x)) = (heads, x) else {
            return self.run(Kernel::Latent, &memories, &arguments, [groups, norm.x.rows, 1]);
        };
        let (code, out, more, of_heads) = self.head_arguments(op, x.part_step)?;
        arguments.extend(more);
        let [codes, scales, extra] = self.first_shard(op.weight);
        let [latent, key, queries, memory, table, slots, weight] = memories;
        let memories = [
            latent,
            key,
            queries,
            memory,
            &out.memory,
            out.form(),
            table,
            slots,
            weight,
            &x.memory,
            &codes,
            &scales,
            &extra,
        ];
        self.run(Kernel::LatentHeads(code), &memories, &arguments, [groups + of_heads, 1, 1])
    }
}

/// Whether operations read the rows `x` before an operation of the kind that wrote them does so again.
fn is_read_again(ops: &[(Stage, Op)], x: Tensor) -> bool {
    let same = |y: &Tensor| y.buffer.id == x.buffer.id;
    let writes = |op: &Op| match op {
        Op::AttendMla(op) => same(&op.out),
        Op::GateUp(op) => same(&op.out) && !same(&op.x),
        Op::MoeGateUp(op) => same(&op.out) && !same(&op.x),
        _ => false,
    };
    ops.iter().take_while(|(_, op)| !writes(op)).any(|(_, op)| op.reads().iter().any(same))
}

/// Whether one weight's product is what the norm behind it adds.
fn is_delta_of(parts: &[(Weight, Tensor)], norm: &RmsNorm) -> bool {
    matches!(parts, [(_, out)] if norm.delta == Some(*out))
}

/// Whether operations are what `latent.wgsl` does: a latent normed in place, queries and one key rotated alike, latent and key stored.
fn stores_latent(norm: &RmsNorm, [q, k]: [&Rope; 2], parts: &[Tensor], cache: Cache) -> bool {
    let in_place = norm.delta.is_none() && norm.x == norm.out && norm.x.buffer.id != q.x.buffer.id;
    let alike = q.table == k.table && q.pairs == k.pairs && k.num_heads == 1 && q.x.rows == norm.x.rows;
    in_place && alike && parts == [norm.x, k.x] && k.x.cols == k.table.cols && cache.width <= LATENT_WIDTH
}
