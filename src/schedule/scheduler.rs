//! The scheduler, which plans steps and commits their results.

use super::policy::{ComputeSpeed, PreemptionCost};
use super::queue::{RunningQueue, WaitingQueue};
use super::retained::{RetainedSession, RetainedSessions};
use super::sequence::Swapped;
use super::tenants::Tenants;
use super::{
    FinishReason, PlanItem, Policy, Sequence, SequenceKey, SequenceSpec, SequenceState, Sequences,
    StepPlan, Task, TokenInput,
};
use crate::cache::{
    AccountingError, BlockCache, BlockCounts, BlockId, BlockTable, HostBlockId, HostBlocks,
};
use crate::id::{RequestId, SessionId, StepId};
use crate::sampling::ConstraintError;
use serde::Serialize;
use std::time::Instant;

/// Number of sequences in each state, and totals of what was done for them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sequences that hold blocks and take part in steps.
    pub running: usize,
    /// Sequences that wait, whether never started or preempted.
    pub waiting: usize,
    /// Running and waiting sequences whose reader is too slow.
    pub paused: usize,
    /// Number of preemptions since the start.
    pub preemptions: u64,
    /// Number of preemptions that copied the blocks to host memory.
    pub swaps: u64,
    /// Prompt tokens that were looked up for reuse, since the start.
    pub prefix_queries: u64,
    /// Prompt tokens that were reused from the prefix cache, from a session or from a sequence
    /// with the same prompt, since the start.
    pub prefix_hits: u64,
    /// Sessions that keep keys and values between their turns.
    pub retained_sessions: usize,
    /// Blocks that these sessions keep.
    pub retained_blocks: usize,
    /// Blocks that these sessions have pinned.
    pub pinned_blocks: usize,
    /// Number of pins refused since the start because of the cap on pinned blocks.
    pub pins_refused: u64,
    /// Blocks of host memory in use.
    pub swapped_blocks: usize,
}

/// Result of committing one sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The token was appended, and the sequence goes on.
    Token,
    /// The token was appended, and the sequence has ended. It holds its blocks until the caller
    /// closes it.
    Finished(FinishReason),
    /// The sequence's constraint failed. The token was not appended, and the caller must close
    /// the sequence.
    Failed(ConstraintError),
    /// The sequence no longer exists, and the token was discarded.
    Discarded,
}

/// What happens to the blocks of a sequence that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockDisposition {
    /// They are released.
    Release,
    /// The sequence's session keeps the blocks of the first tokens.
    Retain {
        /// Number of tokens to keep.
        tokens: usize,
        /// Time until which the blocks are pinned; not pinned if `None`.
        pin_until: Option<Instant>,
    },
}

/// Size of what a session keeps between its turns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct RetainedCache {
    /// Number of tokens whose keys and values are retained.
    pub tokens: usize,
    /// Number of blocks that hold them.
    pub blocks: usize,
    /// Whether the blocks are pinned, so that they are not evicted.
    pub pinned: bool,
}

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
struct StartCost {
    source: Source,
    /// Number of tokens whose keys and values exist already.
    computed: usize,
    /// Number of blocks to allocate.
    missing: usize,
    /// Number of reused blocks that count as available now and no longer will when the sequence
    /// holds them.
    reused_cached_blocks: usize,
}

/// What is left of a step's limits.
struct Budget {
    tokens: usize,
    samples: usize,
}

/// The scheduler, which owns the sequences and the block accounting.
#[derive(Debug)]
pub struct Scheduler {
    policy: Policy,
    cache: BlockCache,
    host: HostBlocks,
    /// Host blocks that the step being planned copies in. They are freed when the step is fully
    /// planned: it copies out before it copies in, so it must not copy out to these blocks.
    read_back: Vec<HostBlockId>,
    sequences: Sequences,
    running: RunningQueue,
    waiting: WaitingQueue,
    tenants: Tenants,
    retained: RetainedSessions,
    speed: ComputeSpeed,
    arrivals: u64,
    paused: usize,
    /// Totals since the start. The other fields stay 0 until [`Scheduler::counts`] fills them
    /// in.
    totals: Counts,
    launched: StepId,
    /// Spare allocation for [`Scheduler::plan_running`].
    scratch: Vec<SequenceKey>,
}

impl Scheduler {
    /// Creates a scheduler without sequences.
    pub fn new(policy: Policy, cache: BlockCache) -> Self {
        Self {
            policy,
            cache,
            host: HostBlocks::new(policy.swap_blocks),
            read_back: Vec::new(),
            sequences: Sequences::default(),
            running: RunningQueue::default(),
            waiting: WaitingQueue::default(),
            tenants: Tenants::default(),
            retained: RetainedSessions::default(),
            speed: ComputeSpeed::default(),
            arrivals: 0,
            paused: 0,
            totals: Counts::default(),
            launched: StepId::default(),
            scratch: Vec::new(),
        }
    }

    /// Returns all sequences that have not ended.
    pub fn sequences(&self) -> &Sequences {
        &self.sequences
    }

    /// Returns the block accounting of the KV cache.
    pub fn cache(&self) -> &BlockCache {
        &self.cache
    }

    /// Returns the blocks whose content was discarded since the last call. Recording starts
    /// with the first call, which returns nothing.
    pub fn take_freed(&mut self) -> Vec<BlockId> {
        self.cache.take_freed()
    }

    /// Returns the last step that was planned.
    pub fn launched(&self) -> StepId {
        self.launched
    }

    /// Returns the number of sequences in each state, and totals of what was done for them.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.sequences.len() - self.running.len(),
            paused: self.paused,
            retained_sessions: self.retained.len(),
            retained_blocks: self.retained.blocks(),
            pinned_blocks: self.retained.pinned_blocks(),
            swapped_blocks: self.host.total() - self.host.free(),
            ..self.totals
        }
    }

    /// Checks the block accounting (I3), and that every sequence is in exactly one state (I2).
    ///
    /// # Errors
    /// Returns [`AccountingError`] if the recorded numbers differ from a recount. This is always a
    /// bug.
    pub fn audit(&self) -> Result<BlockCounts, AccountingError> {
        let in_state = |state| {
            let sequences = self.sequences.values();
            sequences.filter(|other| other.state == state).count()
        };
        let swapped: usize = self
            .sequences
            .values()
            .filter_map(|sequence| Some(sequence.swapped.as_ref()?.blocks.len()))
            .sum();
        let paused = self.sequences.values().filter(|other| other.paused).count();
        let sums = [
            (
                "running sequences",
                self.running.len(),
                in_state(SequenceState::Running),
            ),
            (
                "waiting sequences",
                self.waiting.len(),
                in_state(SequenceState::Waiting),
            ),
            ("paused sequences", self.paused, paused),
            (
                "swapped-out blocks",
                self.host.total() - self.host.free(),
                swapped,
            ),
        ];
        for (what, counted, found) in sums.into_iter().chain(self.retained.sums()) {
            if counted != found {
                return Err(AccountingError(format!(
                    "{counted} {what} recorded, but {found} found"
                )));
            }
        }
        for sequence in self.sequences.values() {
            if sequence.state != SequenceState::Running && !sequence.table.is_empty() {
                return Err(AccountingError(format!(
                    "{} holds blocks but is not running",
                    sequence.id
                )));
            }
        }
        if self.sequences.is_empty() && !self.tenants.is_empty() {
            return Err(AccountingError(
                "there are tenants but no sequences".to_owned(),
            ));
        }
        let tables = self.sequences.values().map(|sequence| &sequence.table);
        self.cache.audit(tables.chain(self.retained.tables()))
    }

    /// Adds a sequence to the queue. If its session keeps tokens, those after the common
    /// beginning with the prompt are dropped, and their blocks are released.
    pub fn add(&mut self, id: RequestId, spec: SequenceSpec) -> SequenceKey {
        self.add_follower(id, spec, None)
    }

    /// Like [`Scheduler::add`], for a sequence with the same prompt as `leader`. The sequence
    /// starts when the leader has computed the prompt, and shares its blocks. A leader with
    /// another salt is ignored.
    pub fn add_follower(
        &mut self,
        id: RequestId,
        spec: SequenceSpec,
        leader: Option<SequenceKey>,
    ) -> SequenceKey {
        self.arrivals += 1;
        if let Some(session) = spec.session {
            // A task that needs every row recomputes the whole prompt, so it reuses nothing.
            // Blocks with another salt must not be reused.
            let retained = self.retained.get(session);
            let foreign =
                retained.is_some_and(|retained| retained.table.salt() != spec.salt.as_ref());
            let reusable = match spec.task.needs_every_row() || foreign {
                true => &[],
                false => spec.prompt.as_slice(),
            };
            self.cut_retained(session, reusable);
        }
        let tenant = self.tenants.open(&spec.tenant);
        let same_salt = |leader: &SequenceKey| {
            let leader = self.sequences.get(*leader);
            leader.is_some_and(|leader| leader.spec.salt == spec.salt)
        };
        let leader = leader.filter(same_salt);
        let mut sequence = Sequence::new(id, spec, tenant, self.arrivals);
        sequence.leader = leader;
        let key = self.sequences.insert(sequence);
        if let Some(leader) = leader.and_then(|leader| self.sequences.get_mut(leader)) {
            leader.followers.push(key);
        }
        self.unblock(key);
        key
    }

    /// Cuts what a session keeps to the common beginning with `tokens`.
    fn cut_retained(&mut self, session: SessionId, tokens: &[u32]) {
        let Some(retained) = self.retained.get(session) else {
            return;
        };
        let common = retained.tokens.iter().zip(tokens);
        let common = common.take_while(|(retained, new)| retained == new).count();
        // Called even if nothing is cut, because it marks the session as used.
        self.rewind_session(session, common);
    }

    /// Moves a blocked sequence to the waiting ones, unless something holds it back.
    fn unblock(&mut self, key: SequenceKey) {
        let Some(sequence) = self.sequences.get(key) else {
            return;
        };
        let led = sequence
            .leader
            .and_then(|leader| self.sequences.get(leader))
            .is_some_and(|leader| leader.written_tokens < leader.prompt_tokens);
        // A sequence that has started before does not wait for its leader's prompt again.
        let led = led && !sequence.started;
        let held_back = sequence.paused || sequence.in_flight > 0 || led;
        if sequence.state == SequenceState::Blocked && !held_back {
            self.set_state(key, SequenceState::Waiting);
            self.waiting.insert(key, &self.sequences);
        }
    }

    fn set_state(&mut self, key: SequenceKey, state: SequenceState) {
        if let Some(sequence) = self.sequences.get_mut(key) {
            sequence.state = state;
        }
    }

    /// Ends a sequence in any state and releases all its blocks, like [`Scheduler::close`] with
    /// [`BlockDisposition::Release`].
    pub fn remove(&mut self, key: SequenceKey) -> Option<(Sequence, usize)> {
        self.close(key, BlockDisposition::Release)
    }

    /// Ends a sequence in any state. Returns it with the number of blocks that no table holds
    /// any more. These can be allocated at once, or when the last step that touches them has
    /// completed.
    pub fn close(
        &mut self,
        key: SequenceKey,
        disposition: BlockDisposition,
    ) -> Option<(Sequence, usize)> {
        let state = self.sequences.get(key)?.state;
        match state {
            SequenceState::Running => self.running.remove(key, &self.sequences),
            SequenceState::Waiting => self.waiting.remove(key, &self.sequences),
            SequenceState::Blocked => {}
        }
        let mut sequence = self.sequences.remove(key)?;
        self.paused -= usize::from(sequence.paused);
        self.tenants.close(sequence.tenant);
        if let Some(swapped) = sequence.swapped.take() {
            self.host.release(swapped.blocks);
        }
        self.hand_over(std::mem::take(&mut sequence.followers));
        let blocks = match (disposition, sequence.spec.session) {
            (BlockDisposition::Retain { tokens, pin_until }, Some(session)) => {
                self.retain(&mut sequence, session, tokens, pin_until)
            }
            _ => self.cache.release(&mut sequence.table, sequence.last_step),
        };
        Some((sequence, blocks))
    }

    /// Makes the first of these sequences the leader of the others, because their leader ended
    /// before it had computed the prompt.
    fn hand_over(&mut self, followers: Vec<SequenceKey>) {
        let alive = |key: &SequenceKey| self.sequences.contains_key(*key);
        let mut rest = followers.into_iter().filter(alive).collect::<Vec<_>>();
        if rest.is_empty() {
            return;
        }
        let first = rest.remove(0);
        for &follower in &rest {
            if let Some(follower) = self.sequences.get_mut(follower) {
                follower.leader = Some(first);
            }
        }
        if let Some(first) = self.sequences.get_mut(first) {
            first.leader = None;
            first.followers = rest;
        }
        self.unblock(first);
    }

    /// Lets the session keep the blocks of the first `tokens` tokens. Returns the number of
    /// other blocks that no table holds any more.
    fn retain(
        &mut self,
        sequence: &mut Sequence,
        session: SessionId,
        tokens: usize,
        pin_until: Option<Instant>,
    ) -> usize {
        if sequence.table.is_empty() {
            // If the sequence never started, the session still has what it retained before.
            return self.rewind_session(session, tokens);
        }
        let tokens = tokens
            .min(sequence.written_tokens)
            .min(sequence.tokens.len());
        let last_step = sequence.last_step;
        let blocks = self.cache.truncate(&mut sequence.table, tokens, last_step);
        let mut table = std::mem::take(&mut sequence.table);
        if table.is_empty() {
            return blocks;
        }
        table.shrink();
        let cap = self.policy.max_pinned_blocks;
        let fits = self.retained.pinned_blocks() + table.len() <= cap;
        self.totals.pins_refused += u64::from(pin_until.is_some() && !fits);
        let pin_until = pin_until.filter(|_| fits);
        self.retained.insert(
            session,
            RetainedSession {
                tokens: sequence.tokens[..tokens].to_vec(),
                table,
                last_step,
                pinned_until: pin_until,
                ..RetainedSession::default()
            },
        );
        blocks
    }

    /// Returns the size of what a session keeps now.
    pub fn retained(&self, session: SessionId) -> RetainedCache {
        self.retained
            .get(session)
            .map_or_else(RetainedCache::default, RetainedSession::size)
    }

    /// Returns every session that keeps something, ordered by id, with the size and the block
    /// table of what it keeps.
    pub fn retained_sessions(&self) -> Vec<(SessionId, RetainedCache, &BlockTable)> {
        let retained = self.retained.iter();
        let mut all: Vec<_> = retained
            .map(|(session, retained)| (session, retained.size(), &retained.table))
            .collect();
        all.sort_unstable_by_key(|(session, ..)| *session);
        all
    }

    /// Returns what all sessions keep: the tokens, and the blocks that hold them.
    #[cfg(test)]
    pub(crate) fn retained_contents(
        &self,
    ) -> impl Iterator<Item = (&[u32], &crate::cache::BlockTable)> {
        self.retained.contents()
    }

    /// Cuts what a session keeps to its first `tokens` tokens. Returns the number of blocks
    /// that no table holds any more.
    pub fn rewind_session(&mut self, session: SessionId, tokens: usize) -> usize {
        let Some(mut retained) = self.retained.take(session) else {
            return 0;
        };
        retained.tokens.truncate(tokens);
        let blocks = self
            .cache
            .truncate(&mut retained.table, tokens, retained.last_step);
        if !retained.table.is_empty() {
            self.retained.insert(session, retained);
        }
        blocks
    }

    /// Releases everything that a session keeps. Returns the number of blocks that no table
    /// holds any more, and the last step that touches them.
    pub fn end_session(&mut self, session: SessionId) -> (usize, StepId) {
        match self.retained.take(session) {
            Some(mut retained) => {
                let blocks = self.cache.release(&mut retained.table, retained.last_step);
                (blocks, retained.last_step)
            }
            None => (0, StepId::default()),
        }
    }

    /// Lets the new session `to` keep what `from` keeps. Both share the blocks.
    pub fn fork_session(&mut self, from: SessionId, to: SessionId) {
        let Some(retained) = self.retained.get(from) else {
            return;
        };
        let table = self.cache.share(&retained.table, retained.tokens.len());
        let fork = RetainedSession {
            tokens: retained.tokens.clone(),
            table,
            last_step: retained.last_step,
            ..RetainedSession::default()
        };
        self.retained.insert(to, fork);
    }

    /// Removes the pins that have expired by `now`, so that their sessions can be evicted.
    pub fn expire_pins(&mut self, now: Instant) {
        self.retained.expire(now);
    }

    /// Forgets the tokens of all blocks that no table holds.
    pub fn clear_prefixes(&mut self) {
        self.cache.clear_prefixes();
    }

    /// Pauses a sequence, or resumes it.
    pub fn set_paused(&mut self, key: SequenceKey, paused: bool) {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        if sequence.paused == paused {
            return;
        }
        sequence.paused = paused;
        let state = sequence.state;
        if !paused {
            self.paused -= 1;
            self.unblock(key);
            return;
        }
        self.paused += 1;
        if state == SequenceState::Waiting {
            self.waiting.remove(key, &self.sequences);
            self.set_state(key, SequenceState::Blocked);
        }
    }

    /// Records that step `step` and all before it have completed on the device.
    pub fn step_completed(&mut self, step: StepId) {
        self.cache.step_completed(step);
    }

    /// Records that a step of `rows` rows took `seconds`, from which the cost of recomputing is
    /// estimated.
    pub fn observe_step(&mut self, rows: usize, seconds: f64) {
        self.speed.observe(rows, seconds);
    }

    /// Chooses the rows of the next step and allocates their blocks. Returns `None` if there is
    /// nothing to do until a step completes or a command arrives.
    pub fn plan(&mut self) -> Option<StepPlan> {
        let mut plan = StepPlan::default();
        self.plan_into(&mut plan).then_some(plan)
    }

    /// Like [`Scheduler::plan`], but reuses the allocations of an earlier plan. Returns whether
    /// there is something to do.
    pub fn plan_into(&mut self, plan: &mut StepPlan) -> bool {
        plan.clear();
        plan.step = self.launched.next();
        let mut budget = Budget {
            tokens: self.policy.max_batch_tokens,
            samples: self.policy.max_samples(),
        };
        // Sequences that are more urgent than a running one are admitted before the running
        // ones are planned, while these can still be preempted.
        self.admit(plan, &mut budget, |urgent, running| {
            running.is_some_and(|last| urgent < last)
        });
        self.plan_running(plan, &mut budget);
        self.admit(plan, &mut budget, |_, _| true);
        self.host.release(self.read_back.drain(..));
        let some = !plan.items.is_empty() || !plan.transfers.is_empty();
        if some {
            self.launched = plan.step;
        }
        some
    }

    /// Plans the running sequences: first those that decode, then those that are still in
    /// prefill.
    fn plan_running(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        // Iterate over a copy, because making room changes the queue.
        let mut keys = std::mem::take(&mut self.scratch);
        keys.clear();
        keys.extend_from_slice(self.running.keys());
        // Sequences in prefill are moved to the front of `keys`, for the second loop.
        let mut prompts = 0;
        for index in 0..keys.len() {
            let key = keys[index];
            match self.plannable(key, plan) {
                _ if budget.tokens == 0 => break,
                0 => {}
                1 => self.plan_rows(key, 1, plan, budget),
                _ => {
                    keys[prompts] = key;
                    prompts += 1;
                }
            }
        }
        for &key in &keys[..prompts] {
            let count = self.plannable(key, plan).min(budget.tokens);
            if count > 0 {
                self.plan_rows(key, count, plan, budget);
            }
        }
        self.scratch = keys;
    }

    /// Returns how many more tokens of a sequence this step could compute; 1 means a decode.
    fn plannable(&self, key: SequenceKey, plan: &StepPlan) -> usize {
        let runs = |sequence: &&Sequence| {
            let planned = sequence.last_step == plan.step;
            !planned && !sequence.paused && sequence.state == SequenceState::Running
        };
        let sequence = self.sequences.get(key).filter(runs);
        sequence.map_or(0, Sequence::pending)
    }

    /// Plans the next `count` tokens of a running sequence, or fewer, if there is room for
    /// them.
    fn plan_rows(
        &mut self,
        key: SequenceKey,
        count: usize,
        plan: &mut StepPlan,
        budget: &mut Budget,
    ) {
        let sequence = self.sequences.get(key);
        let count = sequence.map_or(0, |own| own.rows_within(count, budget.samples));
        if count > 0 && self.make_room(key, count, plan) {
            self.push_item(plan, key, count, budget);
        }
    }

    /// Adds an item that is within the budget to the plan, and updates the sequence.
    fn push_item(
        &mut self,
        plan: &mut StepPlan,
        key: SequenceKey,
        count: usize,
        budget: &mut Budget,
    ) {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        let start = sequence.launched_tokens;
        let sample = sequence.samples_last(count);
        let end = sequence.ends_with_prompt() && start + count == sequence.length();
        let report = sequence.report(count);
        let input = if start >= sequence.tokens.len() {
            TokenInput::Feedback {
                sample: sequence.last_sample,
            }
        } else {
            TokenInput::Known
        };
        sequence.launched_tokens += count;
        let reported = sequence.launched_tokens.min(sequence.prompt_tokens);
        sequence.reported = sequence.reported.max(reported);
        sequence.last_step = plan.step;
        if sample || end {
            sequence.in_flight += 1;
        }
        let item = PlanItem {
            key,
            start,
            count,
            input,
            sample,
            end,
            report,
        };
        budget.tokens -= count;
        budget.samples -= item.sample_count();
        // The sample of an item's last row is the last sample of the item.
        sequence.last_sample = (self.policy.max_samples() - budget.samples).saturating_sub(1);
        self.tenants.charge(sequence.tenant, count, sample);
        plan.items.push(item);
    }

    /// Prepares the block table of `key` for its next `count` tokens, and evicts or preempts
    /// others if necessary. Returns whether this succeeded; if not, no block of `key` was
    /// allocated.
    fn make_room(&mut self, key: SequenceKey, count: usize, plan: &mut StepPlan) -> bool {
        loop {
            let Some(sequence) = self.sequences.get_mut(key) else {
                return false;
            };
            let start = sequence.launched_tokens;
            let Err(short) = self.cache.prepare(
                &mut sequence.table,
                start,
                start + count,
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
            match self.victim(key, plan) {
                Some(victim) => self.preempt(victim, plan),
                None => return false,
            }
            let own = self.sequences.get(key);
            if own.is_none_or(|sequence| sequence.state != SequenceState::Running) {
                return false; // `key` itself was the victim
            }
        }
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

    /// Estimates what preempting a sequence would cost.
    fn preemption_cost(&self, sequence: &Sequence) -> PreemptionCost {
        let blocks = self.cache.blocks_for(sequence.launched_tokens);
        let swap = 2.0 * blocks as f64 * self.policy.swap_seconds_per_block;
        PreemptionCost {
            recompute: self.speed.seconds(sequence.launched_tokens),
            swap: (blocks > 0 && blocks <= self.host.free()).then_some(swap),
        }
    }

    /// Preempts a sequence: swaps its blocks out, or drops them so that it is recomputed.
    fn preempt(&mut self, key: SequenceKey, plan: &mut StepPlan) {
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
        let count = self.cache.blocks_for(sequence.launched_tokens);
        if let Some(host) = swap.then(|| self.host.allocate(count)).flatten() {
            let blocks = sequence.table.blocks().iter().copied();
            let pairs = blocks.zip(host.iter().copied());
            plan.transfers.swap_out.extend(pairs);
            sequence.swapped = Some(Swapped {
                blocks: host,
                tokens: sequence.launched_tokens,
                step: plan.step,
            });
            // The copy is part of this step.
            sequence.last_step = plan.step;
            self.totals.swaps += 1;
        }
        self.cache.release(&mut sequence.table, sequence.last_step);
        sequence.launched_tokens = 0;
        sequence.written_tokens = 0;
        sequence.state = SequenceState::Blocked;
        self.unblock(key);
    }

    /// Starts waiting sequences in order, as long as budget, places and blocks are left.
    /// `wanted` decides whether the next one may start, given its priority and that of the last
    /// running sequence, if any. A sequence starts only if all its known tokens fit in the
    /// cache.
    fn admit(
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
            if self.running.len() >= self.policy.max_sequences {
                let start = self.start_cost(key);
                match self.victim_to_start(key, plan).zip(start) {
                    Some((victim, start)) if self.fits_after_preemption(key, &start, plan) => {
                        self.preempt(victim, plan);
                    }
                    _ => break,
                }
                continue;
            }
            let Some(start) = self.room_to_start(key, plan) else {
                break;
            };
            self.start(key, start, plan);
            let count = self.sequences.get(key).map_or(0, |sequence| {
                let count = sequence.pending().min(budget.tokens);
                sequence.rows_within(count, budget.samples)
            });
            self.push_item(plan, key, count, budget);
        }
    }

    /// Returns whether `key` could start if all sessions were evicted and all sequences
    /// preempted that may be preempted for it. Otherwise they would be preempted in vain.
    fn fits_after_preemption(&self, key: SequenceKey, start: &StartCost, plan: &StepPlan) -> bool {
        let Some(own) = self.sequences.get(key) else {
            return false;
        };
        let mut room = self.cache.available_blocks() + self.cache.deferred_blocks()
            - start.reused_cached_blocks;
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
        start.missing + running <= room
    }

    /// Returns the sequence to preempt so that `key` can start: a paused one, or a less urgent
    /// one.
    fn victim_to_start(&self, key: SequenceKey, plan: &StepPlan) -> Option<SequenceKey> {
        let priority = self.sequences.get(key)?.spec.priority;
        self.last_unplanned(plan, |sequence| sequence.paused)
            .or_else(|| self.last_unplanned(plan, |other| other.spec.priority > priority))
    }

    /// Makes room for a waiting sequence. One block per running sequence stays available, so
    /// that the new sequence is not preempted at once. Returns `None` if the sequence cannot
    /// start now.
    fn room_to_start(&mut self, key: SequenceKey, plan: &mut StepPlan) -> Option<StartCost> {
        loop {
            let start = self.start_cost(key)?;
            let needed = start.missing + self.running.len();
            let available = self.cache.available_blocks() - start.reused_cached_blocks;
            if needed <= available {
                return Some(start);
            }
            if needed <= available + self.cache.deferred_blocks() {
                return None;
            }
            if self.evict_session() || (self.running.len() == 0 && self.evict_pinned_session()) {
                continue;
            }
            let victim = self.victim_to_start(key, plan)?;
            if !self.fits_after_preemption(key, &start, plan) {
                return None;
            }
            self.preempt(victim, plan);
        }
    }

    /// Returns what starting a waiting sequence would take now; `None` if it cannot start yet.
    fn start_cost(&self, key: SequenceKey) -> Option<StartCost> {
        let sequence = self.sequences.get(key)?;
        let length = sequence.tokens.len();
        let most = sequence.reusable();
        let blocks = self.cache.blocks_for(length);
        let salt = sequence.spec.salt.as_ref();
        let retained = |session| Some((session, self.retained.get(session)?));
        if let Some(swapped) = &sequence.swapped {
            if swapped.step > self.cache.last_completed_step() {
                return None; // the step that copies the blocks out may still fail
            }
            // The rows of all swapped-out tokens were reported before, so none must be
            // recomputed.
            let (known, reused_cached_blocks) =
                self.cache
                    .lookup(salt, &sequence.tokens, swapped.tokens.min(length - 1));
            return Some(StartCost {
                source: Source::Swapped,
                computed: swapped.tokens,
                missing: blocks - known,
                reused_cached_blocks,
            });
        }
        if let Some((session, retained)) = sequence.spec.session.and_then(retained) {
            let computed = retained.tokens.len().min(most);
            return Some(StartCost {
                source: Source::Session(session),
                computed,
                missing: self.cache.missing_blocks(&retained.table, computed, length),
                reused_cached_blocks: 0,
            });
        }
        // A sequence that has started before may find more than the prompt in the prefix cache.
        let leader = sequence.leader.filter(|_| !sequence.started);
        let leader = leader.and_then(|leader| self.sequences.get(leader));
        if let Some(leader) = leader.filter(|leader| leader.written_tokens >= leader.prompt_tokens)
        {
            let computed = leader.prompt_tokens.min(most);
            return Some(StartCost {
                source: Source::Leader(sequence.leader?),
                computed,
                // A partial last block counts as missing, because it is copied before it is
                // written.
                missing: blocks - computed / self.cache.block_tokens(),
                reused_cached_blocks: 0,
            });
        }
        let (known, reused_cached_blocks) = self.cache.lookup(salt, &sequence.tokens, most);
        Some(StartCost {
            source: Source::Prefix,
            computed: known * self.cache.block_tokens(),
            missing: blocks - known,
            reused_cached_blocks,
        })
    }

    /// Starts a waiting sequence for which there is room.
    fn start(&mut self, key: SequenceKey, start: StartCost, plan: &mut StepPlan) {
        self.waiting.remove(key, &self.sequences);
        self.set_state(key, SequenceState::Running);
        self.running.insert(key, &self.sequences);
        let shared = match start.source {
            Source::Leader(leader) => self
                .sequences
                .get(leader)
                .map(|leader| self.cache.share(&leader.table, start.computed)),
            _ => None,
        };
        let retained = match start.source {
            Source::Session(session) => self.retained.take(session),
            _ => None,
        };
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        sequence.started_step = plan.step;
        sequence.launched_tokens = start.computed;
        if let Some(table) = shared {
            sequence.table = table;
        } else if let Some(retained) = retained {
            sequence.table = retained.table;
            sequence.last_step = sequence.last_step.max(retained.last_step);
        } else {
            let most = sequence.tokens.len() - 1;
            let limit = start.computed.min(most);
            self.cache
                .attach(&mut sequence.table, &sequence.tokens, limit);
        }
        sequence.reserve(self.cache.block_tokens());
        sequence.written_tokens = match start.source {
            Source::Swapped => 0,
            _ => start.computed,
        };
        let known = sequence.table.len();
        let (from, to) = (sequence.launched_tokens, sequence.tokens.len());
        let (table, transfers) = (&mut sequence.table, &mut plan.transfers);
        let copies = transfers.copies.len();
        let booked = self.cache.prepare(table, from, to, plan.step, transfers);
        debug_assert!(booked.is_ok(), "there was room: {booked:?}");
        if transfers.copies.len() > copies {
            // A copied block counts as written only when this step has completed, because the
            // step may fail.
            let size = self.cache.block_tokens();
            sequence.written_tokens = sequence.written_tokens.min(from - from % size);
        }
        if let Some(swapped) = sequence.swapped.take() {
            let blocks = sequence.table.blocks().iter().copied();
            let pairs = swapped.blocks.iter().copied().zip(blocks);
            plan.transfers.swap_in.extend(pairs.skip(known));
            self.read_back.extend(swapped.blocks);
        }
        if !sequence.started {
            sequence.started = true;
            sequence.cached_tokens = start.computed;
            if !sequence.spec.task.needs_every_row() {
                self.totals.prefix_queries += sequence.prompt_tokens as u64;
            }
            self.totals.prefix_hits += start.computed as u64;
        }
    }

    /// Computes the mask of allowed tokens for each constrained sequence that `plan` samples.
    /// Returns the sequences whose constraint failed. The caller must close them after
    /// launching the step.
    pub fn refresh_masks(&mut self, plan: &StepPlan) -> Vec<(SequenceKey, ConstraintError)> {
        let mut failed = Vec::new();
        for item in plan.samples() {
            let sequence = self.sequences.get_mut(item.key);
            if let Some(constraint) =
                sequence.and_then(|sequence| sequence.spec.constraint.as_mut())
                && let Err(error) = constraint.refresh()
            {
                failed.push((item.key, error));
            }
        }
        failed
    }

    /// Records that the step of `plan` has completed without an error. The keys and values that
    /// its items wrote exist now, and other sequences may find the complete blocks.
    pub fn step_succeeded(&mut self, plan: &StepPlan) {
        for item in &plan.items {
            let Some(sequence) = self.sequences.get_mut(item.key) else {
                continue;
            };
            // The sequence may have been preempted since, and even restarted.
            if sequence.state != SequenceState::Running || plan.step < sequence.started_step {
                continue;
            }
            sequence.written_tokens = item.start + item.count;
            self.cache.publish(
                &mut sequence.table,
                &sequence.tokens,
                sequence.written_tokens,
                sequence.last_step,
            );
            if sequence.written_tokens >= sequence.prompt_tokens && !sequence.followers.is_empty() {
                for follower in std::mem::take(&mut sequence.followers) {
                    self.unblock(follower);
                }
            }
        }
    }

    /// Records that the step of `plan` has failed. Blocks that it should have copied to the
    /// host are lost, and their tokens are recomputed. The caller must end the sequences of its
    /// items.
    pub fn step_failed(&mut self, plan: &StepPlan) {
        if plan.transfers.swap_out.is_empty() {
            return;
        }
        for sequence in self.sequences.values_mut() {
            let lost = sequence
                .swapped
                .take_if(|swapped| swapped.step == plan.step);
            if let Some(swapped) = lost {
                self.host.release(swapped.blocks);
            }
        }
    }

    /// Commits the sample of one plan item.
    pub fn commit(&mut self, key: SequenceKey, token: u32) -> Commit {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        let mut stopped = sequence.spec.stop_tokens.contains(&token);
        if let Some(constraint) = sequence.spec.constraint.as_mut().filter(|_| !stopped) {
            match constraint.accept(token) {
                Ok(complete) => stopped = complete,
                Err(error) => return Commit::Failed(error),
            }
        }
        sequence.tokens.push(token);
        let commit = if stopped {
            Commit::Finished(FinishReason::Stop)
        } else if sequence.tokens.len() >= sequence.spec.max_tokens {
            Commit::Finished(FinishReason::Length)
        } else {
            Commit::Token
        };
        self.unblock(key);
        commit
    }

    /// Commits the end of the prompt of a sequence that ends with it.
    pub fn commit_end(&mut self, key: SequenceKey) -> Commit {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        let reason = match sequence.spec.task {
            Task::Embed => FinishReason::Stop,
            Task::Generate | Task::Score { .. } => FinishReason::Length,
        };
        self.unblock(key);
        Commit::Finished(reason)
    }
}

#[cfg(test)]
mod tests;
