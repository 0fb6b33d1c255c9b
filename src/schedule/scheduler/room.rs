//! Makes room for a sequence when blocks run out: decides which sessions are evicted and which
//! sequences are preempted, and preempts them.

use super::Scheduler;
use super::start::StartCost;
use crate::cache::{BlockTable, Extent};
use crate::id::SessionId;
use crate::schedule::policy::PreemptionCost;
use crate::schedule::sequence::Swapped;
use crate::schedule::{Sequence, SequenceKey, SequenceState, StepPlan};

/// Whether there is a slot for the state of a sequence that starts.
enum SlotToStart {
    /// There is one, or none is needed.
    Free,
    /// There is none before a step has completed or a sequence has ended.
    Later,
    /// Something was given up, so that there may be one now.
    Retry,
}

/// What a preempted sequence may keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Keep {
    /// Its blocks in host memory and the slot of its state, if the policy prefers that.
    Anything,
    /// No slot: another sequence needs one.
    NoSlot,
}

impl Scheduler {
    /// Prepares the block table of `key` for its next `count` tokens, and evicts or preempts
    /// others if necessary. Returns whether this succeeded; if not, no block of `key` was
    /// allocated.
    pub(super) fn make_room(
        &mut self,
        key: SequenceKey,
        count: usize,
        plan: &mut StepPlan,
    ) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(key) else {
                return false;
            };
            let start = sequence.launched_tokens;
            let Err(short) = self.cache.prepare(
                &mut sequence.table,
                start,
                Extent::all(start + count),
                plan.step,
                &mut plan.transfers,
            ) else {
                return true;
            };
            let is_prompt = sequence.pending() > 1;
            if self.cache.available_blocks() + self.cache.deferred_blocks() >= short.needed {
                // Wait for the step in flight that frees enough blocks. No sequence may take
                // those that a prompt waits for.
                self.waits_for_room |= is_prompt;
                return false;
            }
            if self.evict_session(None) || (self.running.len() == 1 && self.evict_pinned_session())
            {
                continue;
            }
            let victim = self.victim(key, plan);
            let others = !plan.items.is_empty() || self.cache.last_completed_step() < self.launched;
            if is_prompt && victim == Some(key) && others {
                // The next part of a prompt waits until other sequences have ended, or until a
                // step in flight lets blocks behind a window go. What has been computed of the
                // prompt is kept, and no sequence may start meanwhile.
                self.waits_for_room = true;
                return false;
            }
            match victim {
                Some(victim) => self.preempt(victim, plan, Keep::Anything),
                None => return false,
            }
            let own = self.sequences.get(key);
            if own.is_none_or(|sequence| sequence.state != SequenceState::Running) {
                return false; // `key` itself was the victim
            }
        }
    }

    /// Makes room for a waiting sequence. One block per running sequence and group stays
    /// available, so that the new sequence is not preempted at once. Returns `None` if the
    /// sequence cannot start now. Then nothing was given up for it.
    pub(super) fn room_to_start(
        &mut self,
        key: SequenceKey,
        plan: &mut StepPlan,
    ) -> Option<StartCost> {
        loop {
            let cost = self.start_cost(key)?;
            let needed = cost.missing + self.running.len() * self.cache.groups();
            let available = self.cache.available_blocks() - cost.reused_cached_blocks;
            if needed <= available {
                match self.slot_to_start(key, &cost, plan) {
                    SlotToStart::Free => return Some(cost),
                    SlotToStart::Later => return None,
                    SlotToStart::Retry => continue,
                }
            }
            if needed <= available + self.cache.deferred_blocks() {
                return None;
            }
            if !self.fits_if_others_give_way(key, &cost, plan) {
                // With its own session, a sequence may need one block more than there are.
                if self.evicted_for_the_only_sequence() {
                    continue;
                }
                return None;
            }
            let own = self.sequences.get(key)?.spec.session;
            if self.evict_session(own) || (self.running.len() == 0 && self.evict_pinned_session()) {
                continue;
            }
            let victim = self.victim_to_start(key, plan)?;
            self.preempt(victim, plan, self.kept_for(&cost));
        }
    }

    /// Returns what a sequence may keep that is preempted so that another one can start.
    pub(super) fn kept_for(&self, cost: &StartCost) -> Keep {
        match cost.has_state || self.cache.has_slot(cost.reused_cached_states) {
            true => Keep::Anything,
            false => Keep::NoSlot,
        }
    }

    /// Looks for a slot for the state of a sequence that could start otherwise, and gives up what
    /// others keep if there is none.
    fn slot_to_start(
        &mut self,
        key: SequenceKey,
        cost: &StartCost,
        plan: &mut StepPlan,
    ) -> SlotToStart {
        if self.kept_for(cost) == Keep::Anything {
            return SlotToStart::Free;
        }
        if self.cache.has_deferred_slots() {
            return SlotToStart::Later;
        }
        let own = self.sequences.get(key).and_then(|own| own.spec.session);
        if self.evict_slot(own) || self.drop_swapped(key, plan) {
            return SlotToStart::Retry;
        }
        match self.victim_to_start(key, plan) {
            Some(victim) => {
                self.preempt(victim, plan, Keep::NoSlot);
                SlotToStart::Retry
            }
            None if self.evicted_for_the_only_sequence() => SlotToStart::Retry,
            None => SlotToStart::Later,
        }
    }

    /// If nothing runs, so that a sequence would wait forever, evicts a session, whatever that
    /// frees and even if it is the sequence's own. Returns whether there was one.
    fn evicted_for_the_only_sequence(&mut self) -> bool {
        self.running.len() == 0 && (self.evict_session(None) || self.evict_pinned_session())
    }

    /// Evicts the least recently used session that alone holds a snapshot, except `own` and
    /// pinned ones. If nothing runs, pinned ones are evicted as well. Returns whether there was
    /// one.
    fn evict_slot(&mut self, own: Option<SessionId>) -> bool {
        let pinned = self.running.len() == 0;
        let mut sessions = self.retained.in_order_of_eviction(pinned);
        let found = sessions.find(|(session, retained)| {
            Some(*session) != own && self.cache.has_exclusive_slot(&retained.table)
        });
        let found = found.map(|(session, _)| session);
        drop(sessions);
        self.evict(found)
    }

    /// Lets a sequence that was swapped out be recomputed instead, because it keeps its slot while
    /// it waits: one that is paused or served later than `key`, or any other if nothing runs.
    /// Returns whether there was one.
    fn drop_swapped(&mut self, key: SequenceKey, plan: &StepPlan) -> bool {
        let Some(own) = self.sequences.get(key).map(Sequence::rank) else {
            return false;
        };
        let alone = self.running.len() == 0;
        let gives_way = |other: &Sequence| {
            // Blocks that this step copies out must not be copied out to again.
            let swapped = other.swapped.as_ref();
            let swapped = swapped.is_some_and(|swapped| swapped.step != plan.step);
            swapped && (alone || other.paused || other.rank() > own)
        };
        let mut others = self.sequences.iter_mut();
        let found = others.find(|(other, sequence)| *other != key && gives_way(sequence));
        let Some((_, sequence)) = found else {
            return false;
        };
        if let Some(swapped) = sequence.swapped.take() {
            self.host.release(swapped.blocks);
        }
        self.cache.release(&mut sequence.table, sequence.last_step);
        true
    }

    /// Returns whether there would be blocks for `key` if all sessions were evicted and all
    /// sequences preempted that may be for it. Otherwise they would give way in vain.
    pub(super) fn fits_if_others_give_way(
        &self,
        key: SequenceKey,
        cost: &StartCost,
        plan: &StepPlan,
    ) -> bool {
        let Some(own) = self.sequences.get(key) else {
            return false;
        };
        let keys = self.running.keys().iter();
        let running = keys.filter_map(|key| self.sequences.get(*key));
        let gives_way = |sequence: &&Sequence| {
            let less_urgent = sequence.spec.priority > own.spec.priority;
            sequence.last_step != plan.step && (sequence.paused || less_urgent)
        };
        let tables = running.filter(gives_way).map(|sequence| &sequence.table);
        let mut tables: Vec<&BlockTable> = tables.collect();
        let left = self.running.len() - tables.len();
        let sessions = self.retained.in_order_of_eviction(left == 0);
        let others = sessions.filter(|(session, _)| Some(*session) != own.spec.session);
        tables.extend(others.map(|(_, retained)| &retained.table));
        let needed = cost.missing + left * self.cache.groups();
        let room = self.cache.available_blocks() + self.cache.deferred_blocks();
        let lacking = (needed + cost.reused_cached_blocks).saturating_sub(room);
        // Blocks that several of them share are counted only if all holders are among them.
        let most: usize = tables.iter().map(|table| table.len()).sum();
        lacking <= most && lacking <= self.cache.blocks_held_only_by(&tables)
    }

    /// Returns the sequence to preempt so that `key` can start: a paused one, or a less urgent
    /// one.
    pub(super) fn victim_to_start(&self, key: SequenceKey, plan: &StepPlan) -> Option<SequenceKey> {
        let priority = self.sequences.get(key)?.spec.priority;
        self.last_unplanned(plan, |sequence| sequence.paused)
            .or_else(|| self.last_unplanned(plan, |other| other.spec.priority > priority))
    }

    /// Returns the sequence to preempt for `key`, which is not paused: the last paused one,
    /// else the last one that is served no earlier than `key`, which may be `key` itself.
    fn victim(&self, key: SequenceKey, plan: &StepPlan) -> Option<SequenceKey> {
        let own = self.sequences.get(key)?.rank();
        self.last_unplanned(plan, |sequence| sequence.paused)
            .or_else(|| self.last_unplanned(plan, |sequence| sequence.rank() >= own))
    }

    /// Returns the last running sequence that satisfies `kind` and is not in the plan. Prefers
    /// one whose release frees at least one block.
    fn last_unplanned(
        &self,
        plan: &StepPlan,
        kind: impl Fn(&Sequence) -> bool,
    ) -> Option<SequenceKey> {
        let candidate = |key: &SequenceKey| {
            let sequence = self.sequences.get(*key)?;
            // Planning a sequence sets `last_step` to the step.
            (kind(sequence) && sequence.last_step != plan.step).then_some((*key, sequence))
        };
        let last_first = || self.running.keys().iter().rev().filter_map(candidate);
        last_first()
            .find(|(_, sequence)| self.cache.has_exclusive_blocks(&sequence.table))
            .or_else(|| last_first().next())
            .map(|(key, _)| key)
    }

    /// Evicts the least recently used session without a pin, except `own`. Returns whether there
    /// was one.
    fn evict_session(&mut self, own: Option<SessionId>) -> bool {
        let mut sessions = self.retained.in_order_of_eviction(false);
        let oldest = sessions.find(|(session, _)| Some(*session) != own);
        let oldest = oldest.map(|(session, _)| session);
        drop(sessions);
        self.evict(oldest)
    }

    /// Evicts the session whose pin expires first, for a sequence that could never run
    /// otherwise. Returns whether there was one.
    fn evict_pinned_session(&mut self) -> bool {
        let first = self.retained.first_pinned();
        self.evict(first)
    }

    /// Releases what a session keeps. Returns whether there is a session.
    fn evict(&mut self, session: Option<SessionId>) -> bool {
        session.map(|session| self.end_session(session)).is_some()
    }

    /// Estimates what preempting a sequence would cost.
    fn preemption_cost(&self, sequence: &Sequence) -> PreemptionCost {
        let end = self.cache.blocks_for(sequence.launched_tokens);
        let blocks = sequence.table.blocks_before(end).count();
        let swap = 2.0 * blocks as f64 * self.policy.swap_seconds_per_block;
        PreemptionCost {
            recompute: self.speed.seconds(sequence.launched_tokens),
            swap: (blocks > 0 && blocks <= self.host.free()).then_some(swap),
        }
    }

    /// Preempts a sequence: swaps its blocks out, or drops them so that it is recomputed.
    pub(super) fn preempt(&mut self, key: SequenceKey, plan: &mut StepPlan, keep: Keep) {
        self.running.remove(key, &self.sequences);
        let Some(sequence) = self.sequences.get(key) else {
            return;
        };
        let cost = self.preemption_cost(sequence);
        // A sequence that is swapped out keeps its slot.
        let swap = keep == Keep::Anything && cost.prefers_swap(self.policy.preemption);
        tracing::debug!(
            request = %sequence.id,
            tokens = sequence.launched_tokens,
            recompute_seconds = cost.recompute,
            swap_seconds = cost.swap,
            swap,
            "preempted a sequence"
        );
        self.totals.preemptions += 1;
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        let end = self.cache.blocks_for(sequence.launched_tokens);
        let blocks = || sequence.table.blocks_before(end).map(|(_, block)| block);
        let host = swap.then(|| self.host.allocate(blocks().count()));
        if let Some(host) = host.flatten() {
            let pairs = blocks().zip(host.iter().copied());
            plan.transfers.swap_out.extend(pairs);
            sequence.swapped = Some(Swapped {
                blocks: host,
                first: sequence.table.first_blocks(),
                end,
                tokens: sequence.launched_tokens,
                step: plan.step,
            });
            // The copy is part of this step.
            sequence.last_step = plan.step;
            self.totals.swaps += 1;
            // The state stays in its slot.
            let (table, touched) = (&mut sequence.table, sequence.last_step);
            self.cache.release_blocks_of(table, touched);
        } else {
            self.cache.release(&mut sequence.table, sequence.last_step);
        }
        sequence.launched_tokens = 0;
        sequence.written_tokens = 0;
        sequence.state = SequenceState::Blocked;
        self.unblock(key);
    }
}
