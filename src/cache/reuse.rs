//! Reuse of blocks: finds, publishes and shares blocks by their tokens, and goes back to earlier
//! tokens.

use super::prefix::{NodeId, Predecessor};
use super::table::Group;
use super::{BlockCache, BlockId, BlockState, BlockTable, CacheLayout, Miss, StateSlot};
use crate::id::StepId;
use std::ops::Range;
use std::sync::Arc;

/// Known blocks with which a sequence can begin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PrefixHit {
    /// Number of tokens that need not be computed.
    pub tokens: usize,
    /// Number of blocks that hold what the sequence needs of them.
    pub blocks: usize,
    /// How many of these no table holds, so that they count as available until they are used.
    pub cached: usize,
    /// Number of tokens whose blocks are known, from which a sequence could begin if there were a
    /// snapshot of its state. Equal to `tokens` if no layer is recurrent.
    pub matched: usize,
    /// How many snapshots that nobody holds are needed.
    pub cached_states: usize,
    /// Whether there was a snapshot after `tokens` tokens that was evicted.
    pub lost_state: bool,
    /// Why no more blocks are known, if there are more tokens.
    pub miss: Miss,
    /// Node of the last block.
    node: Option<NodeId>,
}

/// From which block on a group is needed to begin with known blocks.
#[derive(Clone, Copy)]
enum Needed<'a> {
    /// As far back as the window reaches from where the known blocks end.
    Window,
    /// From these indices on, by group, because the blocks after the known ones are there
    /// already.
    From(&'a [usize]),
}

impl Needed<'_> {
    /// Returns the index of the first block that `group` needs if it continues at block `end`.
    fn first(self, layout: &CacheLayout, group: usize, end: usize, size: usize) -> usize {
        match self {
            Self::Window => layout.first_block(group, end * size, size),
            Self::From(first) => first.get(group).copied().unwrap_or(0),
        }
    }
}

/// The known blocks with which a sequence can begin.
#[derive(Clone, Copy, Default)]
struct Longest {
    /// Number of blocks of each group that needs all tokens.
    end: usize,
    /// Node of the last of them.
    node: Option<NodeId>,
    /// The same number, if a snapshot of the state were not needed.
    matched: usize,
    /// Whether a later node had a snapshot.
    lost_state: bool,
    miss: Miss,
}

impl BlockCache {
    /// Returns with how many known blocks a table with this salt can begin, within the first
    /// `limit` of these tokens.
    pub fn lookup(&self, salt: Option<&Arc<str>>, tokens: &[u32], limit: usize) -> PrefixHit {
        self.hit(salt, tokens, limit, Needed::Window)
    }

    /// Like [`BlockCache::lookup`], for a sequence that has the later blocks already, each
    /// group from the block with the index in `first` on.
    pub fn lookup_before(
        &self,
        salt: Option<&Arc<str>>,
        tokens: &[u32],
        limit: usize,
        first: &[usize],
    ) -> PrefixHit {
        self.hit(salt, tokens, limit, Needed::From(first))
    }

    fn hit(
        &self,
        salt: Option<&Arc<str>>,
        tokens: &[u32],
        limit: usize,
        needed: Needed<'_>,
    ) -> PrefixHit {
        let Longest {
            end,
            node,
            matched,
            lost_state,
            miss,
        } = self.longest(salt, tokens, limit, needed);
        let mut hit = PrefixHit {
            tokens: end * self.block_tokens,
            matched: matched * self.block_tokens,
            lost_state,
            miss,
            node,
            ..PrefixHit::default()
        };
        if let Some(slot) = self.known_state(node, needed) {
            hit.cached_states = usize::from(self.is_cached_state(slot));
        }
        self.for_each_block(end, node, needed, |_, block| {
            hit.blocks += 1;
            hit.cached += usize::from(self.pool.state(block) == BlockState::Cached);
        });
        hit
    }

    /// Returns the known snapshot with which a sequence begins after `node`; `None` if it needs
    /// none.
    fn known_state(&self, node: Option<NodeId>, needed: Needed<'_>) -> Option<StateSlot> {
        let needs_state = self.states.is_some() && matches!(needed, Needed::Window);
        let prefix = self.prefix.as_ref().filter(|_| needs_state);
        prefix
            .zip(node)
            .and_then(|(prefix, node)| prefix.state(node))
    }

    /// Returns the largest number of known blocks' worth of tokens after which every group can
    /// continue, and the last node of these.
    fn longest(
        &self,
        salt: Option<&Arc<str>>,
        tokens: &[u32],
        limit: usize,
        needed: Needed<'_>,
    ) -> Longest {
        let mut best = Longest::default();
        let Some(prefix) = &self.prefix else {
            return best;
        };
        // For each group, the index from which on all blocks so far are known.
        let mut known_from = [0; CacheLayout::MOST_GROUPS];
        let mut after = Predecessor::Salt(salt);
        let whole = tokens[..limit.min(tokens.len())].chunks_exact(self.block_tokens);
        for (index, chunk) in whole.enumerate() {
            let link = prefix.link(after, chunk);
            let node = prefix.find(&link);
            let Some(node) = node.filter(|node| prefix.has_full_groups(*node)) else {
                best.miss = prefix.why_missing(&link);
                break;
            };
            after = Predecessor::Node(node);
            let end = index + 1;
            let mut continues = true;
            for (group, known_from) in known_from[..self.groups()].iter_mut().enumerate() {
                if prefix.block(node, group).is_none() {
                    *known_from = end;
                }
                let first = needed.first(&self.layout, group, end, self.block_tokens);
                continues &= *known_from <= first || first >= end;
            }
            if continues {
                best.matched = end;
            }
            let lacks_state = self.states.is_some()
                && matches!(needed, Needed::Window)
                && prefix.state(node).is_none();
            best.lost_state |= lacks_state && prefix.had_state(node);
            if continues && !lacks_state {
                (best.end, best.node) = (end, Some(node));
                best.lost_state = false;
            } else if let Needed::From(_) = needed {
                break;
            }
        }
        best
    }

    /// Calls `act` with the group and the block of everything that a sequence needs that continues
    /// after `end` known blocks, the last of which belongs to `node`. Goes from the end to the
    /// start.
    fn for_each_block(
        &self,
        end: usize,
        mut node: Option<NodeId>,
        needed: Needed<'_>,
        mut act: impl FnMut(usize, BlockId),
    ) {
        let Some(prefix) = &self.prefix else {
            return;
        };
        let mut first = [0; CacheLayout::MOST_GROUPS];
        let first = &mut first[..self.groups()];
        for (group, first) in first.iter_mut().enumerate() {
            *first = needed.first(&self.layout, group, end, self.block_tokens);
        }
        let begin = first.iter().copied().min().unwrap_or(0);
        for index in (begin..end).rev() {
            let Some(current) = node else {
                return;
            };
            for (group, &first) in first.iter().enumerate() {
                if index >= first
                    && let Some(block) = prefix.block(current, group)
                {
                    act(group, block);
                }
            }
            node = prefix.parent(current);
        }
    }

    /// Lets an empty `table` hold the blocks that [`BlockCache::lookup`] has found. No block may
    /// have been allocated or released since.
    pub fn attach(&mut self, table: &mut BlockTable, hit: &PrefixHit) {
        self.attach_needed(table, hit, Needed::Window);
    }

    /// Like [`BlockCache::attach`], for what [`BlockCache::lookup_before`] has found. The table
    /// then begins, in each group, with the block with the index in `first`.
    pub fn attach_before(&mut self, table: &mut BlockTable, hit: &PrefixHit, first: &[usize]) {
        self.attach_needed(table, hit, Needed::From(first));
    }

    fn attach_needed(&mut self, table: &mut BlockTable, hit: &PrefixHit, needed: Needed<'_>) {
        debug_assert!(table.is_empty(), "the table must be empty");
        self.open(table);
        let (end, node) = (hit.tokens / self.block_tokens, hit.node);
        if let Some(slot) = self.known_state(node, needed) {
            self.attach_state(table, hit.tokens, slot);
        }
        for (index, group) in table.groups.iter_mut().enumerate() {
            group.first = needed.first(&self.layout, index, end, self.block_tokens);
        }
        let groups = &mut table.groups;
        self.for_each_block(end, node, needed, |group, block| {
            groups[group].blocks.push(block);
        });
        for group in &mut table.groups {
            group.blocks.reverse();
            for &block in &group.blocks {
                self.pool.add_reference(block);
            }
        }
        (table.published, table.last) = (end, node);
    }

    /// Publishes the complete blocks of `table`, which holds `tokens`. The first `written` of
    /// these have been computed by completed steps. A block whose tokens are known already is
    /// replaced by the known block; it can be allocated again when step `touched` has
    /// completed.
    #[inline]
    pub fn publish(
        &mut self,
        table: &mut BlockTable,
        tokens: &[u32],
        written: usize,
        touched: StepId,
    ) {
        let whole = written.min(tokens.len()) / self.block_tokens;
        if table.published < whole {
            self.publish_to(table, tokens, whole, touched);
        }
    }

    fn publish_to(
        &mut self,
        table: &mut BlockTable,
        tokens: &[u32],
        whole: usize,
        touched: StepId,
    ) {
        let mut replaced = Vec::new();
        while table.published < whole {
            let index = table.published;
            let chunk = &tokens[index * self.block_tokens..][..self.block_tokens];
            if !self.publish_next(table, chunk, &mut replaced) {
                break;
            }
        }
        if !replaced.is_empty() {
            self.release_blocks(replaced, touched);
        }
    }

    /// Publishes the first block of `table` that is not published yet, in all groups. Returns
    /// whether that was possible.
    fn publish_next(
        &mut self,
        table: &mut BlockTable,
        chunk: &[u32],
        replaced: &mut Vec<BlockId>,
    ) -> bool {
        let Some(prefix) = &mut self.prefix else {
            return false;
        };
        let index = table.published;
        let after = match table.last {
            None => Predecessor::Salt(table.salt.as_ref()),
            Some(last) if prefix.exists(last) => Predecessor::Node(last),
            Some(_) => return false,
        };
        let link = prefix.link(after, chunk);
        let found = prefix.find(&link);
        let known = |group: usize| found.and_then(|node| prefix.block(node, group));
        let mut held = false;
        for (group, own) in table.groups.iter().enumerate() {
            let Some(own) = own.get(index) else {
                continue;
            };
            held = true;
            // Only a block that no other table holds may be published, because another table
            // might not hold the block before it.
            if known(group).is_none() && self.pool.references(own) != 1 {
                return false;
            }
        }
        if !held {
            return false;
        }
        let Some(node) = found.or_else(|| prefix.insert(&link)) else {
            return false;
        };
        for (group, held) in table.groups.iter_mut().enumerate() {
            let Some(own) = held.get(index) else {
                continue;
            };
            match prefix.block(node, group) {
                None => prefix.publish(node, group, own),
                Some(known) if known != own => {
                    self.pool.add_reference(known);
                    held.blocks[index - held.first] = known;
                    replaced.push(own);
                }
                Some(_) => {}
            }
        }
        (table.published, table.last) = (index + 1, Some(node));
        true
    }

    /// Treats the blocks of `table` from this index on as not published, because they will be
    /// released or written again.
    pub(super) fn unpublish_from(&self, table: &mut BlockTable, index: usize) {
        if index >= table.published {
            return;
        }
        let steps = table.published - index;
        table.published = index;
        table.last = match (&self.prefix, table.last) {
            _ if index == 0 => None,
            (Some(prefix), Some(last)) if prefix.exists(last) => prefix.ancestor(last, steps),
            // A node that is gone: nothing can be published after it.
            (_, last) => last,
        };
    }

    /// Returns whether a sequence can continue after the first `tokens` tokens of `table`: no
    /// block that the next token needs was given back, and there is a snapshot of its state.
    pub fn can_continue(&self, table: &BlockTable, tokens: usize) -> bool {
        if !self.has_state(table, tokens) {
            return false;
        }
        let mut groups = table.groups.iter().enumerate();
        groups.all(|(index, group)| {
            group.first <= self.layout.first_block(index, tokens, self.block_tokens)
        })
    }

    /// Returns a new table that shares the blocks of the first `tokens` tokens of `table`, as
    /// far as a sequence needs them that continues there. [`BlockCache::can_continue`] must
    /// hold.
    pub fn share(&mut self, table: &BlockTable, tokens: usize) -> BlockTable {
        debug_assert!(
            self.can_continue(table, tokens),
            "blocks that are needed after {tokens} tokens were given back"
        );
        let keep = self.blocks_for(tokens);
        let mut shared = BlockTable::salted(table.salt.clone());
        shared.groups.reserve_exact(table.groups.len());
        for (index, group) in table.groups.iter().enumerate() {
            let kept = self
                .layout
                .first_kept_block(index, tokens, self.block_tokens);
            let first = kept.clamp(group.first, group.range().end);
            let end = keep.clamp(first, group.range().end);
            let blocks = &group.blocks[first - group.first..end - group.first];
            for &block in blocks {
                self.pool.add_reference(block);
            }
            shared.groups.push(Group {
                first,
                blocks: blocks.to_vec(),
            });
        }
        (shared.published, shared.last) = (table.published, table.last);
        self.unpublish_from(&mut shared, tokens / self.block_tokens);
        if let Some(slot) = self.snapshot_of(table, tokens) {
            self.attach_state(&mut shared, tokens, slot);
        }
        shared
    }

    /// Goes back to the first `tokens` tokens of `table` and releases the blocks after them. If
    /// blocks that the next token needs were given back, it takes them from the prefix cache; if
    /// they are not there any more, it goes back further, to the last position at which the
    /// sequence can continue. Returns the number of tokens that are left, and the number of
    /// blocks that no table holds any more.
    pub fn rewind(
        &mut self,
        table: &mut BlockTable,
        tokens: usize,
        touched: StepId,
    ) -> (usize, usize) {
        if self.can_continue(table, tokens) {
            return (tokens, self.cut(table, tokens, touched));
        }
        let nodes = self.published_nodes(table);
        let mut left = tokens;
        while left > 0 && !self.is_known(table, &nodes, left) {
            left = (left - 1) / self.block_tokens * self.block_tokens;
        }
        if left > 0 {
            self.take_back(table, &nodes, left);
        }
        let state = self.state_at(&nodes, left);
        let blocks = self.cut(table, left, touched);
        if let Some(slot) = state
            && self.snapshot_of(table, left).is_none()
        {
            self.attach_state(table, left, slot);
        }
        (left, blocks)
    }

    /// Returns the nodes of the published blocks of `table`, in the order of the tokens.
    fn published_nodes(&self, table: &BlockTable) -> Vec<NodeId> {
        let last = self.prefix.as_ref().zip(table.last);
        let last = last.filter(|(prefix, last)| prefix.exists(*last));
        let nodes = last.map(|(prefix, last)| {
            std::iter::successors(Some(last), |node| prefix.parent(*node)).collect()
        });
        let mut nodes: Vec<NodeId> = nodes.unwrap_or_default();
        nodes.reverse();
        nodes
    }

    /// Returns the indices of the blocks that `group` needs to continue after `tokens` tokens.
    fn window_range(&self, group: usize, tokens: usize) -> Range<usize> {
        let first = self.layout.first_block(group, tokens, self.block_tokens);
        first..self.blocks_for(tokens)
    }

    /// Returns the known snapshot of the first `tokens` tokens of a sequence with these nodes.
    fn state_at(&self, nodes: &[NodeId], tokens: usize) -> Option<StateSlot> {
        let is_whole = self.states.is_some() && tokens.is_multiple_of(self.block_tokens);
        let index = (tokens / self.block_tokens)
            .checked_sub(1)
            .filter(|_| is_whole);
        let node = index.and_then(|index| nodes.get(index));
        let prefix = self.prefix.as_ref();
        prefix
            .zip(node)
            .and_then(|(prefix, node)| prefix.state(*node))
    }

    /// Returns whether each block that the sequence needs after `tokens` tokens is held by
    /// `table` or known, and the state there as well.
    fn is_known(&self, table: &BlockTable, nodes: &[NodeId], tokens: usize) -> bool {
        if !self.has_state(table, tokens) && self.state_at(nodes, tokens).is_none() {
            return false;
        }
        let known = |group: usize, index: usize| {
            let prefix = self.prefix.as_ref().zip(nodes.get(index));
            prefix.is_some_and(|(prefix, node)| prefix.block(*node, group).is_some())
        };
        let mut groups = table.groups.iter().enumerate();
        groups.all(|(group, held)| {
            let mut needed = self.window_range(group, tokens);
            // What it holds reaches beyond these tokens.
            let holds_all = held.first <= needed.start;
            holds_all || needed.all(|index| held.get(index).is_some() || known(group, index))
        })
    }

    /// Lets `table` hold the known blocks again that it gave back and that the sequence needs
    /// after `tokens` tokens.
    fn take_back(&mut self, table: &mut BlockTable, nodes: &[NodeId], tokens: usize) {
        for group in 0..table.groups.len() {
            let needed = self.window_range(group, tokens);
            let held = &mut table.groups[group];
            if held.first <= needed.start {
                continue;
            }
            let missing = needed.start..held.first.min(needed.end);
            let Some(prefix) = &self.prefix else {
                continue;
            };
            let known = nodes[missing.clone()].iter();
            let blocks: Vec<BlockId> = known
                .filter_map(|node| prefix.block(*node, group))
                .collect();
            debug_assert_eq!(blocks.len(), missing.len(), "each block is known");
            for &block in &blocks {
                self.pool.add_reference(block);
            }
            // What the table holds after a gap is released by the caller.
            held.first = missing.start;
            held.blocks.splice(0..0, blocks);
        }
    }

    /// Returns every known block with its tokens.
    #[cfg(test)]
    pub(crate) fn known(&self) -> impl Iterator<Item = (BlockId, &[u32])> {
        let groups = self.groups();
        self.prefix.iter().flat_map(move |prefix| {
            prefix.nodes().flat_map(move |node| {
                let blocks = (0..groups).filter_map(move |group| prefix.block(node, group));
                blocks.map(move |block| (block, prefix.tokens_of(node)))
            })
        })
    }
}
