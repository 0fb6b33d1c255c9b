//! One sequence: its tokens, its blocks, and how far it has come.

use super::plan::Report;
use super::tenants::TenantKey;
use crate::cache::{BlockTable, HostBlockId};
use crate::id::{RequestId, SessionId, StepId};
use crate::sampling::{ConstraintState, SamplingParams};
use slotmap::{SlotMap, new_key_type};
use std::sync::Arc;

new_key_type! {
    /// Names a sequence on the scheduler thread; carries a generation.
    pub struct SequenceKey;
}

/// All sequences that have not ended.
pub type Sequences = SlotMap<SequenceKey, Sequence>;

/// Why a sequence ended by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token, or a stop string, or the model's end of turn; or a constraint that
    /// allows nothing more.
    Stop,
    /// The limit on new tokens, or the context limit.
    Length,
}

impl FinishReason {
    /// `stop` or `length`, as the OpenAI API says it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// What is wanted of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Task {
    /// Tokens that continue the prompt.
    #[default]
    Generate,
    /// The same, and the log-probability of each token of the prompt after the first.
    Score {
        /// How many of the likeliest tokens to report in the place of each.
        top: u32,
    },
    /// The mean of the last hidden states of the prompt; no token.
    Embed,
}

impl Task {
    /// Whether something is wanted of every row of the prompt, so that each must be
    /// computed for this sequence.
    pub fn needs_every_row(self) -> bool {
        self != Self::Generate
    }
}

/// What a new sequence is to do.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// The prompt: at least one token.
    pub prompt: Vec<u32>,
    /// What is wanted of it.
    pub task: Task,
    /// Tokens at which it ends, prompt and answer together; more than the prompt, unless
    /// only that is to be computed.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub params: Arc<SamplingParams>,
    /// Tokens that end it.
    pub stop_tokens: Arc<[u32]>,
    /// A lower number goes first; 0 is usual.
    pub priority: i32,
    /// Who it is served for: waiting tenants are served evenly.
    pub tenant: Option<Arc<str>>,
    /// Only sequences with the same salt share blocks through the prefix cache.
    pub salt: Option<Arc<str>>,
    /// The session whose turn it is.
    pub session: Option<SessionId>,
    /// Which tokens may be chosen. It goes on with every token that is committed, and
    /// is untouched by what becomes of the blocks.
    pub constraint: Option<ConstraintState>,
}

impl SequenceSpec {
    /// A sequence that continues `prompt` greedily up to `max_tokens` tokens, prompt and
    /// answer together, and nothing else.
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Self {
            prompt,
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

/// Where a sequence is; always exactly one of these (I2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Waits to be started, or started again.
    Waiting,
    /// Cannot be started yet: its reader is too slow, a sample is on its way, or
    /// another sequence computes its prompt.
    Parked,
    /// Holds blocks, and is planned.
    Running,
}

/// Keys and values in host memory.
#[derive(Debug)]
pub(super) struct Swapped {
    pub blocks: Vec<HostBlockId>,
    /// Tokens whose keys and values they hold.
    pub tokens: usize,
    /// The step that copies them.
    pub step: StepId,
}

/// A sequence on the scheduler thread.
#[derive(Debug)]
pub struct Sequence {
    /// Who it belongs to.
    pub id: RequestId,
    /// What it does; `spec.prompt` has moved to `tokens`.
    pub spec: SequenceSpec,
    /// The counter of `spec.tenant`.
    pub(super) tenant: TenantKey,
    /// The prompt, then the committed tokens.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that the cache held already when it was first started.
    pub cached_tokens: usize,
    /// Tokens whose keys and values the launched steps write.
    pub(super) computed: usize,
    /// Tokens whose keys and values completed steps have written.
    pub(super) written: usize,
    /// Prompt tokens whose rows were in a step: what the task wants of them is on its way.
    pub(super) reported: usize,
    /// Samples, or the end of a prompt that is not continued, launched and not committed.
    pub(super) in_flight: usize,
    /// Index of its latest sample among its step's, for feedback.
    pub(super) last_sample: usize,
    /// The last step that touches its blocks.
    pub(super) touched: StepId,
    /// The first step since it was last started.
    pub(super) since: StepId,
    /// Its blocks.
    pub table: BlockTable,
    /// Its keys and values, if it was preempted to host memory.
    pub(super) swapped: Option<Swapped>,
    /// Sequences with the same prompt that wait for this one to compute it.
    pub(super) followers: Vec<SequenceKey>,
    /// The sequence that computes its prompt.
    pub(super) leader: Option<SequenceKey>,
    /// Its place in the order of arrival.
    pub(super) arrival: u64,
    /// Whether its reader is too slow: then it is not planned.
    pub(super) paused: bool,
    pub(super) place: Place,
    /// Whether it has been started before.
    pub(super) started: bool,
}

impl Sequence {
    pub(super) fn new(
        id: RequestId,
        mut spec: SequenceSpec,
        tenant: TenantKey,
        arrival: u64,
    ) -> Self {
        let tokens = std::mem::take(&mut spec.prompt);
        let table = BlockTable::salted(spec.salt.clone());
        Self {
            id,
            prompt_tokens: tokens.len(),
            cached_tokens: 0,
            tokens,
            spec,
            tenant,
            computed: 0,
            written: 0,
            reported: 0,
            in_flight: 0,
            last_sample: 0,
            touched: StepId::default(),
            since: StepId::default(),
            table,
            swapped: None,
            followers: Vec::new(),
            leader: None,
            arrival,
            paused: false,
            place: Place::Parked,
            started: false,
        }
    }

    /// Makes room for what it is to become, so that a step that decodes allocates
    /// nothing. Memory that is never written to costs nothing but addresses, yet who asks
    /// for a long answer does not always get one: beyond `RESERVED` it grows as vectors do.
    pub(super) fn reserve(&mut self, block_tokens: usize) {
        /// Tokens.
        const RESERVED: usize = 1 << 15;
        let length = self.spec.max_tokens.min(self.tokens.len() + RESERVED);
        let more = length.saturating_sub(self.tokens.len());
        self.tokens.reserve_exact(more);
        self.table.reserve(length.div_ceil(block_tokens));
    }

    /// Tokens known and on their way.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() + self.in_flight
    }

    /// Tokens that could be computed now; 1 means a decode.
    pub(super) fn pending(&self) -> usize {
        // Which tokens may come next is known when the one before has been committed.
        let held = self.spec.constraint.is_some() && self.in_flight > 0;
        if held {
            0
        } else if self.length() < self.spec.max_tokens {
            self.length() - self.computed
        } else {
            // Nothing more is sampled: there is only what the prompt lacks.
            self.prompt_tokens.saturating_sub(self.computed)
        }
    }

    /// Whether it ends when its prompt has been computed.
    pub(super) fn ends_with_prompt(&self) -> bool {
        self.spec.max_tokens <= self.prompt_tokens
    }

    /// How many of its tokens need no rows of their own where their keys and values are
    /// there already: all but the last, which is computed for its logits; and of a prompt
    /// whose every row is wanted, only those that have been reported before.
    pub(super) fn reusable(&self) -> usize {
        let most = self.tokens.len() - 1;
        if self.spec.task.needs_every_row() && self.reported < self.prompt_tokens {
            most.min(self.reported)
        } else {
            most
        }
    }

    /// What the next `count` rows report.
    pub(super) fn report(&self, count: usize) -> Report {
        let from = self.computed.max(self.reported);
        let to = (self.computed + count).min(self.prompt_tokens);
        match self.spec.task {
            // The last token of the prompt has no next one that is known.
            Task::Score { .. } if from < to.min(self.prompt_tokens - 1) => {
                Report::Scores(from..to.min(self.prompt_tokens - 1))
            }
            Task::Embed if from < to => Report::Sum(from..to),
            _ => Report::Nothing,
        }
    }

    /// Whether the row of the last known token is among the next `count`, and sampled.
    pub(super) fn samples_last(&self, count: usize) -> bool {
        self.computed + count == self.length() && !self.ends_with_prompt()
    }

    /// The most of the next `count` rows that take no more than `samples` samples.
    pub(super) fn rows_within(&self, mut count: usize, samples: usize) -> usize {
        loop {
            let last = usize::from(self.samples_last(count));
            let taken = self.report(count).scored().len() + last;
            // A row takes one at most.
            match taken.saturating_sub(samples) {
                0 => return count,
                excess => count -= excess,
            }
        }
    }

    /// The order in which sequences are served: urgent ones, then early ones.
    pub(super) fn rank(&self) -> (i32, u64) {
        (self.spec.priority, self.arrival)
    }

    /// Answer tokens committed so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// Tokens whose keys and values completed steps have written.
    pub fn written(&self) -> usize {
        self.written
    }

    /// Whether its reader is too slow: then it is not planned.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// Whether it has given its blocks up to others, and waits to be started again.
    pub fn is_preempted(&self) -> bool {
        self.started && self.place != Place::Running
    }

    /// The last step that touches its blocks.
    pub fn touched(&self) -> StepId {
        self.touched
    }

    /// Where it is.
    pub fn place(&self) -> Place {
        self.place
    }
}
