//! The books of the paged key-value cache: which block belongs to whom.
//!
//! Pure logic: no device, no memory. [`BlockCache`] hands out blocks of a fixed
//! number of tokens, shares them between tables, takes them back behind a fence (a
//! step in flight may still touch them), and can prove at any time that its books
//! balance.
//!
//! # Prefix cache
//!
//! Complete blocks are *published*: known by their tokens and all tokens before. A
//! later sequence that begins with the same tokens holds the same blocks. When nobody
//! holds a published block it is *cached*: still known, and handed out only when no
//! free block is left, least recently used first. Tables are given back from their
//! end, so a block is always handed out before those that it follows.
//!
//! Tables may have a *salt*. Only tables with the same salt share blocks, so that one
//! tenant cannot find out what another one has sent.
//!
//! There is one published block for the same tokens and salt: who publishes a second one gets
//! the first in its table instead. So whoever holds a published block holds all that
//! come before it, and what nobody holds can always be handed out.

mod fence;
mod list;
mod pool;
mod prefix;
mod table;
mod transfer;

pub use fence::Fence;
pub use pool::{BlockId, BlockState, Pool};
pub use table::BlockTable;
pub use transfer::{HostBlockId, HostBlocks, Transfers};

use crate::id::StepId;
use fence::Release;
use prefix::{After, PrefixCache};
use serde::Serialize;
use std::sync::Arc;
use thiserror::Error;

/// How the blocks of a cache are used at one moment.
///
/// Invariant I3: `free + referenced + cached + deferred = total`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Books {
    /// Blocks in all.
    pub total: usize,
    /// Blocks that can be handed out now, and hold nothing of use.
    pub free: usize,
    /// Blocks that at least one table holds.
    pub referenced: usize,
    /// Blocks that nobody holds and whose tokens are still of use: the prefix cache,
    /// handed out when no free block is left.
    pub cached: usize,
    /// Blocks given back that a step in flight may still touch.
    pub deferred: usize,
}

impl Books {
    /// Blocks that can be handed out now.
    pub fn available(&self) -> usize {
        self.free + self.cached
    }
}

/// There are not enough free blocks.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("{needed} more blocks of the key-value cache are needed, {free} are free")]
pub struct OutOfBlocks {
    /// Blocks asked for.
    pub needed: usize,
    /// Blocks that could be handed out at that moment.
    pub free: usize,
}

/// The books do not balance: a bug, found by [`BlockCache::audit`].
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the key-value cache's books do not balance: {0}")]
pub struct Imbalance(pub(crate) String);

/// Hands out the blocks of the key-value cache and takes them back.
#[derive(Debug)]
pub struct BlockCache {
    pool: Pool,
    fence: Fence,
    prefix: Option<PrefixCache>,
    block_tokens: usize,
    releases: u64,
}

impl BlockCache {
    /// A cache of `blocks` blocks of `block_tokens` tokens, all free. With `prefixes`
    /// it remembers the tokens of complete blocks.
    pub fn new(blocks: usize, block_tokens: usize, prefixes: bool) -> Self {
        assert!(block_tokens > 0, "a block holds at least one token");
        Self {
            pool: Pool::new(blocks),
            fence: Fence::default(),
            prefix: prefixes.then(|| PrefixCache::new(blocks, block_tokens)),
            block_tokens,
            releases: 0,
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
    pub fn available_blocks(&self) -> usize {
        self.pool.free_blocks() + self.pool.cached_blocks()
    }

    /// Blocks that can be handed out when the steps in flight have completed.
    pub fn deferred_blocks(&self) -> usize {
        self.pool.deferred_blocks()
    }

    /// Blocks that must be handed out so that the tokens from `start` to before `end`
    /// can be written through `table`.
    pub fn missing_blocks(&self, table: &BlockTable, start: usize, end: usize) -> usize {
        let growth = self.blocks_for(end).saturating_sub(table.len());
        growth + usize::from(self.shared_at(table, start).is_some())
    }

    /// The block that the token at `start` goes to, if `table` holds it and others may
    /// read what it holds.
    fn shared_at(&self, table: &BlockTable, start: usize) -> Option<usize> {
        let index = start / self.block_tokens;
        let &block = table.blocks.get(index)?;
        let known = self
            .prefix
            .as_ref()
            .is_some_and(|prefix| prefix.knows(block));
        (known || self.pool.references(block) > 1).then_some(index)
    }

    /// Whether giving `table` back would leave a block that nobody holds.
    pub fn holds_alone(&self, table: &BlockTable) -> bool {
        let mut last_first = table.blocks.iter().rev();
        last_first.any(|&block| self.pool.references(block) == 1)
    }

    /// How many blocks nobody would hold if `table` were given back.
    pub fn held_alone(&self, table: &BlockTable) -> usize {
        let blocks = table.blocks.iter();
        blocks
            .filter(|&&block| self.pool.references(block) == 1)
            .count()
    }

    /// Makes `table` ready for the tokens from `start` to before `end` to be written
    /// by step `step`: all blocks that this takes, or none. A block that others may
    /// read is replaced by a copy (copy on write), which `transfers` names.
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
            // One that starts at its own beginning has nothing to copy.
            let copy = !start.is_multiple_of(self.block_tokens);
            if let Some(own) = self.hand_out() {
                if copy {
                    transfers.copies.push((shared, own));
                }
                table.blocks[index] = own;
                self.release_blocks(vec![shared], step);
            }
        }
        while table.len() < self.blocks_for(end) {
            match self.hand_out() {
                Some(block) => table.blocks.push(block),
                None => break,
            }
        }
        Ok(())
    }

    /// A block without anything in it: a free one, or else the cached one that was
    /// unused for the longest.
    fn hand_out(&mut self) -> Option<BlockId> {
        if let Some(block) = self.pool.allocate() {
            return Some(block);
        }
        let block = self.pool.evict()?;
        if let Some(prefix) = &mut self.prefix {
            prefix.forget(block);
        }
        Some(block)
    }

    /// How many leading blocks of `tokens` are known to tables with this salt, at most
    /// `limit` tokens of them, and how many of these nobody holds.
    pub fn lookup(&self, salt: Option<&Arc<str>>, tokens: &[u32], limit: usize) -> (usize, usize) {
        let mut unheld = 0;
        let known = self.matches(salt, tokens, limit).inspect(|&block| {
            unheld += usize::from(self.pool.state(block) == BlockState::Cached);
        });
        (known.count(), unheld)
    }

    /// The known blocks that hold the beginning of `tokens`, at most `limit` of them.
    fn matches<'a>(
        &'a self,
        salt: Option<&'a Arc<str>>,
        tokens: &'a [u32],
        limit: usize,
    ) -> impl Iterator<Item = BlockId> + 'a {
        let mut after = After::Salt(salt);
        let whole = tokens[..limit.min(tokens.len())].chunks_exact(self.block_tokens);
        whole.map_while(move |chunk| {
            let block = self.prefix.as_ref()?.find(after, chunk)?;
            after = After::Block(block);
            Some(block)
        })
    }

    /// Lets an empty `table` hold the known blocks of `tokens`, at most `limit` tokens
    /// of them, and gives the number of tokens.
    pub fn attach(&mut self, table: &mut BlockTable, tokens: &[u32], limit: usize) -> usize {
        debug_assert!(table.is_empty(), "only an empty table is filled");
        let known = self.matches(table.salt.as_ref(), tokens, limit);
        table.blocks.extend(known);
        for &block in &table.blocks {
            self.pool.add_reference(block);
        }
        table.published = table.len();
        table.len() * self.block_tokens
    }

    /// Publishes the complete blocks of `table`, whose first `written` tokens are
    /// `tokens` and have been computed by completed steps. A block whose tokens are
    /// known already is replaced by the known one, and given back behind `touched`.
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
                Some(before) => After::Block(table.blocks[before]),
                None => After::Salt(table.salt.as_ref()),
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
                // Another table that holds it need not hold what it follows.
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

    /// A table that holds the blocks of the first `tokens` tokens of `table`, too.
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

    /// Takes back the blocks of `table` beyond the first `tokens` tokens, and gives
    /// the number of those that nobody holds any more.
    pub fn truncate(&mut self, table: &mut BlockTable, tokens: usize, touched: StepId) -> usize {
        let keep = self.blocks_for(tokens).min(table.len());
        let blocks = table.blocks.split_off(keep);
        table.published = table.published.min(tokens / self.block_tokens);
        self.release_blocks(blocks, touched)
    }

    /// Takes back all blocks of `table`, and gives the number of those that nobody
    /// holds any more. They can be handed out again once step `touched`, the last that
    /// may use them, has completed (I4).
    pub fn release(&mut self, table: &mut BlockTable, touched: StepId) -> usize {
        self.truncate(table, 0, touched)
    }

    fn release_blocks(&mut self, mut blocks: Vec<BlockId>, touched: StepId) -> usize {
        // From the end: a block is handed out again before those that it follows.
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

    /// Step `step` and all before it have completed: what waited for them can be
    /// handed out.
    pub fn completed(&mut self, step: StepId) {
        let Self {
            pool,
            fence,
            prefix,
            ..
        } = self;
        fence.complete(step, |release| settle(pool, prefix, release));
    }

    /// The last step that has completed.
    pub fn completed_step(&self) -> StepId {
        self.fence.completed()
    }

    /// Forgets all tokens that nobody holds: what was cached is free.
    pub fn clear_prefixes(&mut self) {
        let cached: Vec<BlockId> = self.pool.cached().collect();
        for block in cached {
            if let Some(prefix) = &mut self.prefix {
                prefix.forget(block);
            }
            self.pool.forget(block);
        }
    }

    /// The blocks whose content was given up since the last call; the first call
    /// starts the record.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.pool.take_freed()
    }

    /// How the blocks are used now.
    pub fn books(&self) -> Books {
        Books {
            total: self.pool.total_blocks(),
            free: self.pool.free_blocks(),
            referenced: self.pool.referenced_blocks(),
            cached: self.pool.cached_blocks(),
            deferred: self.pool.deferred_blocks(),
        }
    }

    /// What each block is now, from the first to the last.
    pub fn states(&self) -> impl Iterator<Item = BlockState> + '_ {
        self.pool.states()
    }

    /// What can be found: every known block with its tokens.
    #[cfg(test)]
    pub(crate) fn known(&self) -> impl Iterator<Item = (BlockId, &[u32])> {
        let prefix = self.prefix.iter();
        prefix.flat_map(|prefix| {
            let blocks = (0..self.pool.total_blocks() as u32).map(BlockId);
            let known = blocks.filter(|&block| prefix.knows(block));
            known.map(|block| (block, prefix.tokens_of(block)))
        })
    }

    /// Checks I3 against the tables of every holder: each block is free, cached,
    /// deferred or referenced, and is referenced as often as tables hold it; and what
    /// the prefix cache relies on.
    pub fn audit<'a>(
        &self,
        tables: impl Iterator<Item = &'a BlockTable>,
    ) -> Result<Books, Imbalance> {
        let books = self.books();
        if books.free + books.referenced + books.cached + books.deferred != books.total {
            return Err(Imbalance(format!("{books:?} does not add up")));
        }
        let mut held = vec![0u32; books.total];
        for table in tables {
            for &block in table.blocks() {
                match held.get_mut(block.index()) {
                    Some(count) => *count += 1,
                    None => return Err(Imbalance(format!("a table holds {block:?} of {books:?}"))),
                }
            }
            self.audit_published(table)?;
        }
        self.pool.audit(&held).map_err(Imbalance)?;
        self.audit_deferred()?;
        self.audit_prefixes()?;
        Ok(books)
    }

    /// A table's published blocks are known, follow each other, and have its salt.
    fn audit_published(&self, table: &BlockTable) -> Result<(), Imbalance> {
        let Some(prefix) = &self.prefix else {
            return Ok(());
        };
        let mut parent = None;
        if let Some(&first) = table.blocks[..table.published].first()
            && prefix.salt(first) != table.salt()
        {
            return Err(Imbalance(format!("{first:?} is shared across salts")));
        }
        for &block in &table.blocks[..table.published] {
            if !prefix.knows(block) || prefix.parent(block) != parent {
                let known = prefix.parent(block);
                return Err(Imbalance(format!(
                    "{block:?} was published after {parent:?}, and is known after {known:?}"
                )));
            }
            parent = Some(block);
        }
        Ok(())
    }

    /// Every deferred block will be looked at.
    fn audit_deferred(&self) -> Result<(), Imbalance> {
        let mut awaited = vec![false; self.pool.total_blocks()];
        for block in self.fence.iter() {
            awaited[block.index()] = true;
        }
        for (index, awaited) in awaited.into_iter().enumerate() {
            if self.pool.state(BlockId(index as u32)) == BlockState::Deferred && !awaited {
                return Err(Imbalance(format!("block {index} is deferred for ever")));
            }
        }
        Ok(())
    }

    /// What is cached is known, what is free is not; and what a known block follows is
    /// known, and is not handed out before it.
    fn audit_prefixes(&self) -> Result<(), Imbalance> {
        let Some(prefix) = &self.prefix else {
            let cached = self.pool.cached_blocks();
            return match cached {
                0 => Ok(()),
                _ => Err(Imbalance(format!("{cached} blocks cached without a cache"))),
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
                    return Err(Imbalance(format!("{block:?} is cached, but unknown")));
                }
                continue;
            }
            known += 1;
            let lost = prefix.parent(block).filter(|&parent| {
                !prefix.knows(parent) || order[parent.index()] < order[block.index()]
            });
            if state == BlockState::Free || lost.is_some() {
                return Err(Imbalance(format!(
                    "{block:?}, which is {state:?}, is known after {lost:?}"
                )));
            }
        }
        if known != prefix.len() {
            let listed = prefix.len();
            return Err(Imbalance(format!("{known} blocks known, {listed} listed")));
        }
        Ok(())
    }
}

/// Deferred blocks whose steps have completed: cached if known, else free.
fn settle(pool: &mut Pool, prefix: &Option<PrefixCache>, release: &Release) {
    for &block in &release.blocks {
        let known = prefix.as_ref().is_some_and(|prefix| prefix.knows(block));
        pool.settle(block, release.number, known);
    }
}

#[cfg(test)]
mod tests;
