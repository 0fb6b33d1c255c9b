//! What some models do to the residual stream besides adding to it.
//!
//! Sums of a row are added up in float64, in the order of the columns.

use super::CpuDevice;
use super::activation::activate;
use super::error::require;
use super::linear::CpuLinear;
use super::memory::Disjoint;
use super::norm::CpuVector;
use super::rowwise::{load, store, vectors};
use super::simd::{Kernel, Simd};
use super::tensor::{CpuTensor, require_shape};
use crate::device::{Activation, DeviceError, ResidualOps};

impl ResidualOps for CpuDevice {
    fn copy(&mut self, x: &CpuTensor, rows: usize, out: &mut CpuTensor) -> Result<(), DeviceError> {
        require_shape("copy", "x", x, (rows, x.columns()))?;
        require_shape("copy", "the result", out, (rows, x.columns()))?;
        out.leading_mut(rows).copy_from_slice(x.leading(rows));
        Ok(())
    }

    fn scale(&mut self, x: &mut CpuTensor, factor: f32, rows: usize) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("scale", "x", x, (rows, columns))?;
        let x = x.leading_mut(rows);
        self.rowwise("scale", (rows, columns), x, |_, x| Scale { x, factor })
    }

    fn embed_within(
        &mut self,
        table: &CpuLinear,
        scale: f32,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let (rows, columns) = (self.staged.rows(), table.columns());
        require_shape("embed_within", "the result", out, (rows, columns))?;
        let (tokens, vocabulary) = (&self.staged.tokens, table.rows());
        let out = Disjoint::new(out.leading_mut(rows));
        let grain = (4096 / columns.max(1)).max(1);
        self.workers.run("embed_within", rows, grain, |range| {
            for row in range {
                let token = tokens[row] as usize;
                // SAFETY: each row belongs to one item.
                let out = unsafe { out.range(row * columns, columns) };
                table.read_row(if token < vocabulary { token } else { 0 }, out);
                out.iter_mut().for_each(|value| *value *= scale);
            }
        })
    }

    fn gate_columns(
        &mut self,
        gate: &mut CpuTensor,
        activation: Activation,
        inputs: &CpuTensor,
        first: usize,
        rows: usize,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "gate_columns";
        let (columns, stride) = (gate.columns(), inputs.columns());
        require_shape(NAME, "the gate", gate, (rows, columns))?;
        require_shape(NAME, "the inputs", inputs, (rows, stride))?;
        require(first.saturating_add(columns) <= stride, NAME, || {
            format!("{columns} columns from {first} are outside the {stride} columns of the inputs")
        })?;
        let inputs = inputs.leading(rows);
        let gate = gate.leading_mut(rows);
        self.rowwise(NAME, (rows, 4 * columns), gate, |range, gate| GateColumns {
            gate,
            columns,
            activation,
            inputs: &inputs[range.start * stride..range.end * stride],
            stride,
            first,
        })
    }

    fn multiply(
        &mut self,
        x: &CpuTensor,
        weight: &CpuVector,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        let (columns, weight) = (x.columns(), weight.values());
        require_shape("multiply", "x", x, (rows, columns))?;
        require_shape("multiply", "the result", out, (rows, columns))?;
        require(weight.len() == columns, "multiply", || {
            format!("there are {} factors for {columns} columns", weight.len())
        })?;
        for row in 0..rows {
            let factors = x.row(row).iter().zip(weight);
            let out = out.row_mut(row).iter_mut();
            out.zip(factors).for_each(|(out, (x, w))| *out = x * w);
        }
        Ok(())
    }

    fn match_magnitude(
        &mut self,
        x: &mut CpuTensor,
        like: &CpuTensor,
        floor: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let columns = x.columns();
        require_shape("match_magnitude", "x", x, (rows, columns))?;
        require_shape("match_magnitude", "the other", like, (rows, columns))?;
        for row in 0..rows {
            let own = mean(x.row(row), |x| x * x).max(f64::from(floor));
            let factor = (mean(like.row(row), |x| x * x) / own).sqrt() as f32;
            x.row_mut(row).iter_mut().for_each(|x| *x *= factor);
        }
        Ok(())
    }

    fn mix_streams(
        &mut self,
        streams: &[CpuTensor],
        routed: &CpuTensor,
        weight: &CpuVector,
        rows: usize,
        out: &mut [CpuTensor],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "mix_streams";
        let count = streams.len();
        let columns = streams.first().map_or(0, CpuTensor::columns);
        require(out.len() == count, NAME, || {
            format!("there are {count} streams and {} results", out.len())
        })?;
        require_shape(NAME, "what is routed", routed, (rows, count))?;
        let weight = require_factors(NAME, weight, count * count, count)?;
        for stream in streams.iter().chain(&*out) {
            require_shape(NAME, "a stream", stream, (rows, columns))?;
        }
        for (i, out) in out.iter_mut().enumerate() {
            let out = Disjoint::new(out.leading_mut(rows));
            self.workers.run(NAME, rows, 4, |range| {
                for row in range {
                    // SAFETY: each row belongs to one item.
                    let out = unsafe { out.range(row * columns, columns) };
                    out.copy_from_slice(streams[i].row(row));
                    let weights = weight[i * count * count..].chunks_exact(count);
                    let factors = weights.map(|weights| dot(weights, routed.row(row)));
                    for (stream, factor) in streams.iter().zip(factors) {
                        let stream = stream.row(row).iter();
                        out.iter_mut()
                            .zip(stream)
                            .for_each(|(a, x)| *a += factor * x);
                    }
                }
            })?;
        }
        Ok(())
    }

    fn correct_streams(
        &mut self,
        updated: &CpuTensor,
        (routed, weight): (&CpuTensor, &CpuVector),
        active: usize,
        rows: usize,
        streams: &mut [CpuTensor],
    ) -> Result<(), DeviceError> {
        const NAME: &str = "correct_streams";
        let (count, columns) = (streams.len(), updated.columns());
        require(active < count, NAME, || {
            format!("there is no stream {active}: there are {count}")
        })?;
        require_shape(NAME, "what is routed", routed, (rows, count))?;
        let weight = require_factors(NAME, weight, count, count)?;
        let factor_of = |row: usize, stream: usize| {
            1.0 + dot(&weight[stream * count..][..count], routed.row(row))
        };
        require_shape(NAME, "the update", updated, (rows, columns))?;
        for stream in &*streams {
            require_shape(NAME, "a stream", stream, (rows, columns))?;
        }
        let (before, rest) = streams.split_at_mut(active);
        let Some((active_stream, after)) = rest.split_first_mut() else {
            return Ok(());
        };
        let others = before.iter_mut().enumerate();
        let others = others.chain(
            after
                .iter_mut()
                .enumerate()
                .map(|(at, own)| (active + 1 + at, own)),
        );
        for (stream, own) in others {
            let own = Disjoint::new(own.leading_mut(rows));
            self.workers.run(NAME, rows, 4, |range| {
                for row in range {
                    // SAFETY: each row belongs to one item.
                    let own = unsafe { own.range(row * columns, columns) };
                    let factor = factor_of(row, stream);
                    let pairs = updated.row(row).iter().zip(active_stream.row(row));
                    for (own, (updated, before)) in own.iter_mut().zip(pairs) {
                        *own += factor * (updated - before);
                    }
                }
            })?;
        }
        // It is changed last, because the others need what it was.
        let own = Disjoint::new(active_stream.leading_mut(rows));
        self.workers.run(NAME, rows, 4, |range| {
            for row in range {
                // SAFETY: each row belongs to one item.
                let own = unsafe { own.range(row * columns, columns) };
                let factor = factor_of(row, active);
                for (own, updated) in own.iter_mut().zip(updated.row(row)) {
                    *own += factor * (updated - *own);
                }
            }
        })
    }

    fn cut_gate(
        &mut self,
        gate_up: &mut CpuTensor,
        deviations: f32,
        rows: usize,
    ) -> Result<(), DeviceError> {
        let columns = gate_up.columns();
        require_shape("cut_gate", "gate and up", gate_up, (rows, columns))?;
        let out = Disjoint::new(gate_up.leading_mut(rows));
        self.workers.run("cut_gate", rows, 1, |range| {
            for row in range {
                // SAFETY: each row belongs to one item.
                let gate = unsafe { out.range(row * columns, columns / 2) };
                let centre = mean(gate, |x| x);
                let variance = mean(gate, |x| (x - centre) * (x - centre));
                let cut = (centre + f64::from(deviations) * variance.sqrt()) as f32;
                // NaN stays NaN, so that it is noticed.
                let cut_off = |x: f32| if x - cut < 0.0 { 0.0 } else { x - cut };
                gate.iter_mut().for_each(|x| *x = cut_off(*x));
            }
        })
    }
}

/// Returns the numbers of a matrix of `rows` × `columns` factors.
fn require_factors<'a>(
    operation: &'static str,
    weight: &'a CpuVector,
    rows: usize,
    columns: usize,
) -> Result<&'a [f32], DeviceError> {
    let weight = weight.values();
    require(weight.len() == rows * columns, operation, || {
        format!(
            "there are {} weights for {rows} factors of {columns} streams",
            weight.len()
        )
    })?;
    Ok(weight)
}

/// Returns the sum of the products, in the order of the elements.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Returns the mean of `of` over the elements.
fn mean(x: &[f32], of: impl Fn(f64) -> f64) -> f64 {
    let sum: f64 = x.iter().map(|&x| of(f64::from(x))).sum();
    sum / x.len().max(1) as f64
}

/// `x *= factor`, element by element.
struct Scale<'a> {
    x: &'a mut [f32],
    factor: f32,
}

impl Kernel for Scale<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for (at, count) in vectors(self.x.len()) {
            // SAFETY: `vectors` stays inside the slice.
            unsafe {
                let x = load(s, self.x.as_ptr().add(at), count);
                store(s, self.x.as_mut_ptr().add(at), s.mul(x, factor), count);
            }
        }
    }
}

/// `gate = activation(gate) · inputs` for rows of `columns` columns.
struct GateColumns<'a> {
    gate: &'a mut [f32],
    columns: usize,
    activation: Activation,
    /// Rows of `stride` columns, which count from `first`.
    inputs: &'a [f32],
    stride: usize,
    first: usize,
}

impl Kernel for GateColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let inputs = self.inputs.chunks_exact(self.stride);
        for (gate, inputs) in self.gate.chunks_exact_mut(self.columns).zip(inputs) {
            let inputs = &inputs[self.first..][..self.columns];
            for (at, count) in vectors(self.columns) {
                // SAFETY: `vectors` stays inside the two rows, which have `columns` elements.
                unsafe {
                    let x = load(s, gate.as_ptr().add(at), count);
                    let input = load(s, inputs.as_ptr().add(at), count);
                    let gated = activate(s, self.activation, x, input);
                    store(s, gate.as_mut_ptr().add(at), gated, count);
                }
            }
        }
    }
}
