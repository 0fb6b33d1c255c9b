//! The engine's settings.

use std::time::Duration;

/// Limits and sizes of an engine; every field has a working default.
///
/// Construct it with `..EngineConfig::default()`: fields are added in minor releases.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Maximum number of tokens per step: decodes first, then chunks of prompts in the
    /// room that is left. If `None`, the device decides: 512 on the CPU; on a GPU 8192, or less
    /// if the activations of such a step would take more than a quarter of the memory that the
    /// weights leave, or if the KV cache is smaller.
    pub max_batch_tokens: Option<usize>,
    /// Maximum number of sequences that run at the same time.
    pub max_sequences: usize,
    /// Maximum number of open requests, including those that wait to start. Further requests
    /// are refused with [`SubmitError::Overloaded`](crate::SubmitError::Overloaded).
    pub max_open_requests: usize,
    /// Size of the KV cache in bytes. If `None`, the device decides: 512 MiB on the CPU; on a
    /// GPU, the usable memory that is left after the weights are loaded; but no more than
    /// `max_sequences` sequences of the full context hold.
    pub kv_cache_bytes: Option<usize>,
    /// Number of slots for the states of recurrent layers, of models that have some: one for each
    /// running sequence, and one for each state that is kept so that later sequences can begin
    /// with it. If `None`, the slots take at most half of the memory of the KV cache, and there
    /// are at most four for each of the sequences that may run. Must be `None` for models
    /// without recurrent layers.
    pub state_slots: Option<usize>,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// Maximum number of tokens per sequence, prompt and answer together, at most the context of
    /// the model. If `None`, the model's own limit applies.
    pub max_context: Option<usize>,
    /// Number of unread chunks at which a request is paused until its reader catches up. A chunk
    /// has the tokens of one step, which is usually one.
    pub stream_buffer: usize,
    /// Whether complete blocks are kept after their sequence has ended, so that later
    /// sequences that begin with the same tokens can reuse them.
    pub prefix_cache: bool,
    /// Host memory, in bytes, to which preempted sequences may be swapped out instead of being
    /// recomputed. It is allocated as needed; 0 disables swapping, which contradicts
    /// [`Preemption::Swap`].
    pub swap_bytes: usize,
    /// What happens to the KV cache of a sequence that is preempted.
    pub preemption: Preemption,
    /// Share of the KV cache, in percent, that sessions may pin.
    pub pinned_percent: u8,
    /// How long a request may stay paused because its reader lags behind, before it is
    /// cancelled as [`SlowConsumer`](crate::CancelReason::SlowConsumer). `None` means no limit.
    pub slow_consumer_deadline: Option<Duration>,
    /// How long one device call, which launches a step or waits for one, may take before the
    /// device counts as stuck. A stuck device fails every request and closes the engine.
    /// `None` means no limit.
    pub step_deadline: Option<Duration>,
    /// Value of the label `model_name` on this engine's metrics. If `None`, the metrics have no
    /// such label.
    pub metrics_label: Option<String>,
    /// Whether the block accounting is checked after every step, and freed blocks are
    /// overwritten with NaN to expose steps that still read them. An inconsistency closes the
    /// engine. The check takes time proportional to the number of blocks.
    pub audit: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: None,
            max_sequences: 256,
            max_open_requests: 4096,
            kv_cache_bytes: None,
            state_slots: None,
            block_tokens: 16,
            max_context: None,
            stream_buffer: 256,
            prefix_cache: true,
            swap_bytes: 256 << 20,
            preemption: Preemption::Auto,
            pinned_percent: 25,
            slow_consumer_deadline: Some(Duration::from_secs(120)),
            step_deadline: Some(Duration::from_secs(120)),
            metrics_label: None,
            audit: cfg!(debug_assertions),
        }
    }
}

/// What happens to the KV cache of a sequence that is preempted, when its blocks are needed by
/// others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Preemption {
    /// Recompute or swap, whichever is estimated to take less time.
    #[default]
    Auto,
    /// The blocks are dropped, and the tokens are recomputed when the sequence resumes.
    Recompute,
    /// The blocks are copied to host memory, as long as there is room; otherwise the tokens are
    /// recomputed.
    Swap,
}
