//! Copies of blocks on the device and to and from host memory, and the accounting of host
//! blocks.

use super::BlockId;

/// Index of a block of host memory, which has room for one swapped-out block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostBlockId(pub(crate) u32);

impl HostBlockId {
    /// Returns the index of the block in the host memory for swapping.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Copies to make before a step computes: first `swap_out`, then `copies`, then `swap_in`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Copies from the device to the host.
    pub swap_out: Vec<(BlockId, HostBlockId)>,
    /// Copies from block to block, as pairs of source and target. No block is the target of two
    /// copies, or both a source and a target.
    pub copies: Vec<(BlockId, BlockId)>,
    /// Copies from the host back to the device.
    pub swap_in: Vec<(HostBlockId, BlockId)>,
}

impl Transfers {
    /// Removes all copies and keeps the allocations.
    pub fn clear(&mut self) {
        self.swap_out.clear();
        self.copies.clear();
        self.swap_in.clear();
    }

    /// Returns whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.swap_out.is_empty() && self.copies.is_empty() && self.swap_in.is_empty()
    }
}

/// Accounting of the host memory for swapped-out blocks.
#[derive(Debug)]
pub struct HostBlocks {
    /// Free blocks. The lowest index is allocated first, so that no more memory is touched than
    /// needed.
    free: std::collections::BinaryHeap<std::cmp::Reverse<HostBlockId>>,
    total: usize,
}

impl HostBlocks {
    /// Creates the accounting for `blocks` free host blocks.
    pub fn new(blocks: usize) -> Self {
        let ids = (0..blocks as u32).map(|block| std::cmp::Reverse(HostBlockId(block)));
        Self {
            free: ids.collect(),
            total: blocks,
        }
    }

    /// Returns the number of all blocks.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Returns the number of free blocks.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Allocates `count` blocks, or none if fewer are free.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<HostBlockId>> {
        (count <= self.free.len()).then(|| {
            (0..count)
                .filter_map(|_| Some(self.free.pop()?.0))
                .collect()
        })
    }

    /// Frees blocks.
    pub fn release(&mut self, blocks: impl IntoIterator<Item = HostBlockId>) {
        self.free.extend(blocks.into_iter().map(std::cmp::Reverse));
    }
}
