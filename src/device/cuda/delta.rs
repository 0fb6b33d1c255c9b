//! Gated delta nets, which this device does not compute yet.

use super::CudaDevice;
use super::cache::CudaCache;
use super::norm::CudaVector;
use super::recurrent::unsupported;
use super::tensor::CudaTensor;
use crate::device::{DeltaHeads, DeltaInput, DeltaOps, DeviceError, StatePart};

impl DeltaOps for CudaDevice {
    fn gated_delta(
        &mut self,
        _: &DeltaInput<'_, Self>,
        _: &mut CudaTensor,
        _: &DeltaHeads,
        _: &mut CudaCache,
        _: StatePart,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(unsupported())
    }

    fn gated_rms_norm(
        &mut self,
        _: &mut CudaTensor,
        _: (&CudaTensor, usize),
        _: &CudaVector,
        _: f32,
        _: usize,
    ) -> Result<(), DeviceError> {
        Err(unsupported())
    }
}
