//! Grouped-query attention over a paged cache.

use crate::Result;
use crate::buffer::{Cache, CacheDtype, Paging, Tensor};
use crate::conformance::{Case, PagedCase, Tolerance, floats, normal_rows, upload, upload_row, zeros};
use crate::error::{expect, expect_eq};
use crate::reference::{Memory, dot, softmax_average};

/// `out[t, h] = softmax(q[t, h] · k * scale) v` over positions `0..=p` of the row's sequence, the last `window` of them
/// where there is one. Query head `h` reads key head `h / (num_heads / num_kv_heads)`. A sink is one more logit a head
/// that takes its share of the softmax and has no value (gpt-oss).
#[derive(Debug, Clone, Copy)]
pub struct AttendGqa {
    /// `[num_tokens, num_heads * head_dim]`.
    pub q: Tensor,
    /// Rows `[k | v]`, each `num_kv_heads * head_dim`.
    pub cache: Cache,
    /// Query heads.
    pub num_heads: usize,
    /// Key and value heads; divides `num_heads`.
    pub num_kv_heads: usize,
    /// Elements of a head.
    pub head_dim: usize,
    /// Factor on the logits.
    pub scale: f32,
    /// Positions that a row sees, itself included; `None` for all.
    pub window: Option<usize>,
    /// `[1, num_heads]`.
    pub sinks: Option<Tensor>,
    /// Where the keys are.
    pub paging: Paging,
    /// `[num_tokens, num_heads * head_dim]`, another buffer than `q`.
    pub out: Tensor,
}

impl AttendGqa {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "attend_gqa";
        let shape = [self.q.rows, self.num_heads * self.head_dim];
        self.q.check_f32(op, "q", shape)?;
        self.out.check_f32(op, "out", shape)?;
        let grouped = self.num_kv_heads > 0 && self.num_heads.is_multiple_of(self.num_kv_heads);
        expect(op, grouped, "num_kv_heads", self.num_kv_heads, format_args!("a divisor of {} heads", self.num_heads))?;
        expect_eq(op, "width of the cache", self.cache.width, 2 * self.num_kv_heads * self.head_dim)?;
        expect(op, self.window != Some(0), "window", 0, "at least 1")?;
        if let Some(sinks) = self.sinks {
            sinks.check_f32(op, "sinks", [1, self.num_heads])?;
        }
        self.paging.check(op, self.q.rows)
    }

    /// Bytes that must be moved if every row has its own sequence of `max_context` positions: an upper bound.
    pub fn bytes(&self) -> u64 {
        let seen = self.window.map_or(self.paging.max_context, |w| w.min(self.paging.max_context));
        (self.q.rows * (seen * self.cache.row_bytes() + 2 * self.q.cols * 4)) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let q = memory.rows(self.q);
        let sinks = self.sinks.map(|s| memory.row(s));
        let group = self.num_heads / self.num_kv_heads;
        let values_start = self.num_kv_heads * self.head_dim;
        let mut out = Vec::new();
        for (t, q) in q.iter().enumerate() {
            let (position, slots) = memory.context(&self.paging, t);
            let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
            let rows: Vec<&[f32]> = slots[first..].iter().map(|slot| memory.cache_row(&self.cache, *slot)).collect();
            let head = |h: usize| {
                let at = h / group * self.head_dim;
                let query = &q[h * self.head_dim..][..self.head_dim];
                let scores: Vec<f64> =
                    rows.iter().map(|r| dot(query, &r[at..at + self.head_dim]) * f64::from(self.scale)).collect();
                let values: Vec<&[f32]> = rows.iter().map(|r| &r[values_start + at..][..self.head_dim]).collect();
                softmax_average(&scores, &values, sinks.as_ref().map(|s| s[h]))
            };
            out.push((0..self.num_heads).flat_map(head).collect());
        }
        memory.set_rows(self.out, &out);
    }
}

pub(crate) fn cases() -> Vec<Case> {
    let case = |name: &'static str,
                rows: usize,
                context: usize,
                dtype: CacheDtype,
                window: Option<usize>,
                with_sinks: bool| {
        let (num_heads, num_kv_heads, head_dim) = (6, 2, 32);
        Case::new(
            "attend_gqa",
            format!("{name}, {dtype:?}"),
            rows,
            Tolerance::exact(context + head_dim),
            move |backend, picked| {
                let paged = PagedCase::new(rows, context, 16);
                let cache = paged.random_cache(backend, 18, dtype, 2 * num_kv_heads * head_dim)?;
                let paging = paged.upload(backend, picked)?;
                let q = upload(backend, &normal_rows(19, rows, num_heads * head_dim), picked)?;
                let sinks =
                    if with_sinks { Some(upload_row(backend, &normal_rows(20, 1, num_heads)[0])?) } else { None };
                let out = zeros(backend, picked.len(), num_heads * head_dim)?;
                backend.attend_gqa(&AttendGqa {
                    q,
                    cache,
                    num_heads,
                    num_kv_heads,
                    head_dim,
                    scale: 0.17,
                    window,
                    sinks,
                    paging,
                    out,
                })?;
                Ok(vec![floats(backend, "out", out)?])
            },
        )
    };
    vec![
        case("one key", 1, 1, CacheDtype::F32, None, false),
        case("one past a block", 2, 17, CacheDtype::F32, None, false),
        case("long", 5, 300, CacheDtype::Bf16, None, false),
        case("many tokens", 19, 150, CacheDtype::Bf16, None, true),
        case("many tokens, window", 10, 200, CacheDtype::F32, Some(140), false),
        case("window", 4, 100, CacheDtype::F32, Some(24), false),
        case("window and sinks", 3, 70, CacheDtype::Bf16, Some(128), true),
    ]
}
