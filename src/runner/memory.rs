//! The memory plan: how many blocks the KV cache gets.

use super::limits::context_tokens;
use super::{LoadError, SwapInfo};
use crate::config::EngineConfig;
use crate::device::{CacheShape, Device};
use crate::model::ModelConfig;

/// Maximum number of blocks, on the device or on the host.
const MAX_BLOCKS: usize = u32::MAX as usize >> 8;

/// Memory that a model takes on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Size of the weights in bytes, in the device's format.
    pub weights: usize,
    /// Size of the KV cache in bytes per token, all layers together.
    pub cache_per_token: usize,
    /// Number of blocks of the KV cache.
    pub cache_blocks: usize,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
}

impl MemoryPlan {
    /// Creates the plan for `weights` bytes of weights and a cache of this shape.
    pub(super) fn new<D: Device>(weights: usize, shape: &CacheShape, device: &D) -> Self {
        Self {
            weights,
            cache_per_token: device.cache_bytes(shape) / (shape.blocks * shape.block_tokens),
            cache_blocks: shape.blocks,
            block_tokens: shape.block_tokens,
        }
    }

    /// Returns the size of the whole KV cache in bytes.
    pub fn cache(&self) -> usize {
        self.cache_per_token * self.block_tokens * self.cache_blocks
    }
}

/// Returns the shape of the largest useful cache that fits in `budget` bytes.
pub(super) fn cache_shape<D: Device>(
    model: &ModelConfig,
    config: &EngineConfig,
    budget: usize,
    device: &D,
) -> Result<CacheShape, LoadError> {
    let heads = model.heads();
    let block = CacheShape {
        layers: model.layers.len(),
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        blocks: 1,
        block_tokens: config.block_tokens,
    };
    let block_bytes = device.cache_bytes(&block).max(1);
    // More than the full length of every sequence would never be used.
    let useful = context_tokens(model, config)
        .div_ceil(config.block_tokens)
        .saturating_mul(config.max_sequences);
    let blocks = (budget / block_bytes).min(useful).min(MAX_BLOCKS);
    if blocks == 0 {
        return Err(LoadError::Config {
            name: "kv_cache_bytes",
            value: budget.to_string(),
            expected: format!("at least {block_bytes} (one block of this model)"),
        });
    }
    Ok(CacheShape { blocks, ..block })
}

/// Returns how many blocks of a cache of this shape can be swapped out under the settings;
/// `None` if there is no room for one.
pub(super) fn swap_info<D: Device>(
    config: &EngineConfig,
    shape: &CacheShape,
    device: &D,
) -> Option<SwapInfo> {
    let block_bytes = device.cache_bytes(&CacheShape {
        blocks: 1,
        ..*shape
    });
    let blocks = config.swap_bytes.checked_div(block_bytes)?;
    (blocks > 0).then(|| SwapInfo {
        blocks: blocks.min(MAX_BLOCKS),
        seconds_per_block: block_bytes as f64 / device.swap_bandwidth(),
    })
}
