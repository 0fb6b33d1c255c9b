//! Norms and sums of rows.

use super::CudaDevice;
use super::error;
use super::launch::kernels;
use super::memory::{Buffer, CudaTensor, Ptr};
use crate::device::*;

kernels! {
    /// Kernels of `kernels/norm.cu`.
    pub(super) struct NormKernels in "norm" {
        rms_norm(out: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        add_rms_norm(out: Ptr, residual: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        rms_norm_add(residual: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        add(residual: Ptr, x: Ptr, count: u32);
        convert(out: Ptr, x: Ptr, count: u32);
        gather_rows(out: Ptr, x: Ptr, indices: Ptr, columns: u32);
    }
}

/// A vector of float32 numbers.
pub struct CudaVector {
    #[allow(dead_code)]
    pub(super) buffer: Buffer,
    #[allow(dead_code)]
    pub(super) length: usize,
}

impl CudaDevice {
    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn load_vector_op(&mut self, values: &[f32]) -> Result<CudaVector, DeviceError> {
        Err(error::failed("load_vector_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn rms_norm_op(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("rms_norm_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn add_rms_norm_op(
        &mut self,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("add_rms_norm_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn rms_norm_add_op(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        residual: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("rms_norm_add_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn add_op(
        &mut self,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        Err(error::failed("add_op", "not written yet"))
    }

    #[allow(unused_variables, clippy::too_many_arguments)]
    pub(super) fn gather_samples_op(
        &mut self,
        x: &CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        Err(error::failed("gather_samples_op", "not written yet"))
    }
}
