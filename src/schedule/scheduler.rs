//! The scheduler: plans steps and commits their outcomes.

use super::queue::ArrivalQueue;
use super::{
    FinishReason, PlanItem, Policy, Sequence, SequenceKey, SequenceSpec, Sequences, StepPlan,
    TokenInput,
};
use crate::cache::{BlockCache, BlockId, Books, Imbalance};
use crate::id::{SessionId, StepId};

/// Sequences by state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences that hold blocks and are planned.
    pub running: usize,
    /// Sequences that wait for blocks, never started or preempted.
    pub waiting: usize,
    /// Of both, those whose reader is too slow.
    pub paused: usize,
    /// Preemptions since the start.
    pub preemptions: u64,
}

/// What became of one sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The token was appended; the sequence goes on.
    Token,
    /// The token was appended, and the sequence has come to its end. It still
    /// holds its blocks until it is removed.
    Finished(FinishReason),
    /// The sequence is gone: the token was discarded.
    Discarded,
}

/// Owns the sequences and the cache's books.
#[derive(Debug)]
pub struct Scheduler {
    policy: Policy,
    cache: BlockCache,
    sequences: Sequences,
    running: ArrivalQueue,
    waiting: ArrivalQueue,
    arrivals: u64,
    preemptions: u64,
    launched: StepId,
    /// Kept for its memory.
    scratch: Vec<SequenceKey>,
}

impl Scheduler {
    /// A scheduler without sequences.
    pub fn new(policy: Policy, cache: BlockCache) -> Self {
        Self {
            policy,
            cache,
            sequences: Sequences::default(),
            running: ArrivalQueue::default(),
            waiting: ArrivalQueue::default(),
            arrivals: 0,
            preemptions: 0,
            launched: StepId::default(),
            scratch: Vec::new(),
        }
    }

    /// All sequences.
    pub fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    /// The cache's books.
    pub fn cache(&self) -> &BlockCache {
        &self.cache
    }

    /// The blocks that became free since the last call; the first call starts the
    /// record.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.cache.take_freed()
    }

    /// The last step that was planned.
    pub fn launched(&self) -> StepId {
        self.launched
    }

    /// Tokens of the longest sequence that fits in the cache alone.
    pub fn capacity_tokens(&self) -> usize {
        self.cache.books().total * self.cache.block_tokens()
    }

    /// Sequences by state.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.waiting.len(),
            paused: self
                .sequences
                .values()
                .filter(|sequence| sequence.paused)
                .count(),
            preemptions: self.preemptions,
        }
    }

    /// Checks the books (I3) and that every sequence is in exactly one queue (I2).
    pub fn audit(&self) -> Result<Books, Imbalance> {
        debug_assert_eq!(
            self.running.len() + self.waiting.len(),
            self.sequences.len()
        );
        self.cache
            .audit(self.sequences.values().map(|sequence| &sequence.table))
    }

    /// Takes a new sequence to the end of the queue.
    pub fn add(&mut self, id: SessionId, spec: SequenceSpec) -> SequenceKey {
        self.arrivals += 1;
        let key = self
            .sequences
            .insert(Sequence::new(id, spec, self.arrivals));
        self.waiting.insert(key, &self.sequences);
        key
    }

    /// Removes a sequence, wherever it is, and gives it back with the number of its
    /// blocks. They are free at once, or when the last step that touches them has
    /// completed.
    pub fn remove(&mut self, key: SequenceKey) -> Option<(Sequence, usize)> {
        let mut sequence = self.sequences.remove(key)?;
        self.running.remove(key);
        self.waiting.remove(key);
        let blocks = self.cache.release(&mut sequence.table, sequence.touched);
        Some((sequence, blocks))
    }

    /// Pauses a sequence, or lets it go on.
    pub fn set_paused(&mut self, key: SequenceKey, paused: bool) {
        if let Some(sequence) = self.sequences.get_mut(key) {
            sequence.paused = paused;
        }
    }

    /// Step `step` has completed on the device.
    pub fn completed(&mut self, step: StepId) {
        self.cache.completed(step);
    }

    /// Chooses the rows of the next step and books their blocks. `None` when there
    /// is nothing to do before a step completes or a command arrives.
    pub fn plan(&mut self) -> Option<StepPlan> {
        let step = self.launched.next();
        let mut plan = StepPlan {
            step,
            ..StepPlan::default()
        };
        let mut budget = self.policy.max_batch_tokens;
        let mut samples = 0;
        self.plan_running(&mut plan, &mut budget, &mut samples, true);
        self.plan_running(&mut plan, &mut budget, &mut samples, false);
        self.admit(&mut plan, &mut budget, &mut samples);
        if plan.items.is_empty() {
            return None;
        }
        self.launched = step;
        Some(plan)
    }

    /// Plans the running sequences that decode, or those still at their prompt.
    fn plan_running(
        &mut self,
        plan: &mut StepPlan,
        budget: &mut usize,
        samples: &mut usize,
        decodes: bool,
    ) {
        // Making room changes the queue: walk over a copy of it.
        let mut keys = std::mem::take(&mut self.scratch);
        keys.clear();
        keys.extend_from_slice(self.running.keys());
        for &key in &keys {
            let Some(sequence) = self.sequences.get(key) else {
                continue;
            };
            let pending = sequence.pending();
            let skip = sequence.paused || !sequence.running || *budget == 0;
            if skip || pending == 0 || (pending == 1) != decodes {
                continue;
            }
            let count = pending.min(*budget);
            let needed = sequence.computed + count;
            if self.make_room(key, needed, plan) {
                *budget -= count;
                self.push_item(plan, key, count, samples);
            }
        }
        self.scratch = keys;
    }

    /// Books the item in the sequence and adds it to the plan.
    fn push_item(
        &mut self,
        plan: &mut StepPlan,
        key: SequenceKey,
        count: usize,
        samples: &mut usize,
    ) {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        let start = sequence.computed;
        let sample = start + count == sequence.length();
        let input = if start >= sequence.tokens.len() {
            TokenInput::Feedback {
                sample: sequence.last_sample,
            }
        } else {
            TokenInput::Known
        };
        sequence.computed += count;
        sequence.touched = plan.step;
        if sample {
            sequence.in_flight += 1;
            sequence.last_sample = *samples;
            *samples += 1;
        }
        plan.items.push(PlanItem {
            key,
            start,
            count,
            input,
            sample,
        });
    }

    /// Makes the table of `key` long enough for `tokens`, preempting others if it
    /// must. `false` when it can't be now: then nothing was booked for `key`.
    fn make_room(&mut self, key: SequenceKey, tokens: usize, plan: &StepPlan) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(key) else {
                return false;
            };
            let Err(short) = self.cache.grow(&mut sequence.table, tokens) else {
                return true;
            };
            if self.cache.free_blocks() + self.cache.deferred_blocks() >= short.needed {
                return false; // a step in flight frees enough: wait for it
            }
            match self.victim(key, plan) {
                Some(victim) => self.preempt(victim),
                None => return false,
            }
            if self
                .sequences
                .get(key)
                .is_none_or(|sequence| !sequence.running)
            {
                return false; // it was its own victim
            }
        }
    }

    /// Who gives way to `key`, which is not paused: the latest paused sequence, else
    /// the latest one that arrived no earlier than `key` itself.
    fn victim(&self, key: SequenceKey, plan: &StepPlan) -> Option<SequenceKey> {
        let own = self.sequences.get(key)?.arrival;
        self.latest_outside(plan, |sequence| sequence.paused)
            .or_else(|| self.latest_outside(plan, |sequence| sequence.arrival >= own))
    }

    /// The latest running sequence of a kind that is not in the plan. What runs holds
    /// blocks.
    fn latest_outside(
        &self,
        plan: &StepPlan,
        kind: impl Fn(&Sequence) -> bool,
    ) -> Option<SequenceKey> {
        let planned = |key: &SequenceKey| plan.items.iter().any(|item| item.key == *key);
        let mut latest_first = self.running.keys().iter().rev().copied();
        latest_first.find(|key| self.sequences.get(*key).is_some_and(&kind) && !planned(key))
    }

    /// Takes a sequence's blocks; it waits to be computed anew.
    fn preempt(&mut self, key: SequenceKey) {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        self.cache.release(&mut sequence.table, sequence.touched);
        sequence.computed = 0;
        sequence.running = false;
        self.preemptions += 1;
        self.running.remove(key);
        self.waiting.insert(key, &self.sequences);
    }

    /// Starts waiting sequences, in order, while budget, places and blocks last.
    /// A sequence starts only when all its known tokens fit.
    fn admit(&mut self, plan: &mut StepPlan, budget: &mut usize, samples: &mut usize) {
        let mut index = 0;
        while *budget > 0 {
            let Some(&key) = self.waiting.keys().get(index) else {
                break;
            };
            let Some(sequence) = self.sequences.get(key) else {
                break;
            };
            // One that was preempted with a sample in flight waits for that sample.
            if sequence.paused || sequence.in_flight > 0 {
                index += 1;
                continue;
            }
            let tokens = sequence.tokens.len();
            if self.running.len() >= self.policy.max_sequences {
                // A paused sequence holds a place that others could use.
                match self.latest_outside(plan, |sequence| sequence.paused) {
                    Some(paused) => self.preempt(paused),
                    None => break,
                }
                continue;
            }
            if !self.room_to_admit(key, tokens, plan) {
                break;
            }
            self.waiting.remove(key);
            self.running.insert(key, &self.sequences);
            let Some(sequence) = self.sequences.get_mut(key) else {
                break;
            };
            sequence.running = true;
            let count = sequence.pending().min(*budget);
            *budget -= count;
            self.push_item(plan, key, count, samples);
        }
    }

    /// Books the blocks of a waiting sequence. Only paused sequences give way to
    /// one; a block is kept back for each running sequence, so that the newcomer is
    /// not preempted at once.
    fn room_to_admit(&mut self, key: SequenceKey, tokens: usize, plan: &StepPlan) -> bool {
        loop {
            let reserve = self.running.len();
            let Some(sequence) = self.sequences.get_mut(key) else {
                return false;
            };
            let needed = self.cache.blocks_for(tokens) + reserve;
            if needed <= self.cache.free_blocks() {
                return self.cache.grow(&mut sequence.table, tokens).is_ok();
            }
            if needed <= self.cache.free_blocks() + self.cache.deferred_blocks() {
                return false;
            }
            match self.latest_outside(plan, |sequence| sequence.paused) {
                Some(paused) => self.preempt(paused),
                None => return false,
            }
        }
    }

    /// Takes the sample of one plan item.
    pub fn commit(&mut self, key: SequenceKey, token: u32) -> Commit {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        sequence.tokens.push(token);
        if sequence.spec.stop_tokens.contains(&token) {
            Commit::Finished(FinishReason::Stop)
        } else if sequence.tokens.len() >= sequence.spec.max_tokens {
            Commit::Finished(FinishReason::Length)
        } else {
            Commit::Token
        }
    }
}
