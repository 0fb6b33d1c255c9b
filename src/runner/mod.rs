//! A plan made into device work: the model, its inputs, and its memory.
//!
//! [`Runner`] is all that the scheduler thread knows of models and devices.
//! [`ModelRunner`] is the real one; [`NullRunner`] measures the host side; tests bring
//! their own to reach states that a real device can't be brought into on demand.

mod error;
mod files;
mod generation_config;
mod inputs;
pub(crate) mod limits;
mod memory;
mod model_runner;
mod null;

pub use error::LoadError;
pub use files::{DeviceChoice, GenerationConfig, LoadOptions, ModelFiles};
pub use memory::MemoryPlan;
pub use model_runner::ModelRunner;
pub use null::{NullOptions, NullRunner};

use crate::cache::BlockId;
use crate::device::{DeviceError, DeviceInfo, PooledRows};
use crate::model::ModelConfig;
use crate::sampling::{Sampled, SamplingDefaults};
use crate::schedule::{Sequences, StepPlan};
use crate::weights::ParameterCount;
use std::time::Duration;

/// Carries out steps, in the order in which they are launched.
pub trait Runner {
    /// Steps that may be in flight at the same time: 1 or 2.
    fn depth(&self) -> usize;

    /// Enqueues a step: its transfers, then its items, of which there may be none. An
    /// error means that nothing of it is in flight, and that what it was to copy is lost.
    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError>;

    /// Overwrites blocks that nobody holds, so that a step that reads them shows it.
    /// Comes after what is in flight and before what is launched next.
    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        let _ = blocks;
        Ok(())
    }

    /// Waits for the oldest step in flight and gives what it has computed.
    fn collect(&mut self) -> Result<StepOutput, DeviceError>;

    /// Takes an output back that has been read, so that a later step can use its memory.
    fn recycle(&mut self, output: StepOutput) {
        drop(output);
    }
}

/// What a step has computed for the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// In the order of the plan's items: the scores of an item's rows, then the sample of
    /// its last.
    pub samples: Vec<Sampled>,
    /// In the order of [`StepPlan::sums`].
    pub sums: Vec<PooledRows>,
}

impl From<Vec<Sampled>> for StepOutput {
    fn from(samples: Vec<Sampled>) -> Self {
        Self {
            samples,
            sums: Vec::new(),
        }
    }
}

/// What an engine runs, and in how much memory.
#[derive(Clone, Debug)]
pub struct RunnerInfo {
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Longest sequence that the model and the settings allow.
    pub context_tokens: usize,
    /// Numbers of an embedding; `None` if the runner computes none.
    pub embedding: Option<usize>,
    /// Tokens that end a sequence, by the model's own settings.
    pub end_tokens: Vec<u32>,
    /// Blocks of the key-value cache.
    pub cache_blocks: usize,
    /// Tokens a block.
    pub block_tokens: usize,
    /// Where blocks can be swapped out to; `None` if the runner cannot.
    pub swap: Option<SwapInfo>,
    /// The model; `None` for a runner without one.
    pub model: Option<ModelInfo>,
}

/// Host memory for swapped-out blocks, and how fast it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SwapInfo {
    /// Blocks that it has room for.
    pub blocks: usize,
    /// Seconds that copying one block takes, one way.
    pub seconds_per_block: f64,
}

/// A loaded model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// Its numbers.
    pub config: ModelConfig,
    /// Its weights in the file.
    pub parameters: ParameterCount,
    /// The device that holds it.
    pub device: DeviceInfo,
    /// The memory that it takes there.
    pub memory: MemoryPlan,
    /// How to sample where a request does not say, by the model's own settings.
    pub sampling: SamplingDefaults,
    /// How long it took to read the weights and to lay them out for the device.
    pub load_time: Duration,
}
