//! The cache's blocks: who holds each, which are free. One block is `block_size` slots of every layer's caches (main, index
//! keys, MTP's), so a number is all there is to it here.

/// Number of a cache block, as block tables hold it.
pub type BlockId = u32;

/// Reference counts of all blocks of a decoder's caches.
#[derive(Debug)]
pub struct KvPool {
    block_size: usize,
    block_bytes: u64,
    /// Holders of each block: sequences, and the prefix cache.
    references: Vec<u32>,
    /// Whether the prefix cache is one of the holders.
    cached: Vec<bool>,
    free: Vec<BlockId>,
    /// Blocks that only the prefix cache holds.
    num_evictable: usize,
}

impl KvPool {
    /// All of `num_blocks` blocks free.
    pub fn new(num_blocks: usize, block_size: usize, block_bytes: u64) -> Self {
        KvPool {
            block_size,
            block_bytes,
            references: vec![0; num_blocks],
            cached: vec![false; num_blocks],
            free: (0..num_blocks as BlockId).rev().collect(),
            num_evictable: 0,
        }
    }

    /// Slots of a block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Bytes of a block, all layers and caches together.
    pub fn block_bytes(&self) -> u64 {
        self.block_bytes
    }

    /// All blocks.
    pub fn num_blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that only the prefix cache holds.
    pub fn num_evictable(&self) -> usize {
        self.num_evictable
    }

    /// Blocks for `num_tokens` positions.
    pub fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    /// A free block, held once; `None` if there is none.
    pub fn alloc(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        self.references[block as usize] = 1;
        Some(block)
    }

    /// One more holder.
    pub fn retain(&mut self, block: BlockId) {
        self.count_evictable(block, |references| *references += 1);
    }

    /// One holder less; the last one frees the block.
    ///
    /// # Panics
    /// If nobody holds it: a block is released once by each holder.
    pub fn release(&mut self, block: BlockId) {
        assert!(self.references[block as usize] > 0, "block {block} is released once by each holder");
        self.count_evictable(block, |references| *references -= 1);
        if self.references[block as usize] == 0 {
            self.free.push(block);
        }
    }

    /// The prefix cache becomes a holder.
    pub(crate) fn retain_cached(&mut self, block: BlockId) {
        self.retain(block);
        self.cached[block as usize] = true;
        self.num_evictable += usize::from(self.is_evictable(block));
    }

    /// The prefix cache is no holder any more.
    pub(crate) fn release_cached(&mut self, block: BlockId) {
        self.num_evictable -= usize::from(self.is_evictable(block));
        self.cached[block as usize] = false;
        self.release(block);
    }

    /// Whether only the prefix cache holds the block.
    pub(crate) fn is_evictable(&self, block: BlockId) -> bool {
        self.cached[block as usize] && self.references[block as usize] == 1
    }

    fn count_evictable(&mut self, block: BlockId, change: impl FnOnce(&mut u32)) {
        let before = self.is_evictable(block);
        change(&mut self.references[block as usize]);
        let after = self.is_evictable(block);
        self.num_evictable = self.num_evictable + usize::from(after) - usize::from(before);
    }

    /// Checks the counts against who really holds what: `holders` yields each block once for each holder.
    ///
    /// # Errors
    /// The first block whose count is wrong.
    pub fn check(&self, holders: impl Iterator<Item = BlockId>) -> Result<(), String> {
        let mut expected = vec![0u32; self.references.len()];
        holders.for_each(|block| expected[block as usize] += 1);
        for (block, (found, expected)) in self.references.iter().zip(&expected).enumerate() {
            if found != expected {
                return Err(format!("block {block} has {found} references, expected {expected}"));
            }
        }
        let unheld = expected.iter().filter(|count| **count == 0).count();
        if unheld != self.free.len() {
            return Err(format!("{} blocks are free, expected {unheld}", self.free.len()));
        }
        let evictable = (0..self.references.len() as BlockId).filter(|block| self.is_evictable(*block)).count();
        if evictable != self.num_evictable {
            return Err(format!("{} blocks are evictable, expected {evictable}", self.num_evictable));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_free_after_their_last_holder() {
        let mut pool = KvPool::new(2, 16, 1000);
        let (a, b) = (pool.alloc().unwrap(), pool.alloc().unwrap());
        assert_eq!((a, b, pool.alloc()), (0, 1, None));
        pool.retain_cached(a);
        assert_eq!(pool.num_evictable(), 0);
        pool.release(a);
        assert_eq!((pool.num_evictable(), pool.num_free()), (1, 0));
        pool.retain(a);
        assert_eq!(pool.num_evictable(), 0);
        pool.check([a, a, b].into_iter()).unwrap();
        pool.release_cached(a);
        pool.release(a);
        pool.release(b);
        assert_eq!((pool.num_evictable(), pool.num_free()), (0, 2));
        assert_eq!(pool.check([a].into_iter()).unwrap_err(), "block 0 has 0 references, expected 1");
    }
}
