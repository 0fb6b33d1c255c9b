//! Doubly linked lists of blocks, threaded through flat arrays.

use super::BlockId;

/// Sentinel: no block, at either end of a list.
const NONE: u32 = u32::MAX;

/// The links of all blocks. Each block is in at most one list.
#[derive(Debug)]
pub(super) struct Links {
    previous: Vec<u32>,
    next: Vec<u32>,
}

/// One list, whose links are in [`Links`].
#[derive(Debug)]
pub(super) struct List {
    head: u32,
    tail: u32,
    len: usize,
}

impl Links {
    pub fn new(blocks: usize) -> Self {
        assert!(blocks < NONE as usize, "at most 2³² − 2 blocks");
        Self {
            previous: vec![NONE; blocks],
            next: vec![NONE; blocks],
        }
    }
}

impl Default for List {
    fn default() -> Self {
        Self {
            head: NONE,
            tail: NONE,
            len: 0,
        }
    }
}

impl List {
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the block that has been in the list the longest.
    pub fn front(&self) -> Option<BlockId> {
        (self.head != NONE).then_some(BlockId(self.head))
    }

    pub fn push_back(&mut self, links: &mut Links, block: BlockId) {
        links.previous[block.index()] = self.tail;
        links.next[block.index()] = NONE;
        match self.tail {
            NONE => self.head = block.0,
            tail => links.next[tail as usize] = block.0,
        }
        self.tail = block.0;
        self.len += 1;
    }

    /// Removes a block that is in this list.
    pub fn remove(&mut self, links: &mut Links, block: BlockId) {
        let (previous, next) = (links.previous[block.index()], links.next[block.index()]);
        match previous {
            NONE => self.head = next,
            previous => links.next[previous as usize] = next,
        }
        match next {
            NONE => self.tail = previous,
            next => links.previous[next as usize] = previous,
        }
        self.len -= 1;
    }

    /// Returns the blocks in order. Terminates even if the links form a cycle.
    pub fn iter<'a>(&self, links: &'a Links) -> impl Iterator<Item = BlockId> + use<'a> {
        let mut block = self.head;
        let mut rest = links.next.len();
        std::iter::from_fn(move || {
            if block == NONE || rest == 0 {
                return None;
            }
            rest -= 1;
            let current = BlockId(block);
            block = links.next[current.index()];
            Some(current)
        })
    }
}
