//! Mamba-2 layers, which this device does not compute yet.

use super::CudaDevice;
use super::cache::CudaCache;
use super::norm::CudaVector;
use super::recurrent::unsupported;
use super::tensor::CudaTensor;
use crate::device::{DeviceError, Mamba2Ops, Mamba2Spec, Mamba2Weights, StatePart};

impl Mamba2Ops for CudaDevice {
    fn mamba2(
        &mut self,
        _: &CudaTensor,
        _: &CudaTensor,
        _: &Mamba2Spec,
        _: Mamba2Weights<'_, CudaVector>,
        _: &mut CudaCache,
        _: StatePart,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(unsupported())
    }

    fn gated_norm(
        &mut self,
        _: &mut CudaTensor,
        _: &CudaTensor,
        _: &CudaVector,
        _: usize,
        _: f32,
        _: usize,
    ) -> Result<(), DeviceError> {
        Err(unsupported())
    }
}
