//! Steps as a whole: what their operations write for each other, and runs of them that are one kernel, with the same bits.
//!
//! | operations | kernel |
//! |---|---|
//! | `linear` or `moe_down`, then the `rms_norm` that adds their output | the product adds it |
//! | `rms_norm` of the latent, `rope` of queries and key, `kv_store` | `latent.wgsl` |
//! | any that writes a view, then any that reads it as the input of a product | `forms.wgsl` instead of `spread.wgsl` |

use super::forms::Parts;
use super::products::WeightRef;
use super::{WgpuBackend, place};
use crate::kernels::Kernel;
use crate::program::Op;
use moellon_ops::{Cache, CacheDtype, KvStore, MoeDown, Result, RmsNorm, Rope, RopePairs, Stage, Tensor, Weight};

/// Elements of a cache row that `latent.wgsl` keeps.
const LATENT_WIDTH: usize = 1024;

impl WgpuBackend {
    /// Launches the operations of a step.
    pub(super) fn launch_step(&mut self, ops: &[(Stage, Op)]) -> Result<()> {
        for (_, op) in ops {
            self.expect_inputs(op)?;
        }
        let mut at = 0;
        // Whether the norm that comes next finds its delta added already.
        let mut added = false;
        while at < ops.len() {
            self.stage = ops[at].0;
            if let Some(count) = self.launch_together(&ops[at..])? {
                at += count;
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
                Op::Linear { x: read, parts } => {
                    if same(read) && *read != x {
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

    /// Launches the operations in front as one kernel, if there is one for them, and says how many they were.
    fn launch_together(&mut self, ops: &[(Stage, Op)]) -> Result<Option<usize>> {
        match ops {
            [
                (_, Op::RmsNorm(norm)),
                (_, Op::Rope(q)),
                (_, Op::Rope(k)),
                (_, Op::KvStore { parts, slots, cache }),
                ..,
            ] if stores_latent(norm, [q, k], parts, *cache) => {
                self.latent(norm, [q, k], &KvStore { parts, slots: *slots, cache: *cache })?;
                Ok(Some(4))
            }
            _ => Ok(None),
        }
    }

    fn latent(&mut self, norm: &RmsNorm, [q, k]: [&Rope; 2], store: &KvStore<'_>) -> Result<()> {
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
        arguments.extend([half as u32, u32::from(q.pairs == RopePairs::Interleaved), store.slots.offset as u32]);
        arguments.extend([row_words, u32::from(store.cache.dtype == CacheDtype::Bf16)]);
        let memories = [&latent, &key, &queries, &memory, &table, &slots, &weight];
        let grid = [1 + (q.num_heads * half).div_ceil(256), norm.x.rows, 1];
        self.run(Kernel::Latent, &memories, &arguments, grid)
    }
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
