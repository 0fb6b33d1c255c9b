//! Norms and sums of rows.

use super::CudaDevice;
use super::error::require;
use super::launch::{Grid, kernels};
use super::memory::{Buffer, CudaTensor, Ptr};
use crate::device::{DeviceError, Precision};

kernels! {
    /// Kernels of `kernels/norm.cu`.
    pub(super) struct NormKernels in "norm" {
        rms_norm(out: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
        add_rms_norm(out: Ptr, residual: Ptr, x: Ptr, weight: Ptr, epsilon: f32, columns: u32);
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

/// Returns a grid with one CUDA block per row.
pub(super) fn row_grid(rows: usize) -> Grid {
    Grid::new([rows as u32, 1, 1], [256, 1, 1])
}

/// Returns a grid with one thread per eight numbers.
pub(super) fn vector_grid(count: usize) -> Grid {
    Grid::new([count.div_ceil(8 * 256) as u32, 1, 1], [256, 1, 1])
}

/// Returns [`DeviceError::Failed`] unless `tensor` has at least `rows` rows, exactly `columns`
/// columns and this precision, `columns` is a multiple of eight, and the number of its elements
/// fits 32 bits.
pub(super) fn require_shape(
    operation: &'static str,
    name: &str,
    tensor: &CudaTensor,
    (rows, columns): (usize, usize),
    precision: Precision,
) -> Result<(), DeviceError> {
    let fits = tensor.rows() >= rows
        && tensor.columns() == columns
        && tensor.precision() == precision
        && columns.is_multiple_of(8)
        && (tensor.rows().max(1)).saturating_mul(columns) <= u32::MAX as usize;
    require(fits, operation, || {
        format!(
            "{name} is {} × {} in {:?} precision, but {rows} × {columns} in {precision:?}, a \
             multiple of 8 columns and less than 2³² numbers, is needed",
            tensor.rows(),
            tensor.columns(),
            tensor.precision(),
        )
    })
}

impl CudaDevice {
    pub(super) fn load_vector_op(&mut self, values: &[f32]) -> Result<CudaVector, DeviceError> {
        Ok(CudaVector {
            buffer: self.context.upload(values, "a vector")?,
            length: values.len(),
        })
    }

    pub(super) fn rms_norm_op(
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
        require_shape(NAME, "x", x, shape, Precision::Full)?;
        require_shape(NAME, "the result", out, shape, Precision::Activation)?;
        let columns = weight.length as u32;
        self.norm.rms_norm(
            &self.context,
            row_grid(rows),
            out.ptr(),
            x.ptr(),
            weight.ptr(),
            epsilon,
            columns,
        )
    }

    pub(super) fn add_rms_norm_op(
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

    pub(super) fn rms_norm_add_op(
        &mut self,
        x: &CudaTensor,
        weight: &CudaVector,
        epsilon: f32,
        rows: usize,
        residual: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rms_norm_add";
        let rows = self.step.padded(rows);
        let shape = (rows, weight.length);
        require_shape(NAME, "x", x, shape, Precision::Activation)?;
        require_shape(NAME, "the residual", residual, shape, Precision::Full)?;
        let columns = weight.length as u32;
        self.norm.rms_norm_add(
            &self.context,
            row_grid(rows),
            residual.ptr(),
            x.ptr(),
            weight.ptr(),
            epsilon,
            columns,
        )
    }

    pub(super) fn add_op(
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

    pub(super) fn gather_samples_op(
        &mut self,
        x: &CudaTensor,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gather_samples";
        let rows = self.step.padded(self.step.rows());
        let samples = self.step.samples();
        let columns = x.columns();
        require_shape(NAME, "x", x, (rows, columns), Precision::Full)?;
        require_shape(NAME, "the result", out, (samples, columns), Precision::Full)?;
        let indices = self.step.sample_rows();
        self.norm.gather_rows(
            &self.context,
            row_grid(samples),
            out.ptr(),
            x.ptr(),
            indices,
            columns as u32,
        )
    }
}
