//! The pool of blocks: who holds each, and the lists of those that nobody holds.

use super::list::{Links, List};
use crate::id::StepId;

/// Names a block of the key-value cache, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// The block's place in the device's cache.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a block is at one moment; every block is exactly one of these (I3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// On the free list.
    Free,
    /// At least one table holds it.
    Referenced,
    /// Nobody holds it, but a step in flight may still touch it.
    Deferred,
    /// Nobody holds it, and the prefix cache knows its tokens: it is handed out when
    /// no free block is left, the one unused for the longest first.
    Cached,
}

/// Flat arrays over all blocks; every operation on a block is O(1).
///
/// The free list is first in, first out: the block that has been free the longest
/// is handed out next.
#[derive(Debug)]
pub struct Pool {
    state: Vec<BlockState>,
    references: Vec<u32>,
    /// The last step that touches the block.
    touched: Vec<StepId>,
    /// The release that deferred the block last.
    release: Vec<u64>,
    links: Links,
    free: List,
    cached: List,
    referenced: usize,
    deferred: usize,
    /// What was given up since it was last asked, if anybody asks.
    freed: Option<Vec<BlockId>>,
}

impl Pool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        let mut links = Links::new(blocks);
        let mut free = List::default();
        for block in 0..blocks as u32 {
            free.push_back(&mut links, BlockId(block));
        }
        Self {
            state: vec![BlockState::Free; blocks],
            references: vec![0; blocks],
            touched: vec![StepId::default(); blocks],
            release: vec![0; blocks],
            links,
            free,
            cached: List::default(),
            referenced: 0,
            deferred: 0,
            freed: None,
        }
    }

    /// Blocks in all.
    pub fn total_blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks on the free list.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Blocks that nobody holds and the prefix cache knows.
    pub fn cached_blocks(&self) -> usize {
        self.cached.len()
    }

    /// Blocks with at least one reference.
    pub fn referenced_blocks(&self) -> usize {
        self.referenced
    }

    /// Blocks that wait for a step in flight.
    pub fn deferred_blocks(&self) -> usize {
        self.deferred
    }

    /// What a block is.
    pub fn state(&self, block: BlockId) -> BlockState {
        self.state[block.index()]
    }

    /// What each block is, from the first to the last.
    pub fn states(&self) -> impl Iterator<Item = BlockState> + '_ {
        self.state.iter().copied()
    }

    /// How many tables hold a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.references[block.index()]
    }

    /// Takes the block that has been free the longest; it has one reference then.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.front()?;
        self.free.remove(&mut self.links, block);
        self.hold_first(block);
        Some(block)
    }

    /// Takes the cached block that has been unused for the longest; its tokens are
    /// lost, and it has one reference then.
    pub fn evict(&mut self) -> Option<BlockId> {
        let block = self.cached.front()?;
        self.cached.remove(&mut self.links, block);
        self.hold_first(block);
        self.record(block);
        Some(block)
    }

    /// Adds a reference to a block that is not free.
    pub fn add_reference(&mut self, block: BlockId) {
        match self.state(block) {
            BlockState::Referenced => self.references[block.index()] += 1,
            BlockState::Cached => {
                self.cached.remove(&mut self.links, block);
                self.hold_first(block);
            }
            // Its entry in the fence finds it held, and leaves it alone.
            BlockState::Deferred => {
                self.deferred -= 1;
                self.hold_first(block);
            }
            BlockState::Free => debug_assert!(false, "{block:?} is free"),
        }
    }

    fn hold_first(&mut self, block: BlockId) {
        self.state[block.index()] = BlockState::Referenced;
        self.references[block.index()] = 1;
        self.referenced += 1;
    }

    /// Drops a reference of a holder whose last step is `touched`; `true` when it was
    /// the last. The block is deferred then, until [`Pool::settle`] of this release.
    pub fn drop_reference(&mut self, block: BlockId, touched: StepId, release: u64) -> bool {
        let index = block.index();
        debug_assert!(self.references[index] > 0, "{block:?} is not held");
        self.touched[index] = self.touched[index].max(touched);
        self.references[index] -= 1;
        let last = self.references[index] == 0;
        if last {
            self.state[index] = BlockState::Deferred;
            self.release[index] = release;
            self.referenced -= 1;
            self.deferred += 1;
        }
        last
    }

    /// The last step that touches a block.
    pub fn touched(&self, block: BlockId) -> StepId {
        self.touched[block.index()]
    }

    /// Makes a block free, or cached if `known`, that `release` was the last to defer:
    /// all steps that touch it have completed. Does nothing to any other block.
    pub fn settle(&mut self, block: BlockId, release: u64, known: bool) {
        let index = block.index();
        if self.state[index] != BlockState::Deferred || self.release[index] != release {
            return;
        }
        self.deferred -= 1;
        if known {
            self.state[index] = BlockState::Cached;
            self.cached.push_back(&mut self.links, block);
        } else {
            self.make_free(block);
        }
    }

    /// Makes a cached block free.
    pub fn forget(&mut self, block: BlockId) {
        if self.state(block) == BlockState::Cached {
            self.cached.remove(&mut self.links, block);
            self.make_free(block);
        }
    }

    /// Puts a block that is in no list at the end of the free list.
    fn make_free(&mut self, block: BlockId) {
        self.state[block.index()] = BlockState::Free;
        self.free.push_back(&mut self.links, block);
        self.record(block);
    }

    /// The content of a block was given up.
    fn record(&mut self, block: BlockId) {
        if let Some(freed) = &mut self.freed {
            freed.push(block);
        }
    }

    /// Cached blocks, the one unused for the longest first.
    pub fn cached(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.cached.iter(&self.links)
    }

    /// The blocks whose content was given up since the last call; the first call
    /// starts the record.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.freed.replace(Vec::new()).unwrap_or_default()
    }

    /// Compares the counts with `held`, how many tables hold each block, and checks
    /// that each block is in exactly the list that its state says.
    pub(super) fn audit(&self, held: &[u32]) -> Result<(), String> {
        let mut listed = vec![None; self.state.len()];
        for (list, state) in [
            (&self.free, BlockState::Free),
            (&self.cached, BlockState::Cached),
        ] {
            let mut count = 0;
            for block in list.iter(&self.links) {
                if let Some(other) = listed[block.index()].replace(state) {
                    return Err(format!("{block:?} is listed as {other:?} and as {state:?}"));
                }
                count += 1;
            }
            if count != list.len() {
                return Err(format!(
                    "{count} blocks listed as {state:?}, {} counted",
                    list.len()
                ));
            }
        }
        for (index, (&state, &held)) in self.state.iter().zip(held).enumerate() {
            let references = self.references[index];
            if references != held {
                return Err(format!(
                    "block {index} has {references} references, {held} tables hold it"
                ));
            }
            if (references > 0) != (state == BlockState::Referenced) {
                return Err(format!(
                    "block {index} is {state:?} with {references} references"
                ));
            }
            let expected = matches!(state, BlockState::Free | BlockState::Cached).then_some(state);
            if listed[index] != expected {
                return Err(format!(
                    "block {index} is {state:?}, and listed as {:?}",
                    listed[index]
                ));
            }
        }
        let count = |state| self.state.iter().filter(|other| **other == state).count();
        let counted = (count(BlockState::Referenced), count(BlockState::Deferred));
        if counted != (self.referenced, self.deferred) {
            return Err(format!(
                "{counted:?} blocks are referenced and deferred, {:?} counted",
                (self.referenced, self.deferred)
            ));
        }
        Ok(())
    }
}
