//! Grouped-query attention of a step of up to 32 rows: what stands between the products of a layer's queries, keys and values and its output
//! projection is one kernel (`kernels/gqa.cu`).

use super::operations::{attend_rows_kernel, max_splits, partial_row_bytes};
use super::{CudaBackend, GEMV_ROWS, PARTIAL_BYTES};
use crate::args;
use crate::buffers::Parts;
use crate::weights::takes_digits;
use moellon_ops::program::Op;
use moellon_ops::{AttendGqa, Cache, Result, RmsNorm, Rope, RopePairs, Tensor};

/// Most columns of a head: what a warp norms.
const HEAD_COLUMNS: usize = 256;
/// Threads of a block: a warp for each of its heads, and one for keys.
const THREADS: u32 = 32 * 9;

/// The operations of a step's attention, from the products' results to attention itself.
struct Grouped<'a> {
    /// Of the heads of queries and keys.
    norms: [Option<&'a RmsNorm>; 2],
    /// The same.
    ropes: [&'a Rope; 2],
    values: Tensor,
    slots: Tensor,
    cache: Cache,
    attend: &'a AttendGqa,
    /// How many operations these are.
    count: usize,
}

impl<'a> Grouped<'a> {
    /// What `ops` starts with, if the kernel knows it.
    fn parse(ops: &'a [Op]) -> Option<Self> {
        let num_norms = ops.iter().take(2).take_while(|op| matches!(op, Op::RmsNorm(_))).count();
        let [Op::Rope(q), Op::Rope(k), Op::KvStore { parts, slots, cache }, Op::AttendGqa(attend), ..] =
            &ops[num_norms..]
        else {
            return None;
        };
        let [keys, values] = parts[..] else { return None };
        let mut norms = [None; 2];
        let heads = [(attend.q, attend.num_heads), (keys, attend.num_kv_heads)];
        for op in &ops[..num_norms] {
            let Op::RmsNorm(norm) = op else { return None };
            let whole = |&(x, count): &(Tensor, usize)| x.stride == x.cols && norm.x == x.split_rows(count);
            let of = heads.iter().position(whole)?;
            if norm.delta.is_some() || norm.out != norm.x || norms[of].replace(norm).is_some() {
                return None;
            }
        }
        let dim = attend.head_dim;
        let rotates = |rope: &Rope, (x, count): (Tensor, usize)| {
            rope.x == x && rope.num_heads == count && rope.head_stride == dim && rope.table == q.table
        };
        let known = rotates(q, heads[0])
            && rotates(k, heads[1])
            && q.pairs == k.pairs
            && q.table.cols <= dim
            && *cache == attend.cache
            && (keys.cols, values.cols) == (attend.num_kv_heads * dim, attend.num_kv_heads * dim)
            && dim.is_multiple_of(8)
            && dim <= HEAD_COLUMNS
            && cache.width.is_multiple_of(8)
            && (1..=GEMV_ROWS).contains(&attend.q.rows)
            && norms
                .iter()
                .flatten()
                .all(|norm| norms.iter().flatten().all(|other| norm.eps.to_bits() == other.eps.to_bits()));
        let count = num_norms + 4;
        // Nobody gets the heads themselves.
        let raw = [attend.q, keys].iter().any(|x| is_read(&ops[count..], *x));
        (known && !raw).then_some(Grouped { norms, ropes: [q, k], values, slots: *slots, cache: *cache, attend, count })
    }
}

/// Whether one of the operations reads the buffer of `x` before a product writes it.
fn is_read(ops: &[Op], x: Tensor) -> bool {
    let same = |y: &Tensor| y.buffer.id == x.buffer.id;
    for op in ops {
        if op.reads().iter().any(same) {
            return true;
        }
        if matches!(op, Op::Linear { parts, .. } if parts.iter().any(|(_, out)| same(out))) {
            return false;
        }
    }
    false
}

/// Whether `op` writes to `cache`. Keys that no operation of this step writes are read while the operation before works.
fn stores_to(op: &Op, cache: Cache) -> bool {
    matches!(op, Op::KvStore { cache: other, .. } if other.id == cache.id)
}

impl CudaBackend {
    /// Launches a step's attention with what comes before it as one kernel; `before` are the operations of the step that are launched already.
    /// Returns how many of the operations that was; `None`, with nothing launched, where there is no such kernel.
    pub(super) fn grouped_attention(&mut self, before: &[Op], ops: &[Op]) -> Result<Option<usize>> {
        let Some(grouped) = Grouped::parse(ops) else { return Ok(None) };
        let op = grouped.attend;
        op.validate()?;
        let (mut attend, max_keys) = self.attend_gqa_args(op)?;
        let bytes = op.q.rows * partial_row_bytes(&attend, max_keys);
        if bytes > PARTIAL_BYTES {
            return Ok(None);
        }
        let splits = max_splits(max_keys) as u32;
        attend.partial = self.partial.pointer("parts of attention", bytes as u64, &mut self.device)?;
        attend.max_splits = splits;
        let groups = attend.num_heads / attend.heads_per_block;
        let [q, k] = grouped.ropes;
        let norms = grouped.norms;
        let mut weight = |norm: Option<&RmsNorm>| norm.map_or(Ok(0), |norm| self.address(norm.weight));
        let (q_norm, k_norm) = (weight(norms[0])?, weight(norms[1])?);
        let mut heads = args::StepHeads {
            k: self.input(k.x)?,
            v: self.input(grouped.values)?,
            table: self.input(q.table)?,
            q_norm,
            k_norm,
            slots: self.address(grouped.slots)?,
            cache: self.cache_address(grouped.cache),
            digits: 0,
            arrived: self.counters(op.q.rows * groups as usize)?,
            rows: op.q.rows as u32,
            interleaved: u32::from(q.pairs == RopePairs::Interleaved),
            eps: norms.iter().flatten().next().map_or(0.0, |norm| norm.eps),
            early: u32::from(!before.iter().any(|op| stores_to(op, grouped.cache))),
        };
        // Behind it is a product that reads digits.
        let wanted = matches!(ops.get(grouped.count), Some(Op::Linear { x, parts })
            if *x == op.out && parts.iter().any(|(w, _)| takes_digits(w.format)));
        if wanted && op.head_dim.is_multiple_of(64) {
            let whole = Parts { count: 1, stride: op.out.cols, cols: op.out.cols };
            let buffer = self.buffers.get_mut(&op.out.buffer.id).expect("the arguments named it");
            (heads.digits, _) = buffer.digits(op.out, whole, &mut self.device)?;
        }
        let (lanes, dtype, shared) = attend_rows_kernel(&attend)?;
        let own = 4 * (THREADS / 32) * attend.q_dim;
        let kernel = self.kernels.gqa(&format!("gqa{lanes}_{dtype}"))?;
        let grid = [splits, groups, op.q.rows as u32];
        self.device.launch(&kernel, grid, THREADS, shared + own, &args::Gqa { attend, heads })?;
        Ok(Some(grouped.count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_ops::{Buffer, CacheDtype, ElementType, Paging, Weight};
    use moellon_tensor::WeightFormat;

    fn tensor(id: u32, rows: usize, cols: usize) -> Tensor {
        Buffer { id, element: ElementType::F32, len: 1 << 20 }.tensor(rows, cols)
    }

    /// Attention of Qwen3-30B-A3B for `rows` rows, as a decoder asks for it.
    fn attention(rows: usize) -> Vec<Op> {
        let (q, out) = (tensor(0, rows, 32 * 128), tensor(2, rows, 32 * 128));
        let k = tensor(1, rows, 4 * 128);
        let v = Tensor { offset: rows * 4 * 128, ..k };
        let norm = |x: Tensor| Op::RmsNorm(RmsNorm { x, delta: None, weight: tensor(3, 1, 128), eps: 1e-6, out: x });
        let rope = |x, num_heads| {
            let (table, pairs) = (tensor(4, rows, 128), RopePairs::HalfSplit);
            Op::Rope(Rope { x, num_heads, head_stride: 128, table, pairs })
        };
        let cache = Cache { id: 0, dtype: CacheDtype::Bf16, num_slots: 64, width: 2 * 4 * 128 };
        let row = tensor(5, 1, rows);
        let paging =
            Paging { positions: row, sequences: row, block_table: tensor(6, 1, 2), block_size: 32, max_context: 64 };
        vec![
            norm(q.split_rows(32)),
            norm(k.split_rows(4)),
            rope(q, 32),
            rope(k, 4),
            Op::KvStore { parts: vec![k, v], slots: row, cache },
            Op::AttendGqa(AttendGqa {
                q,
                cache,
                num_heads: 32,
                num_kv_heads: 4,
                head_dim: 128,
                scale: 0.1,
                window: None,
                sinks: None,
                paging,
                out,
            }),
        ]
    }

    #[test]
    fn attention_of_a_step_is_one_kernel() {
        let count = |ops: &[Op]| Grouped::parse(ops).map(|grouped| grouped.count);
        assert_eq!([1, 32, 33].map(|rows| count(&attention(rows))), [Some(6), Some(6), None]);
        // Without norms, and with that of the keys alone.
        assert_eq!([1, 2].map(|first| count(&attention(1)[first..])), [Some(5), Some(4)]);
        assert_eq!(
            Grouped::parse(&attention(1)[1..]).map(|grouped| grouped.norms.map(|norm| norm.is_some())),
            Some([false, true])
        );
        let mut ops = attention(1);
        ops.swap(2, 3);
        assert_eq!(count(&ops), None, "keys are rotated as queries");
    }

    #[test]
    fn a_cache_that_the_step_writes_before_is_not_read_early() {
        let ops = attention(1);
        let Op::AttendGqa(attend) = &ops[5] else { panic!("attention comes last") };
        assert!(ops.iter().any(|op| stores_to(op, attend.cache)));
        assert!(!ops.iter().any(|op| stores_to(op, Cache { id: 1, ..attend.cache })));
    }

    #[test]
    fn heads_that_somebody_reads_stay() {
        let format = WeightFormat::Bf16;
        let weight = Weight { id: 0, format, count: 1, rows: 32 * 128, cols: 32 * 128, has_bias: false };
        let product = |x, out| Op::Linear { x, parts: vec![(weight, out)] };
        let (q, other) = (tensor(0, 1, 32 * 128), tensor(9, 1, 32 * 128));
        let mut ops = attention(1);
        ops.push(product(other, q));
        ops.push(product(q, other));
        assert!(Grouped::parse(&ops).is_some(), "they were written anew");
        ops.swap(6, 7);
        assert!(Grouped::parse(&ops).is_none(), "the kernel does not write them");
    }
}
