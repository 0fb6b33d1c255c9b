//! Swapping: copies of blocks of the KV cache to host memory and back.

use super::{CacheShape, DeviceError, DeviceTypes};

/// The part of a [`Device`](super::Device) that swaps blocks of the KV cache out and in. Its
/// copies are enqueued and checked like those of [`CacheOps`](super::CacheOps).
pub trait SwapOps: DeviceTypes {
    /// Host memory for swapped-out blocks.
    type HostBlocks;

    /// Reserves host memory into which `blocks` blocks of a cache of this shape can be swapped
    /// out, one slot per block. A slot takes memory only once it is first written.
    fn allocate_host_blocks(
        &mut self,
        shape: &CacheShape,
        blocks: usize,
    ) -> Result<Self::HostBlocks, DeviceError>;

    /// Swap bandwidth in bytes per second, one direction. An estimate, for deciding whether to
    /// swap a sequence out or to recompute it.
    fn swap_bandwidth(&self) -> f64;

    /// Copies blocks to host memory, in the order of the pairs. Each pair is a block and the
    /// slot it is copied to.
    fn swap_out(
        &mut self,
        cache: &Self::Cache,
        host: &mut Self::HostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;

    /// Copies blocks back from host memory, in the order of the pairs. Each pair is a slot that
    /// was swapped out to before, and the block it is copied to.
    fn swap_in(
        &mut self,
        cache: &mut Self::Cache,
        host: &Self::HostBlocks,
        pairs: &[[u32; 2]],
    ) -> Result<(), DeviceError>;
}
