//! Starts waiting sequences, and decides where their first keys and values come from.

use super::Scheduler;
use super::plan::Budget;
use crate::cache::{Extent, PrefixHit};
use crate::id::SessionId;
use crate::schedule::{SequenceKey, SequenceState, Sequences, StepPlan};

/// Where a starting sequence takes its first keys and values from.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// Host memory, for the tokens that the prefix cache does not have.
    Swapped,
    /// The last turn of this session.
    Session(SessionId),
    /// The sequence with the same prompt.
    Leader(SequenceKey),
    /// The prefix cache.
    Prefix,
}

/// What starting a sequence would take.
#[derive(Clone, Copy, Debug)]
pub(super) struct StartCost {
    source: Source,
    /// Number of tokens whose keys and values exist already.
    computed: usize,
    /// Number of blocks to allocate.
    pub missing: usize,
    /// Number of reused blocks that count as available now and no longer will when the sequence
    /// holds them.
    pub reused_cached_blocks: usize,
    /// The same for snapshots of states.
    pub reused_cached_states: usize,
    /// Whether the sequence has a slot for its state already.
    pub has_state: bool,
    /// What the prefix cache knows, if it was asked.
    known: PrefixHit,
}

impl Scheduler {
    /// Starts waiting sequences in order, as long as budget, places and blocks are left.
    /// `wanted` decides whether the next one may start, given its priority and that of the last
    /// running sequence, if any. A sequence starts only if all its known tokens fit in the
    /// cache.
    pub(super) fn admit(
        &mut self,
        plan: &mut StepPlan,
        budget: &mut Budget,
        wanted: impl Fn(i32, Option<i32>) -> bool,
    ) {
        let priority =
            |sequences: &Sequences, key| sequences.get(key).map(|other| other.spec.priority);
        while budget.tokens > 0 && budget.samples > 0 {
            let Some(key) = self.waiting.next(&self.tenants) else {
                break;
            };
            let last = self.running.keys().last();
            let last = last.and_then(|last| priority(&self.sequences, *last));
            if !priority(&self.sequences, key).is_some_and(|own| wanted(own, last)) {
                break;
            }
            let tokens = |key| self.sequences.get(key).map_or(0, |own| own.tokens.len());
            if self.policy.whole_prompts && tokens(key) > budget.tokens {
                break;
            }
            if self.running.len() >= self.policy.max_sequences {
                // Most often, there is no victim, so look for it before what takes longer.
                let Some(victim) = self.victim_to_start(key, plan) else {
                    break;
                };
                match self.start_cost(key) {
                    Some(cost) if self.fits_if_others_give_way(key, &cost, plan) => {
                        self.preempt(victim, plan, self.kept_for(&cost));
                    }
                    _ => break,
                }
                continue;
            }
            let Some(cost) = self.room_to_start(key, plan) else {
                break;
            };
            let count = self.start(key, cost, plan, budget);
            self.push_item(plan, key, count, budget);
        }
    }

    /// Returns what starting a waiting sequence would take now; `None` if it cannot start yet.
    pub(super) fn start_cost(&self, key: SequenceKey) -> Option<StartCost> {
        let sequence = self.sequences.get(key)?;
        let length = sequence.tokens.len();
        let most = sequence.reusable();
        let step_tokens = self.policy.max_batch_tokens;
        let salt = sequence.spec.salt.as_ref();
        let retained = |session| Some((session, self.retained.get(session)?));
        if let Some(swapped) = &sequence.swapped {
            if swapped.step > self.cache.last_completed_step() {
                return None; // the step that copies the blocks out may still fail
            }
            // All swapped-out tokens were reported before, so none must be
            // recomputed.
            let limit = swapped.tokens.min(length - 1);
            let known = self
                .cache
                .lookup_before(salt, &sequence.tokens, limit, &swapped.first);
            let blocks = self.cache.blocks_from(&swapped.first, length, step_tokens);
            return Some(StartCost {
                source: Source::Swapped,
                computed: swapped.tokens,
                missing: blocks - known.blocks,
                reused_cached_blocks: known.cached,
                reused_cached_states: 0,
                has_state: true,
                known,
            });
        }
        if let Some((session, retained)) = sequence.spec.session.and_then(retained) {
            let computed = retained.tokens.len().min(most);
            return Some(StartCost {
                source: Source::Session(session),
                computed,
                missing: self.cache.blocks_to_continue(
                    &retained.table,
                    computed,
                    length,
                    step_tokens,
                ),
                reused_cached_blocks: 0,
                reused_cached_states: 0,
                has_state: false,
                known: PrefixHit::default(),
            });
        }
        // A sequence that has started before may find more than the prompt in the prefix cache.
        let leader = sequence.leader.filter(|_| !sequence.started);
        let leader = leader.and_then(|leader| self.sequences.get(leader));
        let leader = leader.filter(|leader| leader.written_tokens >= leader.prompt_tokens);
        let computed = leader.map_or(0, |leader| leader.prompt_tokens.min(most));
        // The leader may have given back what is needed here, if this sequence waited for long.
        if leader.is_some_and(|leader| self.cache.can_continue(&leader.table, computed)) {
            return Some(StartCost {
                source: Source::Leader(sequence.leader?),
                computed,
                // A partial last block counts as missing, because it is copied before it is
                // written.
                missing: self.cache.blocks_after(computed, length, step_tokens),
                reused_cached_blocks: 0,
                reused_cached_states: 0,
                has_state: false,
                known: PrefixHit::default(),
            });
        }
        let known = self.cache.lookup(salt, &sequence.tokens, most);
        Some(StartCost {
            source: Source::Prefix,
            computed: known.tokens,
            missing: self.cache.blocks_after(known.tokens, length, step_tokens),
            reused_cached_blocks: known.cached,
            reused_cached_states: known.cached_states,
            has_state: false,
            known,
        })
    }

    /// Starts a waiting sequence for which there is room. Returns the number of tokens to
    /// compute for it in this step.
    fn start(
        &mut self,
        key: SequenceKey,
        cost: StartCost,
        plan: &mut StepPlan,
        budget: &Budget,
    ) -> usize {
        self.waiting.remove(key, &self.sequences);
        self.set_state(key, SequenceState::Running);
        self.running.insert(key, &self.sequences);
        let shared = match cost.source {
            Source::Leader(leader) => self
                .sequences
                .get(leader)
                .map(|leader| self.cache.share(&leader.table, cost.computed)),
            _ => None,
        };
        let retained = match cost.source {
            Source::Session(session) => self.retained.take(session),
            _ => None,
        };
        let Some(sequence) = self.sequences.get_mut(key) else {
            return 0;
        };
        sequence.started_step = plan.step;
        sequence.launched_tokens = cost.computed;
        // Only where it is of use: others have computed these tokens, but left no snapshot.
        let interval = self.cache.state_interval();
        let branch = interval.map_or(0, |interval| cost.known.matched / interval * interval);
        sequence.branch = if branch > cost.computed { branch } else { 0 };
        let count = sequence.pending().min(budget.tokens);
        let count = sequence.tokens_to_branch(sequence.tokens_within(count, budget.samples));
        // Number of tokens that the prefix cache has.
        let mut known = 0;
        if let Some(table) = shared {
            sequence.table = table;
        } else if let Some(retained) = retained {
            sequence.table = retained.table;
            sequence.last_step = sequence.last_step.max(retained.last_step);
        } else {
            let (table, hit) = (&mut sequence.table, &cost.known);
            match &sequence.swapped {
                Some(swapped) => self.cache.attach_before(table, hit, &swapped.first),
                None => self.cache.attach(table, hit),
            }
            known = hit.tokens;
        }
        sequence.reserve(&self.cache, self.policy.max_batch_tokens);
        sequence.written_tokens = match cost.source {
            Source::Swapped => 0,
            _ => cost.computed,
        };
        let from = sequence.launched_tokens;
        let extent = Extent {
            full: sequence.tokens.len(),
            windowed: from + count,
        };
        let (table, transfers) = (&mut sequence.table, &mut plan.transfers);
        let copies = transfers.copies.len();
        let booked = self
            .cache
            .prepare(table, from, extent, plan.step, transfers);
        debug_assert!(booked.is_ok(), "there was room: {booked:?}");
        if transfers.copies.len() > copies {
            // A copied block counts as written only when this step has completed, because the
            // step may fail.
            let size = self.cache.block_tokens();
            sequence.written_tokens = sequence.written_tokens.min(from - from % size);
        }
        if let Some(swapped) = sequence.swapped.take() {
            self.totals.swaps_in += 1;
            let needed = self.cache.blocks_for(known)..self.cache.blocks_for(swapped.tokens);
            let mut host = swapped.blocks.iter();
            for (group, &first) in swapped.first.iter().enumerate() {
                let own = host.by_ref().take(swapped.end.saturating_sub(first));
                for (index, &host) in (first..).zip(own) {
                    if needed.contains(&index)
                        && let Some(block) = sequence.table.block(group, index)
                    {
                        plan.transfers.swap_in.push((host, block));
                    }
                }
            }
            self.read_back.extend(swapped.blocks);
        }
        if !sequence.started {
            sequence.started = true;
            sequence.cached_tokens = cost.computed;
            if !sequence.spec.task.needs_every_token() {
                self.totals.prefix_queries += sequence.prompt_tokens as u64;
                let whole = sequence.prompt_tokens.saturating_sub(1);
                let whole = whole / self.cache.block_tokens() * self.cache.block_tokens();
                self.totals
                    .prefix_misses
                    .add(whole, cost.computed, &cost.known);
            }
            self.totals.prefix_hits += cost.computed as u64;
        }
        count
    }
}
