//! Steps: their inputs, and when their operations are enqueued.

use super::{DeviceError, DeviceTypes};

/// What the caller must do next after staging a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    /// Enqueue the operations of the forward pass, then call [`StepOps::finish`].
    Enqueue,
    /// Only sample. The device had recorded the forward pass of a step of this size and has
    /// enqueued all of it.
    Replayed,
}

/// What the caller must do next after enqueueing the operations of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// Only sample.
    Done,
    /// Enqueue the operations again, then call [`StepOps::finish`] again. The device tried to
    /// record the operations and failed, and computed none of them.
    Repeat,
}

/// Upper limits on the size of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Maximum number of tokens per step.
    pub rows: usize,
    /// Maximum number of sequences per step, and of sampled rows per step.
    pub sequences: usize,
    /// Maximum number of tokens per sequence.
    pub sequence_tokens: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// Number of logits per sampled row.
    pub vocabulary: usize,
}

/// The rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of the sequence, which are consecutive tokens.
    pub rows: std::ops::Range<usize>,
    /// Range of its block table in [`Batch::tables`].
    pub table: std::ops::Range<usize>,
}

/// Reference to a token id that so far only the device knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// Row that takes the token.
    pub row: usize,
    /// Index of the sample in the previous step.
    pub sample: usize,
}

/// Input of one step, as flat arrays with one entry per row unless stated otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids. The entry of a row that `feedback` names is ignored.
    pub tokens: Vec<u32>,
    /// Rows whose token is a sample of the previous step.
    pub feedback: Vec<Feedback>,
    /// Position of each token in its sequence, from 0.
    pub positions: Vec<u32>,
    /// Slot that each token's key and value are written to: `block · block_tokens + offset`.
    pub slots: Vec<u32>,
    /// One entry per sequence. Their rows follow each other without gaps.
    pub sequences: Vec<BatchSequence>,
    /// Block tables of the sequences, one after the other. Entry `i` of a table is the block of
    /// the positions from `i · block_tokens`.
    pub tables: Vec<u32>,
    /// Rows whose logits are needed, in ascending order.
    pub sample_rows: Vec<usize>,
}

impl Batch {
    /// Returns the number of tokens.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Empties every array but keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.feedback.clear();
        self.positions.clear();
        self.slots.clear();
        self.sequences.clear();
        self.tables.clear();
        self.sample_rows.clear();
    }
}

/// The part of a [`Device`](super::Device) that begins and ends steps.
pub trait StepOps: DeviceTypes {
    /// Tells the device how large steps can get, so that it can reserve memory for their inputs
    /// and intermediates. Must be called before anything is allocated.
    fn reserve(&mut self, limits: &DeviceLimits) -> Result<(), DeviceError> {
        let _ = limits;
        Ok(())
    }

    /// Returns the maximum number of steps in flight, 1 or 2. With 2, a step is collected after
    /// the next one has been enqueued.
    fn depth(&self) -> usize {
        1
    }

    /// Takes the inputs of the next step, which its operations then use.
    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError>;

    /// Ends the forward pass after [`StepOps::stage`] returned [`Staged::Enqueue`] and the
    /// caller enqueued the operations. `outcome` is the result of enqueueing them. Must be
    /// called before [`SamplingOps::sample`](super::SamplingOps::sample).
    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        outcome.map(|()| Finished::Done)
    }
}
