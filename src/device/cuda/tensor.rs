//! Matrices of activations.

use super::CudaDevice;
use super::context::Context;
use super::error::{out_of_memory, require};
use super::launch::row_grid;
use super::memory::{Buffer, Ptr};
use crate::device::{DeviceError, Precision, TensorOps};

/// A dense, row-major matrix of activations in device memory.
pub struct CudaTensor {
    buffer: Buffer,
    rows: usize,
    columns: usize,
    precision: Precision,
}

impl CudaTensor {
    /// Allocates an uninitialised matrix.
    pub(super) fn new(
        context: &Context,
        rows: usize,
        columns: usize,
        precision: Precision,
    ) -> Result<Self, DeviceError> {
        let bytes = bytes(rows, columns, precision)
            .ok_or_else(|| out_of_memory(usize::MAX, "activations"))?;
        Ok(Self {
            buffer: context.allocate(bytes, "activations")?,
            rows,
            columns,
            precision,
        })
    }

    /// Returns the address of the first row.
    pub(super) fn ptr(&self) -> Ptr {
        self.buffer.ptr()
    }

    /// Returns the memory of all rows.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Returns the number of rows that the matrix has room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of elements per row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns how precisely elements are stored.
    pub fn precision(&self) -> Precision {
        self.precision
    }
}

/// Returns the bytes of a matrix, or `None` if the number overflows.
fn bytes(rows: usize, columns: usize, precision: Precision) -> Option<usize> {
    let element = match precision {
        Precision::Activation => 2,
        Precision::Full => 4,
    };
    rows.checked_mul(columns)?.checked_mul(element)
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

impl TensorOps for CudaDevice {
    fn allocate(
        &mut self,
        rows: usize,
        columns: usize,
        precision: Precision,
    ) -> Result<CudaTensor, DeviceError> {
        CudaTensor::new(&self.context, rows, columns, precision)
    }

    fn tensor_bytes(&self, rows: usize, columns: usize, precision: Precision) -> usize {
        bytes(rows, columns, precision).unwrap_or(usize::MAX)
    }

    fn gather_samples(&mut self, x: &CudaTensor, out: &mut CudaTensor) -> Result<(), DeviceError> {
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

/// Matrices with given values, for tests and benches.
#[cfg(any(test, feature = "internals"))]
impl CudaDevice {
    /// Creates a matrix with `columns` columns from row-major `values`, rounded to `precision`.
    /// Values beyond the last whole row are ignored.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] if the matrix cannot be allocated, and other errors if the
    /// driver fails.
    pub fn tensor(
        &mut self,
        columns: usize,
        precision: Precision,
        values: &[f32],
    ) -> Result<CudaTensor, DeviceError> {
        let rows = values.len().checked_div(columns).unwrap_or(0);
        let tensor = CudaTensor::new(&self.context, rows, columns, precision)?;
        let values = &values[..rows * columns];
        let buffer = tensor.buffer();
        match precision {
            Precision::Full => self.context.write(buffer, 0, values)?,
            Precision::Activation => {
                let encode = |value: &f32| self.options.activations.encode(*value);
                let encoded: Vec<u16> = values.iter().map(encode).collect();
                self.context.write(buffer, 0, &encoded)?;
            }
        }
        Ok(tensor)
    }

    /// Reads the first `rows` rows of a matrix, after waiting for all enqueued work.
    ///
    /// # Errors
    /// Fails if the driver fails, or if a decode step is being recorded as a graph.
    pub fn values(&self, tensor: &CudaTensor, rows: usize) -> Result<Vec<f32>, DeviceError> {
        let count = rows.min(tensor.rows()) * tensor.columns();
        match tensor.precision() {
            Precision::Full => self.context.read(tensor.ptr(), count),
            Precision::Activation => {
                let encoded: Vec<u16> = self.context.read(tensor.ptr(), count)?;
                let decode = |bits| self.options.activations.decode(bits);
                Ok(encoded.into_iter().map(decode).collect())
            }
        }
    }
}
