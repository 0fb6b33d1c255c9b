//! The scheduler: its state, which the modules below change, and the checks of that state.

mod commit;
mod lifecycle;
mod plan;
mod room;
mod sessions;
mod start;

pub use commit::Commit;
pub use lifecycle::BlockDisposition;

use super::policy::ComputeSpeed;
use super::queue::{RunningQueue, WaitingQueue};
use super::retained::RetainedSessions;
use super::tenants::Tenants;
use super::{Policy, SequenceKey, SequenceState, Sequences};
use crate::cache::{
    AccountingError, BlockCache, BlockCounts, BlockId, HostBlockId, HostBlocks, Miss, PrefixHit,
    StateSlot,
};
use crate::id::StepId;
use serde::Serialize;

/// Number of prompt tokens that had to be computed, although they were looked up, by reason. The
/// last token of a prompt, and those of its last, incomplete block, are always computed and do
/// not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct PrefixMisses {
    /// No block with these tokens, and all tokens before them, is known.
    pub no_block: u64,
    /// Their blocks are known, but there is no snapshot of the state of recurrent layers from
    /// which the sequence could continue.
    pub no_snapshot: u64,
    /// They were known once, or there was a snapshot for them, but it was evicted.
    pub evicted: u64,
    /// Only a request with another salt has computed them.
    pub salt: u64,
}

impl PrefixMisses {
    /// Counts the misses of a prompt of which `computed` tokens need not be computed, where `whole`
    /// of them are in complete blocks.
    fn add(&mut self, whole: usize, computed: usize, known: &PrefixHit) {
        let matched = known.matched.max(computed);
        let snapshot = match known.lost_state {
            true => &mut self.evicted,
            false => &mut self.no_snapshot,
        };
        *snapshot += (matched - computed) as u64;
        let block = match known.miss {
            Miss::Unknown => &mut self.no_block,
            Miss::Evicted => &mut self.evicted,
            Miss::OtherSalt => &mut self.salt,
        };
        // Sessions and sequences with the same prompt have more than complete blocks.
        *block += whole.saturating_sub(matched) as u64;
    }
}

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
    /// Number of swapped-out sequences that resumed with these blocks.
    pub swaps_in: u64,
    /// Prompt tokens that were looked up for reuse, since the start.
    pub prefix_queries: u64,
    /// Prompt tokens that were reused from the prefix cache, from a session or from a sequence
    /// with the same prompt, since the start.
    pub prefix_hits: u64,
    /// Prompt tokens that were looked up and not found, since the start.
    pub prefix_misses: PrefixMisses,
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
    /// Whether a running sequence waits for room for more of its prompt, in the step that is being
    /// planned.
    waits_for_room: bool,
    /// Spare allocation for `Scheduler::plan_running`.
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
            waits_for_room: false,
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

    /// The same for slots of states.
    pub fn take_freed_states(&mut self) -> Vec<StateSlot> {
        self.cache.take_freed_states()
    }

    /// Forgets the tokens of all blocks that no table holds.
    pub fn clear_prefixes(&mut self) {
        self.cache.clear_prefixes();
    }

    /// Forgets the tokens of the blocks that only this sequence holds, which is about to end.
    pub fn forget_prefix(&mut self, key: SequenceKey) {
        if let Some(sequence) = self.sequences.get_mut(key) {
            self.cache.forget_prefix(&mut sequence.table);
        }
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
    /// Returns [`AccountingError`] if the recorded numbers differ from a recount. This is
    /// always a bug.
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
}

#[cfg(test)]
mod tests;
