//! Element-wise non-linearities.

use super::CpuDevice;
use super::error::require;
use super::rowwise::{load, store, vectors};
use super::simd::{Kernel, Simd};
use super::tensor::{CpuTensor, require_shape};
use crate::device::{Activation, ActivationOps, DeviceError};

impl ActivationOps for CpuDevice {
    fn gated_activation(
        &mut self,
        gate_up: &CpuTensor,
        activation: Activation,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let columns = out.columns();
        require_shape(
            "gated_activation",
            "gate and up",
            gate_up,
            (rows, activation.gate_up_columns(columns)),
        )?;
        require_shape("gated_activation", "the result", out, (rows, columns))?;
        let gate_up = gate_up.leading(rows);
        let weight = 4 * columns;
        self.rowwise(
            "gated_activation",
            (rows, weight),
            out.leading_mut(rows),
            |range, out| {
                let stride = activation.gate_up_columns(columns);
                let gate_up = &gate_up[range.start * stride..range.end * stride];
                Gate {
                    gate_up,
                    activation,
                    columns,
                    out,
                }
            },
        )
    }

    fn softcap(&mut self, x: &mut CpuTensor, cap: f32, rows: usize) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("softcap", "x", x, (rows, columns))?;
        let weight = 4 * columns;
        self.rowwise("softcap", (rows, weight), x.leading_mut(rows), |_, x| {
            Softcap { x, cap }
        })
    }

    fn sigmoid_gate(
        &mut self,
        x: &mut CpuTensor,
        gate: &CpuTensor,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "sigmoid_gate";
        let (columns, gates) = (x.columns(), gate.columns());
        require(gates > 0 && columns.is_multiple_of(gates), NAME, || {
            format!("{gates} gates do not divide {columns} columns")
        })?;
        require_shape(NAME, "x", x, (rows, columns))?;
        require_shape(NAME, "the gate", gate, (rows, gates))?;
        let gate = gate.leading(rows);
        let weight = 4 * columns;
        self.rowwise(NAME, (rows, weight), x.leading_mut(rows), |range, x| {
            SigmoidGate {
                x,
                gate: &gate[range.start * gates..range.end * gates],
                width: columns / gates,
            }
        })
    }
}

/// `out = activation(gate) · up` for rows of `columns` results. If the activation is not gated,
/// `gate_up` is `up`.
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
        let stride = self.activation.gate_up_columns(columns);
        // Where there is no gate, what would be loaded as one is `up` itself.
        let up_column = stride - columns;
        let rows = self.gate_up.chunks_exact(stride);
        for (gate_up, out) in rows.zip(self.out.chunks_exact_mut(columns)) {
            for (at, count) in vectors(columns) {
                // SAFETY: `vectors` stays inside the result row, and the operand row has as many
                // columns from each of the two places on.
                unsafe {
                    let gate = load(s, gate_up.as_ptr().add(at), count);
                    let up = load(s, gate_up.as_ptr().add(up_column + at), count);
                    let gated = activate(s, self.activation, gate, up);
                    store(s, out.as_mut_ptr().add(at), gated, count);
                }
            }
        }
    }
}

/// Returns `activation(gate) · up`.
#[inline(always)]
pub(super) fn activate<S: Simd>(s: S, activation: Activation, gate: S::F, up: S::F) -> S::F {
    match activation {
        Activation::Silu => s.mul(silu(s, gate), up),
        Activation::GeluTanh => s.mul(gelu_tanh(s, gate), up),
        Activation::ClampedSwiGlu { slope, limit } => clamped_swiglu(s, gate, up, slope, limit),
        Activation::SquaredRelu => {
            // The operand order propagates NaN.
            let positive = s.max(s.splat(0.0), up);
            s.mul(positive, positive)
        }
        Activation::Gelu => gelu(s, up),
    }
}

/// Returns `x/2 · (1 + erf(x / √2))`, with a relative error of about 1e-6 also where it is close
/// to 0. It is `max(x, 0) − |x| · h`, where `h` is half the complementary error function of
/// `|x| / √2`, as Press et al., *Numerical Recipes*, 1992, approximate it.
#[inline(always)]
fn gelu<S: Simd>(s: S, x: S::F) -> S::F {
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    let magnitude = s.max(s.sub(zero, x), x);
    let z = s.mul(magnitude, s.splat(std::f32::consts::FRAC_1_SQRT_2));
    let t = s.div(one, s.fma(z, s.splat(0.5), one));
    let mut p = s.splat(0.170_872_77);
    for coefficient in [
        -0.822_152_23,
        1.488_515_9,
        -1.135_204,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_7,
        -1.265_512_2,
    ] {
        p = s.fma(p, t, s.splat(coefficient));
    }
    let e = s.exp(s.sub(p, s.mul(z, z)));
    let h = s.mul(s.mul(t, s.splat(0.5)), e);
    // The operand order propagates NaN.
    s.sub(s.max(zero, x), s.mul(magnitude, h))
}

#[inline(always)]
pub(super) fn silu<S: Simd>(s: S, x: S::F) -> S::F {
    let e = s.exp(s.sub(s.splat(0.0), x));
    s.div(x, s.add(s.splat(1.0), e))
}

/// Returns `gate · sigmoid(slope · gate) · (up + 1)` of a limited gate and up.
#[inline(always)]
fn clamped_swiglu<S: Simd>(s: S, gate: S::F, up: S::F, slope: f32, limit: f32) -> S::F {
    let zero = s.splat(0.0);
    // There is no minimum: it is the negated maximum of negated numbers.
    // NaN stays NaN: of a NaN and a number, `max` returns its second operand.
    let at_most = |x: S::F| s.sub(zero, s.max(s.splat(-limit), s.sub(zero, x)));
    let gate = at_most(gate);
    let up = s.max(s.splat(-limit), at_most(up));
    let e = s.exp(s.mul(gate, s.splat(-slope)));
    let activated = s.div(gate, s.add(s.splat(1.0), e));
    s.mul(activated, s.add(up, s.splat(1.0)))
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

/// `x → x · sigmoid(gate)`, with a gate for each `width` elements.
struct SigmoidGate<'a> {
    x: &'a mut [f32],
    gate: &'a [f32],
    width: usize,
}

impl Kernel for SigmoidGate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let one = s.splat(1.0);
        if self.width > 1 {
            for (x, &gate) in self.x.chunks_exact_mut(self.width).zip(self.gate) {
                let divisor = s.add(one, s.exp(s.splat(-gate)));
                for (at, count) in vectors(x.len()) {
                    // SAFETY: `vectors` stays inside the slice.
                    unsafe {
                        let gated = s.div(load(s, x.as_ptr().add(at), count), divisor);
                        store(s, x.as_mut_ptr().add(at), gated, count);
                    }
                }
            }
            return;
        }
        for (at, count) in vectors(self.x.len().min(self.gate.len())) {
            // SAFETY: `vectors` stays inside the shorter of the two.
            unsafe {
                let gate = load(s, self.gate.as_ptr().add(at), count);
                let divisor = s.add(one, s.exp(s.sub(s.splat(0.0), gate)));
                let gated = s.div(load(s, self.x.as_ptr().add(at), count), divisor);
                store(s, self.x.as_mut_ptr().add(at), gated, count);
            }
        }
    }
}
