//! Latent attention, which this device does not compute.

use super::CudaDevice;
use super::error::unsupported;
use super::tensor::CudaTensor;
use crate::device::{DeviceError, LatentOps, Latents, LinearSpec};

/// The weights of each head. There are none.
pub enum CudaHeads {}

impl LatentOps for CudaDevice {
    type HeadLinear = CudaHeads;

    /// Refuses the weights. The model has been refused before, by
    /// [`StepOps::reserve`](crate::device::StepOps::reserve).
    fn load_heads(&mut self, heads: &[LinearSpec<'_>]) -> Result<CudaHeads, DeviceError> {
        Err(unsupported(
            format!("latent attention of {} heads", heads.len()),
            "the model must have attention with cached values",
        ))
    }

    fn latent_qkv(
        &mut self,
        latents: &Latents<'_, Self>,
        _: usize,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        match *latents.absorbed {}
    }

    fn multiply_heads(
        &mut self,
        _: &CudaTensor,
        weights: &CudaHeads,
        _: usize,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        match *weights {}
    }
}
