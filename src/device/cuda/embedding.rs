//! Token embeddings.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/embedding.cu`.
    pub(super) struct EmbeddingKernels in "embedding" {
        resolve_tokens(resolved: Ptr, tokens: Ptr, feedback: Ptr, previous: Ptr, rows: u32);
        embed_dense(out: Ptr, table: Ptr, resolved: Ptr, scale: f32, columns: u32, vocabulary: u32);
    }
}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn embed_op(
        &mut self,
        table: &super::CudaLinear,
        scale: f32,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("embed_op", "not written yet"))
    }
}
