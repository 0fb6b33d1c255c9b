//! The books of the paged key-value cache: which block belongs to whom.
//!
//! Pure logic: no device, no memory. [`BlockCache`] hands out blocks of a fixed
//! number of tokens, takes them back behind a fence (a step in flight may still
//! touch them), and can prove at any time that its books balance.

mod fence;
mod pool;
mod table;
mod transfer;

pub use fence::Fence;
pub use pool::{BlockId, Pool};
pub use table::BlockTable;
pub use transfer::{HostBlockId, Transfers};

use crate::id::StepId;
use thiserror::Error;

/// How the blocks of a cache are used at one moment.
///
/// Invariant I3: `free + referenced + cached + deferred = total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Books {
    /// Blocks in all.
    pub total: usize,
    /// Blocks that can be handed out now.
    pub free: usize,
    /// Blocks that at least one table holds.
    pub referenced: usize,
    /// Blocks that nobody holds and whose tokens are still of use: the prefix cache,
    /// handed out when no free block is left.
    pub cached: usize,
    /// Blocks given back that a step in flight may still touch.
    pub deferred: usize,
}

/// There are not enough free blocks.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{needed} more blocks of the key-value cache are needed, {free} are free")]
pub struct OutOfBlocks {
    /// Blocks asked for.
    pub needed: usize,
    /// Blocks free at that moment.
    pub free: usize,
}

/// The books do not balance: a bug, found by [`BlockCache::audit`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the key-value cache's books do not balance: {0}")]
pub struct Imbalance(String);

/// Hands out the blocks of the key-value cache and takes them back.
#[derive(Debug)]
pub struct BlockCache {
    pool: Pool,
    fence: Fence,
    block_tokens: usize,
}

impl BlockCache {
    /// A cache of `blocks` blocks of `block_tokens` tokens, all free.
    pub fn new(blocks: usize, block_tokens: usize) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        Self {
            pool: Pool::new(blocks),
            fence: Fence::default(),
            block_tokens,
        }
    }

    /// Tokens a block holds.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Blocks that `tokens` tokens take.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// Blocks that can be handed out now.
    pub fn free_blocks(&self) -> usize {
        self.pool.free_blocks()
    }

    /// Blocks that become free when the steps in flight have completed.
    pub fn deferred_blocks(&self) -> usize {
        self.fence.blocks()
    }

    /// Makes `table` long enough for `tokens` tokens: all blocks or none.
    pub fn grow(&mut self, table: &mut BlockTable, tokens: usize) -> Result<(), OutOfBlocks> {
        let needed = self.blocks_for(tokens).saturating_sub(table.len());
        if needed > self.pool.free_blocks() {
            return Err(OutOfBlocks {
                needed,
                free: self.pool.free_blocks(),
            });
        }
        for _ in 0..needed {
            if let Some(block) = self.pool.allocate() {
                table.push(block);
            }
        }
        Ok(())
    }

    /// Takes back all blocks of `table` and gives their number. They become free
    /// once step `touched`, the last that may use them, has completed (I4).
    pub fn release(&mut self, table: &mut BlockTable, touched: StepId) -> usize {
        let blocks = table.take();
        let count = blocks.len();
        let idle: Vec<BlockId> = blocks
            .into_iter()
            .filter(|&block| self.pool.drop_reference(block))
            .collect();
        if self.fence.is_completed(touched) {
            self.pool.make_free(&idle);
        } else {
            self.fence.defer(idle, touched);
        }
        count
    }

    /// Step `step` and all before it have completed: what waited for them is free.
    pub fn completed(&mut self, step: StepId) {
        let Self { pool, fence, .. } = self;
        fence.complete(step, |blocks| pool.make_free(blocks));
    }

    /// The blocks that became free since the last call; the first call starts the
    /// record.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.pool.take_freed()
    }

    /// How the blocks are used now.
    pub fn books(&self) -> Books {
        Books {
            total: self.pool.total_blocks(),
            free: self.pool.free_blocks(),
            referenced: self.pool.referenced_blocks(),
            cached: 0,
            deferred: self.fence.blocks(),
        }
    }

    /// Checks I3 against the tables of every sequence: each block is free, deferred
    /// or referenced, and is referenced as often as tables hold it.
    pub fn audit<'a>(
        &self,
        tables: impl Iterator<Item = &'a BlockTable>,
    ) -> Result<Books, Imbalance> {
        let books = self.books();
        if books.free + books.referenced + books.deferred != books.total {
            return Err(Imbalance(format!("{books:?} does not add up")));
        }
        let mut held = vec![0u32; books.total];
        for &block in tables.flat_map(BlockTable::blocks) {
            match held.get_mut(block.index()) {
                Some(count) => *count += 1,
                None => return Err(Imbalance(format!("a table holds {block:?} of {books:?}"))),
            }
        }
        self.pool
            .audit(&held, self.fence.iter())
            .map_err(Imbalance)?;
        Ok(books)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn growing_takes_all_blocks_or_none() {
        let mut cache = BlockCache::new(4, 16);
        let (mut a, mut b) = (BlockTable::default(), BlockTable::default());
        cache.grow(&mut a, 33).unwrap();
        assert_eq!(a.len(), 3);
        let error = cache.grow(&mut b, 17).unwrap_err();
        assert_eq!(error, OutOfBlocks { needed: 2, free: 1 });
        assert_eq!(b.len(), 0);
        cache.grow(&mut a, 48).unwrap();
        assert_eq!(a.len(), 3, "48 tokens fit in three blocks");
    }

    #[test]
    fn blocks_that_a_step_in_flight_touches_are_deferred() {
        let mut cache = BlockCache::new(2, 16);
        let mut table = BlockTable::default();
        cache.grow(&mut table, 32).unwrap();
        assert_eq!(cache.release(&mut table, StepId(3)), 2);
        assert_eq!(
            cache.books(),
            Books {
                total: 2,
                free: 0,
                referenced: 0,
                cached: 0,
                deferred: 2
            }
        );
        cache.completed(StepId(2));
        assert_eq!(cache.free_blocks(), 0);
        cache.completed(StepId(3));
        assert_eq!(cache.free_blocks(), 2);
        cache.grow(&mut table, 1).unwrap();
        cache.release(&mut table, StepId(3));
        assert_eq!(cache.free_blocks(), 2, "a completed step defers nothing");
    }

    #[test]
    fn freed_blocks_are_recorded_once_asked_for() {
        let mut cache = BlockCache::new(4, 16);
        let mut table = BlockTable::default();
        assert_eq!(cache.take_freed(), []);
        cache.grow(&mut table, 32).unwrap();
        cache.release(&mut table, StepId(1));
        assert_eq!(cache.take_freed(), [], "step 1 may still touch them");
        cache.completed(StepId(1));
        assert_eq!(cache.take_freed(), [BlockId(0), BlockId(1)]);
        assert_eq!(cache.take_freed(), []);
    }

    #[test]
    fn an_audit_finds_a_table_that_the_books_do_not_know() {
        let mut cache = BlockCache::new(4, 16);
        let mut table = BlockTable::default();
        cache.grow(&mut table, 20).unwrap();
        let copy = table.clone();
        assert!(cache.audit([&table].into_iter()).is_ok());
        assert!(cache.audit([&table, &copy].into_iter()).is_err());
        assert!(cache.audit(std::iter::empty()).is_err());
    }

    proptest! {
        #[test]
        fn the_books_balance_after_every_operation(
            operations in prop::collection::vec((0usize..6, 0usize..3, 1usize..200), 1..200)
        ) {
            let mut cache = BlockCache::new(24, 16);
            let mut tables = vec![BlockTable::default(); 6];
            let (mut launched, mut done) = (StepId(0), StepId(0));
            for (which, operation, tokens) in operations {
                match operation {
                    0 => { let _ = cache.grow(&mut tables[which], tokens); }
                    1 => { cache.release(&mut tables[which], launched); }
                    _ if launched > done => { done = done.next(); cache.completed(done); }
                    _ => launched = launched.next(),
                }
                let books = cache.audit(tables.iter()).unwrap();
                if launched == done {
                    prop_assert_eq!(books.deferred, 0);
                }
            }
        }
    }
}
