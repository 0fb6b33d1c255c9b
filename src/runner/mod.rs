//! Turns plans into device work: the model, its inputs and its memory.
//!
//! [`Runner`] is all that the scheduler thread knows about models and devices. [`ModelRunner`]
//! runs a model on a device. [`NullRunner`] computes nothing and serves to measure the host
//! side. Tests have runners of their own, to reach states that a real device does not enter on
//! demand.

mod demand;
mod device;
mod error;
mod files;
mod generation_config;
mod inputs;
pub(crate) mod limits;
mod memory;
mod model_runner;
#[cfg(any(test, feature = "internals"))]
mod null;
mod options;
mod pooling;

pub use error::LoadError;
#[cfg(any(test, feature = "cli", feature = "internals"))]
pub use files::random_model;
pub use files::{ModelFiles, build_runner};
pub use memory::{GroupMemory, MemoryPlan};
pub use model_runner::ModelRunner;
#[cfg(any(test, feature = "internals"))]
pub use null::{NullOptions, NullRunner};
pub use options::{DeviceChoice, GenerationConfig, LoadOptions};
#[cfg(feature = "server")]
pub(crate) use pooling::normalize;
pub use pooling::{Dense, Pooling, PoolingStage};

use crate::cache::{BlockId, CacheLayout, StateSlot};
use crate::config::EngineConfig;
use crate::device::{DeviceError, DeviceInfo, PooledRows};
use crate::sampling::{Samples, SamplingDefaults, Token};
use crate::schedule::{Sequences, StepPlan};
use std::time::Duration;

/// Executes steps in the order in which they are launched.
pub trait Runner {
    /// Returns how many steps may be in flight at the same time: 1 or 2. With 2, every run must
    /// have one token per sampled position, because the next step is planned before the run is
    /// known.
    fn depth(&self) -> usize;

    /// Enqueues a step: first its transfers, then its items, if any.
    ///
    /// # Errors
    /// Returns the error of the device. The step is then not in flight, and the data that it
    /// should have copied is lost.
    fn launch(&mut self, plan: &StepPlan, sequences: &Sequences) -> Result<(), DeviceError>;

    /// Overwrites blocks that no table holds, so that tests detect steps that still read them.
    /// The write happens after the steps in flight and before the next one that is launched.
    ///
    /// # Errors
    /// Returns the error of the device.
    fn poison(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        let _ = blocks;
        Ok(())
    }

    /// The same for slots of states.
    ///
    /// # Errors
    /// Returns the error of the device.
    fn poison_states(&mut self, slots: &[StateSlot]) -> Result<(), DeviceError> {
        let _ = slots;
        Ok(())
    }

    /// Waits for the oldest step in flight and returns what it has computed.
    ///
    /// # Errors
    /// Returns the error of the device, if the step failed.
    fn collect(&mut self) -> Result<StepOutput, DeviceError>;

    /// Takes back an output that has been read, so that a later step can reuse its memory.
    fn recycle(&mut self, output: StepOutput) {
        drop(output);
    }
}

/// Results of a step for the host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepOutput {
    /// Tokens in the order of the plan's items. For each item, the scores of its rows come
    /// first, then its run: the tokens that follow the first of its sampled positions.
    pub samples: Samples,
    /// Number of tokens in the run of each item that is sampled, in the order of the plan, and
    /// at least 1 each. Empty if every run has one token per sampled position, which is usual.
    pub runs: Vec<usize>,
    /// Sums of hidden states, in the order of [`StepPlan::sums`].
    pub sums: Vec<PooledRows>,
}

impl StepOutput {
    /// Empties the output and keeps its allocations.
    #[cfg(any(test, feature = "internals"))]
    pub fn clear(&mut self) {
        let Self {
            samples: Samples { tokens, not_finite },
            runs,
            sums,
        } = self;
        tokens.clear();
        not_finite.clear();
        runs.clear();
        sums.clear();
    }
}

impl From<Vec<Token>> for StepOutput {
    fn from(tokens: Vec<Token>) -> Self {
        Self {
            samples: tokens.into(),
            ..Self::default()
        }
    }
}

/// Description of a runner: what it runs, and how large its KV cache is.
#[derive(Clone, Debug)]
pub struct RunnerInfo {
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Maximum number of tokens per sequence that the model and the settings allow.
    pub context_tokens: usize,
    /// Maximum number of tokens per step, unless the settings say otherwise.
    pub max_batch_tokens: usize,
    /// Length of an embedding vector, or the number of scores; `None` if the runner computes
    /// neither.
    pub embedding: Option<usize>,
    /// How embeddings and scores are computed.
    pub pooling: Pooling,
    /// Whether the runner can generate tokens.
    pub generates: bool,
    /// Number of segments that the model tells apart; 1 for most models. A token of segment `s` is
    /// given as its id plus `s` times the size of the vocabulary. Only embeddings have segments.
    pub segments: usize,
    /// Whether all tokens of a prompt must be in the same step.
    pub whole_prompts: bool,
    /// Tokens that end a sequence, according to the model's own settings.
    pub end_tokens: Vec<u32>,
    /// Number of blocks of the KV cache.
    pub cache_blocks: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// How the layers share blocks and block tables.
    pub layout: CacheLayout,
    /// Memory for the states of recurrent layers; `None` if there are no such layers.
    pub states: Option<StateInfo>,
    /// Host memory for swapped-out blocks; `None` if the runner cannot swap.
    pub swap: Option<SwapInfo>,
    /// The loaded model; `None` for a runner without one.
    pub model: Option<ModelInfo>,
}

impl RunnerInfo {
    /// Replaces what the settings decide.
    pub(crate) fn with_settings(self, config: &EngineConfig) -> Self {
        Self {
            max_batch_tokens: config.max_batch_tokens.unwrap_or(self.max_batch_tokens),
            ..self
        }
    }
}

/// Memory for the states of recurrent layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateInfo {
    /// Number of slots.
    pub slots: usize,
    /// Snapshots are taken at multiples of this number of tokens.
    pub interval: usize,
}

/// Host memory for swapped-out blocks, and its speed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SwapInfo {
    /// Number of blocks that fit in it.
    pub blocks: usize,
    /// Time in seconds to copy one block in one direction.
    pub seconds_per_block: f64,
}

/// Description of a loaded model.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelInfo {
    /// Name of the model's architecture, such as `llama`.
    pub architecture: &'static str,
    /// Number of weights in the file.
    pub parameters: usize,
    /// Name of the format in which the file stores most weights, such as `Q4_K`; `None` if it
    /// has no weights.
    pub weights_format: Option<&'static str>,
    /// The device that runs the model.
    pub device: DeviceInfo,
    /// Memory that the model and its KV cache take on the device.
    pub memory: MemoryPlan,
    /// The model's own sampling settings, which apply if a request sets none.
    pub sampling: SamplingDefaults,
    /// Time it took to read the weights, to convert them for the device, and to warm it up.
    pub load_time: Duration,
}

#[cfg(any(test, feature = "internals"))]
impl ModelInfo {
    /// Describes a model of which only the sampling settings are known.
    pub fn of_sampling(sampling: SamplingDefaults) -> Self {
        Self {
            architecture: "none",
            parameters: 0,
            weights_format: None,
            device: DeviceInfo {
                name: "none".to_owned(),
                description: String::new(),
                details: Vec::new(),
            },
            memory: MemoryPlan {
                weights: 0,
                activations: 0,
                scratch: 0,
                graphs: 0,
                graph_bytes: 0,
                pinned: 0,
                batch_tokens: 1,
                cache_per_token: 0,
                cache_blocks: 0,
                block_bytes: 0,
                block_tokens: 1,
                state_slots: 0,
                state_bytes: 0,
                state_layers: 0,
                layout: CacheLayout::single(),
                context_tokens: 1,
            },
            sampling,
            load_time: Duration::ZERO,
        }
    }
}
