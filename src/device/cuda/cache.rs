//! The paged KV cache.
//!
//! Each layer of a block has two arrays, keys and values, of shape
//! `[blocks][kv_heads][block_tokens][head_dim]` in the activation type. All arrays are stored
//! one after the other. Where values are in the keys (latent attention), there are only the keys.
//! The arrays of a block have room for the largest layer. Smaller layers follow each other in them,
//! each with its own number of heads and their size.

use super::CudaDevice;
use super::error::{require, require_ok, unsupported};
use super::launch::{Grid, kernels};
use super::memory::{Buffer, Ptr};
use crate::device::blocks::{check_blocks, check_copies};
use crate::device::{CacheLayer, CacheOps, CacheShape, DeviceError, HeadShape, StateShape, Values};

kernels! {
    /// Kernels of `kernels/cache.cu`.
    pub(super) struct CacheKernels in "cache" {
        copy_blocks(cache: Ptr, pairs: Ptr, blocks: u32, vectors: u32);
        poison_blocks(cache: Ptr, list: Ptr, blocks: u32, vectors: u32);
    }
}

/// Bytes per element of a key or value.
const ELEMENT: usize = 2;
/// Bytes of a vector, the unit in which kernels count.
const VECTOR_BYTES: usize = 16;

/// Head sizes, in elements, for which there are attention kernels.
pub(super) const HEAD_DIMS: [usize; 8] = [16, 32, 64, 80, 96, 128, 256, 512];

/// The largest key, in elements, of attention whose values are in the keys, as in
/// `kernels/latent.cu`.
pub(super) const LARGEST_KEY: usize = 576;

/// The KV cache. Layers are counted within a block.
pub struct CudaCache {
    shape: CacheShape,
    buffer: Buffer,
    /// The states of recurrent layers, if there are some.
    pub(super) states: Option<States>,
}

/// Where the keys and values of a layer are.
pub(super) struct CachePlace {
    /// Address of the first key in the first block.
    pub(super) keys: Ptr,
    /// Address of the first value in the first block.
    pub(super) values: Ptr,
    /// Number of vectors of eight elements from one block to the next.
    pub(super) block_vectors: u32,
}

/// The memory for the states of recurrent layers: one slot after the other.
pub(super) struct States {
    pub(super) shape: StateShape,
    pub(super) buffer: Buffer,
}

impl CudaCache {
    /// Returns the shape that the cache was allocated for.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Returns where the keys and values of a layer with these heads are. [`require_heads`] must
    /// hold.
    pub(super) fn place(&self, heads: HeadShape, layer: CacheLayer) -> CachePlace {
        let CacheShape { block_tokens, .. } = self.shape;
        let own = heads.kv_heads * block_tokens * heads.head_dim * ELEMENT;
        let first = |array: Ptr| array.offset_bytes(layer.part * own);
        CachePlace {
            keys: first(self.keys(layer.index)),
            values: first(self.values(layer.index)),
            block_vectors: (block_bytes(&self.shape) / VECTOR_BYTES) as u32,
        }
    }

    /// Returns the address of the keys of a layer. `layer` must be below `shape().layers`.
    pub(super) fn keys(&self, layer: usize) -> Ptr {
        self.array(arrays(&self.shape) * layer)
    }

    /// Returns the address of the values of a layer, which is that of the keys if the values are in
    /// them. `layer` must be below `shape().layers`.
    pub(super) fn values(&self, layer: usize) -> Ptr {
        let arrays = arrays(&self.shape);
        self.array(arrays * layer + arrays - 1)
    }

    fn array(&self, index: usize) -> Ptr {
        let bytes = block_bytes(&self.shape) * self.shape.blocks;
        self.buffer.ptr().offset_bytes(index * bytes)
    }

    /// Returns the addresses of a block's keys and values in each layer, and the bytes at each
    /// address.
    pub(super) fn parts(&self, block: u32) -> (impl Iterator<Item = Ptr>, usize) {
        let bytes = block_bytes(&self.shape);
        let count = arrays(&self.shape) * self.shape.layers;
        let arrays = (0..count).map(|index| self.array(index));
        let offset = block as usize * bytes;
        (arrays.map(move |array| array.offset_bytes(offset)), bytes)
    }

    /// Returns the number of blocks, and the bytes per block in all layers together.
    pub(super) fn blocks(&self) -> (usize, usize) {
        (self.shape.blocks, all_layers(&self.shape))
    }

    /// Reads the keys and the values of a block in a layer, as bits of the activation type,
    /// each of shape `[kv_heads][block_tokens][head_dim]`. For tests.
    ///
    /// # Errors
    /// Fails if the layer or the block does not exist, or if the driver fails.
    #[cfg(any(test, feature = "internals"))]
    pub fn read(
        &self,
        device: &CudaDevice,
        layer: usize,
        block: usize,
    ) -> Result<(Vec<u16>, Vec<u16>), DeviceError> {
        let inside = layer < self.shape.layers && block < self.shape.blocks;
        require(inside, "read", || {
            format!(
                "there is no block {block} of layer {layer} in {:?}",
                self.shape
            )
        })?;
        let bytes = block_bytes(&self.shape);
        let read = |array: Ptr| {
            let from = array.offset_bytes(block * bytes);
            device.context.read(from, bytes / ELEMENT)
        };
        Ok((read(self.keys(layer))?, read(self.values(layer))?))
    }

    /// Returns a grid with one CUDA block per entry and array, and the last two parameters of
    /// the kernels: blocks per array, and 16-byte vectors per block in an array.
    fn launch(&self, entries: usize) -> (Grid, u32, u32) {
        let grid = Grid::new(
            [
                entries as u32,
                (arrays(&self.shape) * self.shape.layers) as u32,
                1,
            ],
            [256, 1, 1],
        );
        let vectors = block_bytes(&self.shape) / 16;
        (grid, self.shape.blocks as u32, vectors as u32)
    }
}

/// Returns the number of arrays of a layer.
fn arrays(shape: &CacheShape) -> usize {
    match shape.values {
        Values::BesideKeys => 2,
        Values::InKeys(_) => 1,
    }
}

/// Returns the bytes of the keys, or of the values, of a block in one layer.
fn block_bytes(shape: &CacheShape) -> usize {
    shape.kv_heads * shape.block_tokens * shape.head_dim * ELEMENT
}

/// Returns the bytes of a block in all layers. `shape` must be that of an allocated cache, so
/// that the result does not overflow.
pub(super) fn all_layers(shape: &CacheShape) -> usize {
    arrays(shape) * shape.layers * block_bytes(shape)
}

/// Returns the bytes of a cache, or `None` if the number overflows.
fn bytes(shape: &CacheShape) -> Option<usize> {
    [
        arrays(shape),
        shape.layers,
        shape.blocks,
        shape.kv_heads,
        shape.head_dim,
    ]
    .into_iter()
    .try_fold(shape.block_tokens * ELEMENT, usize::checked_mul)
}

/// Returns [`DeviceError::Unsupported`] if there are no attention kernels for heads of
/// this size.
pub(super) fn require_head_dim(head_dim: usize) -> Result<(), DeviceError> {
    if HEAD_DIMS.contains(&head_dim) {
        return Ok(());
    }
    let known = HEAD_DIMS.map(|dim| dim.to_string()).join(", ");
    Err(unsupported(
        format!("attention heads of {head_dim} elements"),
        format!("supported head sizes are {known}"),
    ))
}

/// Returns [`DeviceError::Unsupported`] if there are no attention kernels for these keys and values.
fn require_keys(shape: &CacheShape) -> Result<(), DeviceError> {
    let head_dim = shape.head_dim;
    let Values::InKeys(elements) = shape.values else {
        return require_head_dim(head_dim);
    };
    let fits = shape.kv_heads == 1 && head_dim.is_multiple_of(8) && head_dim <= LARGEST_KEY;
    if fits && shape.values.check(head_dim).is_ok() {
        return Ok(());
    }
    let heads = shape.kv_heads;
    Err(unsupported(
        format!(
            "latent attention with values of {elements} elements in {heads} keys of {head_dim}"
        ),
        format!(
            "there must be one key, whose number of elements is a multiple of 8 and at most \
             {LARGEST_KEY}"
        ),
    ))
}

/// Returns [`DeviceError::Failed`] unless the heads are consistent and fit the layer's place in the
/// cache.
pub(super) fn require_heads(
    operation: &'static str,
    heads: HeadShape,
    cache: &CudaCache,
    CacheLayer { group, index, part }: CacheLayer,
) -> Result<(), DeviceError> {
    let shape = cache.shape();
    let own = heads.kv_heads.saturating_mul(heads.head_dim);
    let room = shape.kv_heads * shape.head_dim;
    let has_room = match heads.values {
        Values::BesideKeys => own.saturating_mul(part.saturating_add(1)) <= room,
        Values::InKeys(_) => own == room && part == 0,
    };
    let fits = has_room
        && heads.values == shape.values
        && heads.kv_heads > 0
        && heads.q_heads > 0
        && heads.q_heads.is_multiple_of(heads.kv_heads)
        && index < shape.layers;
    require(fits, operation, || {
        format!(
            "{heads:?} of part {part} of layer {index} of group {group} do not fit the cache, \
             {shape:?}"
        )
    })
}

impl CacheOps for CudaDevice {
    /// Returns the bytes of a cache of this shape, or `usize::MAX` if the number overflows.
    fn cache_bytes(&self, shape: &CacheShape) -> usize {
        bytes(shape).unwrap_or(usize::MAX)
    }

    fn cache_budget(&self, unallocated: usize) -> Result<usize, DeviceError> {
        let (free, total) = self.context.memory_info()?;
        let reserve = (total as f64 * f64::from(1.0 - self.options.utilisation)) as usize;
        Ok(free.saturating_sub(reserve).saturating_sub(unallocated))
    }

    fn free_memory(&self) -> Result<Option<usize>, DeviceError> {
        self.context.memory_info().map(|(free, _)| Some(free))
    }

    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<CudaCache, DeviceError> {
        if shape.block_tokens == 0 || !shape.block_tokens.is_multiple_of(16) {
            let what = format!("blocks of {} tokens", shape.block_tokens);
            return Err(unsupported(
                what,
                "the number of tokens per block must be a multiple of 16",
            ));
        }
        require_keys(shape)?;
        let slots = shape.blocks.checked_mul(shape.block_tokens);
        let one_array = CacheShape {
            layers: 1,
            values: Values::InKeys(0),
            ..*shape
        };
        let vectors = bytes(&one_array).map(|bytes| bytes / VECTOR_BYTES);
        let countable = slots.is_some_and(|slots| slots < u32::MAX as usize)
            && vectors.is_some_and(|vectors| vectors < u32::MAX as usize)
            && shape.layers <= 1 << 14
            && bytes(shape).is_some();
        if !countable {
            return Err(unsupported(
                format!("a cache of {shape:?}"),
                "a cache must have fewer than 2³² tokens, at most 16384 layers, and less than \
                 64 GiB of keys per layer",
            ));
        }
        let bytes = self.cache_bytes(shape);
        Ok(CudaCache {
            shape: *shape,
            buffer: self.context.allocate_zeroed(bytes, "the key-value cache")?,
            states: None,
        })
    }

    fn copy_blocks(
        &mut self,
        cache: &mut CudaCache,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "copy_blocks";
        require_ok(NAME, check_copies(pairs, cache.shape.blocks))?;
        self.context.refuse_in_capture(NAME)?;
        if pairs.is_empty() {
            return Ok(());
        }
        let list = self.lists.write(&self.context, pairs.as_flattened())?;
        let (grid, count, vectors) = cache.launch(pairs.len());
        let (context, array) = (&self.context, cache.buffer.ptr());
        self.cache
            .copy_blocks(context, grid, array, list, count, vectors)
    }

    fn poison(&mut self, cache: &mut CudaCache, blocks: &[u32]) -> Result<(), DeviceError> {
        let checked = check_blocks(blocks.iter().copied(), cache.shape.blocks);
        require_ok("poison", checked)?;
        let list = self.lists.write(&self.context, blocks)?;
        let (grid, count, vectors) = cache.launch(blocks.len());
        let (context, array) = (&self.context, cache.buffer.ptr());
        self.cache
            .poison_blocks(context, grid, array, list, count, vectors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_head_sizes_are_refused_with_the_supported_ones() {
        let error = require_head_dim(48).unwrap_err().to_string();
        assert!(error.contains("heads of 48 elements"), "{error}");
        assert!(
            error.contains("16, 32, 64, 80, 96, 128, 256, 512"),
            "{error}"
        );
        for head_dim in HEAD_DIMS {
            require_head_dim(head_dim).unwrap();
        }
    }
}
