//! Norms, and additions to the residual stream.

use super::CudaDevice;
use super::error::require;
use super::launch::{kernels, row_grid, vector_grid};
use super::memory::{Buffer, Ptr};
use super::tensor::{CudaTensor, require_shape};
use crate::device::{DeviceError, NormOps, Precision};

kernels! {
    /// Kernels of `kernels/norm.cu`.
    pub(super) struct NormKernels in "norm" {
        rms_norm(out: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        rms_norm_full(out: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        add_rms_norm(out: Ptr, residual: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        add_layer_norm(
            out: Ptr,
            residual: Ptr,
            x: Ptr,
            weight: Ptr,
            bias: Ptr,
            epsilon: f32,
            columns: u32,
        );
        centre(x: Ptr, columns: u32);
        rms_norm_add(residual: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        add(residual: Ptr, x: Ptr, count: u32);
        convert(out: Ptr, x: Ptr, count: u32);
        gather_rows(out: Ptr, x: Ptr, indices: Ptr, columns: u32);
        pool_rows(out: Ptr, x: Ptr, ranges: Ptr, columns: u32);
    }
}

/// A vector of float32 numbers in device memory.
pub struct CudaVector {
    buffer: Buffer,
    length: usize,
}

impl CudaVector {
    /// Returns the address of the first number.
    pub(super) fn ptr(&self) -> Ptr {
        self.buffer.ptr()
    }

    /// Returns the number of elements.
    pub fn length(&self) -> usize {
        self.length
    }
}

impl NormOps for CudaDevice {
    fn load_vector(&mut self, values: &[f32]) -> Result<CudaVector, DeviceError> {
        self.weights(|context| {
            Ok(CudaVector {
                buffer: context.upload(values, "a vector")?,
                length: values.len(),
            })
        })
    }

    fn rms_norm(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rms_norm";
        let rows = self.step.padded(rows);
        let shape = (rows, weight.length);
        let (of_x, of_out) = match x.precision() {
            Precision::Full => (Precision::Full, Precision::Activation),
            Precision::Activation => (Precision::Activation, Precision::Full),
        };
        require_shape(NAME, "x", x, shape, of_x)?;
        require_shape(NAME, "the result", out, shape, of_out)?;
        let (context, grid, columns) = (&self.context, row_grid(rows), weight.length as u32);
        let (to, from, weight) = (out.ptr(), x.ptr(), weight.ptr());
        match of_out {
            Precision::Activation => self
                .norm
                .rms_norm(context, grid, to, from, weight, epsilon, columns),
            Precision::Full => self
                .norm
                .rms_norm_full(context, grid, to, from, weight, epsilon, columns),
        }
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "add_rms_norm";
        let rows = self.step.padded(rows);
        let shape = (rows, weight.length);
        require_shape(NAME, "the residual", residual, shape, Precision::Full)?;
        require_shape(NAME, "x", x, shape, Precision::Activation)?;
        require_shape(NAME, "the result", out, shape, Precision::Activation)?;
        let columns = weight.length as u32;
        self.norm.add_rms_norm(
            &self.context,
            row_grid(rows),
            out.ptr(),
            residual.ptr(),
            x.ptr(),
            weight.ptr(),
            epsilon,
            columns,
        )
    }

    fn centre(&mut self, x: &mut CudaTensor, rows: usize) -> Result<(), DeviceError> {
        let (rows, columns) = (self.step.padded(rows), x.columns());
        require_shape("centre", "x", x, (rows, columns), Precision::Full)?;
        let grid = row_grid(rows);
        self.norm
            .centre(&self.context, grid, x.ptr(), columns as u32)
    }

    fn add_layer_norm(
        &mut self,
        residual: &mut CudaTensor,
        x: Option<&CudaTensor>,
        [weight, bias]: [&CudaVector; 2],
        epsilon: f32,
        rows: usize,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "add_layer_norm";
        let rows = self.step.padded(rows);
        let columns = weight.length;
        let shape = (rows, columns);
        require_shape(NAME, "the residual", residual, shape, Precision::Full)?;
        if let Some(x) = x {
            require_shape(NAME, "x", x, shape, Precision::Activation)?;
        }
        require_shape(NAME, "the result", out, shape, Precision::Activation)?;
        require(bias.length == columns, NAME, || {
            format!("{columns} weights and {} biases", bias.length)
        })?;
        self.norm.add_layer_norm(
            &self.context,
            row_grid(rows),
            out.ptr(),
            residual.ptr(),
            x.map_or(Ptr::NULL, CudaTensor::ptr),
            weight.ptr(),
            bias.ptr(),
            epsilon,
            columns as u32,
        )
    }

    fn rms_norm_add(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        residual: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rms_norm_add";
        let rows = self.step.padded(rows);
        let (columns, length) = (x.columns(), weight.length);
        let shape = (rows, columns);
        require_shape(NAME, "x", x, shape, Precision::Activation)?;
        require_shape(NAME, "the residual", residual, shape, Precision::Full)?;
        let fits = length > 0 && length.is_multiple_of(8) && columns.is_multiple_of(length);
        require(fits, NAME, || {
            format!(
                "{columns} columns cannot be divided into parts of {length}, which must be a \
                 multiple of 8"
            )
        })?;
        // The parts of a row follow each other like rows.
        let (parts, columns) = (rows * (columns / length), length as u32);
        self.norm.rms_norm_add(
            &self.context,
            row_grid(parts),
            residual.ptr(),
            x.ptr(),
            weight.ptr(),
            epsilon,
            columns,
        )
    }

    fn add(
        &mut self,
        residual: &mut CudaTensor,
        x: &CudaTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "add";
        let rows = self.step.padded(rows);
        let shape = (rows, x.columns());
        require_shape(NAME, "x", x, shape, Precision::Activation)?;
        require_shape(NAME, "the residual", residual, shape, Precision::Full)?;
        let count = rows * x.columns();
        let grid = vector_grid(count);
        self.norm
            .add(&self.context, grid, residual.ptr(), x.ptr(), count as u32)
    }
}
