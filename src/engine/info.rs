//! What an engine runs, and within which limits.

use crate::engine::sync::Arc;
use crate::runner::{ModelInfo, Pooling, RunnerInfo};

/// Description of an engine: what it runs, and how large its KV cache is.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct EngineInfo {
    /// Number of tokens in the vocabulary.
    pub vocabulary: usize,
    /// Maximum number of tokens per sequence that the model and the settings allow.
    /// [`Engine::max_sequence_tokens`](crate::Engine::max_sequence_tokens) also takes the size
    /// of the KV cache into account.
    pub context_tokens: usize,
    /// Maximum number of tokens per step.
    pub max_batch_tokens: usize,
    /// Length of an embedding vector, or the number of scores; `None` if the engine computes
    /// neither.
    pub embedding: Option<usize>,
    /// How embeddings and scores are computed.
    pub pooling: Arc<Pooling>,
    /// Number of segments that the model tells apart. See
    /// [`Engine::pair_tokens`](crate::Engine::pair_tokens).
    pub segments: usize,
    /// Whether the engine can generate tokens. Otherwise, it only computes embeddings or scores.
    pub generates: bool,
    /// Tokens that end an answer, according to the model's own settings.
    pub end_tokens: Vec<u32>,
    /// Number of blocks of the KV cache.
    pub cache_blocks: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// The loaded model. `None` only for an engine without a model, as tests have it.
    pub model: Option<ModelInfo>,
}

impl EngineInfo {
    pub(super) fn new(info: RunnerInfo) -> Self {
        Self {
            vocabulary: info.vocabulary,
            context_tokens: info.context_tokens,
            max_batch_tokens: info.max_batch_tokens,
            embedding: info.embedding,
            pooling: Arc::new(info.pooling),
            segments: info.segments,
            generates: info.generates,
            end_tokens: info.end_tokens,
            cache_blocks: info.cache_blocks,
            block_tokens: info.block_tokens,
            model: info.model,
        }
    }
}
