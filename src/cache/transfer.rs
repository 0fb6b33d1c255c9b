//! Copies between blocks, and between blocks and host memory.

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
    /// Whether there is nothing to copy.
    pub fn is_empty(&self) -> bool {
        self.swap_out.is_empty() && self.copies.is_empty() && self.swap_in.is_empty()
    }
}
