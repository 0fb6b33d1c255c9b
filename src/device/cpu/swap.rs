//! Host memory for swapped-out blocks, and the copies to and from it.

use super::CpuDevice;
use super::cache::{CpuCache, block_bytes};
use super::error::require_ok;
use super::memory::Buffer;
use crate::device::blocks::Slots;
use crate::device::{CacheShape, DeviceError, SwapOps};

/// Host memory for swapped-out blocks. A slot holds one block, layer by layer. The memory is
/// allocated zeroed, so a slot takes no physical memory until it is first written.
pub struct CpuHostBlocks {
    slots: Slots,
    memory: Buffer<u8>,
}

impl CpuHostBlocks {
    /// Allocates `count` slots for blocks of `bytes` bytes.
    fn new(bytes: usize, count: usize) -> Result<Self, DeviceError> {
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

impl CpuCache {
    /// Copies a block to a slot. Both must exist.
    fn swap_out(&self, host: &mut CpuHostBlocks, [block, slot]: [u32; 2]) {
        let part = self.part(block);
        let parts = host.slot_mut(slot).chunks_exact_mut(part.len().max(1));
        for (layer, to) in self.layers.iter().zip(parts) {
            to.copy_from_slice(&layer[part.clone()]);
        }
        host.slots.set_written(slot);
    }

    /// Copies a slot to a block. Both must exist.
    fn swap_in(&mut self, host: &CpuHostBlocks, [slot, block]: [u32; 2]) {
        let part = self.part(block);
        let parts = host.slot(slot).chunks_exact(part.len().max(1));
        for (layer, from) in self.layers.iter_mut().zip(parts) {
            layer[part.clone()].copy_from_slice(from);
        }
    }
}

impl SwapOps for CpuDevice {
    type HostBlocks = CpuHostBlocks;

    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<CpuHostBlocks, DeviceError> {
        CpuHostBlocks::new(block_bytes(shape, self.kv_half), blocks)
    }

    /// Returns the rate at which one thread copies memory, for sizes that do not fit in a CPU
    /// cache.
    fn swap_bandwidth(&self) -> f64 {
        5e9
    }

    fn swap_out(
        &mut self,
        cache: &CpuCache,
        host: &mut CpuHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        require_ok("swap_out", host.slots.check_out(pairs, cache.blocks()))?;
        pairs.iter().for_each(|&pair| cache.swap_out(host, pair));
        Ok(())
    }

    fn swap_in(
        &mut self,
        cache: &mut CpuCache,
        host: &CpuHostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError> {
        require_ok("swap_in", host.slots.check_in(pairs, cache.blocks()))?;
        pairs.iter().for_each(|&pair| cache.swap_in(host, pair));
        Ok(())
    }
}
