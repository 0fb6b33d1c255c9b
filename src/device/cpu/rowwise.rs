//! Operations on single rows: norms, sums and activations.

use super::simd::{Kernel, LANES, Simd};
use crate::device::Activation;

/// Iterates over the start and the length of each vector of a row of `columns` elements.
#[inline(always)]
fn vectors(columns: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..columns)
        .step_by(LANES)
        .map(move |at| (at, LANES.min(columns - at)))
}

/// Loads the first `count` numbers of a vector.
///
/// # Safety
/// `from` must be readable for `count` numbers, and `count` must be at most 16.
#[inline(always)]
unsafe fn load<S: Simd>(s: S, from: *const f32, count: usize) -> S::F {
    // SAFETY: the caller guarantees that `from` is readable.
    unsafe {
        if count == LANES {
            s.load(from)
        } else {
            s.load_part(from, count)
        }
    }
}

/// Stores the first `count` numbers of a vector.
///
/// # Safety
/// `to` must be writable for `count` numbers, and `count` must be at most 16.
#[inline(always)]
unsafe fn store<S: Simd>(s: S, to: *mut f32, value: S::F, count: usize) {
    // SAFETY: the caller guarantees that `to` is writable.
    unsafe {
        if count == LANES {
            s.store(to, value)
        } else {
            s.store_part(to, value, count)
        }
    }
}

/// Returns `1 / √(mean square + ε)`.
#[inline(always)]
fn inverse_rms<S: Simd>(s: S, x: &[f32], epsilon: f32) -> f32 {
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

/// `out = activation(gate) · up` for rows of `columns` results.
pub(crate) struct Gate<'a> {
    pub(crate) gate_up: &'a [f32],
    pub(crate) activation: Activation,
    pub(crate) columns: usize,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.columns;
        let rows = self.gate_up.chunks_exact(2 * columns);
        for (gate_up, out) in rows.zip(self.out.chunks_exact_mut(columns)) {
            for (at, count) in vectors(columns) {
                // SAFETY: `vectors` stays inside the result row, and inside each half of the
                // operand row.
                unsafe {
                    let gate = load(s, gate_up.as_ptr().add(at), count);
                    let up = load(s, gate_up.as_ptr().add(columns + at), count);
                    let activated = match self.activation {
                        Activation::Silu => silu(s, gate),
                        Activation::GeluTanh => gelu_tanh(s, gate),
                    };
                    store(s, out.as_mut_ptr().add(at), s.mul(activated, up), count);
                }
            }
        }
    }
}

#[inline(always)]
fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = s.exp(s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// Returns `x/2 · (1 + tanh u)`, computed as `x / (1 + e^(−2u))` to avoid cancellation.
#[inline(always)]
fn gelu_tanh<S: Simd>(s: S, x: S::F) -> S::F {
    const MINUS_2_SQRT_2_OVER_PI: f32 = -1.595_769;
    let cubic = s.fma(s.mul(s.mul(x, x), x), s.splat(0.044_715), x);
    let e = s.exp(s.mul(cubic, s.splat(MINUS_2_SQRT_2_OVER_PI)));
    s.div(x, s.add(s.splat(1.0), e))
}

/// `x → cap · tanh(x / cap)`, element by element.
pub(crate) struct Softcap<'a> {
    pub(crate) x: &'a mut [f32],
    pub(crate) cap: f32,
}

impl Kernel for Softcap<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let cap = s.splat(self.cap);
        for (at, count) in vectors(self.x.len()) {
            // SAFETY: `vectors` stays inside the slice.
            unsafe {
                let x = load(s, self.x.as_ptr().add(at), count);
                store(
                    s,
                    self.x.as_mut_ptr().add(at),
                    s.mul(cap, s.tanh(s.div(x, cap))),
                    count,
                );
            }
        }
    }
}

/// Largest of the numbers, or −∞ if there are none. NaN is ignored.
pub(crate) struct Largest<'a>(pub(crate) &'a [f32]);

impl Kernel for Largest<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> f32 {
        let (whole, rest) = self.0.as_chunks::<LANES>();
        let mut best = [s.splat(f32::NEG_INFINITY); 4];
        for (i, chunk) in whole.iter().enumerate() {
            // SAFETY: the chunk has `LANES` elements. If the first operand of `max` is NaN, the
            // second one is the result, so NaN is ignored.
            best[i % 4] = s.max(unsafe { s.load(chunk.as_ptr()) }, best[i % 4]);
        }
        let best = s.max(s.max(best[0], best[1]), s.max(best[2], best[3]));
        rest.iter().fold(
            s.reduce_max(best),
            |best, &x| if x > best { x } else { best },
        )
    }
}
