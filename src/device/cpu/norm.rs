//! Norms, and additions to the residual stream.

use super::CpuDevice;
use super::error::require;
use super::rowwise::{load, store, vectors};
use super::simd::{Kernel, Simd};
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, NormOps, ResidualOps};

/// A vector of float32 numbers.
pub struct CpuVector(Vec<f32>);

impl CpuVector {
    /// Returns the numbers.
    pub fn values(&self) -> &[f32] {
        &self.0
    }
}

impl NormOps for CpuDevice {
    fn load_vector(&mut self, values: &[f32]) -> Result<CpuVector, DeviceError> {
        self.weight_bytes += size_of_val(values);
        Ok(CpuVector(values.to_vec()))
    }

    fn rms_norm(
        &mut self,
        x: &CpuTensor,
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let columns = weight.0.len();
        require_shape("rms_norm", "x", x, (rows, columns))?;
        require_shape("rms_norm", "the result", out, (rows, columns))?;
        let (x, weight) = (x.leading(rows), &weight.0[..]);
        self.rowwise(
            "rms_norm",
            (rows, columns),
            out.leading_mut(rows),
            |range, out| {
                let x = &x[range.start * columns..range.end * columns];
                RmsNorm {
                    x,
                    weight,
                    epsilon,
                    out,
                }
            },
        )
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut CpuTensor,
        x: &CpuTensor,
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        self.add(residual, x, rows)?;
        self.rms_norm(residual, weight, epsilon, rows, out)
    }

    fn centre(&mut self, x: &mut CpuTensor, rows: usize) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("centre", "x", x, (rows, columns))?;
        let x = x.leading_mut(rows);
        self.rowwise("centre", (rows, columns), x, |_, x| Centre { x, columns })
    }

    fn add_layer_norm(
        &mut self,
        residual: &mut CpuTensor,
        x: Option<&CpuTensor>,
        [weight, bias]: [&CpuVector; 2],
        epsilon: f32,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "add_layer_norm";
        let columns = weight.0.len();
        require_shape(NAME, "the residual", residual, (rows, columns))?;
        require(bias.0.len() == columns, NAME, || {
            format!("{columns} weights and {} biases", bias.0.len())
        })?;
        if let Some(x) = x {
            self.add(residual, x, rows)?;
        }
        let parameters = [&weight.0[..], &bias.0];
        let rows_of = residual.leading_mut(rows);
        self.rowwise(NAME, (rows, columns), rows_of, |_, x| LayerNorm {
            x,
            parameters,
            epsilon,
        })?;
        self.copy(residual, rows, out)
    }

    fn rms_norm_add(
        &mut self,
        x: &CpuTensor,
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
        residual: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "rms_norm_add";
        let (columns, length) = (x.columns(), weight.0.len());
        require_shape(NAME, "x", x, (rows, columns))?;
        require_shape(NAME, "the residual", residual, (rows, columns))?;
        let fits = length > 0 && columns.is_multiple_of(length);
        require(fits, NAME, || {
            format!("{columns} columns cannot be divided into parts of {length}")
        })?;
        let (x, weight) = (x.leading(rows), &weight.0[..]);
        let residual = residual.leading_mut(rows);
        self.rowwise(NAME, (rows, columns), residual, |range, residual| {
            let x = &x[range.start * columns..range.end * columns];
            RmsNormAdd {
                x,
                weight,
                epsilon,
                residual,
            }
        })
    }

    fn add(
        &mut self,
        residual: &mut CpuTensor,
        x: &CpuTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("add", "x", x, (rows, columns))?;
        require_shape("add", "the residual", residual, (rows, columns))?;
        let x = x.leading(rows);
        self.rowwise(
            "add",
            (rows, columns),
            residual.leading_mut(rows),
            |range, a| Add {
                a,
                b: &x[range.start * columns..range.end * columns],
                factor: 1.0,
            },
        )
    }
}

/// Returns `1 / √(mean square + ε)`.
#[inline(always)]
pub(super) fn inverse_rms<S: Simd>(s: S, x: &[f32], epsilon: f32) -> f32 {
    let mut sum = s.splat(0.0);
    for (at, count) in vectors(x.len()) {
        // SAFETY: `vectors` stays inside the row.
        let v = unsafe { load(s, x.as_ptr().add(at), count) };
        sum = s.fma(v, v, sum);
    }
    1.0 / (s.reduce_add(sum) / x.len() as f32 + epsilon).sqrt()
}

/// Computes `x = x / rms(x) · weight` in place.
#[inline(always)]
pub(crate) fn normalize<S: Simd>(s: S, x: &mut [f32], weight: &[f32], epsilon: f32) {
    assert!(weight.len() >= x.len());
    let factor = s.splat(inverse_rms(s, x, epsilon));
    for (at, count) in vectors(x.len()) {
        // SAFETY: `vectors` stays inside the row, and the weight is at least as long.
        unsafe {
            let v = load(s, x.as_ptr().add(at), count);
            let w = load(s, weight.as_ptr().add(at), count);
            store(s, x.as_mut_ptr().add(at), s.mul(s.mul(v, factor), w), count);
        }
    }
}

/// Computes `x = x / rms(x)` in place.
#[inline(always)]
pub(crate) fn normalize_unweighted<S: Simd>(s: S, x: &mut [f32], epsilon: f32) {
    let factor = s.splat(inverse_rms(s, x, epsilon));
    for (at, count) in vectors(x.len()) {
        // SAFETY: `vectors` stays inside the row.
        unsafe {
            let v = load(s, x.as_ptr().add(at), count);
            store(s, x.as_mut_ptr().add(at), s.mul(v, factor), count);
        }
    }
}

/// `out = x / rms(x) · weight` for rows of `weight.len()` columns.
pub(crate) struct RmsNorm<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) epsilon: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.weight.len();
        for (x, out) in self
            .x
            .chunks_exact(columns)
            .zip(self.out.chunks_exact_mut(columns))
        {
            let factor = s.splat(inverse_rms(s, x, self.epsilon));
            for (at, count) in vectors(columns) {
                // SAFETY: `vectors` stays inside the rows, and the rows and the weight have the
                // same length.
                unsafe {
                    let v = load(s, x.as_ptr().add(at), count);
                    let w = load(s, self.weight.as_ptr().add(at), count);
                    store(
                        s,
                        out.as_mut_ptr().add(at),
                        s.mul(s.mul(v, factor), w),
                        count,
                    );
                }
            }
        }
    }
}

/// `x −= mean(x)` for rows of `columns` columns.
pub(crate) struct Centre<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) columns: usize,
}

impl Kernel for Centre<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for x in self.x.chunks_exact_mut(self.columns) {
            centre(s, x);
        }
    }
}

/// Subtracts the mean of a row from it.
#[inline(always)]
fn centre<S: Simd>(s: S, x: &mut [f32]) {
    let mut sum = s.splat(0.0);
    for (at, count) in vectors(x.len()) {
        // SAFETY: `vectors` stays inside the row.
        sum = s.add(sum, unsafe { load(s, x.as_ptr().add(at), count) });
    }
    let mean = s.splat(s.reduce_add(sum) / x.len() as f32);
    for (at, count) in vectors(x.len()) {
        // SAFETY: `vectors` stays inside the row.
        unsafe {
            let v = load(s, x.as_ptr().add(at), count);
            store(s, x.as_mut_ptr().add(at), s.sub(v, mean), count);
        }
    }
}

/// `x = (x − mean(x)) / σ(x) · weight + bias` for rows of `weight.len()` columns.
struct LayerNorm<'a> {
    x: &'a mut [f32],
    /// The weight and the bias.
    parameters: [&'a [f32]; 2],
    epsilon: f32,
}

impl Kernel for LayerNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let [weight, bias] = self.parameters;
        for x in self.x.chunks_exact_mut(weight.len()) {
            centre(s, x);
            let factor = s.splat(inverse_rms(s, x, self.epsilon));
            for (at, count) in vectors(x.len()) {
                // SAFETY: `vectors` stays inside the row, and the weight and the bias have the same
                // length.
                unsafe {
                    let v = load(s, x.as_ptr().add(at), count);
                    let w = load(s, weight.as_ptr().add(at), count);
                    let b = load(s, bias.as_ptr().add(at), count);
                    let y = s.fma(s.mul(v, factor), w, b);
                    store(s, x.as_mut_ptr().add(at), y, count);
                }
            }
        }
    }
}

/// `residual += x / rms(x) · weight` for rows of `weight.len()` columns.
pub(crate) struct RmsNormAdd<'a> {
    pub(crate) x: &'a [f32],
    pub(crate) weight: &'a [f32],
    pub(crate) epsilon: f32,
    pub(crate) residual: &'a mut [f32],
}

impl Kernel for RmsNormAdd<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.weight.len();
        let residuals = self.residual.chunks_exact_mut(columns);
        for (x, residual) in self.x.chunks_exact(columns).zip(residuals) {
            let factor = s.splat(inverse_rms(s, x, self.epsilon));
            for (at, count) in vectors(columns) {
                // SAFETY: `vectors` stays inside the rows, and the rows and the weight have the
                // same length.
                unsafe {
                    let v = load(s, x.as_ptr().add(at), count);
                    let w = load(s, self.weight.as_ptr().add(at), count);
                    let r = load(s, residual.as_ptr().add(at), count);
                    let sum = s.add(r, s.mul(s.mul(v, factor), w));
                    store(s, residual.as_mut_ptr().add(at), sum, count);
                }
            }
        }
    }
}

/// `a += factor · b`, element by element.
pub(crate) struct Add<'a> {
    pub(crate) a: &'a mut [f32],
    pub(crate) b: &'a [f32],
    /// Factor applied to `b`.
    pub(crate) factor: f32,
}

impl Kernel for Add<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for (at, count) in vectors(self.a.len().min(self.b.len())) {
            // SAFETY: `vectors` stays inside the shorter of the two.
            unsafe {
                let a = load(s, self.a.as_ptr().add(at), count);
                let b = load(s, self.b.as_ptr().add(at), count);
                store(s, self.a.as_mut_ptr().add(at), s.fma(factor, b, a), count);
            }
        }
    }
}
