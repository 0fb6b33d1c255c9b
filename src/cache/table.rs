//! The block table of a sequence: which block holds which of its tokens.

use super::BlockId;
use std::sync::Arc;

/// The blocks that one group of layers has for a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupBlocks<'a> {
    /// Index of the first block, counted from the start of the sequence. The blocks before it
    /// lie behind the window and were given back.
    pub first: usize,
    /// The blocks from there on, in the order of the tokens.
    pub blocks: &'a [BlockId],
}

/// The blocks of one sequence, in the order of its tokens.
///
/// Only the cache creates and changes tables, so that its accounting covers every holder.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    pub(super) blocks: Vec<BlockId>,
    /// Number of leading blocks that are published in the prefix cache. No other block is
    /// published for the same tokens.
    pub(super) published: usize,
    /// Only tables with the same salt share blocks.
    pub(super) salt: Option<Arc<str>>,
}

impl BlockTable {
    /// Creates an empty table. It shares blocks only with tables that have the same salt.
    pub fn salted(salt: Option<Arc<str>>) -> Self {
        Self {
            salt,
            ..Self::default()
        }
    }

    /// Returns the salt that the table was created with.
    pub fn salt(&self) -> Option<&Arc<str>> {
        self.salt.as_ref()
    }

    /// Reserves memory for `blocks` blocks in all, so that the table is not reallocated as it
    /// grows.
    pub fn reserve(&mut self, blocks: usize) {
        self.blocks.reserve_exact(blocks.saturating_sub(self.len()));
    }

    /// Frees unused memory.
    pub fn shrink(&mut self) {
        self.blocks.shrink_to_fit();
    }

    /// Returns the number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Returns whether the table has no blocks.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Returns the blocks, in the order of the tokens.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Returns the number of leading blocks that the prefix cache knows.
    pub fn published(&self) -> usize {
        self.published
    }

    /// Returns the blocks of one group of layers.
    pub fn group(&self, group: usize) -> GroupBlocks<'_> {
        let blocks: &[BlockId] = match group {
            0 => &self.blocks,
            _ => &[],
        };
        GroupBlocks { first: 0, blocks }
    }

    /// Returns the slot for the key and value of the token at `position` in the layers of
    /// `group`, counted in tokens from the start of the cache, or `None` if the table has no
    /// block for it.
    pub fn slot(&self, group: usize, position: usize, block_tokens: usize) -> Option<u32> {
        let GroupBlocks { first, blocks } = self.group(group);
        let block = blocks.get((position / block_tokens).checked_sub(first)?)?;
        Some(block.0 * block_tokens as u32 + (position % block_tokens) as u32)
    }
}
