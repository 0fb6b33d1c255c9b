//! What some models do to the residual stream besides adding to it, which this device does not
//! compute yet.

use super::CudaDevice;
use super::error::unsupported;
use super::norm::CudaVector;
use super::tensor::CudaTensor;
use super::weights::CudaLinear;
use crate::device::{Activation, DeviceError, ModelParts, ResidualOps};

fn refused(part: &str) -> DeviceError {
    unsupported(part, "models that have them are computed on the CPU")
}

impl ResidualOps for CudaDevice {
    fn check_parts(&self, parts: &ModelParts) -> Result<(), DeviceError> {
        match parts.names().next() {
            Some(part) => Err(refused(part)),
            None => Ok(()),
        }
    }

    fn copy(&mut self, _: &CudaTensor, _: usize, _: &mut CudaTensor) -> Result<(), DeviceError> {
        Err(refused("several residual streams"))
    }

    fn scale(&mut self, _: &mut CudaTensor, _: f32, _: usize) -> Result<(), DeviceError> {
        Err(refused("factors of layers"))
    }

    fn embed_within(
        &mut self,
        _: &CudaLinear,
        _: f32,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(refused("inputs of single layers"))
    }

    fn rms_norm_add_parts(
        &mut self,
        _: &CudaTensor,
        _: &CudaVector,
        _: f32,
        _: usize,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(refused("inputs of single layers"))
    }

    fn gate_columns(
        &mut self,
        _: &mut CudaTensor,
        _: Activation,
        _: &CudaTensor,
        _: usize,
        _: usize,
    ) -> Result<(), DeviceError> {
        Err(refused("inputs of single layers"))
    }

    fn multiply(
        &mut self,
        _: &CudaTensor,
        _: &CudaVector,
        _: usize,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(refused("several residual streams"))
    }

    fn match_magnitude(
        &mut self,
        _: &mut CudaTensor,
        _: &CudaTensor,
        _: f32,
        _: usize,
    ) -> Result<(), DeviceError> {
        Err(refused("several residual streams"))
    }

    fn mix_streams(
        &mut self,
        _: &[CudaTensor],
        _: &CudaTensor,
        _: usize,
        _: &mut [CudaTensor],
    ) -> Result<(), DeviceError> {
        Err(refused("several residual streams"))
    }

    fn correct_streams(
        &mut self,
        _: &CudaTensor,
        _: &CudaTensor,
        _: usize,
        _: usize,
        _: &mut [CudaTensor],
    ) -> Result<(), DeviceError> {
        Err(refused("several residual streams"))
    }

    fn cut_gate(&mut self, _: &mut CudaTensor, _: f32, _: usize) -> Result<(), DeviceError> {
        Err(refused("sparse gates"))
    }
}
