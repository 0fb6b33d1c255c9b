//! Choosing tokens on the device.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::CudaTensor;
use crate::device::*;
use crate::sampling::{SampleRow, Sampled};

kernels! {
    /// Kernels of `kernels/sampling.cu`.
    pub(super) struct SamplingKernels in "sampling" {
    }
}

/// Samples on their way to the host.
pub struct CudaPending {}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn sample_op(
        &mut self,
        logits: &CudaTensor,
        rows: &[SampleRow],
    ) -> Result<CudaPending, DeviceError> {
        Err(error::failed("sample_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn collect_op(&mut self, pending: CudaPending) -> Result<Vec<Sampled>, DeviceError> {
        Err(error::failed("collect_op", "not written yet"))
    }
}
