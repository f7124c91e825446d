//! Multi-head latent attention in absorbed form: every head reads the same latent rows.

use crate::Result;
use crate::buffer::{Cache, CacheDtype, Paging, Tensor};
use crate::conformance::{Case, PagedCase, Tolerance, floats, normal_rows, upload, upload_ids, zeros};
use crate::error::{expect, expect_eq};
use crate::reference::{Memory, dot, softmax_average};

/// Positions that each row attends to, chosen by the indexer: the first `counts[t]` of `ids[t]`, ascending.
#[derive(Debug, Clone, Copy)]
pub struct IndexSet {
    /// `[num_tokens, index_topk]` u32, positions in the row's sequence.
    pub ids: Tensor,
    /// `[1, num_tokens]` u32, at most `index_topk`.
    pub counts: Tensor,
}

/// `out[t, h] = Σ_j softmax_j((q_latent[t, h] · c_j + q_rope[t, h] · k_pe_j) * scale) c_j` over the positions of `index`, or
/// over all positions `0..=p`. `q_latent` is the query's no-rope part times the key up-projection; the value up-projection
/// is applied to `out` afterwards ([`crate::LinearHeads`]). DeepSeek-V2 section 2.1; spec: `glm52` section 2.
#[derive(Debug, Clone, Copy)]
pub struct AttendMla {
    /// `[num_tokens, num_heads * kv_lora_rank]`.
    pub q_latent: Tensor,
    /// `[num_tokens, >= (num_heads - 1) * q_rope_head_stride + qk_rope_head_dim]`: the rotated part of the queries.
    pub q_rope: Tensor,
    /// Columns between the starts of two heads of `q_rope`.
    pub q_rope_head_stride: usize,
    /// Rows `[c | k_pe]`: `kv_lora_rank` normed latents, `qk_rope_head_dim` rotated keys.
    pub cache: Cache,
    /// Heads.
    pub num_heads: usize,
    /// Width of a latent.
    pub kv_lora_rank: usize,
    /// Width of the rotated part.
    pub qk_rope_head_dim: usize,
    /// Factor on the logits.
    pub scale: f32,
    /// Which positions; `None` for all.
    pub index: Option<IndexSet>,
    /// Where the rows are.
    pub paging: Paging,
    /// `[num_tokens, num_heads * kv_lora_rank]`, another buffer than `q_latent`.
    pub out: Tensor,
}

impl AttendMla {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "attend_mla";
        let num_tokens = self.q_latent.rows;
        let shape = [num_tokens, self.num_heads * self.kv_lora_rank];
        self.q_latent.check_f32(op, "q_latent", shape)?;
        self.out.check_f32(op, "out", shape)?;
        self.q_rope.check_f32(op, "q_rope", [num_tokens, self.q_rope.cols])?;
        expect(op, self.num_heads > 0, "num_heads", self.num_heads, "at least 1")?;
        let needed = (self.num_heads - 1) * self.q_rope_head_stride + self.qk_rope_head_dim;
        expect(
            op,
            self.q_rope.cols >= needed,
            "columns of q_rope",
            self.q_rope.cols,
            format_args!("at least {needed}"),
        )?;
        expect_eq(op, "width of the cache", self.cache.width, self.kv_lora_rank + self.qk_rope_head_dim)?;
        if let Some(index) = self.index {
            index.ids.check_u32(op, "index ids", [num_tokens, index.ids.cols])?;
            index.counts.check_u32(op, "index counts", [1, num_tokens])?;
        }
        self.paging.check(op, num_tokens)
    }

    /// Bytes that must be moved if no two rows read the same latents: an upper bound.
    pub fn bytes(&self) -> u64 {
        let seen = self.index.map_or(self.paging.max_context, |i| i.ids.cols.min(self.paging.max_context));
        (self.q_latent.rows * (seen * self.cache.row_bytes() + 2 * self.q_latent.cols * 4)) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (q_latent, q_rope) = (memory.rows(self.q_latent), memory.rows(self.q_rope));
        let index = self.index.map(|i| (memory.ids(i.ids), memory.ids(i.counts).remove(0)));
        let rank = self.kv_lora_rank;
        let mut out = Vec::new();
        for t in 0..q_latent.len() {
            let (_, slots) = memory.context(&self.paging, t);
            let chosen: Vec<usize> = match &index {
                Some((ids, counts)) => ids[t][..counts[t] as usize].iter().map(|p| slots[*p as usize]).collect(),
                None => slots,
            };
            let rows: Vec<&[f32]> = chosen.iter().map(|slot| memory.cache_row(&self.cache, *slot)).collect();
            let head = |h: usize| {
                let latent = &q_latent[t][h * rank..][..rank];
                let rope = &q_rope[t][h * self.q_rope_head_stride..][..self.qk_rope_head_dim];
                let score =
                    |row: &&[f32]| (dot(latent, &row[..rank]) + dot(rope, &row[rank..])) * f64::from(self.scale);
                let scores: Vec<f64> = rows.iter().map(score).collect();
                let values: Vec<&[f32]> = rows.iter().map(|r| &r[..rank]).collect();
                softmax_average(&scores, &values, None)
            };
            out.push((0..self.num_heads).flat_map(head).collect());
        }
        memory.set_rows(self.out, &out);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let shaped = |name: &'static str,
                  [num_heads, rank]: [usize; 2],
                  rows: usize,
                  context: usize,
                  dtype: CacheDtype,
                  topk: Option<usize>| {
        let (rope_dim, nope_dim) = (16, 32);
        Case::new(
            "attend_mla",
            format!("{name}, {dtype:?}"),
            rows,
            Tolerance::exact(context + rank),
            move |backend, picked| {
                let paged = PagedCase::new(rows, context, 16);
                let cache = paged.random_cache(backend, 21, dtype, rank + rope_dim)?;
                let paging = paged.upload(backend, picked)?;
                let q_latent = upload(backend, &normal_rows(22, rows, num_heads * rank), picked)?;
                let q = upload(backend, &normal_rows(23, rows, num_heads * (nope_dim + rope_dim)), picked)?;
                let index = match topk {
                    None => None,
                    Some(topk) => {
                        // Every other position, the newest always among them, as many as fit.
                        let set = |p: u32| {
                            let mut ids: Vec<u32> = (0..=p).rev().step_by(2).take(topk).collect();
                            ids.reverse();
                            ids
                        };
                        let sets: Vec<Vec<u32>> = picked.iter().map(|r| set(paged.positions[*r])).collect();
                        let counts = upload_ids(backend, &[sets.iter().map(|s| s.len() as u32).collect()])?;
                        let padded: Vec<Vec<u32>> = sets
                            .into_iter()
                            .map(|mut s| {
                                s.resize(topk, u32::MAX);
                                s
                            })
                            .collect();
                        Some(IndexSet { ids: upload_ids(backend, &padded)?, counts })
                    }
                };
                let out = zeros(backend, picked.len(), num_heads * rank)?;
                backend.attend_mla(&AttendMla {
                    q_latent,
                    q_rope: q.columns(nope_dim, q.cols - nope_dim),
                    q_rope_head_stride: nope_dim + rope_dim,
                    cache,
                    num_heads,
                    kv_lora_rank: rank,
                    qk_rope_head_dim: rope_dim,
                    scale: 0.11,
                    index,
                    paging,
                    out,
                })?;
                Ok(vec![floats(backend, "out", out)?])
            },
        )
    };
    let case = |name, rows, context, dtype, topk| shaped(name, [3, 64], rows, context, dtype, topk);
    vec![
        case("one key", 1, 1, CacheDtype::F32, None),
        case("all positions", 4, 50, CacheDtype::F32, None),
        case("long, all positions", 3, 700, CacheDtype::Bf16, None),
        case("many tokens", 19, 150, CacheDtype::Bf16, None),
        case("index set shorter than it could be", 2, 9, CacheDtype::F32, Some(24)),
        case("index set", 5, 200, CacheDtype::Bf16, Some(24)),
        // Shapes that back ends with matrix units have kernels for.
        shaped("32 heads", [32, 192], 3, 300, CacheDtype::Bf16, None),
        shaped("16 heads, one key", [16, 64], 1, 1, CacheDtype::Bf16, None),
        shaped("16 heads, 512 columns", [16, 512], 2, 1100, CacheDtype::Bf16, None),
        shaped("16 heads, parts of many tiles", [16, 64], 1, 4300, CacheDtype::Bf16, None),
        shaped("48 heads, index set", [48, 128], 4, 200, CacheDtype::Bf16, Some(45)),
    ]
}
