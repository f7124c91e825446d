//! The bytes of a cache block: the rows of its slots in every cache of the decoder, one cache after the other.

use crate::kv_pool::BlockId;
use moellon_model::Decoder;
use moellon_ops::{Backend, Cache, Result};

/// Copies blocks between the device and the host.
#[derive(Debug)]
pub(crate) struct BlockRows {
    caches: Vec<Cache>,
    block_size: usize,
    /// Work space of `copy`.
    bytes: Vec<u8>,
}

impl BlockRows {
    /// Of a decoder's caches and others with the same slots.
    pub(crate) fn new(decoder: &Decoder, others: Vec<Cache>) -> Self {
        let caches = decoder.caches().chain(others).collect();
        BlockRows { caches, block_size: decoder.options().block_size, bytes: Vec::new() }
    }

    /// Bytes of a block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.caches.iter().map(|cache| cache.row_bytes() * self.block_size).sum()
    }

    /// Says how the bytes are laid out: files of another layout are of no use.
    pub(crate) fn describe(&self) -> String {
        let caches: Vec<String> = self.caches.iter().map(|c| format!("{:?}x{}", c.dtype, c.width)).collect();
        format!("block_size {} caches {}", self.block_size, caches.join(" "))
    }

    /// Reads a whole block.
    pub(crate) fn read(&self, block: BlockId, backend: &mut dyn Backend) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.block_bytes()];
        let mut rest = bytes.as_mut_slice();
        for cache in &self.caches {
            let (rows, after) = rest.split_at_mut(cache.row_bytes() * self.block_size);
            backend.read_cache(*cache, block as usize * self.block_size, rows)?;
            rest = after;
        }
        Ok(bytes)
    }

    /// Writes a whole block.
    pub(crate) fn write(&self, block: BlockId, bytes: &[u8], backend: &mut dyn Backend) -> Result<()> {
        let mut rest = bytes;
        for cache in &self.caches {
            let (rows, after) = rest.split_at(cache.row_bytes() * self.block_size);
            backend.write_cache(*cache, block as usize * self.block_size, rows)?;
            rest = after;
        }
        Ok(())
    }

    /// Copies the first `num_slots` rows of a block to another.
    pub(crate) fn copy(
        &mut self,
        from: BlockId,
        to: BlockId,
        num_slots: usize,
        backend: &mut dyn Backend,
    ) -> Result<()> {
        let first = |block: BlockId| block as usize * self.block_size;
        for cache in &self.caches {
            self.bytes.resize(num_slots * cache.row_bytes(), 0);
            backend.read_cache(*cache, first(from), &mut self.bytes)?;
            backend.write_cache(*cache, first(to), &self.bytes)?;
        }
        Ok(())
    }
}
