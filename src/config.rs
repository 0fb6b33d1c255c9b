//! The engine's settings.

use std::time::Duration;

/// Limits and sizes of an engine; every field has a working default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Tokens (rows) of one step: the decodes and the prompt chunk that fills up.
    pub max_batch_tokens: usize,
    /// Sequences that run at the same time.
    pub max_sequences: usize,
    /// Requests that may be open at the same time, waiting ones included; one more
    /// is refused as overload.
    pub max_open_requests: usize,
    /// Bytes of the key-value cache; what the device gives if `None`: 512 MiB on the
    /// CPU, on a GPU what the weights leave of its memory.
    pub kv_cache_bytes: Option<usize>,
    /// Tokens a block of the key-value cache.
    pub block_tokens: usize,
    /// Longest sequence, prompt and answer together; the model's own limit if `None`.
    pub max_context: Option<usize>,
    /// Tokens that wait for a slow reader before its sequence is paused.
    pub stream_buffer: usize,
    /// Whether complete blocks are kept after their sequence has ended, and reused by
    /// later sequences that begin with the same tokens.
    pub prefix_cache: bool,
    /// Host memory, in bytes, that preempted sequences may be swapped out to instead of
    /// being computed anew; used as it is needed. 0 for none.
    pub swap_bytes: usize,
    /// How a sequence gives its blocks back when others need them.
    pub preemption: Preemption,
    /// Share of the key-value cache, in percent, that sessions may pin.
    pub pinned_percent: u8,
    /// How long a paused request's reader may lag behind before it is cancelled as
    /// [`SlowConsumer`](crate::CancelReason::SlowConsumer); without end if `None`.
    pub slow_consumer_deadline: Option<Duration>,
    /// How long one call of the device may take, to launch a step or to wait for one,
    /// before the device counts as stuck, which fails every session and closes the
    /// engine; without end if `None`.
    pub step_deadline: Option<Duration>,
    /// Value of the label `model_name` of this engine's metrics; no label if `None`.
    pub metrics_label: Option<String>,
    /// Whether the cache's books are checked after every step, and freed blocks
    /// overwritten with NaN, so that a step that still reads them shows it. An
    /// imbalance closes the engine. The check costs time in the number of blocks.
    pub audit: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch_tokens: 512,
            max_sequences: 256,
            max_open_requests: 4096,
            kv_cache_bytes: None,
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

/// How a sequence gives its blocks back when others need them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Preemption {
    /// Whichever is estimated to cost less time.
    #[default]
    Auto,
    /// Its tokens are computed anew.
    Recompute,
    /// Its blocks are copied to host memory, as long as there is room.
    Swap,
}
