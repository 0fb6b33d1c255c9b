//! Paged attention.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/attention.cu`.
    pub(super) struct AttentionKernels in "attention" {
        attend_decode_hd[16, 32, 64, 80, 96, 128, 256](partial_out: Ptr, partial_stats: Ptr, qkv: Ptr, k_cache: Ptr, v_cache: Ptr, tables: Ptr, sequences: Ptr, decode_list: Ptr, q_heads: u32, kv_heads: u32, block_tokens: u32, scale: f32, softcap: f32, window: u32, max_units: u32);
        attend_combine(out: Ptr, partial_out: Ptr, partial_stats: Ptr, sequences: Ptr, decode_list: Ptr, q_heads: u32, head_dim: u32, window: u32, max_units: u32);
        attend_prefill_hd[16, 32, 64, 80, 96, 128, 256](out: Ptr, qkv: Ptr, k_cache: Ptr, v_cache: Ptr, tables: Ptr, sequences: Ptr, prefill_work: Ptr, q_heads: u32, kv_heads: u32, block_tokens: u32, scale: f32, softcap: f32, window: u32);
    }
}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn attend_op(
        &mut self,
        qkv: &CudaTensor,
        spec: &AttentionSpec,
        cache: &super::CudaCache,
        layer: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("attend_op", "not written yet"))
    }
}
