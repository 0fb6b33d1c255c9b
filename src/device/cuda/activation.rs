//! Element-wise non-linearities.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/activation.cu`.
    pub(super) struct ActivationKernels in "activation" {
        gated_activation(out: Ptr, gate_up: Ptr, rows: u32, columns: u32, gelu: u32);
        softcap(x: Ptr, cap: f32, count: u32);
    }
}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn gated_activation_op(
        &mut self,
        gate_up: &CudaTensor,
        activation: Activation,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("gated_activation_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn softcap_op(
        &mut self,
        x: &mut CudaTensor,
        cap: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        Err(error::failed("softcap_op", "not written yet"))
    }
}
