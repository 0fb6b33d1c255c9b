//! The pool of blocks: the state and reference count of each block, and the lists of unused
//! blocks.

use super::list::{Links, List};
use crate::id::StepId;

/// Index of a block of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// Returns the index of the block in the device's cache.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// State of a block. Every block is in exactly one state (I3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// On the free list.
    Free,
    /// At least one table holds it.
    Referenced,
    /// No table holds it, but a step in flight may still touch it.
    Deferred,
    /// No table holds it, and the prefix cache knows its tokens. Cached blocks are evicted if
    /// no free block is left, the least recently used one first.
    Cached,
}

/// The state of all blocks, in flat arrays. Every operation on one block takes constant time.
///
/// The free list is first in, first out: the block that has been free the longest is allocated
/// next.
#[derive(Debug)]
pub struct Pool {
    state: Vec<BlockState>,
    references: Vec<u32>,
    /// Last step that touches each block.
    touched: Vec<StepId>,
    /// Number of the release that last deferred each block.
    release: Vec<u64>,
    links: Links,
    free: List,
    cached: List,
    referenced: usize,
    deferred: usize,
    /// Blocks whose content was discarded since they were last taken; `None` until first asked
    /// for.
    freed: Option<Vec<BlockId>>,
}

impl Pool {
    /// Creates a pool of `blocks` free blocks.
    ///
    /// # Panics
    /// Panics if there are more than 2³² − 2 blocks.
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

    /// Returns the number of all blocks.
    pub fn total_blocks(&self) -> usize {
        self.references.len()
    }

    /// Returns the number of free blocks.
    pub fn free_blocks(&self) -> usize {
        self.free.len()
    }

    /// Returns the number of blocks that no table holds and the prefix cache knows.
    pub fn cached_blocks(&self) -> usize {
        self.cached.len()
    }

    /// Returns the number of blocks with at least one reference.
    pub fn referenced_blocks(&self) -> usize {
        self.referenced
    }

    /// Returns the number of blocks that wait for a step in flight.
    pub fn deferred_blocks(&self) -> usize {
        self.deferred
    }

    /// Returns the state of a block.
    pub fn state(&self, block: BlockId) -> BlockState {
        self.state[block.index()]
    }

    /// Returns the state of every block, by block index.
    pub fn states(&self) -> impl Iterator<Item = BlockState> + '_ {
        self.state.iter().copied()
    }

    /// Returns how many tables hold a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.references[block.index()]
    }

    /// Allocates the block that has been free the longest, with one reference.
    pub fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.front()?;
        self.free.remove(&mut self.links, block);
        self.hold_first(block);
        Some(block)
    }

    /// Evicts the least recently used cached block and returns it with one reference. The
    /// caller must forget its tokens.
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
            // The fence still lists the block, but `settle` ignores blocks that are not
            // deferred.
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

    /// Drops the reference of a holder whose last step is `touched`. Returns whether it was the
    /// last one. If so, the block is deferred until [`Pool::settle`] is called for this
    /// release.
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

    /// Returns the last step that touches a block.
    pub fn touched(&self, block: BlockId) -> StepId {
        self.touched[block.index()]
    }

    /// Makes a deferred block cached if it is `known`, and free if not. All steps that touch it
    /// must have completed. Does nothing if the block is not deferred or if a later release
    /// deferred it.
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

    /// Makes a cached block free. Does nothing to other blocks.
    pub fn forget(&mut self, block: BlockId) {
        if self.state(block) == BlockState::Cached {
            self.cached.remove(&mut self.links, block);
            self.make_free(block);
        }
    }

    /// Appends a block that is in no list to the free list.
    fn make_free(&mut self, block: BlockId) {
        self.state[block.index()] = BlockState::Free;
        self.free.push_back(&mut self.links, block);
        self.record(block);
    }

    /// Records that the content of a block was discarded, if anyone asked for the record.
    fn record(&mut self, block: BlockId) {
        if let Some(freed) = &mut self.freed {
            freed.push(block);
        }
    }

    /// Returns the cached blocks, the least recently used one first.
    pub fn cached(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.cached.iter(&self.links)
    }

    /// Returns the blocks whose content was discarded since the last call. Recording starts
    /// with the first call, which returns nothing.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.freed.replace(Vec::new()).unwrap_or_default()
    }

    /// Compares the reference counts with `held`, the number of tables that hold each block.
    /// Also checks that each block is in the list for its state, and in no other.
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
                    "{count} blocks are listed as {state:?}, but {} are counted",
                    list.len()
                ));
            }
        }
        for (index, (&state, &held)) in self.state.iter().zip(held).enumerate() {
            let references = self.references[index];
            if references != held {
                return Err(format!(
                    "block {index} has {references} references, but {held} tables hold it"
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
                    "block {index} is {state:?}, but listed as {:?}",
                    listed[index]
                ));
            }
        }
        let count = |state| self.state.iter().filter(|other| **other == state).count();
        let counted = (count(BlockState::Referenced), count(BlockState::Deferred));
        if counted != (self.referenced, self.deferred) {
            return Err(format!(
                "{counted:?} blocks are referenced and deferred, but {:?} are recorded",
                (self.referenced, self.deferred)
            ));
        }
        Ok(())
    }
}
