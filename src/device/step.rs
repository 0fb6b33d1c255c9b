//! Steps: how large they get, and when their operations are enqueued.

use super::{Batch, DeviceError, DeviceTypes};

/// What the caller must do next after staging a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Staged {
    /// Enqueue the operations of the forward pass, then call [`StepOps::finish`].
    Enqueue,
    /// Only sample. The device had recorded the forward pass of a step of this size and has
    /// enqueued all of it.
    #[cfg(any(test, feature = "cuda", feature = "internals"))]
    Replayed,
}

/// What the caller must do next after enqueueing the operations of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finished {
    /// Only sample.
    Done,
    /// Enqueue the operations again, then call [`StepOps::finish`] again. The device tried to
    /// record the operations and failed, and computed none of them.
    #[cfg(any(test, feature = "cuda", feature = "internals"))]
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
    /// Number of groups of layers, each of which has its own block tables.
    pub groups: usize,
    /// Number of logits per sampled row.
    pub vocabulary: usize,
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
