//! One sequence: its tokens, its blocks, and how far it has come.

use crate::cache::BlockTable;
use crate::id::{SessionId, StepId};
use crate::sampling::SamplingParams;
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
    /// A stop token, or a stop string, or the model's end of turn.
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

/// What a new sequence is to do.
#[derive(Clone, Debug)]
pub struct SequenceSpec {
    /// The prompt: at least one token.
    pub prompt: Vec<u32>,
    /// Tokens at which it ends, prompt and answer together; more than the prompt.
    pub max_tokens: usize,
    /// How to choose tokens.
    pub params: Arc<SamplingParams>,
    /// Tokens that end it.
    pub stop_tokens: Arc<[u32]>,
}

/// A sequence on the scheduler thread.
#[derive(Debug)]
pub struct Sequence {
    /// Who it belongs to.
    pub id: SessionId,
    /// What it does; `spec.prompt` has moved to `tokens`.
    pub spec: SequenceSpec,
    /// The prompt, then the committed tokens.
    pub tokens: Vec<u32>,
    /// How many of `tokens` are the prompt.
    pub prompt_tokens: usize,
    /// Tokens whose keys and values the launched steps write.
    pub(super) computed: usize,
    /// Samples launched and not committed.
    pub(super) in_flight: usize,
    /// Index of its latest sample among its step's, for feedback.
    pub(super) last_sample: usize,
    /// The last step that touches its blocks.
    pub(super) touched: StepId,
    /// Its blocks.
    pub table: BlockTable,
    /// Its place in the order of arrival.
    pub(super) arrival: u64,
    /// Whether its reader is too slow: then it is not planned.
    pub(super) paused: bool,
    /// Whether it is among the running.
    pub(super) running: bool,
}

impl Sequence {
    pub(super) fn new(id: SessionId, mut spec: SequenceSpec, arrival: u64) -> Self {
        let tokens = std::mem::take(&mut spec.prompt);
        Self {
            id,
            prompt_tokens: tokens.len(),
            tokens,
            spec,
            computed: 0,
            in_flight: 0,
            last_sample: 0,
            touched: StepId::default(),
            table: BlockTable::default(),
            arrival,
            paused: false,
            running: false,
        }
    }

    /// Tokens known and on their way.
    pub(super) fn length(&self) -> usize {
        self.tokens.len() + self.in_flight
    }

    /// Tokens that could be computed now; 1 means a decode.
    pub(super) fn pending(&self) -> usize {
        if self.length() >= self.spec.max_tokens {
            0
        } else {
            self.length() - self.computed
        }
    }

    /// Answer tokens committed so far.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    /// The last step that touches its blocks.
    pub fn touched(&self) -> StepId {
        self.touched
    }
}
