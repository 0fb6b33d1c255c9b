//! The prefix cache: finds blocks by their tokens and all tokens before these.
//!
//! It is a tree of *nodes*. A node stands for one block's worth of tokens after those of its
//! parent, and knows the block that holds them in each group of layers, as far as these are
//! still cached. A node is found by a hash of its tokens, chained to the hash of its parent (as
//! in vLLM's automatic prefix caching). A hash only finds a candidate. The candidate matches if
//! its tokens are the same and it is a child of the very node that was matched before, or
//! begins a sequence with the same salt. So a match is exact even if hashes collide, and
//! sequences with different salts never share a block.
//!
//! A node exists as long as it has a block or a child. If some layers need all tokens, a node
//! without their blocks is of no use, so its other blocks are forgotten with them.

use super::states::StateSlot;
use super::{BlockId, CacheLayout, GroupKind};
use foldhash::fast::RandomState;
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

/// Sentinel: no node, or no block.
const NONE: u32 = u32::MAX;

/// Limit on the nodes, as a multiple of the blocks. There can be more nodes than blocks only if
/// all layers have windows, so that the first blocks of a sequence are gone.
const NODES_PER_BLOCK: usize = 8;

/// A node of the prefix cache. It does not match a later node in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NodeId {
    index: u32,
    generation: u32,
}

/// A block's worth of tokens to look up or to add, with their hash.
#[derive(Clone, Copy, Debug)]
pub(super) struct Link<'a> {
    after: Predecessor<'a>,
    tokens: &'a [u32],
    /// Hash of all tokens up to the end of the block.
    chain: u64,
}

/// What comes before a block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Predecessor<'a> {
    /// The block of this node.
    Node(NodeId),
    /// Nothing: the block is the first of a sequence with this salt.
    Salt(Option<&'a Arc<str>>),
}

#[derive(Clone, Debug)]
struct Node {
    /// Hash of all tokens up to the end of the block.
    chain: u64,
    /// Index of the parent, or [`NONE`].
    parent: u32,
    children: u32,
    generation: u32,
    /// Whether a snapshot after its tokens was evicted.
    had_state: bool,
    /// Salt of the sequences that begin with the node. Other nodes have `None` here: they share
    /// the salt of the first one.
    salt: Option<Arc<str>>,
}

impl Default for Node {
    fn default() -> Self {
        Self {
            chain: 0,
            parent: NONE,
            children: 0,
            generation: 0,
            had_state: false,
            salt: None,
        }
    }
}

impl Node {
    fn follows(&self, after: Predecessor<'_>) -> bool {
        match after {
            Predecessor::Node(parent) => self.parent == parent.index,
            Predecessor::Salt(salt) => self.parent == NONE && self.salt.as_ref() == salt,
        }
    }
}

/// Why tokens are not found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Miss {
    /// Nobody has computed them after these tokens, or it is long ago.
    #[default]
    Unknown,
    /// Their blocks were evicted.
    Evicted,
    /// A sequence with another salt begins with them.
    OtherSalt,
}

/// Hashes of the nodes that were forgotten last. They only serve to say why something is not
/// found.
#[derive(Debug)]
struct Forgotten {
    chains: HashSet<u64, RandomState>,
    /// The same, the oldest first.
    order: VecDeque<u64>,
    most: usize,
}

impl Forgotten {
    fn new(most: usize) -> Self {
        Self {
            chains: HashSet::default(),
            order: VecDeque::new(),
            most,
        }
    }

    fn contains(&self, chain: u64) -> bool {
        self.chains.contains(&chain)
    }

    fn insert(&mut self, chain: u64) {
        if !self.chains.insert(chain) {
            return;
        }
        if self.order.len() >= self.most
            && let Some(oldest) = self.order.pop_front()
        {
            self.chains.remove(&oldest);
        }
        self.order.push_back(chain);
    }
}

/// Complete blocks, by their tokens and all tokens before these.
#[derive(Debug)]
pub(super) struct PrefixCache {
    by_chain: HashMap<u64, u32, RandomState>,
    nodes: Vec<Node>,
    /// Indices of unused nodes.
    unused: Vec<u32>,
    most_nodes: usize,
    /// The tokens of every node, one node after the other.
    tokens: Vec<u32>,
    /// The block of every group, or [`NONE`], one node after the other.
    blocks: Vec<u32>,
    /// The node of each block, or [`NONE`].
    node_of: Vec<u32>,
    /// The snapshot after the tokens of every node, or [`NONE`].
    states: Vec<u32>,
    /// The node of each snapshot, or [`NONE`].
    node_of_state: Vec<u32>,
    /// Snapshots that were forgotten with the block of their node.
    useless_states: Vec<StateSlot>,
    /// Number of nodes that begin a sequence with these tokens, whatever their salts, by the hash
    /// of the tokens.
    beginnings: HashMap<u64, u32, RandomState>,
    forgotten: Forgotten,
    /// Whether each group needs all tokens.
    full: Vec<bool>,
    block_tokens: usize,
    /// Randomly seeded for each cache, so that nobody can prepare collisions.
    hasher: RandomState,
}

impl PrefixCache {
    pub fn new(blocks: usize, block_tokens: usize, layout: &CacheLayout) -> Self {
        let groups = layout.groups();
        let full: Vec<bool> = groups
            .iter()
            .map(|group| group.kind == GroupKind::Full)
            .collect();
        let most_nodes = match full.contains(&true) {
            true => blocks,
            false => blocks.saturating_mul(NODES_PER_BLOCK),
        };
        // The nodes exist from the start, so that no step waits for the system to map their memory.
        Self {
            by_chain: HashMap::with_capacity_and_hasher(blocks, RandomState::default()),
            nodes: vec![Node::default(); blocks],
            unused: (0..blocks as u32).rev().collect(),
            most_nodes: most_nodes.min(NONE as usize),
            tokens: vec![0; blocks * block_tokens],
            blocks: vec![NONE; blocks * full.len()],
            node_of: vec![NONE; blocks],
            states: vec![NONE; blocks],
            node_of_state: Vec::new(),
            useless_states: Vec::new(),
            beginnings: HashMap::default(),
            forgotten: Forgotten::new(blocks),
            full,
            block_tokens,
            hasher: RandomState::default(),
        }
    }

    pub fn knows(&self, block: BlockId) -> bool {
        self.node_of[block.index()] != NONE
    }

    /// Reserves memory for this many slots for states.
    pub fn reserve_states(&mut self, slots: usize) {
        self.node_of_state = vec![NONE; slots];
    }

    pub fn knows_state(&self, slot: StateSlot) -> bool {
        self.node_of_state[slot.index()] != NONE
    }

    /// Returns the snapshot after the tokens of a node, if there is one.
    pub fn state(&self, node: NodeId) -> Option<StateSlot> {
        let slot = self.states[node.index as usize];
        (slot != NONE).then_some(StateSlot::new(slot))
    }

    /// Makes a snapshot known as the state after the tokens of a node, which has none.
    pub fn publish_state(&mut self, node: NodeId, slot: StateSlot) {
        debug_assert!(!self.knows_state(slot), "{slot:?} is known already");
        self.states[node.index as usize] = slot.index() as u32;
        self.node_of_state[slot.index()] = node.index;
    }

    /// Forgets a snapshot.
    pub fn forget_state(&mut self, slot: StateSlot) {
        let index = std::mem::replace(&mut self.node_of_state[slot.index()], NONE);
        if index != NONE {
            self.states[index as usize] = NONE;
            self.nodes[index as usize].had_state = true;
            self.remove_unused(index);
        }
    }

    /// Returns whether a node had a snapshot that was evicted.
    pub fn had_state(&self, node: NodeId) -> bool {
        self.nodes[node.index as usize].had_state
    }

    /// Returns why [`PrefixCache::find`] does not find these tokens.
    pub fn why_missing(&self, link: &Link<'_>) -> Miss {
        if self.forgotten.contains(link.chain) {
            return Miss::Evicted;
        }
        let elsewhere = match link.after {
            Predecessor::Node(_) => return Miss::Unknown,
            Predecessor::Salt(None) => link.chain,
            Predecessor::Salt(Some(_)) => self.chain(Predecessor::Salt(None), link.tokens),
        };
        match self.beginnings.contains_key(&elsewhere) {
            true => Miss::OtherSalt,
            false => Miss::Unknown,
        }
    }

    /// Takes the snapshots that were forgotten since the last call because the blocks of their
    /// nodes were.
    pub fn take_useless_states(&mut self) -> impl Iterator<Item = StateSlot> + '_ {
        self.useless_states.drain(..)
    }

    /// Returns the node of a known block.
    pub fn node_of(&self, block: BlockId) -> Option<NodeId> {
        let index = self.node_of[block.index()];
        (index != NONE).then(|| self.id(index))
    }

    fn id(&self, index: u32) -> NodeId {
        NodeId {
            index,
            generation: self.nodes[index as usize].generation,
        }
    }

    /// Returns whether a node still exists.
    pub fn exists(&self, node: NodeId) -> bool {
        self.nodes[node.index as usize].generation == node.generation
    }

    /// Computes the hash of `tokens`, which come after `after`.
    pub fn link<'a>(&self, after: Predecessor<'a>, tokens: &'a [u32]) -> Link<'a> {
        Link {
            after,
            tokens,
            chain: self.chain(after, tokens),
        }
    }

    /// Returns the node that holds the tokens of `link` and comes after the same block.
    pub fn find(&self, link: &Link<'_>) -> Option<NodeId> {
        let candidate = self.id(*self.by_chain.get(&link.chain)?);
        let follows = self.nodes[candidate.index as usize].follows(link.after);
        (follows && self.tokens_of(candidate) == link.tokens).then_some(candidate)
    }

    /// Returns the node before this one.
    pub fn parent(&self, node: NodeId) -> Option<NodeId> {
        let parent = self.nodes[node.index as usize].parent;
        (parent != NONE).then(|| self.id(parent))
    }

    /// Returns the node `steps` nodes before this one; `None` if that is before the first.
    pub fn ancestor(&self, node: NodeId, steps: usize) -> Option<NodeId> {
        (0..steps).try_fold(node, |node, _| self.parent(node))
    }

    /// Returns the block of a group, if it is cached.
    pub fn block(&self, node: NodeId, group: usize) -> Option<BlockId> {
        let block = self.blocks[node.index as usize * self.full.len() + group];
        (block != NONE).then_some(BlockId(block))
    }

    /// Returns whether the node has the blocks of all groups that need all tokens.
    pub fn has_full_groups(&self, node: NodeId) -> bool {
        let mut groups = self.full.iter().enumerate();
        groups.all(|(group, full)| !full || self.block(node, group).is_some())
    }

    /// Returns the salt of the sequences that begin with this node.
    pub fn salt(&self, node: NodeId) -> Option<&Arc<str>> {
        self.nodes[node.index as usize].salt.as_ref()
    }

    /// Returns the tokens of a node.
    pub fn tokens_of(&self, node: NodeId) -> &[u32] {
        &self.tokens[node.index as usize * self.block_tokens..][..self.block_tokens]
    }

    /// Adds a node without blocks; the caller must give it one. Returns `None` if its hash is
    /// taken by other tokens, or if there are too many nodes.
    pub fn insert(&mut self, link: &Link<'_>) -> Option<NodeId> {
        let Link {
            after,
            tokens,
            chain,
        } = *link;
        debug_assert_eq!(
            tokens.len(),
            self.block_tokens,
            "only complete blocks are published (I11)"
        );
        if self.by_chain.contains_key(&chain) {
            return None;
        }
        let index = self.unused_node()?;
        let at = index as usize * self.block_tokens;
        self.tokens[at..at + self.block_tokens].copy_from_slice(tokens);
        let (parent, salt) = match after {
            Predecessor::Node(parent) => (parent.index, None),
            Predecessor::Salt(salt) => (NONE, salt.cloned()),
        };
        if parent == NONE {
            let beginning = match salt {
                None => chain,
                Some(_) => self.chain(Predecessor::Salt(None), tokens),
            };
            *self.beginnings.entry(beginning).or_default() += 1;
        }
        if let Some(parent) = self.nodes.get_mut(parent as usize) {
            parent.children += 1;
        }
        let node = &mut self.nodes[index as usize];
        (node.chain, node.parent, node.salt) = (chain, parent, salt);
        node.had_state = false;
        self.by_chain.insert(chain, index);
        Some(self.id(index))
    }

    fn unused_node(&mut self) -> Option<u32> {
        if let Some(index) = self.unused.pop() {
            return Some(index);
        }
        if self.nodes.len() >= self.most_nodes {
            return None;
        }
        self.nodes.push(Node::default());
        let nodes = self.nodes.len();
        self.tokens.resize(nodes * self.block_tokens, 0);
        self.blocks.resize(nodes * self.full.len(), NONE);
        self.states.resize(nodes, NONE);
        Some(nodes as u32 - 1)
    }

    /// Makes a complete block known as the block of a group.
    pub fn publish(&mut self, node: NodeId, group: usize, block: BlockId) {
        debug_assert!(!self.knows(block), "{block:?} is known already");
        self.blocks[node.index as usize * self.full.len() + group] = block.0;
        self.node_of[block.index()] = node.index;
    }

    /// Forgets a block, which is about to get other tokens. Adds to `useless` the blocks that
    /// are forgotten with it.
    pub fn forget(&mut self, block: BlockId, useless: &mut Vec<BlockId>) {
        let index = std::mem::replace(&mut self.node_of[block.index()], NONE);
        if index == NONE {
            return;
        }
        let groups = self.full.len();
        let blocks = &mut self.blocks[index as usize * groups..][..groups];
        if let Some(group) = blocks.iter().position(|other| *other == block.0) {
            blocks[group] = NONE;
            if self.full[group] {
                self.forgotten.insert(self.nodes[index as usize].chain);
                for other in blocks.iter_mut().filter(|other| **other != NONE) {
                    self.node_of[*other as usize] = NONE;
                    useless.push(BlockId(*other));
                    *other = NONE;
                }
                let state = std::mem::replace(&mut self.states[index as usize], NONE);
                if state != NONE {
                    self.node_of_state[state as usize] = NONE;
                    self.useless_states.push(StateSlot::new(state));
                }
            }
        }
        self.remove_unused(index);
    }

    /// Removes a node without blocks and children, and then its parent, if that has none left.
    fn remove_unused(&mut self, mut index: u32) {
        let groups = self.full.len();
        while index != NONE {
            let blocks = &self.blocks[index as usize * groups..][..groups];
            let node = &mut self.nodes[index as usize];
            let has_state = self.states[index as usize] != NONE;
            if node.children > 0 || has_state || blocks.iter().any(|block| *block != NONE) {
                return;
            }
            node.generation = node.generation.wrapping_add(1);
            node.salt = None;
            self.by_chain.remove(&node.chain);
            if node.parent == NONE {
                let tokens = &self.tokens[index as usize * self.block_tokens..];
                let tokens = &tokens[..self.block_tokens];
                let beginning = self.chain(Predecessor::Salt(None), tokens);
                if let Entry::Occupied(mut count) = self.beginnings.entry(beginning) {
                    *count.get_mut() -= 1;
                    if *count.get() == 0 {
                        count.remove();
                    }
                }
            }
            self.unused.push(index);
            let node = &mut self.nodes[index as usize];
            index = std::mem::replace(&mut node.parent, NONE);
            if let Some(parent) = self.nodes.get_mut(index as usize) {
                parent.children -= 1;
            }
        }
    }

    fn chain(&self, after: Predecessor<'_>, tokens: &[u32]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        match after {
            Predecessor::Node(parent) => {
                hasher.write_u64(self.nodes[parent.index as usize].chain);
            }
            Predecessor::Salt(None) => hasher.write_u64(0),
            Predecessor::Salt(Some(salt)) => hasher.write(salt.as_bytes()),
        }
        let (pairs, rest) = tokens.as_chunks::<2>();
        for [first, second] in pairs {
            hasher.write_u64(u64::from(*first) | u64::from(*second) << 32);
        }
        if let [last] = rest {
            hasher.write_u64(u64::from(*last));
        }
        hasher.finish()
    }

    /// Returns the nodes that exist.
    pub fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.by_chain.values().map(|index| self.id(*index))
    }

    /// Checks that nodes and blocks refer to each other, and that every node has a use. The
    /// error says what is wrong.
    pub fn audit(&self) -> Result<(), String> {
        let mut children = vec![0; self.nodes.len()];
        let mut known = 0;
        for node in self.nodes() {
            let blocks = (0..self.full.len()).filter_map(|group| self.block(node, group));
            let mut used = false;
            for block in blocks {
                used = true;
                known += 1;
                if self.node_of(block) != Some(node) {
                    return Err(format!("{node:?} has {block:?}, which belongs to another"));
                }
            }
            if let Some(slot) = self.state(node) {
                used = true;
                if self.node_of_state[slot.index()] != node.index {
                    return Err(format!("{node:?} has {slot:?}, which belongs to another"));
                }
            }
            used |= self.nodes[node.index as usize].children > 0;
            if !used {
                return Err(format!("{node:?} has neither blocks nor children"));
            }
            if let Some(parent) = self.parent(node) {
                children[parent.index as usize] += 1;
            }
        }
        let counted: Vec<u32> = self.nodes.iter().map(|node| node.children).collect();
        if counted != children {
            return Err(format!(
                "{children:?} children, but {counted:?} are counted"
            ));
        }
        if self.by_chain.len() + self.unused.len() != self.nodes.len() {
            let (used, unused) = (self.by_chain.len(), self.unused.len());
            return Err(format!("{used} nodes are used and {unused} are unused"));
        }
        let indexed = self.node_of.iter().filter(|node| **node != NONE).count();
        if indexed != known {
            return Err(format!(
                "{indexed} blocks are indexed, but {known} are known"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I11: a hash only finds a candidate.
    #[test]
    fn other_tokens_with_the_same_hash_do_not_match() {
        let mut cache = PrefixCache::new(4, 2, &CacheLayout::single());
        let (start, salt) = (Predecessor::Salt(None), Arc::from("salt"));
        let link = cache.link(start, &[1, 2]);
        let known = cache.insert(&link).unwrap();
        cache.publish(known, 0, BlockId(0));
        // Other tokens, and the same tokens after another block or with a salt.
        for (after, tokens) in [
            (start, [3, 4]),
            (Predecessor::Node(known), [1, 2]),
            (Predecessor::Salt(Some(&salt)), [1, 2]),
        ] {
            let collision = cache.link(after, &tokens);
            cache.by_chain.insert(collision.chain, known.index);
            assert_eq!(cache.find(&collision), None);
            assert!(cache.insert(&collision).is_none(), "the hash exists");
        }
        assert_eq!(cache.find(&link), Some(known));
    }

    #[test]
    fn the_nodes_of_windows_alone_are_bounded() {
        let layout = CacheLayout::new(&[Some(2)], 100, 1).unwrap();
        let mut cache = PrefixCache::new(2, 2, &layout);
        let mut last = None;
        let mut nodes = 0;
        loop {
            let after = last.map_or(Predecessor::Salt(None), Predecessor::Node);
            let Some(node) = cache.insert(&cache.link(after, &[nodes, nodes])) else {
                break;
            };
            // Only the newest node keeps its block.
            cache.forget(BlockId(nodes % 2), &mut Vec::new());
            cache.publish(node, 0, BlockId(nodes % 2));
            last = Some(node);
            nodes += 1;
        }
        assert_eq!(nodes as usize, 2 * NODES_PER_BLOCK);
        for block in 0..2 {
            cache.forget(BlockId(block), &mut Vec::new());
        }
        assert_eq!(cache.by_chain.len(), 0, "nodes without use are removed");
        cache.audit().unwrap();
    }
}
