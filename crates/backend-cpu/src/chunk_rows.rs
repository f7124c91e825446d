//! Rows of a chunk of a context as kernels want them.

#[cfg(target_arch = "x86_64")]
use crate::attend_tiles::{self, TileRows};
use crate::attention::{Heads, KeysAndValues, WideRows, attend_chunk, index_chunk};
use crate::product::ActivationMode;
use crate::simd::Level;
use moellon_ops::CacheDtype;

/// Whether tile registers multiply `num_heads` heads over such rows ([`crate::attend_tiles`]): with activations of 8 bits, where they can.
pub(crate) fn tiles_fit(level: Level, mode: ActivationMode, shared: &KeysAndValues, num_heads: usize) -> bool {
    #[cfg(target_arch = "x86_64")]
    return mode == ActivationMode::Int8 && attend_tiles::fits(level, shared, num_heads);
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = (level, mode, shared, num_heads);
        false
    }
}

/// Floats from one query to the next one; zeros behind the `key_dim` that it has.
pub(crate) fn query_floats(key_dim: usize, tiles: bool) -> usize {
    key_dim.next_multiple_of(if tiles { 32 } else { 16 })
}

/// A chunk's rows.
pub(crate) enum ChunkRows<'a> {
    /// As they are in the cache.
    Cached,
    Wide(WideRows<'a>),
    #[cfg(target_arch = "x86_64")]
    Tiles(TileRows<'a>),
}

impl<'a> ChunkRows<'a> {
    /// Floats that they need for `num_heads` heads. `widens`: whether more than one group of heads reads them as f32.
    pub(crate) fn num_floats(shared: &KeysAndValues, tiles: bool, num_heads: usize, widens: bool) -> usize {
        #[cfg(target_arch = "x86_64")]
        if tiles {
            return TileRows::num_floats(shared, num_heads);
        }
        let _ = (tiles, num_heads);
        if shared.rows.dtype == CacheDtype::F32 || !widens { 0 } else { WideRows::num_floats(shared) }
    }

    /// `space`: [`ChunkRows::num_floats`] of them.
    pub(crate) fn new(space: &'a mut [f32], tiles: bool) -> Self {
        #[cfg(target_arch = "x86_64")]
        if tiles {
            return ChunkRows::Tiles(TileRows::new(space));
        }
        let _ = tiles;
        if space.is_empty() { ChunkRows::Cached } else { ChunkRows::Wide(WideRows::new(space)) }
    }

    /// Queries, [`query_floats`] apart, become what products with these rows want. No rows are ready then.
    pub(crate) fn pack_queries(&mut self, level: Level, shared: &KeysAndValues, queries: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if let ChunkRows::Tiles(rows) = self {
            rows.pack_queries(level, shared, queries);
        }
        let _ = (level, shared, queries);
    }

    /// Makes the rows of `slots` ready; `known`: earlier ones of them are.
    pub(crate) fn extend(&mut self, level: Level, shared: &KeysAndValues, slots: &[u32], known: bool) {
        match self {
            ChunkRows::Cached => (),
            ChunkRows::Wide(rows) => {
                if !known {
                    rows.forget();
                }
                rows.extend(level, shared, slots);
            }
            #[cfg(target_arch = "x86_64")]
            ChunkRows::Tiles(rows) => {
                if !known {
                    rows.forget();
                }
                rows.extend(level, shared, slots);
            }
        }
    }

    /// Rows of `slots` will be asked for soon, but not at once.
    pub(crate) fn fetch(&self, shared: &KeysAndValues, slots: &[u32]) {
        #[cfg(target_arch = "x86_64")]
        if matches!(self, ChunkRows::Tiles(_)) {
            attend_tiles::fetch(shared, slots);
        }
        let _ = (shared, slots);
    }

    /// Adds the rows of `slots`, which are ready (and were, if `known`), to the state of all heads. `next`: those that will be asked for
    /// then, or none.
    pub(crate) fn attend(
        &mut self,
        level: Level,
        shared: &KeysAndValues,
        scale: f32,
        heads: &mut Heads<'_>,
        (slots, known): (&[u32], bool),
        next: &[u32],
    ) {
        let _ = next;
        match self {
            ChunkRows::Cached => attend_chunk(level, shared, scale, heads, slots, !known, None),
            ChunkRows::Wide(rows) => attend_chunk(level, shared, scale, heads, slots, !known, Some(rows)),
            #[cfg(target_arch = "x86_64")]
            ChunkRows::Tiles(rows) => rows.attend(level, shared, scale, heads, slots.len(), next),
        }
    }

    /// Scores of the indexer ([`index_chunk`]) for the rows of `slots`, which are ready.
    pub(crate) fn index(
        &self,
        level: Level,
        shared: &KeysAndValues,
        scale: f32,
        (queries, weights): (&[f32], &[f32]),
        slots: &[u32],
        out: &mut [f32],
    ) {
        #[cfg(target_arch = "x86_64")]
        if let ChunkRows::Tiles(rows) = self {
            return rows.index(level, shared, scale, (queries, weights), out);
        }
        index_chunk(level, shared, scale, queries, weights, slots, out);
    }
}
