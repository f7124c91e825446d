//! Tests of the prefix cache on blocks of four tokens.

use super::*;
use proptest::prelude::*;

const BLOCK: usize = 4;

/// A cache with its pool, and a helper that caches a whole sequence as the engine does.
struct Fixture {
    pool: KvPool,
    cache: PrefixCache,
}

impl Fixture {
    fn new(num_blocks: usize, max_blocks: usize) -> Self {
        Fixture { pool: KvPool::new(num_blocks, BLOCK, 100), cache: PrefixCache::new(max_blocks) }
    }

    fn alloc(&mut self) -> Option<BlockId> {
        self.pool.alloc().or_else(|| self.cache.evict(&mut self.pool).then(|| self.pool.alloc()).flatten())
    }

    /// Computes and caches `tokens`, and lets go of them.
    fn add(&mut self, salt: Option<&str>, tokens: &[u32]) {
        let mut cursor = Cursor::start(salt);
        let found = self.cache.lookup(&mut cursor, tokens, 0, &mut self.pool);
        let mut held = found.blocks.clone();
        found.tail.iter().for_each(|(block, _)| self.pool.release(*block));
        for chunk in tokens.chunks(BLOCK).skip(held.len()) {
            let Some(block) = self.alloc() else { break };
            if chunk.len() == BLOCK {
                held.push(self.cache.publish(&mut cursor, chunk, block, &mut self.pool));
            } else {
                self.cache.publish_tail(&cursor, chunk, block, &mut self.pool);
                held.push(block);
            }
        }
        held.into_iter().for_each(|block| self.pool.release(block));
        self.cache.shrink(&mut self.pool);
        self.check();
    }

    /// Tokens found, and the reason of a miss.
    fn find(&mut self, salt: Option<&str>, tokens: &[u32]) -> (usize, Option<CacheMiss>) {
        let found = self.cache.lookup(&mut Cursor::start(salt), tokens, 0, &mut self.pool);
        found.blocks.iter().chain(found.tail.iter().map(|(block, _)| block)).for_each(|b| self.pool.release(*b));
        self.check();
        (found.blocks.len() * BLOCK + found.tail.map_or(0, |(_, agreed)| agreed), found.miss)
    }

    fn check(&self) {
        self.pool.check(self.cache.blocks()).unwrap();
    }
}

fn hash_after(cache: &PrefixCache, cursor: &Cursor, tokens: &[u32]) -> BlockHash {
    cache.hashes_after(cursor, tokens, tokens.len()).next().expect("there are tokens").0
}

fn miss(position: usize, found: u32, cached: Option<u32>) -> Option<CacheMiss> {
    Some(CacheMiss { position, found, cached })
}

#[test]
fn a_prefix_is_found_to_the_token_and_a_miss_names_the_first_that_differs() {
    let mut fixture = Fixture::new(16, 16);
    assert_eq!(fixture.find(None, &[1, 2]), (0, miss(0, 1, None)));
    fixture.add(None, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    assert_eq!(fixture.find(None, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), (10, None));
    assert_eq!(fixture.find(None, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]), (10, miss(10, 11, None)));
    assert_eq!(fixture.find(None, &[1, 2, 3, 4, 5, 6, 99]), (6, miss(6, 99, Some(7))));
    assert_eq!(fixture.find(None, &[1, 2, 3]), (3, None));
    assert_eq!(fixture.find(None, &[4]), (0, miss(0, 4, Some(1))));
    assert_eq!(fixture.find(Some("other user"), &[1, 2]), (0, miss(0, 1, None)));
}

#[test]
fn a_longer_tail_replaces_a_shorter_one_and_equal_blocks_are_kept_once() {
    let mut fixture = Fixture::new(16, 16);
    fixture.add(None, &[1, 2]);
    fixture.add(None, &[1, 2, 3]);
    assert_eq!(fixture.cache.num_blocks(), 1);
    fixture.add(None, &[1, 2]);
    assert_eq!(fixture.cache.num_blocks(), 1);
    fixture.add(None, &[1, 2, 3, 4, 5]);
    assert_eq!(fixture.cache.num_blocks(), 2);
    let (block, mut cursor) = (fixture.pool.alloc().unwrap(), Cursor::start(None));
    let kept = fixture.cache.publish(&mut cursor, &[1, 2, 3, 4], block, &mut fixture.pool);
    assert_ne!(kept, block);
    fixture.pool.release(kept);
    fixture.check();
}

#[test]
fn the_least_recently_used_leaves_go_first_and_blocks_in_use_stay() {
    let mut fixture = Fixture::new(16, 4);
    fixture.add(None, &[1; 8]);
    fixture.add(None, &[2; 8]);
    fixture.find(None, &[1; 8]);
    fixture.add(None, &[3; 4]);
    assert_eq!(fixture.cache.num_blocks(), 4);
    assert_eq!(fixture.find(None, &[2; 8]).0, 4);
    assert_eq!(fixture.find(None, &[1; 8]).0, 8);
    let held = fixture.cache.lookup(&mut Cursor::start(None), &[1; 8], 0, &mut fixture.pool).blocks;
    while fixture.cache.evict(&mut fixture.pool) {}
    assert_eq!(fixture.cache.num_blocks(), 2);
    held.into_iter().for_each(|block| fixture.pool.release(block));
    while fixture.cache.evict(&mut fixture.pool) {}
    assert_eq!((fixture.cache.num_blocks(), fixture.pool.num_free()), (0, 16));
    assert!(fixture.cache.roots.is_empty() && fixture.cache.order.is_empty());
}

#[test]
fn hashes_name_tokens_order_and_salt() {
    let mut fixture = Fixture::new(4, 4);
    let (a, b) = (Cursor::start(None), Cursor::start(Some("b")));
    let first = hash_after(&fixture.cache, &a, &[1, 2, 3, 4]);
    assert_ne!(first, hash_after(&fixture.cache, &b, &[1, 2, 3, 4]));
    assert_ne!(first, hash_after(&fixture.cache, &a, &[4, 3, 2, 1]));
    fixture.add(None, &[1, 2, 3, 4]);
    let mut after = a.clone();
    let blocks = fixture.cache.lookup(&mut after, &[1, 2, 3, 4], 0, &mut fixture.pool).blocks;
    assert_ne!(hash_after(&fixture.cache, &after, &[1, 2, 3, 4]), first);
    blocks.into_iter().for_each(|block| fixture.pool.release(block));
}

proptest! {
    #[test]
    fn a_lookup_finds_the_longest_common_prefix(
        sequences in proptest::collection::vec(proptest::collection::vec(0u32..3, 0..14), 1..12),
        wanted in proptest::collection::vec(0u32..3, 1..14),
    ) {
        let mut fixture = Fixture::new(64, 64);
        sequences.iter().for_each(|tokens| fixture.add(None, tokens));
        let common = |tokens: &Vec<u32>| tokens.iter().zip(&wanted).take_while(|(a, b)| a == b).count();
        let best = sequences.iter().map(common).max().unwrap();
        let (found, reason) = fixture.find(None, &wanted);
        prop_assert_eq!(found, best);
        prop_assert_eq!(reason.is_none(), best == wanted.len());
    }

    #[test]
    fn blocks_never_leak_when_the_cache_is_too_small(
        sequences in proptest::collection::vec(proptest::collection::vec(0u32..3, 0..30), 1..20),
        num_blocks in 1usize..6, max_blocks in 0usize..6,
    ) {
        let mut fixture = Fixture::new(num_blocks, max_blocks);
        for tokens in &sequences {
            fixture.add(None, tokens);
            prop_assert!(fixture.cache.num_blocks() <= max_blocks);
        }
        while fixture.cache.evict(&mut fixture.pool) {}
        prop_assert_eq!(fixture.pool.num_free(), num_blocks);
    }
}

#[test]
fn the_least_recently_used_leaf_goes_first_and_a_used_path_stays_whole() {
    let mut fixture = Fixture::new(16, 16);
    let long = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
    let other = [1, 2, 3, 4, 21, 22, 23, 24];
    fixture.add(None, &long);
    fixture.add(None, &other);
    fixture.add(None, &[31, 32, 33, 34]);
    // The long path is used again, so the branch beside it is the oldest, then the stranger, then the path from its end.
    fixture.find(None, &long);
    assert_eq!(fixture.cache.order.len(), 3, "only leaves have a place in the order");
    for expected in [[3, 1, 1], [3, 1, 0], [2, 1, 0], [1, 1, 0], [0, 0, 0]] {
        assert!(fixture.cache.evict(&mut fixture.pool));
        fixture.check();
        let paths = [&long[..], &other, &[31, 32, 33, 34]].map(|tokens| {
            let mut cursor = Cursor::start(None);
            tokens
                .chunks(BLOCK)
                .take_while(|chunk| {
                    cursor.node = fixture.cache.child(&cursor, chunk);
                    cursor.node.is_some()
                })
                .count()
        });
        assert_eq!(paths, expected);
    }
    assert_eq!(fixture.cache.num_blocks(), 0);
}
