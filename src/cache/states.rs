//! States of recurrent layers: who holds which slot, and which states are kept for others.
//!
//! A recurrent layer keeps one state per sequence in place of keys and values, and every step
//! overwrites it. A sequence therefore has a slot of its own while it runs, its *live* slot. To
//! continue from an earlier position, someone must have kept a copy of the state there: a
//! *snapshot*, which nobody writes again. Snapshots are taken at multiples of a fixed number of
//! tokens, [`BlockCache::state_interval`], and published in the prefix cache with the blocks up
//! to there. They obey the same rules as blocks: a slot is free, referenced, cached or deferred.
//!
//! A snapshot takes as much memory as the keys and values of hundreds of tokens, so only those
//! are taken that are likely to be used (as in Pan et al., *Marconi: Prefix Caching for the Era of
//! Hybrid LLMs*, 2024): near the end of a prompt, where a prompt departs from an earlier one, and
//! while tokens are generated. Of the latter, a sequence keeps the latest two.

use super::fence::{Fence, Release};
use super::pool::Pool;
use super::prefix::PrefixCache;
use super::{BlockCache, BlockCounts, BlockId, BlockState, BlockTable, unheld};
use crate::id::StepId;

/// Number of snapshots of generated tokens that a sequence keeps. A turn may end before the latest
/// one, because steps in flight compute tokens that are then discarded.
const GENERATED: usize = 2;

/// A slot for the state of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSlot(u32);

impl StateSlot {
    /// Returns the index of the slot.
    pub fn index(self) -> usize {
        self.0 as usize
    }

    pub(super) fn new(index: u32) -> Self {
        Self(index)
    }

    fn of(block: BlockId) -> Self {
        Self(block.0)
    }

    fn block(self) -> BlockId {
        BlockId(self.0)
    }
}

/// The slots that the rows of a sequence read and write in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepState {
    /// The state before the first row; `None` at the start of the sequence.
    pub before: Option<StateSlot>,
    /// Gets the state after the last row.
    pub after: StateSlot,
    /// A number of rows, and the slot that gets the state after them.
    pub snapshot: Option<(usize, StateSlot)>,
}

/// A state, and how many tokens it is the state of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    tokens: usize,
    slot: StateSlot,
}

/// The states that a table holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct TableStates {
    /// The state after the last launched step, which only this table holds.
    live: Option<State>,
    /// Snapshots, in the order of the tokens. With a prefix cache, those that are not published
    /// yet, and the one that the sequence has started from.
    kept: Vec<State>,
    /// Published snapshots of generated tokens, which this table does not hold.
    generated: Vec<State>,
}

impl TableStates {
    /// Returns the slots that the table holds.
    pub fn slots(&self) -> impl Iterator<Item = StateSlot> + '_ {
        self.live.iter().chain(&self.kept).map(|state| state.slot)
    }

    pub fn take_live(&mut self) -> Option<State> {
        self.live.take()
    }

    pub fn set_live(&mut self, live: Option<State>) {
        self.live = live;
    }

    fn kept_at(&self, tokens: usize) -> Option<StateSlot> {
        let mut kept = self.kept.iter();
        let found = kept.find(|state| state.tokens == tokens);
        found.map(|state| state.slot)
    }
}

/// Allocates the slots for states and takes them back.
#[derive(Debug)]
pub(super) struct StateCache {
    pool: Pool,
    fence: Fence,
    releases: u64,
    /// How many times a slot lost its last holder.
    released: u64,
    interval: usize,
}

impl StateCache {
    pub fn new(slots: usize, interval: usize) -> Self {
        Self {
            pool: Pool::new(slots),
            fence: Fence::default(),
            releases: 0,
            released: 0,
            interval,
        }
    }

    pub fn counts(&self) -> BlockCounts {
        BlockCounts {
            total: self.pool.total_blocks(),
            free: self.pool.free_blocks(),
            referenced: self.pool.referenced_blocks(),
            cached: self.pool.cached_blocks(),
            deferred: self.pool.deferred_blocks(),
        }
    }

    /// Allocates a free slot, or else the least recently used snapshot that nobody holds.
    fn allocate(&mut self, prefix: &mut Option<PrefixCache>) -> Option<StateSlot> {
        if let Some(slot) = self.pool.allocate() {
            return Some(StateSlot::of(slot));
        }
        let slot = StateSlot::of(self.pool.evict()?);
        if let Some(prefix) = prefix {
            prefix.forget_state(slot);
        }
        Some(slot)
    }

    /// Drops the reference of a holder whose last step is `touched`. Returns whether it was the
    /// last one.
    fn release(&mut self, slot: StateSlot, touched: StepId, prefix: &Option<PrefixCache>) -> bool {
        self.releases += 1;
        let (block, number) = (slot.block(), self.releases);
        if !self.pool.drop_reference(block, touched, number) {
            return false;
        }
        self.released += 1;
        let release = Release {
            number,
            blocks: vec![block],
        };
        match self.pool.touched(block) {
            step if step > self.fence.completed() => self.fence.defer(release, step),
            _ => settle(&mut self.pool, prefix, &release),
        }
        true
    }

    /// Forgets all snapshots that nobody holds. Deferred ones become free when the steps that may
    /// touch them have completed.
    pub fn clear(&mut self, prefix: &mut PrefixCache) {
        for slot in unheld(&self.pool, &self.fence) {
            prefix.forget_state(StateSlot::of(slot));
            self.pool.forget(slot);
        }
    }

    /// Makes a snapshot free that the prefix cache has forgotten, unless someone holds it.
    pub fn forget(&mut self, slot: StateSlot) {
        self.pool.forget(slot.block());
    }

    pub fn step_completed(&mut self, step: StepId, prefix: &Option<PrefixCache>) {
        let Self { pool, fence, .. } = self;
        fence.complete(step, |release| settle(pool, prefix, release));
    }

    /// Makes a snapshot that nobody holds free, if it is known.
    fn discard(&mut self, slot: StateSlot, prefix: &mut PrefixCache) {
        if self.pool.state(slot.block()) == BlockState::Cached {
            prefix.forget_state(slot);
            self.pool.forget(slot.block());
        }
    }

    pub fn audit(&self, held: &[u32], prefix: &Option<PrefixCache>) -> Result<(), String> {
        self.pool.audit(held)?;
        let mut awaited = vec![false; held.len()];
        for slot in self.fence.iter() {
            awaited[slot.index()] = true;
        }
        for (index, awaited) in awaited.into_iter().enumerate() {
            let slot = StateSlot(index as u32);
            let state = self.pool.state(slot.block());
            if state == BlockState::Deferred && !awaited {
                return Err(format!("slot {index} is deferred forever"));
            }
            let known = prefix
                .as_ref()
                .is_some_and(|prefix| prefix.knows_state(slot));
            let wrong = match known {
                true => state == BlockState::Free,
                false => state == BlockState::Cached,
            };
            if wrong {
                return Err(format!("slot {index} is {state:?}, but known is {known}"));
            }
        }
        Ok(())
    }
}

/// Makes deferred slots whose steps have completed cached if they are known, and free if not.
fn settle(pool: &mut Pool, prefix: &Option<PrefixCache>, release: &Release) {
    for &slot in &release.blocks {
        let prefix = prefix.as_ref();
        let known = prefix.is_some_and(|prefix| prefix.knows_state(StateSlot::of(slot)));
        pool.settle(slot, release.number, known);
    }
}

impl BlockCache {
    /// Adds `slots` slots for the states of recurrent layers. Snapshots are taken at multiples of
    /// `interval` tokens, which is a multiple of the tokens per block.
    pub fn with_states(mut self, slots: usize, interval: usize) -> Self {
        debug_assert!(interval > 0 && interval.is_multiple_of(self.block_tokens));
        if let Some(prefix) = &mut self.prefix {
            prefix.reserve_states(slots);
        }
        self.states = Some(StateCache::new(slots, interval));
        self
    }

    /// Returns the slots whose content was discarded since the last call. Recording starts with
    /// the first call, which returns nothing.
    pub fn take_freed_states(&mut self) -> Vec<StateSlot> {
        let freed = self.states.as_mut().map(|states| states.pool.take_freed());
        freed.into_iter().flatten().map(StateSlot::of).collect()
    }

    /// Returns at multiples of how many tokens snapshots are taken; `None` if no layer is
    /// recurrent.
    pub fn state_interval(&self) -> Option<usize> {
        self.states.as_ref().map(|states| states.interval)
    }

    /// Returns the number of slots in each state; all are 0 if no layer is recurrent.
    pub fn state_counts(&self) -> BlockCounts {
        let states = self.states.as_ref();
        states.map(StateCache::counts).unwrap_or_default()
    }

    /// Returns the state of every slot, by slot index; nothing if no layer is recurrent.
    pub fn slot_states(&self) -> impl Iterator<Item = BlockState> + '_ {
        self.states.iter().flat_map(|states| states.pool.states())
    }

    /// Returns how many times since the start a slot lost its last holder.
    pub fn released_states(&self) -> u64 {
        self.states.as_ref().map_or(0, |states| states.released)
    }

    /// Returns whether there is a slot for a sequence that starts, of which `reused` snapshots
    /// that nobody holds will be held by the sequence.
    pub fn has_slot(&self, reused: usize) -> bool {
        let states = self.states.as_ref();
        states.is_none_or(|states| states.counts().available() > reused)
    }

    /// Returns whether releasing `table` would leave a slot that no table holds.
    pub fn has_exclusive_slot(&self, table: &BlockTable) -> bool {
        let references = |slot: StateSlot| {
            let states = self.states.as_ref();
            states.map_or(0, |states| states.pool.references(slot.block()))
        };
        table.states.slots().any(|slot| references(slot) == 1)
    }

    /// Returns whether slots will become available when the steps in flight have completed.
    pub fn has_deferred_slots(&self) -> bool {
        let states = self.states.as_ref();
        states.is_some_and(|states| states.pool.deferred_blocks() > 0)
    }

    /// Returns whether `table` can continue after `tokens` tokens, as far as states matter.
    pub(super) fn has_state(&self, table: &BlockTable, tokens: usize) -> bool {
        self.states.is_none() || tokens == 0 || table.states.kept_at(tokens).is_some()
    }

    /// Chooses the slots for the rows of a step that compute the tokens in `rows`, and allocates
    /// those that are missing. `wanted` is the number of tokens after which a snapshot
    /// should be taken; it is taken only if a slot is left. Returns `None` if no layer is
    /// recurrent, or if there is no slot at all, which [`BlockCache::has_slot`] must rule out
    /// before a sequence starts.
    pub fn plan_state(
        &mut self,
        table: &mut BlockTable,
        rows: std::ops::Range<usize>,
        wanted: Option<usize>,
    ) -> Option<StepState> {
        let Self { states, prefix, .. } = self;
        let states = states.as_mut()?;
        let own = &mut table.states;
        let (before, after) = match own.live {
            Some(live) => {
                debug_assert_eq!(live.tokens, rows.start, "the live state is of other tokens");
                (Some(live.slot), live.slot)
            }
            None => {
                let before = own.kept_at(rows.start);
                debug_assert!(before.is_some() || rows.start == 0, "no state at {rows:?}");
                (before, states.allocate(prefix)?)
            }
        };
        own.live = Some(State {
            tokens: rows.end,
            slot: after,
        });
        let wanted = wanted.filter(|tokens| rows.start < *tokens && *tokens <= rows.end);
        let snapshot = wanted.and_then(|tokens| {
            let slot = states.allocate(prefix)?;
            own.kept.push(State { tokens, slot });
            Some((tokens - rows.start, slot))
        });
        Some(StepState {
            before,
            after,
            snapshot,
        })
    }

    /// Publishes the snapshots of the first `written` tokens of `table`, whose blocks are
    /// published up to there. Those after `prompt` tokens are of generated tokens. Without a
    /// prefix cache, the table itself holds the latest ones.
    #[inline]
    pub fn publish_states(
        &mut self,
        table: &mut BlockTable,
        written: usize,
        prompt: usize,
        touched: StepId,
    ) {
        if self.states.is_some() && !table.states.kept.is_empty() {
            self.publish_kept_states(table, written, prompt, touched);
        }
    }

    fn publish_kept_states(
        &mut self,
        table: &mut BlockTable,
        written: usize,
        prompt: usize,
        touched: StepId,
    ) {
        let Some(states) = &mut self.states else {
            return;
        };
        let own = &mut table.states;
        if self.prefix.is_none() {
            while own.kept.len() > GENERATED && own.kept[GENERATED].tokens <= written {
                let oldest = own.kept.remove(0);
                states.release(oldest.slot, touched, &self.prefix);
            }
            return;
        }
        let end = written.min(table.published * self.block_tokens);
        while let Some(&state) = own.kept.first().filter(|state| state.tokens <= end) {
            own.kept.remove(0);
            if let Some(prefix) = &mut self.prefix
                && let Some(last) = table.last.filter(|last| prefix.exists(*last))
                && let Some(node) =
                    prefix.ancestor(last, table.published - state.tokens / self.block_tokens)
                && prefix.state(node).is_none()
            {
                prefix.publish_state(node, state.slot);
                if state.tokens > prompt {
                    own.generated.push(state);
                }
            }
            states.release(state.slot, touched, &self.prefix);
        }
        // Publishing may have stopped, so that the others will never be known.
        while own.kept.len() > 2 * GENERATED && own.kept[0].tokens <= written {
            let oldest = own.kept.remove(0);
            states.release(oldest.slot, touched, &self.prefix);
        }
        while own.generated.len() > GENERATED
            && let Some(prefix) = &mut self.prefix
        {
            let oldest = own.generated.remove(0);
            let node = table.last.filter(|last| prefix.exists(*last));
            let steps = table.published - oldest.tokens / self.block_tokens;
            let node = node.and_then(|last| prefix.ancestor(last, steps));
            // The slot may have been evicted and allocated again.
            if node.and_then(|node| prefix.state(node)) == Some(oldest.slot) {
                states.discard(oldest.slot, prefix);
            }
        }
    }

    /// Lets `table`, which has no states, begin with a known snapshot of the first `tokens`
    /// tokens.
    pub(super) fn attach_state(&mut self, table: &mut BlockTable, tokens: usize, slot: StateSlot) {
        let Some(states) = &mut self.states else {
            return;
        };
        states.pool.add_reference(slot.block());
        table.states.kept.push(State { tokens, slot });
    }

    /// Returns a snapshot of the first `tokens` tokens of `table`, if it holds one.
    pub(super) fn snapshot_of(&self, table: &BlockTable, tokens: usize) -> Option<StateSlot> {
        table.states.kept_at(tokens)
    }

    /// Returns whether nobody holds a snapshot, so that it counts as available.
    pub(super) fn is_cached_state(&self, slot: StateSlot) -> bool {
        let states = self.states.as_ref();
        states.is_some_and(|states| states.pool.state(slot.block()) == BlockState::Cached)
    }

    /// Returns every published snapshot with all tokens that it is the state of.
    #[cfg(test)]
    pub(crate) fn known_states(&self) -> Vec<(StateSlot, Vec<u32>)> {
        let Some(prefix) = &self.prefix else {
            return Vec::new();
        };
        let states = prefix.nodes().filter_map(|node| {
            let ancestors = std::iter::successors(Some(node), |node| prefix.parent(*node));
            let mut nodes: Vec<_> = ancestors.collect();
            nodes.reverse();
            let tokens = nodes.iter().flat_map(|node| prefix.tokens_of(*node));
            Some((prefix.state(node)?, tokens.copied().collect()))
        });
        states.collect()
    }

    /// Returns every snapshot that `table` holds, with the number of tokens that it is the state
    /// of.
    #[cfg(test)]
    pub(crate) fn kept_states(table: &BlockTable) -> impl Iterator<Item = (StateSlot, usize)> {
        let kept = table.states.kept.iter();
        kept.map(|state| (state.slot, state.tokens))
    }

    /// Releases the live state of `table` and its snapshots of more than `tokens` tokens.
    pub(super) fn cut_states(&mut self, table: &mut BlockTable, tokens: usize, touched: StepId) {
        let Some(states) = &mut self.states else {
            return;
        };
        let own = &mut table.states;
        if let Some(live) = own.live.take() {
            states.release(live.slot, touched, &self.prefix);
        }
        while let Some(state) = own.kept.pop_if(|state| state.tokens > tokens) {
            states.release(state.slot, touched, &self.prefix);
        }
        own.generated.retain(|state| state.tokens <= tokens);
        if tokens == 0 {
            own.kept.shrink_to_fit();
        }
    }
}
