//! A sequence's block table: which block holds which of its tokens.

use super::BlockId;
use std::sync::Arc;

/// The blocks of one sequence, in the order of its tokens.
///
/// Only the cache makes and changes tables, so that its books know every holder.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    pub(super) blocks: Vec<BlockId>,
    /// Leading blocks that the prefix cache knows; these and no other hold the tokens
    /// that they hold.
    pub(super) published: usize,
    /// Only tables with the same salt share blocks.
    pub(super) salt: Option<Arc<str>>,
}

impl BlockTable {
    /// An empty table. It shares blocks with no table that has another salt.
    pub fn salted(salt: Option<Arc<str>>) -> Self {
        Self {
            salt,
            ..Self::default()
        }
    }

    /// What it was made with.
    pub fn salt(&self) -> Option<&Arc<str>> {
        self.salt.as_ref()
    }

    /// Makes room for so many blocks, so that the table need not be moved as it grows.
    pub fn reserve(&mut self, blocks: usize) {
        self.blocks.reserve_exact(blocks.saturating_sub(self.len()));
    }

    /// Gives back the room that it does not need.
    pub fn shrink(&mut self) {
        self.blocks.shrink_to_fit();
    }

    /// Number of blocks.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether the table has no blocks.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The blocks, those of the first tokens first.
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// How many of the leading blocks the prefix cache knows.
    pub fn published(&self) -> usize {
        self.published
    }

    /// Where the key and value of the token at `position` lie, counted in tokens
    /// from the start of the cache. `None` when the table is too short.
    pub fn slot(&self, position: usize, block_tokens: usize) -> Option<u32> {
        let block = self.blocks.get(position / block_tokens)?;
        Some(block.0 * block_tokens as u32 + (position % block_tokens) as u32)
    }
}
