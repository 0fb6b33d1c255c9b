//! Host memory for swapped-out blocks, and the copies to it and back.
//!
//! Pinned memory, so that copies run on their own, in the order of the compute stream.
//! Nobody waits for them: once the memory is made, that stream alone touches it, and so it
//! is with the blocks. Whoever is given a block or a slot after a copy was enqueued comes
//! after the copy in the stream.
//!
//! Pinned memory takes its pages when it is made. So it is made in chunks, each when one
//! of its slots is first written to; making one may wait for the device.
//!
//! A block is one copy for its keys and one for its values in each layer, which costs a
//! call each. Gathering blocks on the device first, by a kernel, would take one copy for
//! all; that is worth it when blocks of a layer are much smaller than 64 KiB.

use super::cache::{CudaCache, all_layers};
use super::context::Context;
use super::error::{failed, sound};
use super::memory::{Pinned, PinnedUse};
use super::{CudaDevice, DeviceError};
use crate::device::CacheShape;
use crate::device::blocks::Slots;

/// Bytes of a chunk, unless a slot is larger.
const CHUNK: usize = 8 << 20;

/// Memory for swapped-out blocks: a slot holds a block, array by array.
pub struct CudaHostBlocks {
    slots: Slots,
    /// `None` before the first of a chunk's slots is written.
    chunks: Vec<Option<Pinned>>,
    slots_in_chunk: usize,
}

impl CudaHostBlocks {
    fn new(bytes: usize, count: usize) -> Self {
        let slots_in_chunk = (CHUNK / bytes.max(1)).max(1);
        let chunks = count.div_ceil(slots_in_chunk);
        Self {
            slots: Slots::new(bytes, count),
            chunks: std::iter::repeat_with(|| None).take(chunks).collect(),
            slots_in_chunk,
        }
    }

    /// Makes the chunk that a slot is in, if there is none yet.
    fn make_chunk(&mut self, context: &Context, slot: u32) -> Result<(), DeviceError> {
        let index = slot as usize / self.slots_in_chunk;
        let left = self.slots.count() - index * self.slots_in_chunk;
        let bytes = self.slots_in_chunk.min(left) * self.slots.bytes();
        if let Some(chunk) = self.chunks.get_mut(index).filter(|chunk| chunk.is_none()) {
            *chunk = Some(Pinned::new(context, bytes, PinnedUse::Swap)?);
        }
        Ok(())
    }

    /// Where a slot begins.
    fn find(&self, operation: &'static str, slot: u32) -> Result<(&Pinned, usize), DeviceError> {
        let index = slot as usize / self.slots_in_chunk;
        let offset = slot as usize % self.slots_in_chunk * self.slots.bytes();
        let chunk = self.chunks.get(index).and_then(Option::as_ref);
        chunk.map(|chunk| (chunk, offset)).ok_or_else(|| {
            failed(
                operation,
                format!("there is no memory for host slot {slot}"),
            )
        })
    }
}

impl CudaDevice {
    pub(super) fn allocate_host_blocks_op(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> CudaHostBlocks {
        CudaHostBlocks::new(all_layers(shape), blocks)
    }

    pub(super) fn swap_out_op(
        &mut self,
        cache: &CudaCache,
        host: &mut CudaHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "swap_out";
        sound(NAME, host.slots.check_out(pairs, cache.blocks()))?;
        let context = &self.context;
        context.refuse_in_capture(NAME)?;
        for &[_, slot] in pairs {
            host.make_chunk(context, slot)?;
        }
        for &[block, slot] in pairs {
            let (chunk, start) = host.find(NAME, slot)?;
            let (parts, bytes) = cache.parts(block);
            for (index, from) in parts.enumerate() {
                context.copy_to_swap((chunk, start + index * bytes), from, bytes)?;
            }
            host.slots.set_written(slot);
        }
        Ok(())
    }

    pub(super) fn swap_in_op(
        &mut self,
        cache: &mut CudaCache,
        host: &CudaHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "swap_in";
        sound(NAME, host.slots.check_in(pairs, cache.blocks()))?;
        let context = &self.context;
        context.refuse_in_capture(NAME)?;
        for &[slot, block] in pairs {
            let (chunk, start) = host.find(NAME, slot)?;
            let (parts, bytes) = cache.parts(block);
            for (index, to) in parts.enumerate() {
                context.copy_from_swap(to, (chunk, start + index * bytes), bytes)?;
            }
        }
        Ok(())
    }
}
