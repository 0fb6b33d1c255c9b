//! The paged KV cache.

use super::{DeviceError, DeviceTypes, Values};

/// Place of a layer in the KV cache.
///
/// A block has places for the keys and values of a fixed number of layers,
/// [`CacheShape::layers`]. The layers that share blocks, and with them the block tables, are a
/// group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheLayer {
    /// Index of the group in [`Batch::groups`](super::Batch::groups).
    pub group: usize,
    /// Index of its place in the blocks of its group.
    pub index: usize,
    /// Number of layers of the same heads before it in the same place. Layers that are smaller
    /// than the place share it.
    pub part: usize,
}

impl CacheLayer {
    /// Returns the place of layer `index` if all layers are in one group.
    #[cfg(any(test, feature = "internals"))]
    pub fn single_group(index: usize) -> Self {
        Self {
            group: 0,
            index,
            part: 0,
        }
    }
}

/// Dimensions of the paged KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    /// Number of places for attention layers per block.
    pub layers: usize,
    /// Number of key-value heads of the largest layer, for which a place has room.
    pub kv_heads: usize,
    /// Number of elements per key of the largest layer.
    pub head_dim: usize,
    /// Where the values are.
    pub values: Values,
    /// Total number of blocks.
    pub blocks: usize,
    /// Number of tokens per block.
    pub block_tokens: usize,
}

/// The part of a [`Device`](super::Device) that allocates the KV cache and copies its blocks.
///
/// Like all operations, copies run after everything already enqueued and before everything
/// enqueued later, and the caller does not wait. An operation that rejects its list of blocks
/// changes nothing.
pub trait CacheOps: DeviceTypes {
    /// Returns the number of bytes that a KV cache of this shape takes on this device, all
    /// layers and blocks together. For the size of one block, pass a shape with `blocks` set to
    /// 1.
    fn cache_bytes(&self, shape: &CacheShape) -> usize;

    /// Returns the number of bytes that the KV cache may take if the settings do not say.
    /// `unallocated` is the number of bytes that are yet to be allocated for anything else.
    fn cache_budget(&self, unallocated: usize) -> Result<usize, DeviceError>;

    /// Returns the free bytes of the device's memory; `None` if it has none of its own.
    fn free_memory(&self) -> Result<Option<usize>, DeviceError> {
        Ok(None)
    }

    /// Allocates the KV cache.
    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<Self::Cache, DeviceError>;

    /// Copies blocks within the cache, keys and values of all its layers. Each pair is a source and
    /// a target. A block must not be a target twice, nor both a source and a target.
    fn copy_blocks(
        &mut self,
        cache: &mut Self::Cache,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Overwrites blocks with NaN, so that tests detect reads of blocks that were freed.
    fn poison(&mut self, cache: &mut Self::Cache, blocks: &[u32]) -> Result<(), DeviceError>;
}
