//! Copies between blocks, and between blocks and host memory; the books of the latter.

use super::BlockId;

/// Names a block of host memory, from 0: room for one swapped-out block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostBlockId(pub(crate) u32);

impl HostBlockId {
    /// The block's place in the host memory set aside for swapping.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What is copied before a step computes, in this order: out, among, in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// To the host.
    pub swap_out: Vec<(BlockId, HostBlockId)>,
    /// From block to block (source, target): no block is a target twice, or a source
    /// and a target.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Back from the host.
    pub swap_in: Vec<(HostBlockId, BlockId)>,
}

impl Transfers {
    /// Leaves nothing to copy, and keeps the memory.
    pub fn clear(&mut self) {
        self.swap_out.clear();
        self.copies.clear();
        self.swap_in.clear();
    }

    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.swap_out.is_empty() && self.copies.is_empty() && self.swap_in.is_empty()
    }
}

/// The books of the host memory for swapped-out blocks.
#[derive(Debug)]
pub struct HostBlocks {
    /// The lowest is handed out first, so that no more memory is touched than needed.
    free: std::collections::BinaryHeap<std::cmp::Reverse<HostBlockId>>,
    total: usize,
}

impl HostBlocks {
    /// Room for `blocks` blocks.
    pub fn new(blocks: usize) -> Self {
        let ids = (0..blocks as u32).map(|block| std::cmp::Reverse(HostBlockId(block)));
        Self {
            free: ids.collect(),
            total: blocks,
        }
    }

    /// Blocks in all.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes `count` blocks, or none if there are not so many.
    pub fn take(&mut self, count: usize) -> Option<Vec<HostBlockId>> {
        (count <= self.free.len()).then(|| {
            (0..count)
                .filter_map(|_| Some(self.free.pop()?.0))
                .collect()
        })
    }

    /// Takes blocks back.
    pub fn give_back(&mut self, blocks: impl IntoIterator<Item = HostBlockId>) {
        self.free.extend(blocks.into_iter().map(std::cmp::Reverse));
    }
}
