//! A step of one row with latent attention: from the second product of its queries to the values of its heads one kernel, `row_heads_*` of
//! `kernels/latent.cu`, whose clusters of blocks have some heads each. The results are the bits of the kernels that it stands for
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
/// Heads of a cluster.
const CLUSTER_HEADS: usize = 4;

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
            && self.q.0.cols <= MOST_COLUMNS
            && heads.is_multiple_of(CLUSTER_HEADS);
        // A block has half of the rows, in whole row tiles (two at a time for the queries).
        let units = |rows: usize, tile_rows: usize, cols: usize| rows / (2 * tile_rows) * slices(cols);
        let cut = rows.is_multiple_of(64)
            && value.is_multiple_of(32)
            && nope.is_multiple_of(8)
            && rows.max(value) <= MOST_ROWS
            && units(rows, 32, self.q.0.cols) <= ROW_WARPS
            && units(RANK, 16, nope) <= ROW_WARPS
            && units(value, 16, RANK) <= ROW_WARPS;
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
        let blocks = 2 * chain.attend.num_heads;
        if self.device.multiprocessors < blocks as u32 || self.kernels.most_shared < shared {
            return Ok(None);
        }
        let Some(kernel) = self.kernels.latent(&format!("row_heads_{name}"))? else { return Ok(None) };
        let clusters = self.device.resident_clusters(&kernel, 2 * CLUSTER_HEADS as u32, 512, shared)?;
        Ok((clusters * 2 * CLUSTER_HEADS >= blocks).then_some((kernel, shared)))
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
            slices: [chain.q.0.cols, chain.keys.weight.cols, RANK].map(|cols| slices(cols) as u32),
            pad: 0,
        };
        self.device.launch(&kernel, [2 * attend.num_heads, 1, 1], 32 * ROW_WARPS as u32, shared, &args)?;
        cursor.at += chain.count;
        cursor.added = false;
        Ok(true)
    }
}

const _: () = assert!(
    MOST_KEYS <= 1024 && MOST_KEYS.is_multiple_of(TILE as usize),
    "parts of up to 1024 keys are one tile (split_of)"
);
