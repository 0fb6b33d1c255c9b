//! Block accounting of the paged KV cache: which tables hold which block.
//!
//! This is pure logic, with no device and no memory behind it. [`BlockCache`] allocates blocks
//! of a fixed number of tokens, shares them between tables, and takes them back. A released
//! block that a step in flight may still touch is deferred until that step has completed.
//! [`BlockCache::audit`] checks that the accounting is consistent.
//!
//! # Prefix cache
//!
//! Complete blocks are *published*: they are known by their tokens and all tokens before these.
//! A later sequence that begins with the same tokens holds the same blocks. A published block
//! that no table holds is *cached*: it is still known, and it is evicted only if no free block
//! is left, the least recently used one first. Tables are released from their end, so a block
//! is always evicted before the blocks that it follows.
//!
//! Tables may have a *salt*. Only tables with the same salt share blocks, so one tenant cannot
//! find out what another one has sent.
//!
//! There is only one published block for the same tokens and salt. If a table publishes a
//! second one, it gets the first one in its place. So a table that holds a published block
//! holds all blocks before it as well, and every cached block can be evicted.

mod fence;
mod layout;
mod list;
mod pool;
mod prefix;
mod table;
mod transfer;

pub use fence::Fence;
pub use layout::{CacheGroup, CacheLayout, EmptyWindow, GroupKind};
pub use pool::{BlockId, BlockState, Pool};
pub use table::{BlockTable, GroupBlocks};
pub use transfer::{HostBlockId, HostBlocks, Transfers};

use crate::id::StepId;
use fence::Release;
use prefix::{Predecessor, PrefixCache};
use serde::Serialize;
use std::sync::Arc;
use thiserror::Error;

/// Number of blocks in each state at one moment.
///
/// Invariant I3: `free + referenced + cached + deferred = total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BlockCounts {
    /// All blocks.
    pub total: usize,
    /// Blocks that can be allocated now and hold nothing of use.
    pub free: usize,
    /// Blocks that at least one table holds.
    pub referenced: usize,
    /// Blocks in the prefix cache that no table holds. They are evicted if no free block is
    /// left.
    pub cached: usize,
    /// Released blocks that a step in flight may still touch.
    pub deferred: usize,
}

impl BlockCounts {
    /// Returns the number of blocks that can be allocated now.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}

/// The error of [`BlockCache::prepare`] if not enough blocks are available.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{needed} more blocks of the KV cache are needed, but only {free} are available")]
pub struct OutOfBlocks {
    /// Number of blocks needed.
    pub needed: usize,
    /// Number of blocks that could be allocated at that moment.
    pub free: usize,
}

/// The error of [`BlockCache::audit`] if the accounting is inconsistent, which is always a bug.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the block accounting of the KV cache is inconsistent: {0}")]
pub struct AccountingError(pub(crate) String);

/// Allocates the blocks of the KV cache and takes them back.
#[derive(Debug)]
pub struct BlockCache {
    pool: Pool,
    fence: Fence,
    prefix: Option<PrefixCache>,
    block_tokens: usize,
    releases: u64,
}

impl BlockCache {
    /// Creates a cache of `blocks` free blocks of `block_tokens` tokens each. With `prefixes`,
    /// it remembers the tokens of complete blocks.
    ///
    /// # Panics
    /// Panics if `block_tokens` is 0 or if there are more than 2³² − 2 blocks.
    pub fn new(blocks: usize, block_tokens: usize, prefixes: bool) -> Self {
        assert!(block_tokens > 0, "a block must hold at least one token");
        Self {
            pool: Pool::new(blocks),
            fence: Fence::default(),
            prefix: prefixes.then(|| PrefixCache::new(blocks, block_tokens)),
            block_tokens,
            releases: 0,
        }
    }

    /// Returns the number of tokens per block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Returns the number of blocks that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// Returns the number of blocks that can be allocated now.
    pub fn available_blocks(&self) -> usize {
        self.pool.free_blocks() + self.pool.cached_blocks()
    }

    /// Returns the number of blocks that can be allocated when the steps in flight have
    /// completed.
    pub fn deferred_blocks(&self) -> usize {
        self.pool.deferred_blocks()
    }

    /// Returns the number of blocks that must be allocated before the tokens `start..end` can
    /// be written through `table`.
    pub fn missing_blocks(&self, table: &BlockTable, start: usize, end: usize) -> usize {
        let growth = self.blocks_for(end).saturating_sub(table.len());
        growth + usize::from(self.shared_at(table, start).is_some())
    }

    /// Returns the index of the block for the token at `start`, if `table` has that block and
    /// must not write to it because others may read it.
    fn shared_at(&self, table: &BlockTable, start: usize) -> Option<usize> {
        let index = start / self.block_tokens;
        let &block = table.blocks.get(index)?;
        let known = self
            .prefix
            .as_ref()
            .is_some_and(|prefix| prefix.knows(block));
        (known || self.pool.references(block) > 1).then_some(index)
    }

    /// Returns whether releasing `table` would leave a block that no table holds.
    pub fn has_exclusive_blocks(&self, table: &BlockTable) -> bool {
        let mut last_first = table.blocks.iter().rev();
        last_first.any(|&block| self.pool.references(block) == 1)
    }

    /// Returns the number of blocks that no table would hold if `table` were released.
    pub fn exclusive_blocks(&self, table: &BlockTable) -> usize {
        let blocks = table.blocks.iter();
        blocks
            .filter(|&&block| self.pool.references(block) == 1)
            .count()
    }

    /// Prepares `table` so that step `step` can write the tokens `start..end`. A block that
    /// others may read is replaced by a copy (copy on write), which is added to `transfers`.
    ///
    /// # Errors
    /// Returns [`OutOfBlocks`] and changes nothing if not enough blocks are available.
    pub fn prepare(
        &mut self,
        table: &mut BlockTable,
        start: usize,
        end: usize,
        step: StepId,
        transfers: &mut Transfers,
    ) -> Result<(), OutOfBlocks> {
        let needed = self.missing_blocks(table, start, end);
        let free = self.available_blocks();
        if needed > free {
            return Err(OutOfBlocks { needed, free });
        }
        if let Some(index) = self.shared_at(table, start) {
            let shared = table.blocks[index];
            table.published = table.published.min(index);
            // If the first token to be written begins a block, there is nothing to copy.
            let copy = !start.is_multiple_of(self.block_tokens);
            if let Some(own) = self.allocate() {
                if copy {
                    transfers.copies.push((shared, own));
                }
                table.blocks[index] = own;
                self.release_blocks(vec![shared], step);
            }
        }
        while table.len() < self.blocks_for(end) {
            match self.allocate() {
                Some(block) => table.blocks.push(block),
                None => break,
            }
        }
        Ok(())
    }

    /// Allocates a free block, or else the least recently used cached block, whose tokens are
    /// forgotten.
    fn allocate(&mut self) -> Option<BlockId> {
        if let Some(block) = self.pool.allocate() {
            return Some(block);
        }
        let block = self.pool.evict()?;
        if let Some(prefix) = &mut self.prefix {
            prefix.forget(block);
        }
        Some(block)
    }

    /// Returns how many leading blocks of `tokens` are known to tables with this salt, within
    /// the first `limit` tokens, and how many of these no table holds.
    pub fn lookup(&self, salt: Option<&Arc<str>>, tokens: &[u32], limit: usize) -> (usize, usize) {
        let mut unheld = 0;
        let known = self.matches(salt, tokens, limit).inspect(|&block| {
            unheld += usize::from(self.pool.state(block) == BlockState::Cached);
        });
        (known.count(), unheld)
    }

    /// Returns the known blocks that hold the beginning of `tokens`, within the first `limit`
    /// tokens.
    fn matches<'a>(
        &'a self,
        salt: Option<&'a Arc<str>>,
        tokens: &'a [u32],
        limit: usize,
    ) -> impl Iterator<Item = BlockId> + 'a {
        let mut after = Predecessor::Salt(salt);
        let whole = tokens[..limit.min(tokens.len())].chunks_exact(self.block_tokens);
        whole.map_while(move |chunk| {
            let block = self.prefix.as_ref()?.find(after, chunk)?;
            after = Predecessor::Block(block);
            Some(block)
        })
    }

    /// Lets an empty `table` hold the known blocks of `tokens`, within the first `limit`
    /// tokens. Returns the number of tokens in these blocks.
    pub fn attach(&mut self, table: &mut BlockTable, tokens: &[u32], limit: usize) -> usize {
        debug_assert!(table.is_empty(), "the table must be empty");
        let known = self.matches(table.salt.as_ref(), tokens, limit);
        table.blocks.extend(known);
        for &block in &table.blocks {
            self.pool.add_reference(block);
        }
        table.published = table.len();
        table.len() * self.block_tokens
    }

    /// Publishes the complete blocks of `table`, which holds `tokens`. The first `written` of
    /// these have been computed by completed steps. A block whose tokens are known already is
    /// replaced by the known block; it can be allocated again when step `touched` has
    /// completed.
    pub fn publish(
        &mut self,
        table: &mut BlockTable,
        tokens: &[u32],
        written: usize,
        touched: StepId,
    ) {
        let Some(prefix) = &mut self.prefix else {
            return;
        };
        let whole = written.min(tokens.len()) / self.block_tokens;
        let mut replaced = Vec::new();
        while table.published < whole.min(table.len()) {
            let index = table.published;
            let after = match index.checked_sub(1) {
                Some(before) => Predecessor::Block(table.blocks[before]),
                None => Predecessor::Salt(table.salt.as_ref()),
            };
            let own = table.blocks[index];
            let chunk = &tokens[index * self.block_tokens..][..self.block_tokens];
            if let Some(known) = prefix.find(after, chunk) {
                if known != own {
                    self.pool.add_reference(known);
                    table.blocks[index] = known;
                    replaced.push(own);
                }
            } else {
                // Only a block that no other table holds may be published, because another
                // table might not hold the block before it.
                let alone = self.pool.references(own) == 1;
                if !alone || !prefix.publish(own, after, chunk) {
                    break;
                }
            }
            table.published += 1;
        }
        if !replaced.is_empty() {
            self.release_blocks(replaced, touched);
        }
    }

    /// Returns a new table that shares the blocks of the first `tokens` tokens of `table`.
    pub fn share(&mut self, table: &BlockTable, tokens: usize) -> BlockTable {
        let blocks = &table.blocks[..self.blocks_for(tokens).min(table.len())];
        for &block in blocks {
            self.pool.add_reference(block);
        }
        BlockTable {
            blocks: blocks.to_vec(),
            published: table.published.min(tokens / self.block_tokens),
            salt: table.salt.clone(),
        }
    }

    /// Releases the blocks of `table` after the first `tokens` tokens. Returns the number of
    /// blocks that no table holds any more.
    pub fn truncate(&mut self, table: &mut BlockTable, tokens: usize, touched: StepId) -> usize {
        let keep = self.blocks_for(tokens).min(table.len());
        let blocks = table.blocks.split_off(keep);
        table.published = table.published.min(tokens / self.block_tokens);
        self.release_blocks(blocks, touched)
    }

    /// Releases all blocks of `table`. Returns the number of blocks that no table holds any
    /// more. They can be allocated again when step `touched`, the last that may use them, has
    /// completed (I4).
    pub fn release(&mut self, table: &mut BlockTable, touched: StepId) -> usize {
        self.truncate(table, 0, touched)
    }

    fn release_blocks(&mut self, mut blocks: Vec<BlockId>, touched: StepId) -> usize {
        // From the end, so that a block is evicted before the blocks that it follows.
        blocks.reverse();
        self.releases += 1;
        let (pool, number) = (&mut self.pool, self.releases);
        blocks.retain(|&block| pool.drop_reference(block, touched, number));
        let count = blocks.len();
        let last = blocks.iter().map(|&block| pool.touched(block)).max();
        let release = Release { number, blocks };
        match last {
            Some(step) if step > self.fence.completed() => self.fence.defer(release, step),
            Some(_) => settle(pool, &self.prefix, &release),
            None => {}
        }
        count
    }

    /// Records that step `step` and all before it have completed. Blocks that were deferred
    /// until then become free or cached.
    pub fn step_completed(&mut self, step: StepId) {
        let Self {
            pool,
            fence,
            prefix,
            ..
        } = self;
        fence.complete(step, |release| settle(pool, prefix, release));
    }

    /// Returns the last step that has completed.
    pub fn last_completed_step(&self) -> StepId {
        self.fence.completed()
    }

    /// Forgets the tokens of all cached blocks, which become free.
    pub fn clear_prefixes(&mut self) {
        let cached: Vec<BlockId> = self.pool.cached().collect();
        for block in cached {
            if let Some(prefix) = &mut self.prefix {
                prefix.forget(block);
            }
            self.pool.forget(block);
        }
    }

    /// Returns the blocks whose content was discarded since the last call. Recording starts
    /// with the first call, which returns nothing.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.pool.take_freed()
    }

    /// Returns the number of blocks in each state.
    pub fn counts(&self) -> BlockCounts {
        BlockCounts {
            total: self.pool.total_blocks(),
            free: self.pool.free_blocks(),
            referenced: self.pool.referenced_blocks(),
            cached: self.pool.cached_blocks(),
            deferred: self.pool.deferred_blocks(),
        }
    }

    /// Returns the state of every block, by block index.
    pub fn states(&self) -> impl Iterator<Item = BlockState> + '_ {
        self.pool.states()
    }

    /// Returns every known block with its tokens.
    #[cfg(test)]
    pub(crate) fn known(&self) -> impl Iterator<Item = (BlockId, &[u32])> {
        let prefix = self.prefix.iter();
        prefix.flat_map(|prefix| {
            let blocks = (0..self.pool.total_blocks() as u32).map(BlockId);
            let known = blocks.filter(|&block| prefix.knows(block));
            known.map(|block| (block, prefix.tokens_of(block)))
        })
    }

    /// Checks I3 against the tables of all holders. Each block must be free, cached, deferred
    /// or referenced, and its reference count must be the number of tables that hold it. The
    /// rules that the prefix cache relies on are checked, too.
    ///
    /// # Errors
    /// Returns [`AccountingError`] with a description of the first inconsistency.
    pub fn audit<'a>(
        &self,
        tables: impl Iterator<Item = &'a BlockTable>,
    ) -> Result<BlockCounts, AccountingError> {
        let counts = self.counts();
        if counts.free + counts.referenced + counts.cached + counts.deferred != counts.total {
            return Err(AccountingError(format!("{counts:?} does not add up")));
        }
        let mut held = vec![0u32; counts.total];
        for table in tables {
            for &block in table.blocks() {
                match held.get_mut(block.index()) {
                    Some(count) => *count += 1,
                    None => {
                        return Err(AccountingError(format!(
                            "a table holds {block:?} of {counts:?}"
                        )));
                    }
                }
            }
            self.audit_published(table)?;
        }
        self.pool.audit(&held).map_err(AccountingError)?;
        self.audit_deferred()?;
        self.audit_prefixes()?;
        Ok(counts)
    }

    /// Checks that a table's published blocks are known, follow each other, and have its salt.
    fn audit_published(&self, table: &BlockTable) -> Result<(), AccountingError> {
        let Some(prefix) = &self.prefix else {
            return Ok(());
        };
        let mut parent = None;
        if let Some(&first) = table.blocks[..table.published].first()
            && prefix.salt(first) != table.salt()
        {
            return Err(AccountingError(format!("{first:?} is shared across salts")));
        }
        for &block in &table.blocks[..table.published] {
            if !prefix.knows(block) || prefix.parent(block) != parent {
                let known = prefix.parent(block);
                return Err(AccountingError(format!(
                    "{block:?} was published after {parent:?}, but is known after {known:?}"
                )));
            }
            parent = Some(block);
        }
        Ok(())
    }

    /// Checks that the fence will settle every deferred block.
    fn audit_deferred(&self) -> Result<(), AccountingError> {
        let mut awaited = vec![false; self.pool.total_blocks()];
        for block in self.fence.iter() {
            awaited[block.index()] = true;
        }
        for (index, awaited) in awaited.into_iter().enumerate() {
            if self.pool.state(BlockId(index as u32)) == BlockState::Deferred && !awaited {
                return Err(AccountingError(format!(
                    "block {index} is deferred forever"
                )));
            }
        }
        Ok(())
    }

    /// Checks that cached blocks are known and free ones are not, and that the block that a
    /// known block follows is known and is evicted after it.
    fn audit_prefixes(&self) -> Result<(), AccountingError> {
        let Some(prefix) = &self.prefix else {
            let cached = self.pool.cached_blocks();
            return match cached {
                0 => Ok(()),
                _ => Err(AccountingError(format!(
                    "{cached} blocks are cached, but there is no prefix cache"
                ))),
            };
        };
        let mut order = vec![usize::MAX; self.pool.total_blocks()];
        for (place, block) in self.pool.cached().enumerate() {
            order[block.index()] = place;
        }
        let mut known = 0;
        for index in 0..self.pool.total_blocks() as u32 {
            let block = BlockId(index);
            let state = self.pool.state(block);
            if !prefix.knows(block) {
                if state == BlockState::Cached {
                    return Err(AccountingError(format!(
                        "{block:?} is cached, but its tokens are not known"
                    )));
                }
                continue;
            }
            known += 1;
            let lost = prefix.parent(block).filter(|&parent| {
                !prefix.knows(parent) || order[parent.index()] < order[block.index()]
            });
            if state == BlockState::Free || lost.is_some() {
                return Err(AccountingError(format!(
                    "{block:?} is {state:?}, but is known after {lost:?}"
                )));
            }
        }
        if known != prefix.len() {
            let listed = prefix.len();
            return Err(AccountingError(format!(
                "{known} blocks are known, but {listed} are indexed"
            )));
        }
        Ok(())
    }
}

/// Makes deferred blocks whose steps have completed cached if they are known, and free if not.
fn settle(pool: &mut Pool, prefix: &Option<PrefixCache>, release: &Release) {
    for &block in &release.blocks {
        let known = prefix.as_ref().is_some_and(|prefix| prefix.knows(block));
        pool.settle(block, release.number, known);
    }
}

#[cfg(test)]
mod tests;
