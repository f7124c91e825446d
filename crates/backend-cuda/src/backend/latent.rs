//! A step of one row with latent attention: from the second product of its queries to the values of its heads one kernel, `row_heads_*` of
//! `kernels/latent.cu`, whose clusters of two blocks have a head each. The results are the bits of the kernels that it stands for
//! (`tests/recorded.rs`).
//!
//! It is for shapes and GPUs where each of its blocks has a multiprocessor of its own, and for contexts of up to [`MOST_KEYS`] positions: every cluster
//! reads the cache, which the kernels for longer ones do once for 16 heads.

use super::decode::{Cursor, is_wide};
use super::products::slices;
use super::{CudaBackend, TILE};
use crate::args;
use crate::driver::Kernel;
use crate::weights::{fast_format, row_heads_bytes};
use moellon_ops::program::Op;
use moellon_ops::{AttendMla, CacheDtype, KvStore, LinearHeads, Result, RmsNorm, Rope, Tensor, Weight};

/// Most positions of a row: `MOST_PARTS` parts of `KEYS` positions in latent.cu.
const MOST_KEYS: usize = 512;
/// Columns of a latent and of a rotated key (`RANK`, `ROPE_COLUMNS`).
const RANK: usize = 512;
const ROPE: usize = 64;
/// Most rows of a head's query and of its values (`MOST_ROWS`), and columns of a query's latent.
const MOST_ROWS: usize = 256;
const MOST_COLUMNS: usize = 2048;
/// Warps of a block (`ROW_WARPS`), each with at most one unit of each product.
const ROW_WARPS: usize = 16;
/// Tiles of a unit of the second and the third product (`OTHER_TILES`): of the third there are half as many as a latent has.
const OTHER_TILES: usize = 4;
/// Blocks of a cluster, which has a head.
const CLUSTER: usize = 2;

/// The operations that the kernel stands for.
#[derive(Clone, Copy)]
struct Chain<'a> {
    q_norm: &'a RmsNorm,
    q: (Weight, Tensor),
    latent: &'a RmsNorm,
    ropes: [&'a Rope; 2],
    store: KvStore<'a>,
    keys: &'a LinearHeads,
    /// The indexer's key and its row of a cache, where the layer has an indexer: nothing that attention over all positions reads.
    beside: &'a [Op],
    attend: &'a AttendMla,
    values: &'a LinearHeads,
    after: Option<&'a Op>,
    /// Operations from the norm on.
    count: usize,
}

impl<'a> Chain<'a> {
    fn find(ops: &'a [Op]) -> Option<Self> {
        let [
            Op::RmsNorm(q_norm),
            Op::Linear { x, parts },
            Op::RmsNorm(latent),
            Op::Rope(q_rope),
            Op::Rope(k_rope),
            Op::KvStore { parts: stored, slots, cache },
            Op::LinearHeads(keys),
            rest @ ..,
        ] = ops
        else {
            return None;
        };
        let beside = match rest {
            [Op::Linear { .. }, Op::LayerNorm(_), Op::Rope(_), Op::KvStore { .. }, Op::AttendMla(_), ..] => &rest[..4],
            _ => &rest[..0],
        };
        let [Op::AttendMla(attend), Op::LinearHeads(values), after @ ..] = &rest[beside.len()..] else { return None };
        let [q] = parts[..] else { return None };
        if *x != q_norm.out {
            return None;
        }
        Some(Chain {
            q_norm,
            q,
            latent,
            ropes: [q_rope, k_rope],
            store: KvStore { parts: stored, slots: *slots, cache: *cache },
            keys,
            beside,
            attend,
            values,
            after: after.first(),
            count: 9 + beside.len(),
        })
    }

    /// Whether each operation reads what the one before it wrote, as the kernel takes it, in shapes that the kernel has.
    fn fits(&self) -> bool {
        let (heads, rows) = (self.attend.num_heads, self.keys.x_head_stride);
        let (nope, value) = (self.keys.weight.cols, self.values.weight.rows);
        let chained = self.keys.x.buffer.id == self.q.1.buffer.id
            && self.keys.x.offset == self.q.1.offset
            && self.ropes[0].x.offset == self.q.1.offset + nope
            && self.ropes[0].x.buffer.id == self.q.1.buffer.id
            && (self.ropes[0].head_stride, self.ropes[0].num_heads) == (rows, heads)
            && self.attend.q_latent == self.keys.out
            && self.attend.q_rope == self.ropes[0].x
            && self.attend.q_rope_head_stride == rows
            && self.attend.cache.id == self.store.cache.id
            && self.values.x == self.attend.out
            && self.values.x_head_stride == RANK;
        let shaped = rows == nope + ROPE
            && self.q.0.rows == heads * rows
            && self.ropes[1].table.cols == ROPE
            && (self.attend.kv_lora_rank, self.attend.qk_rope_head_dim) == (RANK, ROPE)
            && (self.latent.x.cols, self.keys.weight.rows, self.values.weight.cols) == (RANK, RANK, RANK)
            && (self.keys.weight.count, self.values.weight.count) == (heads, heads)
            && self.q.0.cols <= MOST_COLUMNS;
        // A warp has a unit of each product, or none: half of the query's rows, two row tiles at a time; a row tile of the absorbed query, whose input is one slice;
        // a row tile of the values.
        let cut = rows.is_multiple_of(64)
            && value.is_multiple_of(16)
            && nope.is_multiple_of(8)
            && rows.max(value) <= MOST_ROWS
            && rows / 64 * slices(self.q.0.cols) <= ROW_WARPS
            && slices(nope) == 1
            && nope.div_ceil(64) <= OTHER_TILES;
        let one = [self.q_norm.x, self.latent.x, self.keys.x, self.attend.q_latent].iter().all(|x| x.rows == 1);
        one && chained && shaped && cut && self.q_norm.delta.is_none() && self.is_apart()
    }

    /// Whether what stands between may as well be done before.
    fn is_apart(&self) -> bool {
        let ids = |tensors: &[Tensor]| tensors.iter().map(|t| t.buffer.id).collect::<Vec<_>>();
        let written =
            ids(&[self.q_norm.out, self.q.1, self.latent.out, self.ropes[1].x, self.keys.out, self.attend.out]);
        self.beside.iter().all(|op| {
            let reads = op.reads().iter().all(|t| !written.contains(&t.buffer.id));
            let caches = !matches!(op, Op::KvStore { cache, .. } if cache.id == self.store.cache.id);
            let writes = !matches!(op, Op::Linear { parts, .. }
                if parts.iter().any(|(_, out)| written.contains(&out.buffer.id)));
            reads && caches && writes
        })
    }
}

impl CudaBackend {
    /// The kernel for the chain, and its shared memory; `None` where there is none, or where its clusters would not all be resident.
    fn row_heads_kernel(&mut self, chain: &Chain<'_>) -> Result<Option<(Kernel, u32)>> {
        let formats = [chain.q.0, chain.keys.weight, chain.values.weight].map(|w| fast_format(w.format));
        let [Some(name), keys, values] = formats else { return Ok(None) };
        if keys != Some(name) || values != Some(name) {
            return Ok(None);
        }
        let shared = row_heads_bytes(chain.q.0.format);
        let blocks = CLUSTER * chain.attend.num_heads;
        if self.device.multiprocessors < blocks as u32 || self.kernels.most_shared < shared {
            return Ok(None);
        }
        let Some(kernel) = self.kernels.latent(&format!("row_heads_{name}"))? else { return Ok(None) };
        let clusters = self.device.resident_clusters(&kernel, CLUSTER as u32, 32 * ROW_WARPS as u32, shared)?;
        Ok((clusters * CLUSTER >= blocks).then_some((kernel, shared)))
    }

    /// Launches the chain that starts at the cursor as one kernel. False where there is none.
    pub(super) fn row_heads(&mut self, cursor: &mut Cursor<'_>) -> Result<bool> {
        let Some(chain) = Chain::find(cursor.rest()) else { return Ok(false) };
        let max_keys = chain.attend.paging.max_context;
        if !chain.fits() || chain.attend.index.is_some() || max_keys > MOST_KEYS {
            return Ok(false);
        }
        if self.reads_floats(&cursor.rest()[2..], chain.q_norm.out) {
            return Ok(false);
        }
        let Some((kernel, shared)) = self.row_heads_kernel(&chain)? else { return Ok(false) };
        if chain.store.cache.dtype != CacheDtype::Bf16
            || !is_wide(chain.store.cache.width, &[chain.latent.x.offset, chain.latent.weight.offset])
        {
            return Ok(false);
        }
        let Some(latent) = self.latent_args(chain.latent, chain.ropes, &chain.store)? else { return Ok(false) };
        let Some(input) = self.norm_input(chain.q_norm, chain.q.0)? else { return Ok(false) };
        // The indexer's key first: it reads nothing of this.
        self.run_program(chain.beside)?;
        let (attend, _) = self.attend_mla_args(chain.attend)?;
        let mut out_digits = 0;
        let value = chain.values.weight.rows;
        let wanted = matches!(chain.after, Some(Op::Linear { x, .. }) if *x == chain.values.out);
        let out = self.output(chain.values.out)?;
        if wanted && value.is_multiple_of(128) {
            out_digits = self.buffer(chain.values.out)?.digits_written(chain.values.out);
        }
        let packed = |weight: Weight| self.weights[weight.id as usize].packed;
        let args = args::RowHeads {
            w_q: packed(chain.q.0),
            w_k: packed(chain.keys.weight),
            w_v: packed(chain.values.weight),
            input,
            latent,
            attend,
            out,
            out_digits,
            log_slices: slices(chain.q.0.cols).trailing_zeros(),
            pad: 0,
        };
        self.device.launch(&kernel, [CLUSTER as u32 * attend.num_heads, 1, 1], 32 * ROW_WARPS as u32, shared, &args)?;
        cursor.at += chain.count;
        cursor.added = false;
        Ok(true)
    }
}

const _: () = assert!(
    MOST_KEYS <= 1024 && MOST_KEYS.is_multiple_of(TILE as usize),
    "parts of up to 1024 keys are one tile (split_of)"
);

#[cfg(test)]
mod tests {
    use super::*;
    use moellon_ops::{Buffer, Cache, ElementType, LayerNorm, Paging, RopePairs};
    use moellon_tensor::{ScaleDtype, WeightFormat};

    fn tensor(id: u32, cols: usize) -> Tensor {
        Buffer { id, element: ElementType::F32, len: cols }.tensor(1, cols)
    }

    fn weight(id: u32, count: usize, rows: usize, cols: usize) -> Weight {
        let format = WeightFormat::Affine { bits: 4, group: 64, scale: ScaleDtype::Bf16 };
        Weight { id, format, count, rows, cols, has_bias: false }
    }

    /// Attention of one row with `heads` heads whose queries have `nope` columns that are not rotated, with an indexer that reads buffer `index_x`.
    fn attention(heads: usize, nope: usize, index_x: Option<u32>) -> Vec<Op> {
        let cache = |id, width| Cache { id, dtype: CacheDtype::Bf16, num_slots: 64, width };
        let (latent_q, kv, q) = (tensor(1, 2048), tensor(2, RANK + ROPE), tensor(3, heads * (nope + ROPE)));
        let (absorbed, latents, attended) = (tensor(4, heads * RANK), tensor(5, heads * RANK), tensor(6, heads * 256));
        let (latent, k_pe, slots, table) = (kv.columns(0, RANK), kv.columns(RANK, ROPE), tensor(8, 1), tensor(7, ROPE));
        let norm = |x: Tensor| Op::RmsNorm(RmsNorm { x, delta: None, weight: tensor(9, x.cols), eps: 1e-6, out: x });
        let rope = |x, num_heads, head_stride| {
            Op::Rope(Rope { x, num_heads, head_stride, table, pairs: RopePairs::Interleaved })
        };
        let q_rope = q.columns(nope, q.cols - nope);
        let paging = Paging {
            positions: tensor(10, 1),
            sequences: tensor(11, 1),
            block_table: tensor(12, 8),
            block_size: 32,
            max_context: MOST_KEYS,
        };
        let mut ops = vec![
            norm(latent_q),
            Op::Linear { x: latent_q, parts: vec![(weight(0, 1, q.cols, 2048), q)] },
            norm(latent),
            rope(q_rope, heads, nope + ROPE),
            rope(k_pe, 1, ROPE),
            Op::KvStore { parts: vec![latent, k_pe], slots, cache: cache(0, RANK + ROPE) },
            Op::LinearHeads(LinearHeads {
                x: q,
                x_head_stride: nope + ROPE,
                weight: weight(1, heads, RANK, nope),
                out: absorbed,
            }),
        ];
        if let Some(id) = index_x {
            let key = tensor(14, 128);
            let (weight_of, bias) = (tensor(15, 128), tensor(16, 128));
            ops.extend([
                Op::Linear { x: tensor(id, 6144), parts: vec![(weight(3, 1, 128, 6144), key)] },
                Op::LayerNorm(LayerNorm { x: key, weight: weight_of, bias, eps: 1e-6, out: key }),
                rope(key, 1, 128),
                Op::KvStore { parts: vec![key], slots, cache: cache(1, 128) },
            ]);
        }
        ops.extend([
            Op::AttendMla(AttendMla {
                q_latent: absorbed,
                q_rope,
                q_rope_head_stride: nope + ROPE,
                cache: cache(0, RANK + ROPE),
                num_heads: heads,
                kv_lora_rank: RANK,
                qk_rope_head_dim: ROPE,
                scale: 1.0,
                index: None,
                paging,
                out: latents,
            }),
            Op::LinearHeads(LinearHeads {
                x: latents,
                x_head_stride: RANK,
                weight: weight(2, heads, 256, RANK),
                out: attended,
            }),
            Op::Linear { x: attended, parts: vec![(weight(4, 1, 6144, attended.cols), tensor(17, 6144))] },
        ]);
        ops
    }

    /// Operations that one kernel stands for; 0 where it does not.
    fn count(ops: &[Op]) -> usize {
        Chain::find(ops).filter(Chain::fits).map_or(0, |chain| chain.count)
    }

    #[test]
    fn attention_of_glm_is_one_kernel() {
        let ops = attention(64, 192, None);
        assert_eq!(count(&ops), 9);
        // DeepSeek-V3's heads have as many columns that are not rotated as fit; more than three tiles do not.
        assert_eq!([128, 192, 256].map(|nope| count(&attention(64, nope, None))), [9, 9, 0]);
        // Two rows, and another order.
        let mut rows = ops.clone();
        let Op::RmsNorm(norm) = &mut rows[0] else { panic!("the first operation is a norm") };
        norm.x.rows = 2;
        assert_eq!(count(&rows), 0);
        assert_eq!(count(&ops[1..]), 0);
    }

    #[test]
    fn an_indexer_that_reads_something_else_is_done_before() {
        assert_eq!(count(&attention(64, 192, Some(13))), 13);
        // Of the queries' latent, whose norm is the kernel's own.
        assert_eq!(count(&attention(64, 192, Some(1))), 0);
    }

    #[test]
    fn attention_over_another_cache_is_not() {
        let mut ops = attention(64, 192, None);
        let Op::AttendMla(attend) = &mut ops[7] else { panic!("the eighth operation is attention") };
        attend.cache.id = 1;
        assert_eq!(count(&ops), 0);
    }

    /// What a block asks for is less than a block may have, less what the driver keeps.
    #[test]
    fn blocks_fit_a_multiprocessor() {
        for bits in [2, 3, 4, 5, 6, 8] {
            let bytes = row_heads_bytes(WeightFormat::Affine { bits, group: 64, scale: ScaleDtype::Bf16 });
            assert!(bytes <= 226 << 10, "{bits} bits: {bytes} bytes, expected at most {}", 226 << 10);
        }
        for format in [WeightFormat::Nvfp4, WeightFormat::Mxfp4, WeightFormat::Mxfp8] {
            let bytes = row_heads_bytes(format);
            assert!(bytes <= 226 << 10, "{format}: {bytes} bytes, expected at most {}", 226 << 10);
        }
    }
}
