//! The paged KV cache, laid out for attention.
//!
//! Each layer of a block, block and head stores its tokens in tiles of sixteen. A tile has the keys first,
//! transposed to `[head_dim][16 tokens]`, so that sixteen scores are one vector and need no
//! horizontal sums. The values follow, `[16 tokens][head_dim, padded to a multiple of 16]`, unless
//! they are in the keys. Layers that are smaller than the room for one in each block follow each
//! other in it.

use super::CpuDevice;
use super::error::{require, require_ok};
use super::memory::Buffer;
use super::simd::{LANES, Simd};
use crate::device::blocks::{check_blocks, check_copies};
use crate::device::{CacheLayer, CacheOps, CacheShape, DeviceError, HeadShape, StateShape, Values};
use std::ops::Range;

/// The KV cache. It has one buffer for each layer of a block.
pub struct CpuCache {
    shape: CacheShape,
    pub(crate) half: bool,
    pub(super) layers: Vec<Buffer<u8>>,
    /// The states of recurrent layers, one slot after the other; `None` if there are none.
    pub(super) states: Option<(StateShape, Buffer<f32>)>,
}

/// Positions of the parts of a tile, in elements.
#[derive(Clone, Copy)]
pub(crate) struct TileShape {
    pub(crate) head_dim: usize,
    /// Number of elements from one value to the next.
    pub(crate) value_stride: usize,
    /// Where the values are.
    pub(crate) values: Values,
}

impl TileShape {
    pub(crate) fn new(head_dim: usize, values: Values) -> Self {
        Self {
            head_dim,
            value_stride: values.elements(head_dim).next_multiple_of(LANES),
            values,
        }
    }

    /// Returns the shape of the tiles of some heads.
    pub(crate) fn of(heads: HeadShape) -> Self {
        Self::new(heads.head_dim, heads.values)
    }

    /// Returns the number of elements of a tile's keys. The values follow them, if they are beside
    /// the keys.
    pub(crate) fn keys(self) -> usize {
        self.head_dim * LANES
    }

    /// Returns the number of elements of a tile.
    pub(crate) fn elements(self) -> usize {
        match self.values {
            Values::BesideKeys => (self.head_dim + self.value_stride) * LANES,
            Values::InKeys(_) => self.keys(),
        }
    }
}

/// Where the tiles of a layer are in its place, in elements.
#[derive(Clone, Copy)]
pub(crate) struct Tiles {
    /// From one block to the next.
    block: usize,
    /// From the beginning of a block to the layer's first tile.
    first: usize,
    /// From one tile to the next.
    tile: usize,
    /// Number of tiles per block and head.
    in_block: usize,
}

impl Tiles {
    /// Returns the index of the first element of a tile, which holds sixteen tokens of a block
    /// and head.
    pub(crate) fn at(&self, block: usize, head: usize, tile_in_block: usize) -> usize {
        block * self.block + self.first + (head * self.in_block + tile_in_block) * self.tile
    }
}

fn unsupported(what: String, expected: &str) -> DeviceError {
    DeviceError::Unsupported {
        device: "cpu",
        what,
        expected: expected.to_owned(),
    }
}

/// Returns the number of bytes per block, all layers together.
pub(crate) fn block_bytes(shape: &CacheShape, half: bool) -> usize {
    let element = if half { 2 } else { 4 };
    let tiles = shape.block_tokens / LANES * shape.kv_heads * shape.layers;
    tiles * TileShape::new(shape.head_dim, shape.values).elements() * element
}

impl CpuCache {
    pub(crate) fn new(shape: CacheShape, half: bool) -> Result<Self, DeviceError> {
        if shape.block_tokens == 0 || !shape.block_tokens.is_multiple_of(LANES) {
            let what = format!("blocks of {} tokens", shape.block_tokens);
            let expected = "the number of tokens per block must be a multiple of 16";
            return Err(unsupported(what, expected));
        }
        if shape.head_dim == 0 || !shape.head_dim.is_multiple_of(8) || shape.head_dim > 1024 {
            let what = format!("heads of {} elements", shape.head_dim);
            return Err(unsupported(
                what,
                "the number of elements per head must be a multiple of 8, at most 1024",
            ));
        }
        shape.values.check(shape.head_dim).map_err(|what| {
            unsupported(
                what,
                "a value in a key has from 1 element to all of the key's",
            )
        })?;
        let one_layer = CacheShape { layers: 1, ..shape };
        let bytes = block_bytes(&one_layer, half).saturating_mul(shape.blocks);
        let layers = (0..shape.layers).map(|_| Buffer::zeroed(bytes, "the key-value cache"));
        Ok(Self {
            shape,
            half,
            layers: layers.collect::<Result<_, _>>()?,
            states: None,
        })
    }

    /// Returns the shape that the cache was allocated for.
    pub fn shape(&self) -> &CacheShape {
        &self.shape
    }

    /// Returns the bytes of a layer.
    pub(crate) fn layer(&self, layer: usize) -> &[u8] {
        &self.layers[layer]
    }

    pub(crate) fn layer_mut(&mut self, layer: usize) -> &mut [u8] {
        &mut self.layers[layer]
    }

    /// Returns the bytes of a block of a layer, or `None` if the block or the layer does not
    /// exist. For tests.
    #[cfg(any(test, feature = "internals"))]
    pub fn read(&self, layer: usize, block: usize) -> Option<&[u8]> {
        let exists = block < self.shape.blocks;
        let layer = self.layers.get(layer).filter(|_| exists)?;
        layer.get(self.part(block as u32))
    }

    /// Returns the number of blocks, and the number of bytes per block in all layers.
    pub(super) fn blocks(&self) -> (usize, usize) {
        (self.shape.blocks, block_bytes(&self.shape, self.half))
    }

    /// Returns the number of bytes per block and layer.
    fn part_bytes(&self) -> usize {
        let one_layer = CacheShape {
            layers: 1,
            ..self.shape
        };
        block_bytes(&one_layer, self.half)
    }

    /// Returns the byte range of a block in each layer.
    pub(super) fn part(&self, block: u32) -> Range<usize> {
        let bytes = self.part_bytes();
        let start = block as usize * bytes;
        start..start + bytes
    }

    /// Copies a block to another. Both must exist.
    fn copy(&mut self, [from, to]: [u32; 2]) {
        let (from, to) = (self.part(from), self.part(to));
        for layer in &mut self.layers {
            layer.copy_within(from.clone(), to.start);
        }
    }

    /// Returns where the tiles of a layer with these heads are, which is the `part`th of its
    /// place. [`require_cache`] has checked that it fits.
    pub(crate) fn tiles(&self, heads: HeadShape, part: usize) -> Tiles {
        let in_block = self.shape.block_tokens / LANES;
        let tile = TileShape::of(heads).elements();
        let largest = TileShape::new(self.shape.head_dim, self.shape.values);
        let room = self.shape.kv_heads * largest.elements();
        Tiles {
            block: room * in_block,
            first: part * heads.kv_heads * tile * in_block,
            tile,
            in_block,
        }
    }

    /// Overwrites blocks with NaN in every layer.
    fn poison(&mut self, blocks: &[u32]) {
        let bytes = self.part_bytes();
        for layer in &mut self.layers {
            for &block in blocks {
                let block = &mut layer[block as usize * bytes..][..bytes];
                if self.half {
                    for element in block.as_chunks_mut::<2>().0 {
                        *element = 0x7e00u16.to_ne_bytes();
                    }
                } else {
                    for element in block.as_chunks_mut::<4>().0 {
                        *element = f32::NAN.to_ne_bytes();
                    }
                }
            }
        }
    }
}

/// Requires a layer of the cache and heads that fit it.
pub(super) fn require_cache(
    operation: &'static str,
    cache: &CpuCache,
    CacheLayer { group, index, part }: CacheLayer,
    heads: HeadShape,
) -> Result<(), DeviceError> {
    let shape = cache.shape();
    let room = HeadShape {
        q_heads: shape.kv_heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        values: shape.values,
    };
    let fits = index < shape.layers
        && heads.values == shape.values
        && heads.kv_heads > 0
        && heads.q_heads > 0
        && heads.head_dim > 0
        && heads.head_dim.is_multiple_of(8)
        && heads.q_heads.is_multiple_of(heads.kv_heads)
        && heads.cache_elements().saturating_mul(part + 1) <= room.cache_elements();
    require(fits, operation, || {
        format!(
            "{heads:?} of part {part} of layer {index} of group {group} do not fit the cache, \
             {shape:?}"
        )
    })
}

impl CacheOps for CpuDevice {
    fn cache_bytes(&self, shape: &CacheShape) -> usize {
        block_bytes(shape, self.kv_half).saturating_mul(shape.blocks)
    }

    /// Returns a fixed size, whatever the weights take.
    fn cache_budget(&self, _: usize) -> Result<usize, DeviceError> {
        Ok(512 << 20)
    }

    fn allocate_cache(&mut self, shape: &CacheShape) -> Result<CpuCache, DeviceError> {
        CpuCache::new(*shape, self.kv_half)
    }

    fn copy_blocks(&mut self, cache: &mut CpuCache, pairs: &[[u32; 2]]) -> Result<(), DeviceError> {
        let checked = check_copies(pairs, cache.shape().blocks);
        require_ok("copy_blocks", checked)?;
        pairs.iter().for_each(|&pair| cache.copy(pair));
        Ok(())
    }

    fn poison(&mut self, cache: &mut CpuCache, blocks: &[u32]) -> Result<(), DeviceError> {
        let checked = check_blocks(blocks.iter().copied(), cache.shape().blocks);
        require_ok("poison", checked)?;
        cache.poison(blocks);
        Ok(())
    }
}

/// Number type of the cached keys and values.
pub(crate) trait KvElement: Copy + Default + Send + Sync + 'static {
    /// Loads sixteen elements as float32.
    ///
    /// # Safety
    /// `from` must be readable for 16 elements.
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F;
    /// Stores sixteen float32 numbers.
    ///
    /// # Safety
    /// `to` must be writable for 16 elements.
    unsafe fn store<S: Simd>(s: S, to: *mut Self, value: S::F);
}

impl KvElement for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller guarantees that `from` is readable.
        unsafe { s.load(from) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, to: *mut Self, value: S::F) {
        // SAFETY: the caller guarantees that `to` is writable.
        unsafe { s.store(to, value) }
    }
}

/// A float16 number as its bits.
#[derive(Clone, Copy, Default)]
#[repr(transparent)]
pub(crate) struct HalfBits(u16);

impl KvElement for HalfBits {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, from: *const Self) -> S::F {
        // SAFETY: the caller guarantees that `from` is readable, and `HalfBits` is a
        // transparent `u16`.
        unsafe { s.load_f16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn store<S: Simd>(s: S, to: *mut Self, value: S::F) {
        // SAFETY: the caller guarantees that `to` is writable, and `HalfBits` is a transparent
        // `u16`.
        unsafe { s.store_f16(to.cast(), value) }
    }
}
