//! One sequence: its tokens, its blocks and its progress.

use super::plan::Report;
use super::tenants::TenantKey;
use crate::cache::{BlockCache, BlockTable, HostBlockId};
use crate::id::{RequestId, SessionId, StepId};
use crate::sampling::{ConstraintState, SamplingParams};
use slotmap::{SlotMap, new_key_type};
use std::ops::Range;
use std::sync::Arc;

new_key_type! {
    /// Key of a sequence on the scheduler thread. It carries a generation, so it does not match
    /// a later sequence in the same slot.
    pub struct SequenceKey;
}

/// All sequences that have not ended.
pub type Sequences = SlotMap<SequenceKey, Sequence>;

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token, a stop string, the model's end of turn, or a constraint that allows no
    /// further token.
    Stop,
    /// The limit on new tokens or the context limit.
    Length,
}

/// What is computed for a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// Tokens that continue the prompt.
    #[default]
    Generate,
    /// Tokens that continue the prompt, and the log probability of each token of the prompt
    /// after the first.
    Score {
        /// How many of the likeliest tokens to report for each position.
        top: u32,
    },
    /// The mean of the last hidden states of these tokens of the prompt, and no tokens.
    Embed(PooledTokens),
}

/// The tokens of a prompt whose hidden states make its embedding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PooledTokens {
    /// All of them.
    #[default]
    All,
    /// Only the first one.
    First,
    /// Only the last one.
    Last,
}

impl PooledTokens {
    /// Returns the positions of the tokens in a prompt of `length` tokens.
    fn of(self, length: usize) -> Range<usize> {
        match self {
            Self::All => 0..length,
            Self::First => 0..length.min(1),
            Self::Last => length.saturating_sub(1)..length,
        }
    }
}

impl Task {
    /// Returns whether tokens of the prompt before the last one are needed, so that the sequence
    /// must compute each of them itself.
    pub fn needs_every_token(self) -> bool {
        !matches!(self, Self::Generate | Self::Embed(PooledTokens::Last))
    }
}

/// Description of a new sequence.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// The prompt, which has at least one token. All answers to a prompt share it.
    pub prompt: Arc<[u32]>,
    /// What is computed.
    pub task: Task,
    /// Number of tokens, prompt and answer together, at which the sequence ends. It exceeds the
    /// length of the prompt unless only the prompt is to be computed.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub params: Arc<SamplingParams>,
    /// Tokens that end the sequence.
    pub stop_tokens: Arc<[u32]>,
    /// Priority: lower numbers are more urgent, and 0 is the default.
    pub priority: i32,
    /// The tenant whom the sequence is served for. Waiting tenants are served evenly.
    pub tenant: Option<Arc<str>>,
    /// Salt of the prefix cache: only sequences with the same salt share blocks.
    pub salt: Option<Arc<str>>,
    /// The session, if the sequence is one of its turns.
    pub session: Option<SessionId>,
    /// Which tokens may be chosen. The constraint advances with every committed token, and a
    /// preemption does not affect it.
    pub constraint: Option<ConstraintState>,
}

impl SequenceSpec {
    /// Describes a sequence that continues `prompt` greedily, up to `max_tokens` tokens of
    /// prompt and answer together.
    #[cfg(any(test, feature = "internals"))]
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt: prompt.into(),
            task: Task::Generate,
            max_tokens,
            params: Arc::new(SamplingParams::greedy()),
            stop_tokens: Arc::new([]),
            priority: 0,
            tenant: None,
            salt: None,
            session: None,
            constraint: None,
        }
    }
}

/// Whether a sequence waits or runs. Each sequence is in exactly one state (I2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SequenceState {
    /// Waits to be started, for the first time or after a preemption.
    Waiting,
    /// Cannot be started yet: its reader is too slow, a sample of it is in flight, or another
    /// sequence is computing its prompt.
    Blocked,
    /// Holds blocks and takes part in steps.
    Running,
}

/// Keys and values in host memory.
#[derive(Debug)]
pub(super) struct Swapped {
    /// The blocks of all groups, one group after the other.
    pub blocks: Vec<HostBlockId>,
    /// Index of the first block of each group, counted from the start of the sequence.
    pub first: Vec<usize>,
    /// Index after the last block of every group.
    pub end: usize,
    /// Number of tokens whose keys and values the blocks hold.
    pub tokens: usize,
    /// The step that copies the blocks to the host.
    pub step: StepId,
}

/// A sequence on the scheduler thread.
#[derive(Debug)]
pub struct Sequence {
    /// The request that the sequence belongs to.
    pub id: RequestId,
    /// Description of the sequence, except that `spec.prompt` is empty: `tokens` begins with it.
    pub spec: SequenceSpec,
    /// Key of the counter of `spec.tenant`.
    pub(super) tenant: TenantKey,
    /// The prompt, followed by the committed tokens.
    pub tokens: Vec<u32>,
    /// Length of the prompt in tokens.
    pub prompt_tokens: usize,
    /// Number of prompt tokens that were cached when the sequence was first started.
    pub cached_tokens: usize,
    /// Number of tokens whose keys and values are written by launched steps, completed or not.
    pub(super) launched_tokens: usize,
    /// Number of tokens whose keys and values completed steps have written.
    pub(super) written_tokens: usize,
    /// Number of prompt tokens that were in a launched step, and so report to the task.
    pub(super) reported: usize,
    /// Number of launched items, not committed yet, that sample tokens or end the sequence.
    pub(super) in_flight: usize,
    /// Index of the latest sample among the samples of its step, for feedback.
    pub(super) last_sample: usize,
    /// Last step that touches the blocks.
    pub(super) last_step: StepId,
    /// First step since the sequence was last started.
    pub(super) started_step: StepId,
    /// The blocks of the sequence.
    pub table: BlockTable,
    /// Keys and values in host memory, if the sequence was swapped out.
    pub(super) swapped: Option<Swapped>,
    /// Sequences with the same prompt that wait until this one has computed it.
    pub(super) followers: Vec<SequenceKey>,
    /// The sequence that computes the prompt for this one.
    pub(super) leader: Option<SequenceKey>,
    /// Number of tokens after which a snapshot of the state would serve sequences that begin with
    /// the same tokens, because others have begun with them before. 0 if there is no such number.
    pub(super) branch: usize,
    /// Position in the order of arrival.
    pub(super) arrival: u64,
    /// Whether the reader is too slow, so that no tokens are planned.
    pub(super) paused: bool,
    pub(super) state: SequenceState,
    /// Whether the sequence was started before.
    pub(super) started: bool,
}

impl Sequence {
    pub(super) fn new(
        id: RequestId,
        mut spec: SequenceSpec,
        tenant: TenantKey,
        arrival: u64,
    ) -> Self {
        // A copy, because the sequence appends its answer, and others may share the prompt.
        let tokens = std::mem::take(&mut spec.prompt).to_vec();
        let table = BlockTable::salted(spec.salt.clone());
        Self {
            id,
            prompt_tokens: tokens.len(),
            cached_tokens: 0,
            tokens,
            spec,
            tenant,
            launched_tokens: 0,
            written_tokens: 0,
            reported: 0,
            in_flight: 0,
            last_sample: 0,
            last_step: StepId::default(),
            started_step: StepId::default(),
            table,
            swapped: None,
            followers: Vec::new(),
            leader: None,
            branch: 0,
            arrival,
            paused: false,
            state: SequenceState::Blocked,
            started: false,
        }
    }

    /// Reserves memory for the final length, so that decoding does not allocate. Reserved
    /// memory costs only address space until it is written, but many requests end long before
    /// their limit, so everything beyond `RESERVED` grows on demand.
    pub(super) fn reserve(&mut self, cache: &BlockCache, step_tokens: usize) {
        /// Number of tokens beyond the current ones.
        const RESERVED: usize = 1 << 15;
        let length = self.spec.max_tokens.min(self.tokens.len() + RESERVED);
        let more = length.saturating_sub(self.tokens.len());
        self.tokens.reserve_exact(more);
        cache.reserve(&mut self.table, length, step_tokens);
    }

    /// Returns the number of known tokens and samples in flight.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() + self.in_flight
    }

    /// Returns the number of tokens that could be computed now; 1 means a decode.
    pub(super) fn pending(&self) -> usize {
        // The constraint allows the next token only after the previous one has been committed.
        let held = self.spec.constraint.is_some() && self.in_flight > 0;
        if held {
            0
        } else if self.length() < self.spec.max_tokens {
            self.length() - self.launched_tokens
        } else {
            // Nothing more is sampled, so only the rest of the prompt is left.
            self.prompt_tokens.saturating_sub(self.launched_tokens)
        }
    }

    /// Returns whether the sequence ends when its prompt has been computed.
    pub(super) fn ends_with_prompt(&self) -> bool {
        self.spec.max_tokens <= self.prompt_tokens
    }

    /// Returns how many leading tokens need not be computed if their keys and values exist
    /// already.
    /// This is all but the last token, which is computed for its logits. If every token of the
    /// prompt is needed, it is only those that were reported before.
    pub(super) fn reusable(&self) -> usize {
        let most = self.tokens.len() - 1;
        if self.spec.task.needs_every_token() && self.reported < self.prompt_tokens {
            most.min(self.reported)
        } else {
            most
        }
    }

    /// Returns what the next `count` tokens report.
    pub(super) fn report(&self, count: usize) -> Report {
        if self.spec.task == Task::Generate {
            return Report::Nothing;
        }
        let from = self.launched_tokens.max(self.reported);
        let to = (self.launched_tokens + count).min(self.prompt_tokens);
        match self.spec.task {
            // The token after the prompt is not known, so the last token of the prompt has no
            // score.
            Task::Score { .. } if from < to.min(self.prompt_tokens - 1) => {
                Report::Scores(from..to.min(self.prompt_tokens - 1))
            }
            Task::Embed(tokens) => {
                let wanted = tokens.of(self.prompt_tokens);
                let rows = from.max(wanted.start)..to.min(wanted.end);
                if rows.is_empty() {
                    Report::Nothing
                } else {
                    Report::Sum(rows)
                }
            }
            _ => Report::Nothing,
        }
    }

    /// Returns whether the next `count` tokens end with the last one and sample the next.
    pub(super) fn samples_last(&self, count: usize) -> bool {
        self.launched_tokens + count == self.length() && !self.ends_with_prompt()
    }

    /// Returns the largest number of tokens, at most `count`, that need no more than `samples`
    /// samples.
    pub(super) fn tokens_within(&self, mut count: usize, samples: usize) -> usize {
        // Each token has at most one sample.
        while count > samples {
            let last = usize::from(self.samples_last(count));
            let taken = self.report(count).scored().len() + last;
            match taken.saturating_sub(samples) {
                0 => return count,
                excess => count -= excess,
            }
        }
        count
    }

    /// Returns `count`, or fewer tokens if they would pass [`Sequence::branch`], so that a step
    /// takes one snapshot at most.
    pub(super) fn tokens_to_branch(&self, count: usize) -> usize {
        match self.branch.checked_sub(self.launched_tokens) {
            Some(tokens) if tokens > 0 => count.min(tokens),
            _ => count,
        }
    }

    /// Returns after how many tokens a snapshot of the state should be taken if the next step
    /// computes `count` tokens, where snapshots are taken at multiples of `interval` tokens.
    pub(super) fn snapshot_within(&self, count: usize, interval: usize) -> Option<usize> {
        let (start, end) = (self.launched_tokens, self.launched_tokens + count);
        // The last known token is always computed, so a snapshot after it would serve nobody who
        // sends the same prompt.
        let last = match start + 1 < self.tokens.len() {
            true => self.tokens.len() - 1,
            false => end,
        };
        let wanted = [self.branch, last / interval * interval];
        let mut wanted = wanted.into_iter();
        wanted.find(|tokens| start < *tokens && *tokens <= end)
    }

    /// Returns the sort key of the order in which sequences are served: priority, then arrival.
    pub(super) fn rank(&self) -> (i32, u64) {
        (self.spec.priority, self.arrival)
    }

    /// Returns the number of answer tokens committed so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Returns the number of tokens whose keys and values completed steps have written.
    pub fn written_tokens(&self) -> usize {
        self.written_tokens
    }

    /// Returns whether the reader is too slow, so that no tokens are planned.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Returns whether the sequence was started before and does not run now, so that its blocks
    /// went to other sequences.
    pub fn is_preempted(&self) -> bool {
        self.started && self.state != SequenceState::Running
    }

    /// Returns the last step that touches the blocks.
    pub fn last_step(&self) -> StepId {
        self.last_step
    }

    /// Returns whether the sequence waits or runs.
    pub fn state(&self) -> SequenceState {
        self.state
    }
}
