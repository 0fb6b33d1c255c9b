//! A sequence's block table: which block holds which of its tokens.

use super::BlockId;

/// The blocks of one sequence, in the order of its tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    blocks: Vec<BlockId>,
}

impl BlockTable {
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

    /// Where the key and value of the token at `position` lie, counted in tokens
    /// from the start of the cache. `None` when the table is too short.
    pub fn slot(&self, position: usize, block_tokens: usize) -> Option<u32> {
        let block = self.blocks.get(position / block_tokens)?;
        Some(block.0 * block_tokens as u32 + (position % block_tokens) as u32)
    }

    pub(super) fn push(&mut self, block: BlockId) {
        self.blocks.push(block);
    }

    pub(super) fn take(&mut self) -> Vec<BlockId> {
        std::mem::take(&mut self.blocks)
    }
}
