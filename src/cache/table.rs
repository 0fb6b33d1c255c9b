//! The block table of a sequence: which block holds which of its tokens.

use super::BlockId;
use super::prefix::NodeId;
use super::states::{StateSlot, TableStates};
use smallvec::SmallVec;
use std::ops::Range;
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

/// The same, as part of a table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Group {
    pub first: usize,
    pub blocks: Vec<BlockId>,
}

impl Group {
    /// Returns the indices of the blocks, counted from the start of the sequence.
    pub fn range(&self) -> Range<usize> {
        self.first..self.first + self.blocks.len()
    }

    /// Returns the block with this index, if the group holds it.
    pub fn get(&self, index: usize) -> Option<BlockId> {
        self.blocks.get(index.checked_sub(self.first)?).copied()
    }
}

/// The blocks of one sequence, in the order of its tokens, for each group of layers.
///
/// Only the cache creates and changes tables, so that its accounting covers every holder.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct BlockTable {
    /// One entry per group, or none in a table that was never used. Most models have one group;
    /// it is in the table itself, because every decode step reads it for every sequence.
    pub(super) groups: SmallVec<[Group; 1]>,
    /// The number of blocks from the start of the sequence that were published in the prefix
    /// cache. As far as the table still holds them, it holds the published ones and no others.
    pub(super) published: usize,
    /// The node of the last published block.
    pub(super) last: Option<NodeId>,
    /// The states of recurrent layers.
    pub(super) states: TableStates,
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

    /// Frees unused memory.
    pub fn shrink(&mut self) {
        for group in &mut self.groups {
            group.blocks.shrink_to_fit();
        }
    }

    /// Returns the number of blocks of all groups.
    pub fn len(&self) -> usize {
        self.groups.iter().map(|group| group.blocks.len()).sum()
    }

    /// Returns whether the table has no blocks.
    pub fn is_empty(&self) -> bool {
        self.groups.iter().all(|group| group.blocks.is_empty())
    }

    /// Returns the blocks of all groups, one group after the other.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> + '_ {
        let groups = self.groups.iter();
        groups.flat_map(|group| group.blocks.iter().copied())
    }

    /// Returns the slots of the states that the table holds.
    pub fn state_slots(&self) -> impl Iterator<Item = StateSlot> + '_ {
        self.states.slots()
    }

    /// Returns the blocks before the index `end`, counted from the start of the sequence, one
    /// group after the other. Each comes with its index.
    pub fn blocks_before(&self, end: usize) -> impl Iterator<Item = (usize, BlockId)> + '_ {
        self.groups.iter().flat_map(move |group| {
            let blocks = group.range().zip(group.blocks.iter().copied());
            blocks.take_while(move |(index, _)| *index < end)
        })
    }

    /// Returns the block of `group` with this index, counted from the start of the sequence, if
    /// the table holds it.
    pub fn block(&self, group: usize, index: usize) -> Option<BlockId> {
        self.groups.get(group)?.get(index)
    }

    /// Returns the index of the first block of each group, counted from the start of the
    /// sequence.
    pub fn first_blocks(&self) -> Vec<usize> {
        self.groups.iter().map(|group| group.first).collect()
    }

    /// Returns the blocks of one group of layers.
    pub fn group(&self, group: usize) -> GroupBlocks<'_> {
        match self.groups.get(group) {
            Some(Group { first, blocks }) => GroupBlocks {
                first: *first,
                blocks,
            },
            None => GroupBlocks {
                first: 0,
                blocks: &[],
            },
        }
    }

    /// Returns the number of blocks from the start of the sequence that were published in the
    /// prefix cache. Those that the table has given back may be gone.
    #[cfg(any(test, feature = "internals"))]
    pub fn published(&self) -> usize {
        self.published
    }
}
