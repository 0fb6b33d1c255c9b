//! Steps: how large they get, what memory they need, and when their operations are enqueued.

use super::{Batch, DeviceError, DeviceTypes, HeadShape};

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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// The model that computes the steps.
    pub model: ModelShape,
}

/// Sizes of a model on which the memory for intermediate results depends. A device that does not
/// know them allocates that memory when it is first needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ModelShape {
    /// Number of layers.
    pub layers: usize,
    /// Heads of every attention layer, or if they differ, of one whose keys and values take the most
    /// room.
    pub heads: HeadShape,
    /// Heads of an attention layer with the fewest key-value heads, if they are not those.
    pub narrow_heads: Option<HeadShape>,
    /// Largest number of columns of a float32 matrix that is multiplied by weights; 0 if there
    /// is none.
    pub full_columns: usize,
    /// The mixture-of-experts layers, if there are any.
    pub experts: Option<ExpertShape>,
    /// Number of residual streams, if there are several; otherwise 0.
    pub streams: usize,
}

impl ModelShape {
    /// Returns the heads that attention layers have.
    #[cfg(any(test, feature = "cuda"))]
    pub fn all_heads(&self) -> impl Iterator<Item = HeadShape> {
        [Some(self.heads), self.narrow_heads].into_iter().flatten()
    }
}

/// Sizes of a mixture-of-experts layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertShape {
    /// Number of experts.
    pub count: usize,
    /// Number of experts per row.
    pub top_k: usize,
    /// Number of columns of the layer's input and output.
    pub columns: usize,
    /// Number of columns between the two products of an expert.
    pub hidden: usize,
}

/// Memory that a device needs for steps, in bytes, in addition to the weights, the activations
/// and the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepMemory {
    /// Inputs of steps, and intermediate results of single operations.
    pub scratch: usize,
    /// Maximum number of steps that are kept as recordings.
    pub most_graphs: usize,
    /// Size of that many recordings, as far as the device can tell in advance. They are made
    /// after the KV cache is allocated.
    pub graphs: usize,
    /// Pinned memory of the host, through which inputs and results are copied.
    pub pinned: usize,
}

/// The part of a [`Device`](super::Device) that begins and ends steps.
pub trait StepOps: DeviceTypes {
    /// Returns the memory that steps within `limits` need.
    fn step_memory(&self, limits: &DeviceLimits) -> StepMemory {
        let _ = limits;
        StepMemory::default()
    }

    /// Tells the device how large steps can get. It allocates [`StepMemory::scratch`], so that
    /// no step has to. Must be called before anything else is allocated.
    fn reserve(&mut self, limits: &DeviceLimits) -> Result<(), DeviceError> {
        let _ = limits;
        Ok(())
    }

    /// Returns the maximum number of tokens per step that makes good use of this device.
    fn default_step_tokens(&self) -> usize {
        512
    }

    /// Returns the number of steps to run once before the device is used, with
    /// [`StepOps::warm_up`], so that later steps of the same size are fast from the start.
    fn warm_up_steps(&self) -> usize {
        0
    }

    /// Runs one of these steps, given by its index. It has no sequences, and changes nothing in
    /// the cache. `enqueue` enqueues the forward pass of this number of rows, all of which are
    /// sampled.
    fn warm_up(
        &mut self,
        index: usize,
        enqueue: &mut dyn FnMut(&mut Self, usize) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let _ = (index, enqueue);
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
