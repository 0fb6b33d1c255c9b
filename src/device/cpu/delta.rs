//! Gated delta nets.

use super::CpuDevice;
use super::activation::silu;
use super::cache::CpuCache;
use super::error::require;
use super::memory::Disjoint;
use super::norm::{CpuVector, inverse_rms};
use super::rowwise::{load, store, vectors};
use super::simd::{Kernel, LANES, Simd, unroll};
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DELTA_EPSILON, DeltaHeads, DeltaInput, DeltaOps, DeviceError, StatePart};

impl DeltaOps for CpuDevice {
    fn gated_delta(
        &mut self,
        input: &DeltaInput<'_, Self>,
        gates: &mut CpuTensor,
        heads: &DeltaHeads,
        cache: &mut CpuCache,
        part: StatePart,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_delta";
        let rows = self.staged.rows();
        let (qkv_columns, columns) = (heads.qkv_columns(), heads.value_columns());
        let gate_columns = 2 * heads.value_heads;
        let fits = heads.key_heads > 0
            && heads.value_heads.is_multiple_of(heads.key_heads)
            && heads.key_dim.is_multiple_of(LANES)
            && heads.value_dim.is_multiple_of(LANES)
            && input.decay.values().len() == heads.value_heads
            && input.bias.values().len() == heads.value_heads
            && part.elements == heads.state_elements();
        require(fits, NAME, || {
            format!("{heads:?} does not fit its operands")
        })?;
        let wide = (rows, qkv_columns);
        require_shape(NAME, "query, key and value", input.qkv, wide)?;
        require_shape(NAME, "the gates", gates, (rows, gate_columns))?;
        require_shape(NAME, "the result", out, (rows, columns))?;
        let (decay, bias) = (input.decay.values(), input.bias.values());
        let weight = 32 * gate_columns;
        self.rowwise(NAME, (rows, weight), gates.leading_mut(rows), |_, gates| {
            Gates { gates, decay, bias }
        })?;
        let isa = self.multiplier.isa;
        let (qkv, gates) = (input.qkv.leading(rows), gates.leading(rows));
        let out = Disjoint::new(out.leading_mut(rows));
        let pieces = columns / LANES;
        self.over_states(NAME, cache, part, pieces, |piece, rows, state| {
            isa.dispatch(DeltaRule {
                qkv: &qkv[rows.start * qkv_columns..rows.end * qkv_columns],
                gates: &gates[rows.start * gate_columns..rows.end * gate_columns],
                heads,
                first: piece * LANES,
                state,
                out: out.pointer(
                    rows.start * columns + piece * LANES,
                    (rows.len() - 1) * columns + LANES,
                ),
            });
        })
    }

    fn gated_rms_norm(
        &mut self,
        x: &mut CpuTensor,
        (gate, first): (&CpuTensor, usize),
        weight: &CpuVector,
        epsilon: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_rms_norm";
        let (columns, stride) = (x.columns(), gate.columns());
        let weight = weight.values();
        let fits = !weight.is_empty() && columns.is_multiple_of(weight.len());
        require(fits, NAME, || {
            let length = weight.len();
            format!("{columns} columns are not heads of {length}")
        })?;
        require(first + columns <= stride, NAME, || {
            format!("there are no {columns} gates from column {first} on: there are {stride}")
        })?;
        require_shape(NAME, "x", x, (rows, columns))?;
        require_shape(NAME, "the gate", gate, (rows, stride))?;
        let gate = gate.leading(rows);
        let x = x.leading_mut(rows);
        self.rowwise(NAME, (rows, 4 * columns), x, |range, x| GatedNorm {
            x,
            columns,
            gate: &gate[range.start * stride..range.end * stride],
            stride,
            first,
            weight,
            epsilon,
        })
    }
}

/// `[b | a] → [β | α]`, for rows of two numbers per head.
struct Gates<'a> {
    gates: &'a mut [f32],
    decay: &'a [f32],
    bias: &'a [f32],
}

impl Kernel for Gates<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let heads = self.decay.len();
        for row in self.gates.chunks_exact_mut(2 * heads) {
            let (beta, alpha) = row.split_at_mut(heads);
            for beta in beta {
                *beta = 1.0 / (1.0 + (-*beta).exp());
            }
            let parameters = self.decay.iter().zip(self.bias);
            for (alpha, (decay, bias)) in alpha.iter_mut().zip(parameters) {
                *alpha = (decay * softplus(*alpha + bias)).exp();
            }
        }
    }
}

/// Returns `ln(1 + e^x)`.
fn softplus(x: f32) -> f32 {
    // Beyond, the two are the same number.
    match x > 20.0 {
        true => x,
        false => x.exp().ln_1p(),
    }
}

/// The gated delta rule for sixteen columns of the values of consecutive rows.
struct DeltaRule<'a> {
    qkv: &'a [f32],
    /// `[β | α]`.
    gates: &'a [f32],
    heads: &'a DeltaHeads,
    /// First of the columns, counted over all heads.
    first: usize,
    /// One row of sixteen numbers per element of a key.
    state: &'a mut [f32],
    /// The first row's results of these columns. The rows are as far apart as the values of
    /// all heads are wide.
    out: *mut f32,
}

/// Number of sums over the elements of a key that are computed side by side.
const SUMS: usize = 4;

/// The length of an array that [`unroll`] indexes, which must be as long as if all of its steps
/// were taken.
const UNROLLED: usize = 8;

impl Kernel for DeltaRule<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let heads = self.heads;
        let (key_dim, columns) = (heads.key_dim, heads.value_columns());
        let head = self.first / heads.value_dim;
        let query = heads.key_head(head) * key_dim;
        let key = heads.key_columns() + query;
        let value = 2 * heads.key_columns() + self.first;
        let query_scale = 1.0 / (key_dim as f32).sqrt();
        let state = self.state.as_mut_ptr();
        let gates = self.gates.chunks_exact(2 * heads.value_heads);
        let rows = self.qkv.chunks_exact(heads.qkv_columns()).zip(gates);
        for (row, (qkv, gates)) in rows.enumerate() {
            let (beta, alpha) = (gates[head], gates[heads.value_heads + head]);
            let (q, k) = (&qkv[query..][..key_dim], &qkv[key..][..key_dim]);
            let query_factor = inverse_length(s, q) * query_scale;
            let key_factor = inverse_length(s, k);
            // SAFETY: the operands have the sizes that `gated_delta` checks: the state has
            // sixteen numbers for each of the `key_dim` elements, which are a multiple of
            // `SUMS`, and `first` is the first of sixteen columns.
            unsafe {
                let mut sums = [s.splat(0.0); UNROLLED];
                for element in (0..key_dim).step_by(SUMS) {
                    unroll!(m < SUMS => {
                        let state = s.load(state.add((element + m) * LANES));
                        sums[m] = s.fma(s.splat(*k.get_unchecked(element + m)), state, sums[m]);
                    });
                }
                let known = s.mul(total(s, sums), s.splat(alpha * key_factor));
                let new = s.sub(s.load(qkv.as_ptr().add(value)), known);
                let new = s.mul(new, s.splat(beta * key_factor));
                let alpha = s.splat(alpha);
                let mut sums = [s.splat(0.0); UNROLLED];
                for element in (0..key_dim).step_by(SUMS) {
                    unroll!(m < SUMS => {
                        let state = state.add((element + m) * LANES);
                        let kept = s.mul(alpha, s.load(state));
                        let next = s.fma(s.splat(*k.get_unchecked(element + m)), new, kept);
                        s.store(state, next);
                        sums[m] = s.fma(s.splat(*q.get_unchecked(element + m)), next, sums[m]);
                    });
                }
                let result = s.mul(total(s, sums), s.splat(query_factor));
                s.store(self.out.add(row * columns), result);
            }
        }
    }
}

#[inline(always)]
fn total<S: Simd>(s: S, sums: [S::F; UNROLLED]) -> S::F {
    s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]))
}

/// Returns one over the length of a vector whose elements are a multiple of 16.
#[inline(always)]
fn inverse_length<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut sum = s.splat(0.0);
    for x in x.chunks_exact(LANES) {
        // SAFETY: a chunk has sixteen elements.
        let x = unsafe { s.load(x.as_ptr()) };
        sum = s.fma(x, x, sum);
    }
    1.0 / (s.reduce_add(sum) + DELTA_EPSILON).sqrt()
}

/// `x = x / rms(x) · weight · silu(gate)` for heads of `weight.len()` columns.
struct GatedNorm<'a> {
    x: &'a mut [f32],
    columns: usize,
    gate: &'a [f32],
    /// Columns of a row of `gate`.
    stride: usize,
    /// First of the gate's columns.
    first: usize,
    weight: &'a [f32],
    epsilon: f32,
}

impl Kernel for GatedNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.weight.len();
        let gates = self.gate.chunks_exact(self.stride);
        for (x, gate) in self.x.chunks_exact_mut(self.columns).zip(gates) {
            let gate = gate[self.first..][..self.columns].chunks_exact(width);
            for (x, gate) in x.chunks_exact_mut(width).zip(gate) {
                let factor = s.splat(inverse_rms(s, x, self.epsilon));
                for (at, count) in vectors(width) {
                    // SAFETY: `vectors` stays inside the head, and the head, its gate and the
                    // weight have the same length.
                    unsafe {
                        let v = load(s, x.as_ptr().add(at), count);
                        let w = load(s, self.weight.as_ptr().add(at), count);
                        let gate = silu(s, load(s, gate.as_ptr().add(at), count));
                        let normed = s.mul(s.mul(v, factor), w);
                        store(s, x.as_mut_ptr().add(at), s.mul(normed, gate), count);
                    }
                }
            }
        }
    }
}
