//! Host memory for swapped-out blocks, and the copies to and from it.
//!
//! The memory is pinned, so that copies run asynchronously, in the order of the compute stream.
//! Nothing waits for them: only that stream touches the memory and the blocks, so the next user
//! of a block or a slot comes after the copy in the stream.
//!
//! Pinned memory occupies physical pages as soon as it is allocated. It is therefore allocated
//! in chunks, each when one of its slots is first written; an allocation may wait for the
//! device.
//!
//! Each block takes two copies per layer, one for its keys and one for its values, and each
//! copy is a driver call. A kernel that gathers blocks on the device first would need only one
//! copy; that pays off if a block's part in a layer is much smaller than 64 KiB.

use super::CudaDevice;
use super::cache::{CudaCache, all_layers};
use super::context::Context;
use super::error::{failed, require_ok};
use super::memory::{Pinned, PinnedUse};
use crate::device::blocks::Slots;
use crate::device::{CacheShape, DeviceError, SwapOps};

/// Bytes per chunk, unless a slot is larger.
const CHUNK: usize = 8 << 20;

/// Host memory for swapped-out blocks. A slot holds one block: its keys and values in each
/// layer, one after the other.
pub struct CudaHostBlocks {
    slots: Slots,
    /// `None` until one of the chunk's slots is first written.
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

    /// Allocates the chunk that contains a slot, if it is not allocated yet.
    fn make_chunk(&mut self, context: &Context, slot: u32) -> Result<(), DeviceError> {
        let index = slot as usize / self.slots_in_chunk;
        let left = self.slots.count() - index * self.slots_in_chunk;
        let bytes = self.slots_in_chunk.min(left) * self.slots.bytes();
        if let Some(chunk) = self.chunks.get_mut(index).filter(|chunk| chunk.is_none()) {
            *chunk = Some(Pinned::new(&context.handle, bytes, PinnedUse::Swap)?);
        }
        Ok(())
    }

    /// Returns the chunk that contains a slot, and the slot's offset in it in bytes.
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

impl SwapOps for CudaDevice {
    type HostBlocks = CudaHostBlocks;

    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<CudaHostBlocks, DeviceError> {
        Ok(CudaHostBlocks::new(all_layers(shape), blocks))
    }

    /// Assumes half of the 20 GB/s that PCIe 4.0 x16 moves, because each copy is only some tens
    /// of KiB. Not measured.
    fn swap_bandwidth(&self) -> f64 {
        10e9
    }

    fn swap_out(
        &mut self,
        cache: &CudaCache,
        host: &mut CudaHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "swap_out";
        require_ok(NAME, host.slots.check_out(pairs, cache.blocks()))?;
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

    fn swap_in(
        &mut self,
        cache: &mut CudaCache,
        host: &CudaHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "swap_in";
        require_ok(NAME, host.slots.check_in(pairs, cache.blocks()))?;
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
