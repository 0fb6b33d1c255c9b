//! Uploads weight matrices: floating-point weights in the activation type, block formats as
//! records (`pack`).
//!
//! Weights are converted on several threads, one slab of rows at a time, so that loading takes
//! little memory in addition to the stored weights.

use super::context::Context;
use super::error::{DEVICE, failed, require_ok, unsupported};
use super::memory::Buffer;
use super::options::CudaActivations;
use super::pack::{Packer, RECORD_OUTPUTS, stored_row};
use super::weights::{CudaLinear, Kind, Segment};
use crate::device::{DeviceError, LinearSpec, WeightRows};
use crate::weights::{DType, quant};
use half::{bf16, f16};
use std::ops::Range;

/// Approximate number of bytes that are converted and then uploaded at once.
const SLAB: usize = 16 << 20;

/// The largest finite float16.
const LARGEST_F16: f32 = 65504.0;

/// Loads matrices of the same shape as one stack: the experts of a layer, or a single matrix.
pub(super) fn load(
    context: &Context,
    activations: CudaActivations,
    specs: &[LinearSpec<'_>],
) -> Result<CudaLinear, DeviceError> {
    let Some(first) = specs.first() else {
        return Err(failed("load_linear", "there are no weights"));
    };
    let inputs = first.parts.first().map_or(0, |part| part.columns);
    if inputs == 0 || !inputs.is_multiple_of(8) {
        return Err(unsupported(
            format!("a linear layer with {inputs} inputs"),
            "the number of inputs must be a multiple of 8",
        ));
    }
    for spec in specs {
        for part in &spec.parts {
            require_ok("load_linear", part.check(inputs))?;
        }
        if segments_of(spec) != segments_of(first) {
            return Err(unsupported(
                "experts that are stored differently",
                "all experts of a layer must have the same shapes and formats",
            ));
        }
        if specs.len() > 1 && spec.bias.is_some() {
            return Err(unsupported(
                "a bias in an expert",
                "experts must not have one",
            ));
        }
    }
    let outputs = first.parts.iter().map(|part| part.rows).sum::<usize>();
    if u32::try_from(outputs).is_err() || u32::try_from(inputs).is_err() {
        return Err(unsupported(
            format!("{outputs} × {inputs} weights"),
            "outputs and inputs must each be fewer than 2³²",
        ));
    }
    let bias = match &first.bias {
        Some(bias) if bias.len() != outputs => {
            let reason = format!("a bias has {} values for {outputs} rows", bias.len());
            return Err(failed("load_linear", reason));
        }
        Some(bias) => Some(context.upload(bias, "a bias")?),
        None => None,
    };
    let mut segments = Vec::new();
    let (mut first_output, mut first_part) = (0, 0);
    for (kind, rows, parts) in segments_of(first) {
        let stack = Stack {
            parts: specs
                .iter()
                .map(|spec| &spec.parts[first_part..first_part + parts])
                .collect(),
            rows,
            inputs,
        };
        segments.push(Segment {
            first_output,
            outputs: rows,
            kind,
            weights: stack.upload(context, activations, kind)?,
        });
        first_output += rows;
        first_part += parts;
    }
    Ok(CudaLinear {
        segments,
        outputs,
        inputs,
        matrices: specs.len(),
        bias,
    })
}

/// Groups adjacent parts that one kernel can multiply. Returns the kind, the total number of
/// rows and the number of parts of each group.
fn segments_of(spec: &LinearSpec<'_>) -> Vec<(Kind, usize, usize)> {
    let alike = |a: &WeightRows<'_>, b: &WeightRows<'_>| Kind::of(a.dtype) == Kind::of(b.dtype);
    let segments = spec.parts.chunk_by(alike).map(|parts| {
        let rows = parts.iter().map(|part| part.rows).sum();
        (Kind::of(parts[0].dtype), rows, parts.len())
    });
    segments.collect()
}

/// The same segment of every matrix in a stack.
struct Stack<'a> {
    parts: Vec<&'a [WeightRows<'a>]>,
    rows: usize,
    inputs: usize,
}

impl Stack<'_> {
    /// Converts and uploads all rows, matrix after matrix.
    fn upload(
        &self,
        context: &Context,
        activations: CudaActivations,
        kind: Kind,
    ) -> Result<Buffer, DeviceError> {
        // A unit: rows that are converted together, and the bytes that they become.
        let (unit_rows, unit_bytes) = match kind {
            Kind::Dense => (1, self.inputs * 2),
            Kind::Quantised(format, _) => (RECORD_OUTPUTS, format.records_bytes(self.inputs)),
        };
        let units_each = self.rows.div_ceil(unit_rows);
        let units = units_each * self.parts.len();
        let bytes = units
            .checked_mul(unit_bytes)
            .ok_or_else(|| DeviceError::OutOfMemory {
                device: DEVICE,
                bytes: usize::MAX,
                what: "weights".to_owned(),
            })?;
        let buffer = context.allocate(bytes, "weights")?;
        let rows_of = |unit: usize| {
            let first = unit % units_each * unit_rows;
            let rows = first..self.rows.min(first + unit_rows);
            rows.map(move |row| self.row(unit / units_each, row))
        };
        let convert = |range: Range<usize>, out: &mut [u8]| -> Result<(), DeviceError> {
            let out = out.chunks_exact_mut(unit_bytes);
            match kind {
                Kind::Dense => {
                    let mut floats = vec![0.0; self.inputs];
                    for (unit, out) in range.zip(out) {
                        for (dtype, stored) in rows_of(unit) {
                            to_activations(dtype, stored, activations, &mut floats, out);
                        }
                    }
                }
                Kind::Quantised(_, dtype) => {
                    let largest = match activations {
                        CudaActivations::F16 => LARGEST_F16,
                        CudaActivations::Bf16 => f32::MAX,
                    };
                    let mut packer = Packer::new(dtype, self.inputs, largest)?;
                    for (unit, out) in range.zip(out) {
                        for (output, (_, stored)) in rows_of(unit).enumerate() {
                            packer.put(out, output, stored)?;
                        }
                    }
                }
            }
            Ok(())
        };
        let slab_units = (SLAB / unit_bytes).clamp(1, units.max(1));
        let mut slab = vec![0u8; slab_units * unit_bytes];
        for first in (0..units).step_by(slab_units) {
            let range = first..units.min(first + slab_units);
            let slab = &mut slab[..range.len() * unit_bytes];
            slab.fill(0);
            in_parallel(range, unit_bytes, slab, &convert)?;
            context.write(&buffer, first * unit_bytes, slab)?;
        }
        Ok(buffer)
    }

    /// Returns row `row` of matrix `matrix` as stored, with its type.
    fn row(&self, matrix: usize, mut row: usize) -> (DType, &[u8]) {
        let parts = self.parts[matrix];
        let mut part = &parts[0];
        for candidate in parts {
            part = candidate;
            if row < candidate.rows {
                break;
            }
            row -= candidate.rows;
        }
        (part.dtype, stored_row(part, row))
    }
}

type Convert<'a> = dyn Fn(Range<usize>, &mut [u8]) -> Result<(), DeviceError> + Sync + 'a;

/// Converts `units` on all available processors, or on this thread if there is little to do.
fn in_parallel(
    units: Range<usize>,
    unit_bytes: usize,
    out: &mut [u8],
    convert: &Convert<'_>,
) -> Result<(), DeviceError> {
    const SMALL: usize = 1 << 16;
    // Asking the system for its processors takes longer than converting a small tensor.
    let processors = || std::thread::available_parallelism().map_or(1, |count| count.get());
    let threads = if out.len() <= SMALL { 1 } else { processors() };
    if threads == 1 {
        return convert(units, out);
    }
    let share = units.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let mut running = Vec::new();
        for (index, out) in out.chunks_mut(share * unit_bytes).enumerate() {
            let first = units.start + index * share;
            let range = first..first + out.len() / unit_bytes;
            running.push(scope.spawn(move || convert(range, out)));
        }
        for thread in running {
            let outcome = thread.join();
            outcome
                .map_err(|_| failed("load_linear", "a thread that converts weights panicked"))??;
        }
        Ok(())
    })
}

/// Converts a row of floating-point weights to the activation type.
fn to_activations(
    dtype: DType,
    stored: &[u8],
    activations: CudaActivations,
    floats: &mut [f32],
    out: &mut [u8],
) {
    match (dtype, activations) {
        (DType::BF16, CudaActivations::Bf16) | (DType::F16, CudaActivations::F16) => {
            out.copy_from_slice(stored);
            return;
        }
        _ => quant::dequantize(dtype, stored, floats),
    }
    for (out, &weight) in out.chunks_exact_mut(2).zip(&*floats) {
        let bytes = match activations {
            CudaActivations::Bf16 => bf16::from_f32(weight).to_le_bytes(),
            // Saturate as the kernels do. `clamp` keeps NaN.
            CudaActivations::F16 => {
                f16::from_f32(weight.clamp(-LARGEST_F16, LARGEST_F16)).to_le_bytes()
            }
        };
        out.copy_from_slice(&bytes);
    }
}
