//! Scores of DeepSeek Sparse Attention's lightning indexer.

use crate::Result;
use crate::buffer::{Cache, CacheDtype, Paging, Tensor};
use crate::conformance::{Case, Output, PagedCase, Tolerance, floats, normal_rows, upload, zeros};
use crate::error::{expect, expect_eq};
use crate::reference::{Memory, dot};

/// `scores[t, j] = Σ_h weights[t, h] * relu(q[t, h] · key_j * scale)` for positions `j` in `0..=p`; later columns are
/// undefined. DeepSeek-V3.2 report, equation 1; spec: `glm52` section 3.
#[derive(Debug, Clone, Copy)]
pub struct IndexScore {
    /// `[num_tokens, num_heads * head_dim]`, rotated.
    pub q: Tensor,
    /// `[num_tokens, num_heads]`; may be negative. Positive factors common to a row do not matter to the top-k.
    pub weights: Tensor,
    /// Index keys, one head of `head_dim`.
    pub cache: Cache,
    /// Heads of the indexer.
    pub num_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor on the products.
    pub scale: f32,
    /// Where the keys are.
    pub paging: Paging,
    /// `[num_tokens, >= max_context]`.
    pub scores: Tensor,
}

impl IndexScore {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "index_score";
        let num_tokens = self.q.rows;
        self.q.check_f32(op, "q", [num_tokens, self.num_heads * self.head_dim])?;
        self.weights.check_f32(op, "weights", [num_tokens, self.num_heads])?;
        expect_eq(op, "width of the cache", self.cache.width, self.head_dim)?;
        self.paging.check(op, num_tokens)?;
        self.scores.check_f32(op, "scores", [num_tokens, self.scores.cols])?;
        let enough = self.scores.cols >= self.paging.max_context;
        expect(op, enough, "columns of scores", self.scores.cols, format_args!("at least {}", self.paging.max_context))
    }

    /// Bytes that must be moved if every row has its own sequence: an upper bound.
    pub fn bytes(&self) -> u64 {
        (self.q.rows * self.paging.max_context * (self.cache.row_bytes() + 4)) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let (q, weights) = (memory.rows(self.q), memory.rows(self.weights));
        let mut scores = memory.rows(self.scores);
        for t in 0..q.len() {
            let (_, slots) = memory.context(&self.paging, t);
            for (j, slot) in slots.into_iter().enumerate() {
                let key = memory.cache_row(&self.cache, slot);
                let head = |h: usize| {
                    let product = dot(&q[t][h * self.head_dim..][..self.head_dim], key) * f64::from(self.scale);
                    f64::from(weights[t][h]) * product.max(0.0)
                };
                scores[t][j] = (0..self.num_heads).map(head).sum::<f64>() as f32;
            }
        }
        memory.set_rows(self.scores, &scores);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |rows: usize, context: usize, dtype: CacheDtype, (num_heads, head_dim): (usize, usize)| {
        Case::new(
            "index_score",
            format!("{rows} rows, context {context}, {num_heads} heads of {head_dim}, {dtype:?}"),
            rows,
            Tolerance::exact(num_heads * head_dim),
            move |backend, picked| {
                let paged = PagedCase::new(rows, context, 8);
                let cache = paged.random_cache(backend, 24, dtype, head_dim)?;
                let paging = paged.upload(backend, picked)?;
                let q = upload(backend, &normal_rows(25, rows, num_heads * head_dim), picked)?;
                let weights = upload(backend, &normal_rows(26, rows, num_heads), picked)?;
                let scores = zeros(backend, picked.len(), context)?;
                backend.index_score(&IndexScore {
                    q,
                    weights,
                    cache,
                    num_heads,
                    head_dim,
                    scale: 0.2,
                    paging,
                    scores,
                })?;
                let Output::Floats { name, rows: mut values } = floats(backend, "scores", scores)? else {
                    unreachable!("floats() makes floats")
                };
                for (row, r) in values.iter_mut().zip(picked) {
                    row.truncate(paged.positions[*r] as usize + 1);
                }
                Ok(vec![Output::Floats { name, rows: values }])
            },
        )
    };
    vec![
        case(1, 1, CacheDtype::F32, (4, 32)),
        case(3, 65, CacheDtype::F32, (4, 32)),
        case(4, 200, CacheDtype::Bf16, (4, 32)),
        // The indexers of GLM-5.2 and DeepSeek-V3.2; rows of a step and of a prompt.
        case(2, 300, CacheDtype::Bf16, (32, 128)),
        case(35, 300, CacheDtype::Bf16, (64, 128)),
    ]
}
