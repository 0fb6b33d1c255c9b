//! Rotary position embedding, fused with the write into the cache.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/rope.cu`.
    pub(super) struct RopeKernels in "rope" {
        rope_store(qkv: Ptr, k_cache: Ptr, v_cache: Ptr, positions: Ptr, slots: Ptr, angles: Ptr, q_norm: Ptr, k_norm: Ptr, epsilon: f32, norm_mode: u32, q_heads: u32, kv_heads: u32, head_dim: u32, rotary_dim: u32, block_tokens: u32);
    }
}

/// A loaded rotary embedding.
pub struct CudaRope {}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn load_rope_op(&mut self, spec: &RopeSpec) -> Result<CudaRope, DeviceError> {
        Err(error::failed("load_rope_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn rope_store_op(
        &mut self,
        qkv: &mut CudaTensor,
        heads: HeadShape,
        norm: Option<&QkNorm<'_, CudaDevice>>,
        rope: &CudaRope,
        cache: &mut super::CudaCache,
        layer: usize,
    ) -> Result<(), DeviceError> {
        Err(error::failed("rope_store_op", "not written yet"))
    }
}
