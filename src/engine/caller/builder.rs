//! [`EngineBuilder`]: the settings with which an engine is loaded.

use crate::config::{EngineConfig, Preemption};
use crate::device::cpu::CpuOptions;
#[cfg(feature = "cuda")]
use crate::device::cuda::CudaOptions;
use crate::engine::Engine;
use crate::runner::{DeviceChoice, GenerationConfig, LoadError, LoadOptions};
use std::path::PathBuf;
use std::time::Duration;

/// Collects the settings of an engine; [`Engine::builder`] creates it.
///
/// Settings that are not given have the defaults of [`EngineConfig`] and [`LoadOptions`]. They
/// are checked by [`EngineBuilder::build`].
///
/// ```no_run
/// use quell::{DeviceChoice, Engine};
///
/// # fn main() -> Result<(), quell::LoadError> {
/// let engine = Engine::builder("model.gguf")
///     .device(DeviceChoice::Cpu)
///     .kv_cache_bytes(1 << 30)
///     .max_sequences(64)
///     .build()?;
/// # drop(engine);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "the engine is loaded by `build`"]
pub struct EngineBuilder {
    path: PathBuf,
    config: EngineConfig,
    options: LoadOptions,
}

impl EngineBuilder {
    pub(in crate::engine) fn new(path: PathBuf) -> Self {
        Self {
            path,
            config: EngineConfig::default(),
            options: LoadOptions::default(),
        }
    }

    /// Replaces all settings of the engine that were given so far.
    pub fn config(mut self, config: EngineConfig) -> Self {
        self.config = config;
        self
    }

    /// Replaces all settings of loading that were given so far, the device among them.
    pub fn options(mut self, options: LoadOptions) -> Self {
        self.options = options;
        self
    }

    /// Sets where the model runs. The default is a CUDA device if there is one, else the CPU.
    pub fn device(mut self, device: DeviceChoice) -> Self {
        self.options.device = device;
        self
    }

    /// Sets the settings of the CPU device.
    pub fn cpu(mut self, options: CpuOptions) -> Self {
        self.options.cpu = options;
        self
    }

    /// Sets the settings of the CUDA device. [`EngineBuilder::device`] chooses which device it
    /// is.
    #[cfg(feature = "cuda")]
    pub fn cuda(mut self, options: CudaOptions) -> Self {
        self.options.cuda = options;
        self
    }

    /// Sets where [`Engine::sampling_defaults`] come from.
    pub fn generation_config(mut self, choice: GenerationConfig) -> Self {
        self.options.generation_config = choice;
        self
    }

    /// Calls `progress` as [`LoadOptions::progress`] says.
    pub fn progress(mut self, progress: impl FnMut(usize, usize) + Send + 'static) -> Self {
        self.options.progress = Some(Box::new(progress));
        self
    }

    /// Sets the size of the KV cache in bytes.
    pub fn kv_cache_bytes(mut self, bytes: usize) -> Self {
        self.config.kv_cache_bytes = Some(bytes);
        self
    }

    /// Sets the number of slots for the states of recurrent layers, as
    /// [`EngineConfig::state_slots`] describes.
    pub fn state_slots(mut self, slots: usize) -> Self {
        self.config.state_slots = Some(slots);
        self
    }

    /// Sets the number of tokens per KV cache block.
    pub fn block_tokens(mut self, tokens: usize) -> Self {
        self.config.block_tokens = tokens;
        self
    }

    /// Sets the maximum number of tokens per sequence, prompt and answer together.
    pub fn max_context(mut self, tokens: usize) -> Self {
        self.config.max_context = Some(tokens);
        self
    }

    /// Sets the maximum number of sequences that run at the same time.
    pub fn max_sequences(mut self, sequences: usize) -> Self {
        self.config.max_sequences = sequences;
        self
    }

    /// Sets the maximum number of tokens per step.
    pub fn max_batch_tokens(mut self, tokens: usize) -> Self {
        self.config.max_batch_tokens = Some(tokens);
        self
    }

    /// Sets the maximum number of open requests, including those that wait to start.
    pub fn max_open_requests(mut self, requests: usize) -> Self {
        self.config.max_open_requests = requests;
        self
    }

    /// Sets whether complete blocks are kept for later requests with the same prefix.
    pub fn prefix_cache(mut self, enabled: bool) -> Self {
        self.config.prefix_cache = enabled;
        self
    }

    /// Sets what happens to the KV cache of a preempted sequence, and the host memory in bytes
    /// that it may be swapped out to.
    pub fn preemption(mut self, preemption: Preemption, swap_bytes: usize) -> Self {
        self.config.preemption = preemption;
        self.config.swap_bytes = swap_bytes;
        self
    }

    /// Sets the number of unread chunks at which a request is paused until its reader catches
    /// up.
    pub fn stream_buffer(mut self, chunks: usize) -> Self {
        self.config.stream_buffer = chunks;
        self
    }

    /// Sets the share of the KV cache, in percent, that sessions may pin.
    pub fn pinned_percent(mut self, percent: u8) -> Self {
        self.config.pinned_percent = percent;
        self
    }

    /// Sets how long a request may stay paused because its reader lags behind, before it is
    /// cancelled. `None` means no limit.
    pub fn slow_consumer_deadline(mut self, deadline: impl Into<Option<Duration>>) -> Self {
        self.config.slow_consumer_deadline = deadline.into();
        self
    }

    /// Sets how long one device call may take before the engine closes. `None` means no limit.
    pub fn step_deadline(mut self, deadline: impl Into<Option<Duration>>) -> Self {
        self.config.step_deadline = deadline.into();
        self
    }

    /// Sets whether the block accounting is checked after every step, as
    /// [`EngineConfig::audit`] describes.
    pub fn audit(mut self, enabled: bool) -> Self {
        self.config.audit = enabled;
        self
    }

    /// Sets the value of the label `model_name` on the engine's metrics.
    pub fn metrics_label(mut self, label: impl Into<String>) -> Self {
        self.config.metrics_label = Some(label.into());
        self
    }

    /// Loads the model and starts the scheduler thread. Blocks until the model is ready.
    ///
    /// # Errors
    ///
    /// - [`LoadError::Config`] if a setting is out of range, or if the KV cache has no room for
    ///   a block of each group of layers.
    /// - [`LoadError::Weights`] if a file of the model is missing, cannot be read or is invalid.
    /// - [`LoadError::Model`] or [`LoadError::EmptyWindow`] if quell cannot run the model.
    /// - [`LoadError::Text`] if the tokenizer or the chat template is invalid or not supported.
    /// - [`LoadError::GenerationConfig`] if the model's own sampling settings are invalid, unless
    ///   [`EngineBuilder::generation_config`] excludes them.
    /// - [`LoadError::Memory`] if the device has too little memory for the model under the
    ///   settings.
    /// - [`LoadError::Device`] if the device cannot be used or fails.
    /// - [`LoadError::Thread`] if a thread cannot be started.
    pub fn build(self) -> Result<Engine, LoadError> {
        Engine::load_with(self.path, self.config, self.options)
    }
}
