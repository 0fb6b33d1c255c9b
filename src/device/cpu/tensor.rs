//! Matrices of activations.

use super::memory::Buffer;
use crate::device::DeviceError;

/// A row-major float32 matrix, zero at first.
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

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// A row.
    ///
    /// # Panics
    /// When there is no row `row`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.columns..][..self.columns]
    }

    /// A row, to be written.
    ///
    /// # Panics
    /// When there is no row `row`.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.columns..][..self.columns]
    }

    /// The first `rows` rows; they were checked to exist.
    pub(crate) fn leading(&self, rows: usize) -> &[f32] {
        &self.data[..rows * self.columns]
    }

    /// The first `rows` rows, to be written.
    pub(crate) fn leading_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.data[..rows * self.columns]
    }
}
