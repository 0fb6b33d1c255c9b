//! The block table of a sequence: which block holds which of its tokens.

use super::BlockId;
use std::sync::Arc;

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

    /// Returns the slot for the key and value of the token at `position`, counted in tokens
    /// from the start of the cache, or `None` if the table is too short.
    pub fn slot(&self, position: usize, block_tokens: usize) -> Option<u32> {
        let block = self.blocks.get(position / block_tokens)?;
        Some(block.0 * block_tokens as u32 + (position % block_tokens) as u32)
    }
}
