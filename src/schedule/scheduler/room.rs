//! Makes room for a sequence when blocks run out: decides which sessions are evicted and which
//! sequences are preempted, and preempts them.

use super::Scheduler;
use super::start::StartCost;
use crate::cache::Extent;
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
            if self.cache.available_blocks() + self.cache.deferred_blocks() >= short.needed {
                return false; // wait for the step in flight that frees enough blocks
            }
            if self.evict_session() || (self.running.len() == 1 && self.evict_pinned_session()) {
                continue;
            }
            let victim = self.victim(key, plan);
            let others = !plan.items.is_empty() || self.cache.last_completed_step() < self.launched;
            if count > 1 && victim == Some(key) && others {
                // The next part of a prompt waits until other sequences have ended, or until a
                // step in flight lets blocks behind a window go. What has been computed of the
                // prompt is kept, and no sequence may start meanwhile.
                self.waits_for_room = true;
                return false;
            }
            match victim {
                Some(victim) => self.preempt(victim, plan),
                None => return false,
            }
            let own = self.sequences.get(key);
            if own.is_none_or(|sequence| sequence.state != SequenceState::Running) {
                return false; // `key` itself was the victim
            }
        }
    }

    /// Makes room for a waiting sequence. One block per running sequence and group stays
    /// available, so that the new sequence is not preempted at once. Returns `None` if the sequence cannot
    /// start now.
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
                match self.slot_to_start(key, &cost) {
                    SlotToStart::Free => return Some(cost),
                    SlotToStart::Later => return None,
                    SlotToStart::Retry => continue,
                }
            }
            if needed <= available + self.cache.deferred_blocks() {
                return None;
            }
            if self.evict_session() || (self.running.len() == 0 && self.evict_pinned_session()) {
                continue;
            }
            let victim = self.victim_to_start(key, plan)?;
            if !self.fits_after_preemption(key, &cost, plan) {
                return None;
            }
            self.preempt(victim, plan);
        }
    }

    /// Looks for a slot for the state of a sequence that could start otherwise, and gives up what
    /// others keep if there is none. Running sequences keep their slots.
    fn slot_to_start(&mut self, key: SequenceKey, cost: &StartCost) -> SlotToStart {
        if cost.has_state || self.cache.has_slot(cost.reused_cached_states) {
            return SlotToStart::Free;
        }
        if self.cache.has_deferred_slots() {
            return SlotToStart::Later;
        }
        let alone = self.running.len() == 0;
        let given_up = self.evict_session()
            || (alone && (self.evict_pinned_session() || self.drop_swapped(key)));
        match given_up {
            true => SlotToStart::Retry,
            false => SlotToStart::Later,
        }
    }

    /// Lets a sequence other than `key` that was swapped out be recomputed instead, because it
    /// keeps its slot while it waits. Returns whether there was one.
    fn drop_swapped(&mut self, key: SequenceKey) -> bool {
        let mut others = self.sequences.iter_mut();
        let found = others.find(|(other, sequence)| *other != key && sequence.swapped.is_some());
        let Some((_, sequence)) = found else {
            return false;
        };
        if let Some(swapped) = sequence.swapped.take() {
            self.host.release(swapped.blocks);
        }
        self.cache.release(&mut sequence.table, sequence.last_step);
        true
    }

    /// Returns whether `key` could start if all sessions were evicted and all sequences
    /// preempted that may be preempted for it. Otherwise they would be preempted in vain.
    pub(super) fn fits_after_preemption(
        &self,
        key: SequenceKey,
        cost: &StartCost,
        plan: &StepPlan,
    ) -> bool {
        let Some(own) = self.sequences.get(key) else {
            return false;
        };
        let mut room = self.cache.available_blocks() + self.cache.deferred_blocks()
            - cost.reused_cached_blocks;
        room += self.retained.blocks();
        let mut running = self.running.len();
        for sequence in self
            .running
            .keys()
            .iter()
            .filter_map(|key| self.sequences.get(*key))
        {
            let less_urgent = sequence.spec.priority > own.spec.priority;
            if sequence.last_step != plan.step && (sequence.paused || less_urgent) {
                room += self.cache.exclusive_blocks(&sequence.table);
                running -= 1;
            }
        }
        cost.missing + running * self.cache.groups() <= room
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

    /// Evicts the least recently used session without a pin. Returns whether there was one.
    fn evict_session(&mut self) -> bool {
        let oldest = self.retained.oldest();
        oldest.map(|session| self.end_session(session)).is_some()
    }

    /// Evicts the session whose pin expires first, for a sequence that could never run
    /// otherwise. Returns whether there was one.
    fn evict_pinned_session(&mut self) -> bool {
        let first = self.retained.first_pinned();
        first.map(|session| self.end_session(session)).is_some()
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
    pub(super) fn preempt(&mut self, key: SequenceKey, plan: &mut StepPlan) {
        self.running.remove(key, &self.sequences);
        let Some(sequence) = self.sequences.get(key) else {
            return;
        };
        let cost = self.preemption_cost(sequence);
        let swap = cost.prefers_swap(self.policy.preemption);
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
