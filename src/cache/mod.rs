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
//! of layers that need all tokens is always evicted before the blocks that it follows.
//!
//! # Groups
//!
//! A table has blocks for each group of layers ([`CacheLayout`]), all from the same pool. The
//! layers of a group with a window need only the last tokens, so
//! [`BlockCache::give_back`] releases the blocks behind the window while the sequence goes on.
//! These stay in the prefix cache until they are evicted. A sequence can begin with cached
//! blocks up to any position at which every group can continue: groups that need all tokens
//! have all blocks up to it, and those with a window have the blocks that the window covers.
//!
//! Tables may have a *salt*. Only tables with the same salt share blocks, so one tenant cannot
//! find out what another one has sent.
//!
//! There is only one published block for the same tokens and salt. If a table publishes a
//! second one, it gets the first one in its place. So for layers that need all
//! tokens, a table that holds a published block holds all blocks before it as well, and every
//! cached block can be evicted.

mod audit;
mod fence;
mod layout;
mod list;
mod pool;
mod prefix;
mod reuse;
mod states;
mod table;
mod transfer;

pub use fence::Fence;
pub use layout::{CacheLayout, CachePlace, EmptyWindow, GroupKind, LayerCache};
pub use pool::{BlockId, BlockState, Pool};
pub use prefix::Miss;
pub use reuse::PrefixHit;
pub use states::{StateSlot, StepState};
pub use table::{BlockTable, GroupBlocks};
pub use transfer::{HostBlockId, HostBlocks, Transfers};

use crate::id::StepId;
use fence::Release;
use prefix::PrefixCache;
use serde::Serialize;
use states::StateCache;
use std::collections::HashMap;
use thiserror::Error;

/// Number of blocks in each state at one moment. Always
/// `free + referenced + cached + deferred = total`.
// Invariant I3.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
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

/// The block accounting of the KV cache is inconsistent, which is always a bug in quell.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the block accounting of the KV cache is inconsistent: {0}")]
pub struct AccountingError(pub(crate) String);

/// How far a sequence needs blocks, in tokens from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// In groups whose layers need all tokens.
    pub full: usize,
    /// In groups whose layers have a window. Further blocks are allocated when the first ones
    /// have been given back.
    pub windowed: usize,
}

impl Extent {
    /// Returns the extent of `tokens` tokens in all groups.
    pub fn all(tokens: usize) -> Self {
        Self {
            full: tokens,
            windowed: tokens,
        }
    }
}

/// The same in blocks.
#[derive(Clone, Copy)]
struct Ends {
    full: usize,
    windowed: usize,
}

impl Ends {
    /// Returns the index after the last block in groups of this kind.
    #[inline]
    fn of(self, kind: GroupKind) -> usize {
        match kind {
            GroupKind::Full => self.full,
            GroupKind::Window(_) => self.windowed,
        }
    }
}

/// Allocates the blocks of the KV cache and takes them back.
#[derive(Debug)]
pub struct BlockCache {
    pool: Pool,
    fence: Fence,
    prefix: Option<PrefixCache>,
    layout: CacheLayout,
    /// Whether any group has a window.
    windowed: bool,
    /// The slots for states; `None` if no layer is recurrent.
    states: Option<StateCache>,
    block_tokens: usize,
    releases: u64,
    /// Blocks that the prefix cache has just forgotten together with another one. Kept to reuse
    /// the allocation.
    useless: Vec<BlockId>,
}

impl BlockCache {
    /// Creates a cache of `blocks` free blocks of `block_tokens` tokens each, for one group of
    /// layers that need all tokens. With `prefixes`, it remembers the tokens of complete blocks.
    ///
    /// # Panics
    /// Panics if `block_tokens` is 0 or if there are more than 2³² − 2 blocks.
    #[cfg(any(test, feature = "internals"))]
    pub fn new(blocks: usize, block_tokens: usize, prefixes: bool) -> Self {
        Self::with_layout(blocks, block_tokens, prefixes, CacheLayout::single())
    }

    /// Like [`BlockCache::new`], for the groups of `layout`.
    ///
    /// # Panics
    /// Panics if `block_tokens` is 0 or if there are more than 2³² − 2 blocks.
    pub fn with_layout(
        blocks: usize,
        block_tokens: usize,
        prefixes: bool,
        layout: CacheLayout,
    ) -> Self {
        assert!(block_tokens > 0, "a block must hold at least one token");
        let mut groups = layout.groups().iter();
        let windowed = groups.any(|group| matches!(group.kind, GroupKind::Window(_)));
        Self {
            pool: Pool::new(blocks),
            fence: Fence::default(),
            prefix: prefixes.then(|| PrefixCache::new(blocks, block_tokens, &layout)),
            layout,
            windowed,
            states: None,
            block_tokens,
            releases: 0,
            useless: Vec::new(),
        }
    }

    /// Returns the number of tokens per block.
    pub fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Returns the groups of layers.
    #[cfg(any(test, feature = "internals"))]
    pub fn layout(&self) -> &CacheLayout {
        &self.layout
    }

    /// Returns the number of groups of layers.
    pub fn groups(&self) -> usize {
        self.layout.groups().len()
    }

    /// Returns the number of blocks of one group that `tokens` tokens need.
    pub fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_tokens)
    }

    /// Returns how many blocks, counted from the start of the sequence, an extent covers.
    #[inline]
    fn ends(&self, extent: Extent) -> Ends {
        let full = self.blocks_for(extent.full);
        let windowed = match extent.windowed == extent.full {
            true => full,
            false => self.blocks_for(extent.windowed),
        };
        Ends { full, windowed }
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

    /// Returns the number of blocks that must be allocated before the tokens from `start` on can
    /// be written through `table`. `end` returns the index after the last block that is needed
    /// in a group, given the group and the index of the first block that it holds.
    #[inline]
    fn missing_blocks(
        &self,
        table: &BlockTable,
        start: usize,
        end: impl Fn(usize, usize) -> usize,
    ) -> usize {
        let index = start / self.block_tokens;
        let missing = |group: usize| {
            let Some(held) = table.groups.get(group) else {
                return end(group, 0);
            };
            let shared = held.get(index).is_some_and(|block| self.is_shared(block));
            end(group, held.first).saturating_sub(held.range().end) + usize::from(shared)
        };
        (0..self.groups()).map(missing).sum()
    }

    /// Returns the index after the last block of `group` that a sequence of `tokens` tokens needs
    /// before blocks from `first` on are given back, if it is computed in steps of at most
    /// `step_tokens` tokens.
    fn booked(&self, group: usize, first: usize, tokens: usize, step_tokens: usize) -> usize {
        let most = self
            .layout
            .most_blocks(group, tokens, step_tokens, self.block_tokens);
        self.blocks_for(tokens).min(first + most)
    }

    /// Returns the number of blocks to allocate for a sequence of `tokens` tokens until blocks
    /// are given back, if all complete blocks before the token `start` exist, and no other
    /// block. It is computed in steps of at most `step_tokens` tokens.
    pub fn blocks_after(&self, start: usize, tokens: usize, step_tokens: usize) -> usize {
        let missing = |group: usize| {
            let first = self.layout.first_block(group, start, self.block_tokens);
            let end = self.booked(group, first, tokens, step_tokens);
            end.saturating_sub(start / self.block_tokens)
        };
        (0..self.groups()).map(missing).sum()
    }

    /// Like [`BlockCache::blocks_after`], if each group begins with the block with the index in
    /// `first` and no block exists.
    pub fn blocks_from(&self, first: &[usize], tokens: usize, step_tokens: usize) -> usize {
        let groups = first.iter().enumerate();
        let missing = |(group, &first): (usize, &usize)| {
            self.booked(group, first, tokens, step_tokens) - first.min(self.blocks_for(tokens))
        };
        groups.map(missing).sum()
    }

    /// Like [`BlockCache::blocks_after`], for a sequence that continues `table` with the token
    /// `start`.
    pub fn blocks_to_continue(
        &self,
        table: &BlockTable,
        start: usize,
        tokens: usize,
        step_tokens: usize,
    ) -> usize {
        self.missing_blocks(table, start, |group, first| {
            self.booked(group, first, tokens, step_tokens)
        })
    }

    /// Returns whether a table that holds a block must not write to it, because others may read
    /// it.
    #[inline]
    fn is_shared(&self, block: BlockId) -> bool {
        let prefix = self.prefix.as_ref();
        prefix.is_some_and(|prefix| prefix.knows(block)) || self.pool.references(block) > 1
    }

    /// Returns whether releasing `table` would leave a block that no table holds.
    pub fn has_exclusive_blocks(&self, table: &BlockTable) -> bool {
        let mut groups = table.groups.iter();
        groups.any(|group| {
            let mut last_first = group.blocks.iter().rev();
            last_first.any(|&block| self.pool.references(block) == 1)
        })
    }

    /// Returns the number of blocks that no table would hold if all these were released.
    pub fn blocks_held_only_by(&self, tables: &[&BlockTable]) -> usize {
        let mut holders: HashMap<BlockId, u32> = HashMap::new();
        for block in tables.iter().flat_map(|table| table.blocks()) {
            *holders.entry(block).or_default() += 1;
        }
        let only = |&(block, holders): &(&BlockId, &u32)| self.pool.references(*block) == *holders;
        holders.iter().filter(only).count()
    }

    /// Returns whether the cache remembers the tokens of complete blocks.
    pub fn knows_prefixes(&self) -> bool {
        self.prefix.is_some()
    }

    /// Reserves memory for the blocks of a sequence of `tokens` tokens that is computed in steps
    /// of at most `step_tokens` tokens, so that `table` is not reallocated as it grows.
    pub fn reserve(&self, table: &mut BlockTable, tokens: usize, step_tokens: usize) {
        self.open(table);
        for (index, group) in table.groups.iter_mut().enumerate() {
            let most = self
                .layout
                .most_blocks(index, tokens, step_tokens, self.block_tokens);
            let more = most.saturating_sub(group.blocks.len());
            group.blocks.reserve_exact(more);
        }
    }

    /// Gives `table` its groups, if it was never used.
    fn open(&self, table: &mut BlockTable) {
        table.groups.resize_with(self.groups(), Default::default);
    }

    /// Prepares `table` so that step `step` can write the tokens from `start` on, up to `extent`.
    /// A block that others may read is replaced by a copy (copy on write), which is added to
    /// `transfers`.
    ///
    /// # Errors
    /// Returns [`OutOfBlocks`] and changes nothing if not enough blocks are available.
    #[inline]
    pub fn prepare(
        &mut self,
        table: &mut BlockTable,
        start: usize,
        extent: Extent,
        step: StepId,
        transfers: &mut Transfers,
    ) -> Result<(), OutOfBlocks> {
        let ends = self.ends(extent);
        let needed = self.missing_blocks(table, start, |group, _| {
            ends.of(self.layout.groups()[group].kind)
        });
        if needed == 0 {
            return Ok(());
        }
        let free = self.available_blocks();
        if needed > free {
            return Err(OutOfBlocks { needed, free });
        }
        self.allocate_missing(table, start, ends, step, transfers);
        Ok(())
    }

    /// Allocates the blocks that [`BlockCache::prepare`] has found to be missing and available.
    fn allocate_missing(
        &mut self,
        table: &mut BlockTable,
        start: usize,
        ends: Ends,
        step: StepId,
        transfers: &mut Transfers,
    ) {
        self.open(table);
        let index = start / self.block_tokens;
        let mut replaced = Vec::new();
        for group in 0..self.groups() {
            let written = table.groups[group].get(index);
            if written.is_some_and(|block| self.is_shared(block)) {
                self.unpublish_from(table, index);
                let first = table.groups[group].first;
                let Some(own) = self.allocate() else { continue };
                let shared = std::mem::replace(&mut table.groups[group].blocks[index - first], own);
                // If the first token to be written begins a block, there is nothing to copy.
                if !start.is_multiple_of(self.block_tokens) {
                    transfers.copies.push((shared, own));
                }
                replaced.push(shared);
            }
            let end = ends.of(self.layout.groups()[group].kind);
            while table.groups[group].range().end < end {
                match self.allocate() {
                    Some(block) => table.groups[group].blocks.push(block),
                    None => break,
                }
            }
        }
        if !replaced.is_empty() {
            self.release_blocks(replaced, step);
        }
    }

    /// Allocates a free block, or else the least recently used cached block, whose tokens are
    /// forgotten.
    fn allocate(&mut self) -> Option<BlockId> {
        if let Some(block) = self.pool.allocate() {
            return Some(block);
        }
        let block = self.pool.evict()?;
        self.forget(block);
        Some(block)
    }

    /// Lets the prefix cache forget a block. Cached blocks that are of no use without it become
    /// free.
    fn forget(&mut self, block: BlockId) {
        let Some(prefix) = &mut self.prefix else {
            return;
        };
        prefix.forget(block, &mut self.useless);
        for other in self.useless.drain(..) {
            self.pool.forget(other);
        }
        if let Some(states) = &mut self.states {
            for slot in prefix.take_useless_states() {
                states.forget(slot);
            }
        }
    }

    /// Releases the blocks of `table` that no token from `position` on needs. Returns the number
    /// of blocks that no table holds any more. They can be allocated again when step `touched`,
    /// the last that may use them, has completed.
    #[inline]
    pub fn give_back(&mut self, table: &mut BlockTable, position: usize, touched: StepId) -> usize {
        match self.windowed {
            true => self.give_back_behind(table, position, touched),
            false => 0,
        }
    }

    fn give_back_behind(
        &mut self,
        table: &mut BlockTable,
        position: usize,
        touched: StepId,
    ) -> usize {
        let size = self.block_tokens;
        let mut behind = Vec::new();
        for (index, group) in table.groups.iter_mut().enumerate() {
            let keep = self.layout.first_kept_block(index, position, size);
            let keep = keep.min(group.range().end);
            if keep > group.first {
                behind.extend(group.blocks.drain(..keep - group.first));
                group.first = keep;
            }
        }
        match behind.is_empty() {
            true => 0,
            false => self.release_blocks(behind, touched),
        }
    }

    /// Releases all blocks of `table`. Returns the number of blocks that no table holds any
    /// more. They can be allocated again when step `touched`, the last that may use them, has
    /// completed (I4).
    pub fn release(&mut self, table: &mut BlockTable, touched: StepId) -> usize {
        self.cut(table, 0, touched)
    }

    /// Like [`BlockCache::release`], but `table` keeps its live state, from which the sequence
    /// continues when its blocks are there again.
    pub fn release_blocks_of(&mut self, table: &mut BlockTable, touched: StepId) -> usize {
        let live = table.states.take_live();
        let blocks = self.cut(table, 0, touched);
        table.states.set_live(live);
        blocks
    }

    /// Releases the blocks of `table` after the first `tokens` tokens. Returns the number of
    /// blocks that no table holds any more.
    fn cut(&mut self, table: &mut BlockTable, tokens: usize, touched: StepId) -> usize {
        self.cut_states(table, tokens, touched);
        self.unpublish_from(table, tokens / self.block_tokens);
        let keep = self.blocks_for(tokens);
        let mut blocks = Vec::new();
        match table.groups.as_mut_slice() {
            [group] => {
                let keep = keep.saturating_sub(group.first);
                blocks = group.blocks.split_off(keep.min(group.blocks.len()));
            }
            groups => {
                // In the order of the tokens, because that is the order of eviction.
                let end = groups.iter().map(|group| group.range().end).max();
                for index in keep..end.unwrap_or(0) {
                    blocks.extend(groups.iter().filter_map(|group| group.get(index)));
                }
                for group in groups {
                    group.blocks.truncate(keep.saturating_sub(group.first));
                }
            }
        }
        if tokens == 0 {
            for group in &mut table.groups {
                group.first = 0;
            }
        }
        self.release_blocks(blocks, touched)
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
            states,
            ..
        } = self;
        fence.complete(step, |release| settle(pool, prefix, release));
        if let Some(states) = states {
            states.step_completed(step, prefix);
        }
    }

    /// Returns the last step that has completed.
    pub fn last_completed_step(&self) -> StepId {
        self.fence.completed()
    }

    /// Forgets the tokens of all blocks that no table holds. Cached ones become free; deferred ones
    /// do when the steps that may touch them have completed.
    pub fn clear_prefixes(&mut self) {
        for block in unheld(&self.pool, &self.fence) {
            self.forget(block);
            self.pool.forget(block);
        }
        if let Some((states, prefix)) = self.states.as_mut().zip(self.prefix.as_mut()) {
            states.clear(prefix);
        }
    }

    /// Forgets the tokens of the blocks that only `table` holds, whose sequence is about to end.
    pub fn forget_prefix(&mut self, table: &mut BlockTable) {
        let only = |&block: &BlockId| self.pool.references(block) == 1;
        let blocks: Vec<BlockId> = table.blocks().filter(only).collect();
        for block in blocks.into_iter().rev() {
            self.forget(block);
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
}

/// Returns the cached and the deferred blocks, some of them perhaps more than once.
fn unheld(pool: &Pool, fence: &Fence) -> Vec<BlockId> {
    // A table may hold a block again that was deferred.
    let deferred = fence.iter();
    let deferred = deferred.filter(|block| pool.state(*block) == BlockState::Deferred);
    pool.cached().chain(deferred).collect()
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
