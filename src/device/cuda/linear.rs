//! Linear layers.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/linear.cu`.
    pub(super) struct LinearKernels in "linear" {
        linear_[m16, m64, m128](out: Ptr, x: Ptr, weight: Ptr, bias: Ptr, row_index: Ptr, expert_offsets: Ptr, rows: u32, outputs: u32, inputs: u32, out_stride: u32, out_full: u32);
    }
}

kernels! {
    /// Kernels of `kernels/linear_quant.cu`.
    pub(super) struct QuantKernels in "linear_quant" {
    }
}

/// A loaded linear layer.
pub struct CudaLinear {}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn load_linear_op(
        &mut self,
        spec: &LinearSpec<'_>,
    ) -> Result<CudaLinear, DeviceError> {
        Err(error::failed("load_linear_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn linear_op(
        &mut self,
        x: &CudaTensor,
        weight: &CudaLinear,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("linear_op", "not written yet"))
    }
}
