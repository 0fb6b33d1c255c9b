//! Mamba-2 layers.
//!
//! The state of a head is kept as sixteen of its columns at a time. Such a piece has a vector of
//! the columns for each element of their states, so that all sums over the elements stay within
//! a lane, and it is small enough for the first-level cache while the rows of a prompt pass.

use super::CpuDevice;
use super::cache::CpuCache;
use super::error::require;
use super::memory::Disjoint;
use super::norm::{CpuVector, normalize};
use super::rowwise::{load, store, vectors};
use super::simd::{Kernel, LANES, Simd};
use super::tensor::{CpuTensor, require_shape};
use crate::device::{DeviceError, Mamba2Ops, Mamba2Spec, Mamba2Weights, StatePart};

impl Mamba2Ops for CpuDevice {
    fn mamba2(
        &mut self,
        (projected, convolved): (&CpuTensor, &CpuTensor),
        spec: &Mamba2Spec,
        weights: Mamba2Weights<'_, CpuVector>,
        cache: &mut CpuCache,
        part: StatePart,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "mamba2";
        let (rows, columns) = (self.staged.rows(), spec.columns());
        require_shape(NAME, "the projection", projected, (rows, spec.projected()))?;
        require_shape(NAME, "the convolution", convolved, (rows, spec.channels()))?;
        require_shape(NAME, "the result", out, (rows, columns))?;
        let Mamba2Weights {
            rates,
            skips,
            step_biases,
        } = weights;
        let per_head = [rates, skips, step_biases].map(CpuVector::values);
        let fits = spec.head_dim.is_multiple_of(Mamba2Spec::HEAD_DIM)
            && spec.state_size.is_multiple_of(Mamba2Spec::STATE_SIZE)
            && spec.groups > 0
            && spec.heads.is_multiple_of(spec.groups)
            && per_head.iter().all(|vector| vector.len() == spec.heads)
            && part.elements == spec.state_elements();
        require(fits, NAME, || format!("{spec:?} does not fit its operands"))?;
        let isa = self.multiplier.isa;
        let (projected, convolved) = (projected.leading(rows), convolved.leading(rows));
        let out = Disjoint::new(out.leading_mut(rows));
        let [rates, skips, step_biases] = per_head;
        self.over_states(NAME, cache, part, columns / LANES, |piece, rows, state| {
            let first = piece * LANES;
            let head = first / spec.head_dim;
            let of_rows = |columns: usize| rows.start * columns..rows.end * columns;
            isa.dispatch(Columns {
                projected: &projected[of_rows(spec.projected())],
                convolved: &convolved[of_rows(spec.channels())],
                spec,
                first,
                rate: rates[head],
                skip: skips[head],
                step_bias: step_biases[head],
                state,
                out: out.pointer(
                    rows.start * columns + first,
                    (rows.len() - 1) * columns + LANES,
                ),
            });
        })
    }

    fn gated_norm(
        &mut self,
        x: &mut CpuTensor,
        gates: &CpuTensor,
        weight: &CpuVector,
        groups: usize,
        epsilon: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gated_norm";
        let (weight, stride) = (weight.values(), gates.columns());
        let columns = weight.len();
        require_shape(NAME, "x", x, (rows, columns))?;
        require_shape(NAME, "the gates", gates, (rows, stride))?;
        let fits = stride >= columns && groups > 0 && columns.is_multiple_of(groups);
        require(fits, NAME, || {
            format!("{columns} columns in {groups} groups do not fit gates of {stride} columns")
        })?;
        let gates = gates.leading(rows);
        let x = x.leading_mut(rows);
        self.rowwise(NAME, (rows, 4 * columns), x, |range, x| GatedNorm {
            x,
            gates: &gates[range.start * stride..range.end * stride],
            stride,
            weight,
            group: columns / groups,
            epsilon,
        })
    }
}

/// The recurrence of sixteen columns of a head over consecutive rows.
struct Columns<'a> {
    projected: &'a [f32],
    convolved: &'a [f32],
    spec: &'a Mamba2Spec,
    /// First of the columns.
    first: usize,
    rate: f32,
    skip: f32,
    step_bias: f32,
    state: &'a mut [f32],
    /// The first row's results of these columns. The rows are `spec.columns()` elements apart.
    out: *mut f32,
}

impl Columns<'_> {
    /// The length of the step of time of a row.
    #[inline(always)]
    fn step(&self, projected: &[f32]) -> f32 {
        let [least, most] = self.spec.step_limits;
        let head = self.first / self.spec.head_dim;
        let steps = &projected[projected.len() - self.spec.heads..];
        let step = softplus(steps[head] + self.step_bias);
        // Comparisons in this direction leave NaN as it is.
        if step < least {
            least
        } else if step > most {
            most
        } else {
            step
        }
    }
}

impl Kernel for Columns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let spec = self.spec;
        let (columns, size) = (spec.columns(), spec.state_size);
        let group = self.first / spec.head_dim / (spec.heads / spec.groups);
        let skip = s.splat(self.skip);
        let rows = self.projected.chunks_exact(spec.projected());
        let rows = rows.zip(self.convolved.chunks_exact(spec.channels()));
        for (row, (projected, convolved)) in rows.enumerate() {
            let step = self.step(projected);
            let decay = s.splat((step * self.rate).exp());
            let (inputs, both) = convolved.split_at(columns);
            let (b, c) = both.split_at(spec.groups * size);
            let (b, c) = (&b[group * size..][..size], &c[group * size..][..size]);
            // SAFETY: `first` is the first of sixteen columns, the state has sixteen elements for
            // each of `b`, and `mamba2` has checked the shape of the result.
            unsafe {
                let x = s.load(inputs[self.first..][..LANES].as_ptr());
                let scaled = s.mul(x, s.splat(step));
                let state = self.state[..size * LANES].as_mut_ptr();
                // Four sums, so that none of them waits for the one before it.
                // The array is as long as `unroll` demands.
                let mut sums = [s.splat(0.0); 8];
                let mut at = 0;
                while at + 4 <= size {
                    super::simd::unroll!(k < 4 => {
                        let to = state.add((at + k) * LANES);
                        let added = s.mul(scaled, s.splat(*b.get_unchecked(at + k)));
                        let element = s.fma(s.load(to), decay, added);
                        s.store(to, element);
                        sums[k] = s.fma(element, s.splat(*c.get_unchecked(at + k)), sums[k]);
                    });
                    at += 4;
                }
                let sum = s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]));
                s.store(self.out.add(row * columns), s.fma(skip, x, sum));
            }
        }
    }
}

/// Returns `ln(1 + e^x)`.
fn softplus(x: f32) -> f32 {
    // For large numbers the result is the number itself, and `e^x` might overflow.
    match x > 20.0 {
        true => x,
        false => x.exp().ln_1p(),
    }
}

/// `x = norm(x · silu(gate)) · weight` for rows of `weight.len()` columns, group by group.
struct GatedNorm<'a> {
    x: &'a mut [f32],
    gates: &'a [f32],
    /// Columns of a row of `gates`.
    stride: usize,
    weight: &'a [f32],
    /// Columns of a group.
    group: usize,
    epsilon: f32,
}

impl Kernel for GatedNorm<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let columns = self.weight.len();
        let rows = self.x.chunks_exact_mut(columns);
        for (x, gates) in rows.zip(self.gates.chunks_exact(self.stride)) {
            for (at, count) in vectors(columns) {
                // SAFETY: `vectors` stays inside the row, and a row of gates is at least as long.
                unsafe {
                    let gate = load(s, gates.as_ptr().add(at), count);
                    let to = x.as_mut_ptr().add(at);
                    let gated = s.mul(load(s, to, count), super::activation::silu(s, gate));
                    store(s, to, gated, count);
                }
            }
            let weights = self.weight.chunks_exact(self.group);
            for (x, weight) in x.chunks_exact_mut(self.group).zip(weights) {
                normalize(s, x, weight, self.epsilon);
            }
        }
    }
}
