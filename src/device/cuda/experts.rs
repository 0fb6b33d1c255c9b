//! Mixtures of experts.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/experts.cu`.
    pub(super) struct ExpertKernels in "experts" {
        route(pair_expert: Ptr, pair_weight: Ptr, router: Ptr, rows: u32, experts: u32, top_k: u32, normalize: u32);
        group_pairs(expert_offsets: Ptr, row_index: Ptr, pair_slot: Ptr, pair_expert: Ptr, rows: u32, experts: u32, top_k: u32);
        combine_experts(out: Ptr, pair_out: Ptr, pair_slot: Ptr, pair_weight: Ptr, rows: u32, columns: u32, top_k: u32);
    }
}

/// The loaded experts of a layer.
pub struct CudaExperts {}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn load_experts_op(
        &mut self,
        gate_up: &[LinearSpec<'_>],
        down: &[LinearSpec<'_>],
    ) -> Result<CudaExperts, DeviceError> {
        Err(error::failed("load_experts_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn experts_op(
        &mut self,
        x: &CudaTensor,
        router: &CudaTensor,
        routing: RoutingSpec,
        experts: &CudaExperts,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("experts_op", "not written yet"))
    }
}
