//! Matrices of activations.

use super::memory::Buffer;
use crate::device::DeviceError;

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
