//! Linear layers: loading, and the choice of the kernel that multiplies.

use super::CpuDevice;
use super::float::{DequantisedTiles, FloatTiles, TILES};
use super::integer::IntegerTiles;
use super::memory::{Arena, Disjoint};
use super::options::Activations;
use super::packed::{Format, Packed};
use super::product::Operands;
use super::quantise::Quantised;
use super::simd::Isa;
use super::tensor::{CpuTensor, require_shape};
use super::workers::Workers;
use crate::device::{DeviceError, LinearOps, LinearSpec};
use std::ops::Range;

/// A linear layer whose weights have been packed for the CPU.
pub struct CpuLinear {
    parts: Vec<Packed>,
    rows: usize,
    columns: usize,
    bias: Option<Vec<f32>>,
}

impl CpuLinear {
    /// Returns the number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the number of inputs.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the number of bytes that the weights and the bias take.
    pub fn bytes(&self) -> usize {
        let bias = self
            .bias
            .as_ref()
            .map_or(0, |bias| bias.len() * size_of::<f32>());
        self.parts.iter().map(Packed::bytes).sum::<usize>() + bias
    }

    fn load(
        workers: &mut Workers,
        arena: &mut Arena,
        spec: &LinearSpec<'_>,
    ) -> Result<Self, DeviceError> {
        let columns = spec.parts.first().map_or(0, |part| part.columns);
        for part in &spec.parts {
            part.check(columns).map_err(invalid)?;
        }
        let rows = spec.parts.iter().map(|part| part.rows).sum::<usize>();
        if let Some(bias) = &spec.bias
            && bias.len() != rows
        {
            return Err(invalid(format!(
                "a bias has {} values for {rows} rows",
                bias.len()
            )));
        }
        let mut parts = Vec::new();
        let mut first_output = 0;
        // Adjacent parts of the same format are packed as one, so that only its last tile is
        // padded.
        for same in spec.parts.chunk_by(|a, b| a.dtype == b.dtype) {
            parts.push(Packed::new(workers, arena, same, first_output)?);
            first_output += same.iter().map(|part| part.rows).sum::<usize>();
        }
        Ok(Self {
            parts,
            rows,
            columns,
            bias: spec.bias.clone(),
        })
    }

    /// Writes row `row` of the weights to `out` in float32, without the bias.
    pub(crate) fn read_row(&self, row: usize, out: &mut [f32]) {
        let holds =
            |part: &&Packed| (part.first_output..part.first_output + part.rows).contains(&row);
        if let Some(part) = self.parts.iter().find(holds) {
            part.read_row(row - part.first_output, out);
        }
    }
}

fn invalid(reason: String) -> DeviceError {
    DeviceError::Failed {
        device: "cpu",
        operation: "load_linear",
        reason,
    }
}

impl LinearOps for CpuDevice {
    fn load_linear(&mut self, spec: &LinearSpec<'_>) -> Result<CpuLinear, DeviceError> {
        let linear = CpuLinear::load(&mut self.workers, &mut self.weights, spec)?;
        self.weight_bytes += linear.bytes();
        Ok(linear)
    }

    fn linear(
        &mut self,
        x: &CpuTensor,
        weight: &CpuLinear,
        rows: usize,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        require_shape("linear", "x", x, (rows, weight.columns()))?;
        require_shape("linear", "the result", out, (rows, weight.rows()))?;
        let (x, out) = (x.leading(rows), out.leading_mut(rows));
        self.multiplier
            .multiply(&mut self.workers, x, weight, rows, out)
    }
}

/// State that is shared by all multiplications.
pub(crate) struct Multiplier {
    pub(crate) isa: Isa,
    pub(crate) activations: Activations,
    quantised: Quantised,
}

impl Multiplier {
    pub(crate) fn new(isa: Isa, activations: Activations) -> Self {
        Self {
            isa,
            activations,
            quantised: Quantised::default(),
        }
    }

    /// Computes `out = W x + b` for `rows` rows. `x` and `out` must have exactly `rows` rows.
    pub(crate) fn multiply(
        &mut self,
        workers: &mut Workers,
        x: &[f32],
        weight: &CpuLinear,
        rows: usize,
        out: &mut [f32],
    ) -> Result<(), DeviceError> {
        let integer = self.activations != Activations::F32;
        let layouts = weight.parts.iter().filter_map(|part| match part.format {
            Format::Quantised(layout) => Some(layout),
            Format::Float(_) => None,
        });
        if integer && layouts.clone().next().is_some() {
            let shape = (rows, weight.columns);
            self.quantised.fill(workers, self.isa, x, shape, layouts)?;
        }
        let operands = Operands {
            x,
            rows,
            out: Disjoint::new(out),
            outputs: weight.rows,
            bias: weight.bias.as_deref(),
        };
        let (isa, quantised, operands) = (self.isa, &self.quantised, &operands);
        let multiply_part = |part: &Packed, tiles: Range<usize>| match part.format {
            Format::Float(float) => isa.dispatch(FloatTiles {
                part,
                float,
                tiles,
                operands,
            }),
            Format::Quantised(layout) if integer => {
                isa.dispatch(IntegerTiles {
                    part,
                    layout,
                    tiles,
                    x: quantised,
                    operands,
                });
            }
            Format::Quantised(layout) => {
                DequantisedTiles {
                    part,
                    layout,
                    tiles,
                    operands,
                }
                .dispatch(isa);
            }
        };
        let tiles = weight.parts.iter().map(Packed::tiles).sum::<usize>();
        // Several claims per thread balance the load when other programs slow down some
        // threads.
        let grain = (tiles / (workers.count() * 4))
            .next_multiple_of(TILES)
            .max(1);
        workers.run("linear", tiles, grain, |range| {
            let mut first = 0;
            for part in &weight.parts {
                let end = first + part.tiles();
                let (from, to) = (range.start.max(first), range.end.min(end));
                if from < to {
                    multiply_part(part, from - first..to - first);
                }
                first = end;
            }
        })
    }
}
