//! Matrices of activations.

use super::CpuDevice;
use super::error::require;
use super::memory::Buffer;
use crate::device::{DeviceError, Precision, TensorOps};

/// A row-major float32 matrix, initially zero.
pub struct CpuTensor {
    rows: usize,
    columns: usize,
    data: Buffer<f32>,
}

impl CpuTensor {
    pub(crate) fn zeroed(rows: usize, columns: usize) -> Result<Self, DeviceError> {
        let what = format!("a matrix of {rows} × {columns}");
        let len = rows
            .checked_mul(columns)
            .ok_or_else(|| DeviceError::OutOfMemory {
                device: "cpu",
                bytes: usize::MAX,
                what: what.clone(),
            })?;
        Ok(Self {
            rows,
            columns,
            data: Buffer::zeroed(len, &what)?,
        })
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns row `row`.
    ///
    /// # Panics
    /// Panics if there is no row `row`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.columns..][..self.columns]
    }

    /// Returns row `row` for writing.
    ///
    /// # Panics
    /// Panics if there is no row `row`.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.columns..][..self.columns]
    }

    /// Returns the first `rows` rows. The caller has checked that they exist.
    pub(crate) fn leading(&self, rows: usize) -> &[f32] {
        &self.data[..rows * self.columns]
    }

    /// Returns the first `rows` rows for writing. The caller has checked that they exist.
    pub(crate) fn leading_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.data[..rows * self.columns]
    }
}

/// Requires a matrix of exactly `columns` columns and at least `rows` rows.
pub(super) fn require_shape(
    operation: &'static str,
    name: &str,
    tensor: &CpuTensor,
    (rows, columns): (usize, usize),
) -> Result<(), DeviceError> {
    require(
        tensor.rows() >= rows && tensor.columns() == columns,
        operation,
        || {
            let (has_rows, has_columns) = (tensor.rows(), tensor.columns());
            format!("{name} is {has_rows} × {has_columns}, but {rows} × {columns} is needed")
        },
    )
}

impl TensorOps for CpuDevice {
    /// Ignores the precision, because all activations are float32 on this device.
    fn allocate(
        &mut self,
        rows: usize,
        columns: usize,
        _: Precision,
    ) -> Result<CpuTensor, DeviceError> {
        CpuTensor::zeroed(rows, columns)
    }

    fn tensor_bytes(&self, rows: usize, columns: usize, _: Precision) -> usize {
        rows.saturating_mul(columns)
            .saturating_mul(size_of::<f32>())
    }

    fn gather_samples(&mut self, x: &CpuTensor, out: &mut CpuTensor) -> Result<(), DeviceError> {
        let (rows, samples) = (self.staged.rows(), self.staged.sample_rows.len());
        require_shape("gather_samples", "x", x, (rows, x.columns()))?;
        require_shape("gather_samples", "the result", out, (samples, x.columns()))?;
        for (to, &from) in self.staged.sample_rows.iter().enumerate() {
            out.row_mut(to).copy_from_slice(x.row(from));
        }
        Ok(())
    }
}
