//! The paged key-value cache.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::Buffer;
use crate::device::*;

kernels! {
    /// Kernels of `kernels/cache.cu`.
    pub(super) struct CacheKernels in "cache" {
    }
}

/// The key-value cache of all layers.
pub struct CudaCache {
    #[allow(dead_code)]
    pub(super) layers: Vec<Buffer>,
}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn allocate_cache_op(
        &mut self,
        shape: &CacheShape,
    ) -> Result<CudaCache, DeviceError> {
        Err(error::failed("allocate_cache_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn poison_op(
        &mut self,
        cache: &mut CudaCache,
        blocks: &[u32],
    ) -> Result<(), DeviceError> {
        Err(error::failed("poison_op", "not written yet"))
    }

    /// Bytes of a cache of this shape.
    pub(super) fn cache_bytes_op(&self, shape: &CacheShape) -> usize {
        let _ = shape;
        0
    }
}
