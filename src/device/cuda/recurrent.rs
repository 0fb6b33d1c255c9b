//! Recurrent layers, which this device does not compute yet.

use super::CudaDevice;
use super::cache::CudaCache;
use super::norm::CudaVector;
use super::tensor::CudaTensor;
use crate::device::{ConvSpec, DeviceError, RecurrentOps, StatePart, StateShape};

pub(super) fn unsupported() -> DeviceError {
    DeviceError::Unsupported {
        device: "cuda",
        what: "recurrent layers".to_owned(),
        expected: "models whose layers all have attention; the CPU device computes others"
            .to_owned(),
    }
}

impl RecurrentOps for CudaDevice {
    fn allocate_states(&mut self, _: &mut CudaCache, _: &StateShape) -> Result<(), DeviceError> {
        Err(unsupported())
    }

    fn poison_states(&mut self, _: &mut CudaCache, _: &[u32]) -> Result<(), DeviceError> {
        Err(unsupported())
    }

    fn short_conv(
        &mut self,
        _: &CudaTensor,
        _: &ConvSpec,
        _: &CudaVector,
        _: Option<&CudaVector>,
        _: &mut CudaCache,
        _: StatePart,
        _: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(unsupported())
    }
}
