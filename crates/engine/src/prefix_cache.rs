//! Which prefixes of earlier sequences are still cached: a tree whose edges are blocks of token ids.
//!
//! A node is one block. Full blocks chain; a partly filled last block is a leaf, and who continues it copies it, because a
//! shared block never changes. A sequence that uses a node holds all blocks up to it, so nodes that only the cache holds
//! are always below those in use: leaves can be evicted one by one, the least recently used first.

use crate::kv_pool::{BlockId, KvPool};
use crate::request::CacheMiss;
use sha2::{Digest, Sha256};
use std::collections::{BTreeSet, HashMap};

/// Number of a node.
pub type NodeId = usize;

/// Names a block by its tokens and all before it.
pub type BlockHash = [u8; 32];

#[derive(Debug)]
struct Node {
    /// `block_size` of them, or fewer in a leaf.
    tokens: Box<[u32]>,
    hash: BlockHash,
    block: BlockId,
    parent: Parent,
    children: HashMap<Box<[u32]>, NodeId>,
    last_used: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Parent {
    /// The first block of a sequence with this salt.
    Salt(String),
    Node(NodeId),
}

/// Where a sequence stands in the tree: its last published block, or the start of its salt's tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    salt: String,
    node: Option<NodeId>,
}

impl Cursor {
    /// The start of a salt's tree.
    pub fn start(salt: Option<&str>) -> Self {
        Cursor { salt: salt.unwrap_or_default().to_owned(), node: None }
    }

    fn parent(&self) -> Parent {
        self.node.map_or_else(|| Parent::Salt(self.salt.clone()), Parent::Node)
    }
}

/// The name of a block with these tokens behind one of that name.
fn chain(before: &BlockHash, tokens: &[u32]) -> BlockHash {
    let mut hasher = Sha256::new();
    hasher.update(before);
    tokens.iter().for_each(|token| hasher.update(token.to_le_bytes()));
    hasher.finalize().into()
}

/// What [`PrefixCache::lookup`] found.
#[derive(Debug)]
pub struct PrefixMatch {
    /// Full blocks, in order. The caller holds them now.
    pub blocks: Vec<BlockId>,
    /// A block whose first tokens also agree, and how many: to be copied. The caller holds it now.
    pub tail: Option<(BlockId, usize)>,
    /// Why there is no more; `None` if everything agreed.
    pub miss: Option<CacheMiss>,
}

/// The tree, and how much of it may stay.
#[derive(Debug)]
pub struct PrefixCache {
    /// Most blocks that it holds.
    max_blocks: usize,
    nodes: Vec<Option<Node>>,
    unused: Vec<NodeId>,
    num_nodes: usize,
    roots: HashMap<String, HashMap<Box<[u32]>, NodeId>>,
    /// `(last_used, leaf)`: the least recently used first. Nodes with children are not in it: a path is used whenever its
    /// end is, so only ends need a time, and using a path of any length costs one entry.
    order: BTreeSet<(u64, NodeId)>,
    clock: u64,
}

impl PrefixCache {
    /// An empty one that keeps at most `max_blocks` blocks.
    pub fn new(max_blocks: usize) -> Self {
        PrefixCache {
            max_blocks,
            nodes: Vec::new(),
            unused: Vec::new(),
            num_nodes: 0,
            roots: HashMap::new(),
            order: BTreeSet::new(),
            clock: 0,
        }
    }

    /// Blocks held.
    pub fn num_blocks(&self) -> usize {
        self.num_nodes
    }

    /// Blocks held, one by one.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.nodes.iter().flatten().map(|node| node.block)
    }

    /// Follows `tokens` from `cursor` as far as the tree agrees, and moves the cursor along.
    ///
    /// `position` is the position of `tokens[0]`, for the reason of a miss.
    pub fn lookup(&mut self, cursor: &mut Cursor, tokens: &[u32], position: usize, pool: &mut KvPool) -> PrefixMatch {
        let block_size = pool.block_size();
        let mut found = PrefixMatch { blocks: Vec::new(), tail: None, miss: None };
        let mut rest = tokens;
        while let Some((head, after)) = rest.split_at_checked(block_size) {
            let Some(node) = self.child(cursor, head) else { break };
            let block = self.node(node).block;
            pool.retain(block);
            found.blocks.push(block);
            cursor.node = Some(node);
            rest = after;
        }
        let mut last = cursor.node;
        if let Some((node, agreed)) = self.closest_child(cursor, rest) {
            let node_tokens = &self.node(node).tokens;
            if agreed < rest.len() {
                let position = position + tokens.len() - rest.len() + agreed;
                let cached = node_tokens.get(agreed).copied();
                found.miss = Some(CacheMiss { position, found: rest[agreed], cached });
            }
            if agreed > 0 {
                let block = self.node(node).block;
                pool.retain(block);
                found.tail = Some((block, agreed));
                last = Some(node);
            }
        } else if let Some(first) = rest.first() {
            let position = position + tokens.len() - rest.len();
            found.miss = Some(CacheMiss { position, found: *first, cached: None });
        }
        self.touch(last);
        found
    }

    /// Makes a full block findable. Where the tree has one with the same tokens already, `block` is released and the
    /// tree's is returned, held; else `block` itself.
    pub fn publish(&mut self, cursor: &mut Cursor, tokens: &[u32], block: BlockId, pool: &mut KvPool) -> BlockId {
        debug_assert_eq!(tokens.len(), pool.block_size());
        let kept = if let Some(node) = self.child(cursor, tokens) {
            let cached = self.node(node).block;
            if cached != block {
                pool.retain(cached);
                pool.release(block);
            }
            cursor.node = Some(node);
            cached
        } else {
            cursor.node = Some(self.insert(cursor, tokens, block, pool));
            block
        };
        self.touch(cursor.node);
        self.shrink(pool);
        kept
    }

    /// Makes a partly filled last block findable. The caller must not write it any more.
    pub fn publish_tail(&mut self, cursor: &Cursor, tokens: &[u32], block: BlockId, pool: &mut KvPool) {
        if tokens.is_empty() || self.closest_child(cursor, tokens).is_some_and(|(_, agreed)| agreed == tokens.len()) {
            return;
        }
        let node = self.insert(cursor, tokens, block, pool);
        self.touch(Some(node));
        self.shrink(pool);
    }

    /// The names of the full blocks that follow `cursor` with these tokens.
    pub fn hashes_after<'a>(
        &self,
        cursor: &Cursor,
        tokens: &'a [u32],
        block_size: usize,
    ) -> impl Iterator<Item = (BlockHash, &'a [u32])> + use<'a> {
        let mut hash = self.hash_at(cursor);
        tokens.chunks_exact(block_size).map(move |tokens| {
            hash = chain(&hash, tokens);
            (hash, tokens)
        })
    }

    /// What names of blocks after a cursor begin with.
    fn hash_at(&self, cursor: &Cursor) -> BlockHash {
        match cursor.node {
            Some(node) => self.node(node).hash,
            None => Sha256::digest(cursor.salt.as_bytes()).into(),
        }
    }

    /// The name of the block at a cursor; `None` at the start.
    pub fn hash_of(&self, cursor: &Cursor) -> Option<BlockHash> {
        cursor.node.map(|node| self.node(node).hash)
    }

    /// Removes the block at a cursor and those before it, as far as nothing else uses or continues them.
    pub fn forget(&mut self, cursor: &Cursor, pool: &mut KvPool) {
        let mut next = cursor.node;
        while let Some(id) = next {
            let node = self.node(id);
            if !node.children.is_empty() || !pool.is_evictable(node.block) {
                return;
            }
            next = match node.parent {
                Parent::Salt(_) => None,
                Parent::Node(parent) => Some(parent),
            };
            self.remove(id, pool);
        }
    }

    /// Gives up the least recently used block that only the cache holds; `false` if there is none.
    pub fn evict(&mut self, pool: &mut KvPool) -> bool {
        // Leaves in use are skipped: as many as there are running sequences.
        let mut leaves = self.order.iter().map(|(_, node)| *node);
        let oldest = leaves.find(|node| pool.is_evictable(self.node(*node).block));
        oldest.inspect(|node| self.remove(*node, pool)).is_some()
    }

    fn node(&self, node: NodeId) -> &Node {
        self.nodes[node].as_ref().expect("nodes on a path in use are not evicted")
    }

    fn children(&self, cursor: &Cursor) -> Option<&HashMap<Box<[u32]>, NodeId>> {
        match cursor.node {
            Some(node) => Some(&self.node(node).children),
            None => self.roots.get(&cursor.salt),
        }
    }

    fn child(&self, cursor: &Cursor, tokens: &[u32]) -> Option<NodeId> {
        self.children(cursor)?.get(tokens).copied()
    }

    /// The child that agrees longest with `tokens` and for how long; the most recently used of equals.
    fn closest_child(&self, cursor: &Cursor, tokens: &[u32]) -> Option<(NodeId, usize)> {
        let agreed = |node: &Node| node.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        let children = self.children(cursor)?.values();
        children.map(|id| (*id, agreed(self.node(*id)))).max_by_key(|(id, agreed)| (*agreed, self.node(*id).last_used))
    }

    fn insert(&mut self, cursor: &Cursor, tokens: &[u32], block: BlockId, pool: &mut KvPool) -> NodeId {
        // Shorter tails that the new block contains are of no more use.
        let contained: Vec<NodeId> = self
            .children(cursor)
            .into_iter()
            .flat_map(|children| children.values().copied())
            .filter(|id| tokens.starts_with(&self.node(*id).tokens))
            .collect();
        contained.into_iter().for_each(|id| self.remove(id, pool));
        let hash = chain(&self.hash_at(cursor), tokens);
        let parent = cursor.parent();
        let id = self.unused.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            self.nodes.len() - 1
        });
        let siblings = match &parent {
            Parent::Salt(salt) => self.roots.entry(salt.clone()).or_default(),
            Parent::Node(node) => {
                let parent = self.nodes[*node].as_mut().expect("a cursor's node is in use, so it stays");
                self.order.remove(&(parent.last_used, *node));
                &mut parent.children
            }
        };
        siblings.insert(tokens.into(), id);
        let node = Node { tokens: tokens.into(), hash, block, parent, children: HashMap::new(), last_used: 0 };
        self.order.insert((0, id));
        self.nodes[id] = Some(node);
        self.num_nodes += 1;
        pool.retain_cached(block);
        id
    }

    /// Removes a leaf.
    fn remove(&mut self, id: NodeId, pool: &mut KvPool) {
        let node = self.nodes[id].take().expect("a node is removed once");
        debug_assert!(node.children.is_empty());
        match &node.parent {
            Parent::Salt(salt) => {
                if let Some(children) = self.roots.get_mut(salt) {
                    children.remove(&node.tokens);
                    if children.is_empty() {
                        self.roots.remove(salt);
                    }
                }
            }
            Parent::Node(parent) => {
                if let Some(found) = &mut self.nodes[*parent] {
                    found.children.remove(&node.tokens);
                    found.last_used = found.last_used.max(node.last_used);
                    if found.children.is_empty() {
                        self.order.insert((found.last_used, *parent));
                    }
                }
            }
        }
        self.order.remove(&(node.last_used, id));
        self.unused.push(id);
        self.num_nodes -= 1;
        pool.release_cached(node.block);
    }

    /// Marks a node as used, and with it the path to it.
    fn touch(&mut self, node: Option<NodeId>) {
        let Some(id) = node else { return };
        self.clock += 1;
        let node = self.nodes[id].as_mut().expect("a node in use");
        let was_leaf = self.order.remove(&(node.last_used, id));
        node.last_used = self.clock;
        if was_leaf {
            self.order.insert((self.clock, id));
        }
    }

    /// Evicts until the limit holds, as far as blocks are not in use. Call when a sequence lets go of its blocks.
    pub fn shrink(&mut self, pool: &mut KvPool) {
        while self.num_nodes > self.max_blocks && self.evict(pool) {}
    }
}

#[cfg(test)]
mod tests;
