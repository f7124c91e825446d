//! Appends rows to a cache.

use crate::Result;
use crate::buffer::{Cache, CacheDtype, Tensor};
use crate::conformance::{Case, Tolerance, floats, normal_rows, upload, upload_ids};
use crate::error::{expect, expect_eq};
use crate::reference::Memory;

/// `cache[slots[t]] = concat(parts[..][t])`, rounded to the cache's type. Parts are `[k, v]`, `[latent, k_pe]`, or index keys.
#[derive(Debug, Clone, Copy)]
pub struct KvStore<'a> {
    /// Each `[num_tokens, _]`; the columns add up to the cache's width.
    pub parts: &'a [Tensor],
    /// `[1, num_tokens]` u32, all different and below `num_slots` (the scheduler's promise).
    pub slots: Tensor,
    /// Where the rows go.
    pub cache: Cache,
}

impl KvStore<'_> {
    /// Checks the contract.
    ///
    /// # Errors
    /// [`crate::Error::Contract`], naming the argument.
    pub fn validate(&self) -> Result<()> {
        let op = "kv_store";
        expect(op, !self.parts.is_empty(), "number of parts", 0, "at least 1")?;
        let num_tokens = self.slots.cols;
        self.slots.check_u32(op, "slots", [1, num_tokens])?;
        for part in self.parts {
            part.check_f32(op, "part", [num_tokens, part.cols])?;
        }
        expect_eq(op, "columns of the parts together", self.parts.iter().map(|p| p.cols).sum(), self.cache.width)
    }

    /// Bytes that must be moved.
    pub fn bytes(&self) -> u64 {
        (self.slots.cols * (self.cache.width * 4 + self.cache.row_bytes())) as u64
    }

    pub(crate) fn reference(&self, memory: &mut Memory) {
        let parts: Vec<Vec<Vec<f32>>> = self.parts.iter().map(|p| memory.rows(*p)).collect();
        let slots = memory.ids(self.slots).remove(0);
        for (t, slot) in slots.into_iter().enumerate() {
            let row: Vec<f32> = parts.iter().flat_map(|p| p[t].iter().copied()).collect();
            memory.set_cache_row(&self.cache, slot as usize, &row);
        }
    }
}

pub(crate) fn cases() -> Vec<Case> {
    // What was stored is seen through attention to a single key: its value row comes back.
    let case = |dtype: CacheDtype, through_host: bool| {
        let way = if through_host { ", copied to another cache through the host" } else { "" };
        Case::new(
            "kv_store",
            format!("{dtype:?}, key and value read back by attention{way}"),
            3,
            Tolerance::exact(1),
            move |backend, picked| {
                let (key, value) = (normal_rows(15, 3, 16), normal_rows(16, 3, 16));
                let (k, v) = (upload(backend, &key, picked)?, upload(backend, &value, picked)?);
                let cache = backend.alloc_cache("case cache", dtype, 8, 32)?;
                let slot = [5u32, 0, 7];
                let slots: Vec<u32> = picked.iter().map(|r| slot[*r]).collect();
                let slots = upload_ids(backend, &[slots])?;
                backend.kv_store(&KvStore { parts: &[k, v], slots, cache })?;
                let cache = if through_host { copied(backend, cache)? } else { cache };
                let q = upload(backend, &normal_rows(17, 3, 16), picked)?;
                let zero = upload_ids(backend, &[vec![0; picked.len()]])?;
                let sequences = upload_ids(backend, &[(0..picked.len() as u32).collect()])?;
                let table: Vec<Vec<u32>> = picked.iter().map(|r| vec![slot[*r]]).collect();
                let block_table = upload_ids(backend, &table)?;
                let paging = crate::Paging { positions: zero, sequences, block_table, block_size: 1, max_context: 1 };
                let out = crate::conformance::zeros(backend, picked.len(), 16)?;
                backend.attend_gqa(&crate::AttendGqa {
                    q,
                    cache,
                    num_heads: 1,
                    num_kv_heads: 1,
                    head_dim: 16,
                    scale: 0.25,
                    window: None,
                    sinks: None,
                    paging,
                    out,
                })?;
                Ok(vec![floats(backend, "value", out)?])
            },
        )
    };
    [CacheDtype::F32, CacheDtype::Bf16].into_iter().flat_map(|dtype| [case(dtype, false), case(dtype, true)]).collect()
}

/// Another cache with the same rows: the first three read and written in one piece, the others one by one.
fn copied(backend: &mut dyn crate::Backend, cache: Cache) -> Result<Cache> {
    let copy = backend.alloc_cache("copied cache", cache.dtype, cache.num_slots, cache.width)?;
    let pieces = std::iter::once((0, 3)).chain((3..cache.num_slots).map(|slot| (slot, 1)));
    for (first_slot, num_slots) in pieces {
        let mut bytes = vec![0; num_slots * cache.row_bytes()];
        backend.read_cache(cache, first_slot, &mut bytes)?;
        backend.write_cache(copy, first_slot, &bytes)?;
    }
    Ok(copy)
}
