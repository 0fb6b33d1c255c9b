//! The prefix cache: finds blocks by their tokens and the block before them.
//!
//! A block is known by a hash of its tokens, chained to the hash of the block before it (as in
//! vLLM's automatic prefix caching). A hash only finds a candidate. The candidate matches if
//! its tokens are the same and it follows the very block that was matched before, or begins a
//! sequence with the same salt. So a match is exact even if hashes collide, and sequences with
//! different salts never share a block.

use super::BlockId;
use foldhash::fast::RandomState;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

/// Sentinel: no block before, because the block is the first of a sequence.
const ROOT: u32 = u32::MAX;

/// What comes before a block.
#[derive(Clone, Copy, Debug)]
pub(super) enum Predecessor<'a> {
    /// Another known block.
    Block(BlockId),
    /// Nothing: the block is the first of a sequence with this salt.
    Salt(Option<&'a Arc<str>>),
}

/// What is known about one block.
#[derive(Clone, Debug)]
struct Known {
    /// Hash of all tokens up to the end of the block.
    chain: u64,
    /// Index of the block before, or [`ROOT`].
    parent: u32,
    /// Salt of the sequence that begins with the block. Later blocks have `None` here: they
    /// share the salt of their first block.
    salt: Option<Arc<str>>,
}

impl Known {
    fn follows(&self, after: Predecessor<'_>) -> bool {
        match after {
            Predecessor::Block(parent) => self.parent == parent.0,
            Predecessor::Salt(salt) => self.parent == ROOT && self.salt.as_ref() == salt,
        }
    }
}

/// Complete blocks, by their tokens and all tokens before these.
#[derive(Debug)]
pub(super) struct PrefixCache {
    by_chain: HashMap<u64, BlockId, RandomState>,
    known: Vec<Option<Known>>,
    /// The tokens of every block, one block after the other.
    tokens: Vec<u32>,
    block_tokens: usize,
    /// Randomly seeded for each cache, so that nobody can prepare collisions.
    hasher: RandomState,
}

impl PrefixCache {
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        Self {
            by_chain: HashMap::with_capacity_and_hasher(blocks, RandomState::default()),
            known: vec![None; blocks],
            tokens: vec![0; blocks * block_tokens],
            block_tokens,
            hasher: RandomState::default(),
        }
    }

    pub fn len(&self) -> usize {
        self.by_chain.len()
    }

    pub fn knows(&self, block: BlockId) -> bool {
        self.known[block.index()].is_some()
    }

    /// Returns the known block that holds `tokens` and comes after `after`.
    pub fn find(&self, after: Predecessor<'_>, tokens: &[u32]) -> Option<BlockId> {
        let candidate = *self.by_chain.get(&self.chain(after, tokens))?;
        let known = self.known[candidate.index()].as_ref()?;
        let same = known.follows(after) && self.tokens_of(candidate) == tokens;
        same.then_some(candidate)
    }

    /// Makes a complete block known. Returns `false` and leaves it unknown if its hash is taken
    /// by other tokens.
    pub fn publish(&mut self, block: BlockId, after: Predecessor<'_>, tokens: &[u32]) -> bool {
        debug_assert_eq!(
            tokens.len(),
            self.block_tokens,
            "only complete blocks are published (I11)"
        );
        debug_assert!(!self.knows(block), "{block:?} is known already");
        let chain = self.chain(after, tokens);
        if self.by_chain.contains_key(&chain) {
            return false;
        }
        self.by_chain.insert(chain, block);
        let (parent, salt) = match after {
            Predecessor::Block(parent) => (parent.0, None),
            Predecessor::Salt(salt) => (ROOT, salt.cloned()),
        };
        self.known[block.index()] = Some(Known {
            chain,
            parent,
            salt,
        });
        self.tokens[block.index() * self.block_tokens..][..self.block_tokens]
            .copy_from_slice(tokens);
        true
    }

    /// Forgets the tokens of a block, which is about to get other ones.
    pub fn forget(&mut self, block: BlockId) {
        if let Some(known) = self.known[block.index()].take() {
            self.by_chain.remove(&known.chain);
        }
    }

    /// Returns the block before a known block.
    pub fn parent(&self, block: BlockId) -> Option<BlockId> {
        let known = self.known[block.index()].as_ref()?;
        (known.parent != ROOT).then_some(BlockId(known.parent))
    }

    /// Returns the salt of the sequences that begin with a known block.
    pub fn salt(&self, block: BlockId) -> Option<&Arc<str>> {
        self.known[block.index()].as_ref()?.salt.as_ref()
    }

    /// Returns the tokens of a known block.
    pub fn tokens_of(&self, block: BlockId) -> &[u32] {
        &self.tokens[block.index() * self.block_tokens..][..self.block_tokens]
    }

    fn chain(&self, after: Predecessor<'_>, tokens: &[u32]) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        match after {
            Predecessor::Block(parent) => {
                let parent = self.known[parent.index()].as_ref();
                hasher.write_u64(parent.map_or(0, |known| known.chain));
            }
            Predecessor::Salt(None) => hasher.write_u64(0),
            Predecessor::Salt(Some(salt)) => hasher.write(salt.as_bytes()),
        }
        for pair in tokens.chunks(2) {
            let second = pair.get(1).copied().unwrap_or_default();
            hasher.write_u64(u64::from(pair[0]) | u64::from(second) << 32);
        }
        hasher.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// I11: a hash only finds a candidate.
    #[test]
    fn other_tokens_with_the_same_hash_do_not_match() {
        let mut cache = PrefixCache::new(4, 2);
        let known = BlockId(0);
        let (start, salt) = (Predecessor::Salt(None), Arc::from("salt"));
        assert!(cache.publish(known, start, &[1, 2]));
        // Other tokens, and the same tokens after another block or with a salt.
        for (after, tokens) in [
            (start, [3, 4]),
            (Predecessor::Block(known), [1, 2]),
            (Predecessor::Salt(Some(&salt)), [1, 2]),
        ] {
            let collision = cache.chain(after, &tokens);
            cache.by_chain.insert(collision, known);
            assert_eq!(cache.find(after, &tokens), None);
            assert!(
                !cache.publish(BlockId(1), after, &tokens),
                "the hash exists"
            );
        }
        assert_eq!(cache.find(start, &[1, 2]), Some(known));
    }
}
