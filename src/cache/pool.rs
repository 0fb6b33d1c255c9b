//! The pool of blocks: reference counts and a free list threaded through them.

/// Names a block of the key-value cache, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockId(pub(crate) u32);

impl BlockId {
    /// The block's place in the device's cache.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// No block: the end of the free list.
const NONE: u32 = u32::MAX;

/// Flat arrays over all blocks; allocating and freeing are O(1).
///
/// The free list is first in, first out: the block that has been free the longest
/// is handed out next.
#[derive(Debug)]
pub struct Pool {
    references: Vec<u32>,
    /// Next free block of a free block.
    next: Vec<u32>,
    head: u32,
    tail: u32,
    free: usize,
    referenced: usize,
    /// What became free since it was last asked, if anybody asks.
    freed: Option<Vec<BlockId>>,
}

impl Pool {
    /// A pool of `blocks` free blocks.
    pub fn new(blocks: usize) -> Self {
        assert!(blocks < NONE as usize, "at most 2³² − 2 blocks");
        let mut pool = Self {
            references: vec![0; blocks],
            next: vec![NONE; blocks],
            head: NONE,
            tail: NONE,
            free: 0,
            referenced: 0,
            freed: None,
        };
        for block in 0..blocks as u32 {
            pool.append(block);
        }
        pool
    }

    /// Blocks in all.
    pub fn total_blocks(&self) -> usize {
        self.references.len()
    }

    /// Blocks on the free list.
    pub fn free_blocks(&self) -> usize {
        self.free
    }

    /// Blocks with at least one reference.
    pub fn referenced_blocks(&self) -> usize {
        self.referenced
    }

    /// Takes the block that has been free the longest; it has one reference then.
    pub fn allocate(&mut self) -> Option<BlockId> {
        if self.head == NONE {
            return None;
        }
        let block = self.head;
        self.head = self.next[block as usize];
        if self.head == NONE {
            self.tail = NONE;
        }
        self.next[block as usize] = NONE;
        self.references[block as usize] = 1;
        self.free -= 1;
        self.referenced += 1;
        Some(BlockId(block))
    }

    /// Drops a reference; `true` when it was the last. The block is then neither
    /// referenced nor free, until [`Pool::make_free`].
    pub fn drop_reference(&mut self, block: BlockId) -> bool {
        let count = &mut self.references[block.index()];
        debug_assert!(*count > 0, "{block:?} has no reference to drop");
        *count -= 1;
        let last = *count == 0;
        self.referenced -= usize::from(last);
        last
    }

    /// Puts blocks without references at the end of the free list.
    pub fn make_free(&mut self, blocks: &[BlockId]) {
        for &block in blocks {
            debug_assert_eq!(self.references[block.index()], 0, "{block:?} is in use");
            self.append(block.0);
        }
        if let Some(freed) = &mut self.freed {
            freed.extend_from_slice(blocks);
        }
    }

    /// The blocks that became free since the last call; the first call starts the
    /// record.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.freed.replace(Vec::new()).unwrap_or_default()
    }

    fn append(&mut self, block: u32) {
        if self.tail == NONE {
            self.head = block;
        } else {
            self.next[self.tail as usize] = block;
        }
        self.next[block as usize] = NONE;
        self.tail = block;
        self.free += 1;
    }

    /// Compares the counts with `held`, how many tables hold each block, and checks
    /// that every other block is exactly once free or `deferred`.
    pub(super) fn audit(
        &self,
        held: &[u32],
        deferred: impl Iterator<Item = super::BlockId>,
    ) -> Result<(), String> {
        let mut idle = vec![0u32; self.references.len()];
        let mut block = self.head;
        let mut steps = 0;
        while block != NONE {
            idle[block as usize] += 1;
            block = self.next[block as usize];
            steps += 1;
            if steps > self.references.len() {
                return Err("the free list is a circle".to_owned());
            }
        }
        if steps != self.free {
            return Err(format!(
                "{steps} blocks on the free list, {} counted",
                self.free
            ));
        }
        for block in deferred {
            idle[block.index()] += 1;
        }
        for (block, (&references, &held)) in self.references.iter().zip(held).enumerate() {
            let idle = idle[block];
            if references != held {
                return Err(format!(
                    "block {block} has {references} references, {held} tables hold it"
                ));
            }
            if (references == 0) != (idle == 1) || idle > 1 {
                return Err(format!(
                    "block {block} has {references} references and is {idle} times idle"
                ));
            }
        }
        Ok(())
    }
}
