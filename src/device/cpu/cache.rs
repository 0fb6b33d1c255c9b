//! The paged KV cache, laid out for attention.
//!
//! Each layer, block and head stores its tokens in tiles of sixteen. A tile has the keys first,
//! transposed to `[head_dim][16 tokens]`, so that sixteen scores are one vector and need no
//! horizontal sums. The values follow, `[16 tokens][head_dim, padded to a multiple of 16]`.

use super::memory::Buffer;
use super::simd::{LANES, Simd};
use crate::device::blocks::Slots;
use crate::device::{CacheShape, DeviceError};
use std::ops::Range;

/// The KV cache of all layers.
pub struct CpuCache {
    shape: CacheShape,
    pub(crate) half: bool,
    layers: Vec<Buffer<u8>>,
}

/// Host memory for swapped-out blocks. A slot holds one block, layer by layer. The memory is
/// allocated zeroed, so a slot takes no physical memory until it is first written.
pub struct CpuHostBlocks {
    pub(super) slots: Slots,
    memory: Buffer<u8>,
}

/// Positions of the parts of a tile, in elements.
#[derive(Clone, Copy)]
pub(crate) struct TileShape {
    pub(crate) head_dim: usize,
    /// Number of elements from one value to the next.
    pub(crate) value_stride: usize,
}

impl TileShape {
    pub(crate) fn new(head_dim: usize) -> Self {
        Self {
            head_dim,
            value_stride: head_dim.next_multiple_of(LANES),
        }
    }

    /// Returns the number of elements of a tile's keys. The values follow them.
    pub(crate) fn keys(self) -> usize {
        self.head_dim * LANES
    }

    /// Returns the number of elements of a tile.
    pub(crate) fn elements(self) -> usize {
        (self.head_dim + self.value_stride) * LANES
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
    tiles * TileShape::new(shape.head_dim).elements() * element
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
        let one_layer = CacheShape { layers: 1, ..shape };
        let bytes = block_bytes(&one_layer, half).saturating_mul(shape.blocks);
        let layers = (0..shape.layers).map(|_| Buffer::zeroed(bytes, "the key-value cache"));
        Ok(Self {
            shape,
            half,
            layers: layers.collect::<Result<_, _>>()?,
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
    fn part(&self, block: u32) -> Range<usize> {
        let bytes = self.part_bytes();
        let start = block as usize * bytes;
        start..start + bytes
    }

    /// Copies a block to another. Both must exist.
    pub(super) fn copy(&mut self, [from, to]: [u32; 2]) {
        let (from, to) = (self.part(from), self.part(to));
        for layer in &mut self.layers {
            layer.copy_within(from.clone(), to.start);
        }
    }

    /// Copies a block to a slot. Both must exist.
    pub(super) fn swap_out(&self, host: &mut CpuHostBlocks, [block, slot]: [u32; 2]) {
        let part = self.part(block);
        let parts = host.slot_mut(slot).chunks_exact_mut(part.len().max(1));
        for (layer, to) in self.layers.iter().zip(parts) {
            to.copy_from_slice(&layer[part.clone()]);
        }
        host.slots.set_written(slot);
    }

    /// Copies a slot to a block. Both must exist.
    pub(super) fn swap_in(&mut self, host: &CpuHostBlocks, [slot, block]: [u32; 2]) {
        let part = self.part(block);
        let parts = host.slot(slot).chunks_exact(part.len().max(1));
        for (layer, from) in self.layers.iter_mut().zip(parts) {
            layer[part.clone()].copy_from_slice(from);
        }
    }

    /// Returns the index of the first element of a tile, which holds sixteen tokens of a block
    /// and head.
    pub(crate) fn tile(&self, block: usize, head: usize, tile_in_block: usize) -> usize {
        let tiles = self.shape.block_tokens / LANES;
        let tile = (block * self.shape.kv_heads + head) * tiles + tile_in_block;
        tile * TileShape::new(self.shape.head_dim).elements()
    }

    /// Overwrites blocks with NaN in every layer.
    pub(crate) fn poison(&mut self, blocks: &[u32]) {
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

impl CpuHostBlocks {
    /// Allocates `count` slots for blocks of `bytes` bytes.
    pub(super) fn new(bytes: usize, count: usize) -> Result<Self, DeviceError> {
        let all = bytes.saturating_mul(count);
        Ok(Self {
            memory: Buffer::zeroed(all, "swapped-out blocks")?,
            slots: Slots::new(bytes, count),
        })
    }

    fn slot(&self, slot: u32) -> &[u8] {
        let bytes = self.slots.bytes();
        &self.memory[slot as usize * bytes..][..bytes]
    }

    fn slot_mut(&mut self, slot: u32) -> &mut [u8] {
        let bytes = self.slots.bytes();
        &mut self.memory[slot as usize * bytes..][..bytes]
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
