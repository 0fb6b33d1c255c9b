//! Recurrent layers: the memory for their states, and causal convolutions.

use super::CpuDevice;
use super::cache::CpuCache;
use super::error::{require, require_ok};
use super::memory::{Buffer, Disjoint};
use super::norm::CpuVector;
use super::simd::{Kernel, LANES, Simd};
use super::tensor::{CpuTensor, require_shape};
use crate::device::{
    BatchState, ConvInput, ConvSpec, DeviceError, RecurrentOps, StatePart, StateShape,
};
use std::ops::Range;

impl RecurrentOps for CpuDevice {
    fn allocate_states(
        &mut self,
        cache: &mut CpuCache,
        shape: &StateShape,
    ) -> Result<(), DeviceError> {
        let elements = shape.slots.saturating_mul(shape.elements);
        let states = Buffer::zeroed(elements, "the states of recurrent layers")?;
        cache.states = Some((*shape, states));
        Ok(())
    }

    fn poison_states(&mut self, cache: &mut CpuCache, slots: &[u32]) -> Result<(), DeviceError> {
        let (shape, states) = require_states("poison_states", &mut cache.states)?;
        for &slot in slots {
            let exists = (slot as usize) < shape.slots;
            require(exists, "poison_states", || out_of_range(slot, &shape))?;
            let start = slot as usize * shape.elements;
            states[start..start + shape.elements].fill(f32::NAN);
        }
        Ok(())
    }

    fn short_conv(
        &mut self,
        input: &CpuTensor,
        spec: &ConvSpec,
        (weight, bias): (&CpuVector, Option<&CpuVector>),
        cache: &mut CpuCache,
        part: StatePart,
        out: &mut CpuTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "short_conv";
        let (rows, channels) = (self.staged.rows(), spec.channels);
        let columns = match spec.input {
            ConvInput::Columns(first) => first + channels,
            ConvInput::Gated => 3 * channels,
        };
        require(input.columns() >= columns, NAME, || {
            let has = input.columns();
            format!("the input has {has} columns, but {columns} are needed")
        })?;
        require_shape(NAME, "the input", input, (rows, input.columns()))?;
        require_shape(NAME, "the result", out, (rows, channels))?;
        let fits = channels.is_multiple_of(LANES)
            && ConvSpec::TAPS.contains(&spec.taps)
            && weight.values().len() == spec.taps * channels
            && bias.is_none_or(|bias| bias.values().len() == channels)
            && part.elements == spec.state_elements();
        require(fits, NAME, || format!("{spec:?} does not fit its operands"))?;
        let (isa, stride) = (self.multiplier.isa, input.columns());
        let input = input.leading(rows);
        let out = Disjoint::new(out.leading_mut(rows));
        let pieces = channels / LANES;
        self.over_states(NAME, cache, part, pieces, |piece, rows, state| {
            let first = piece * LANES;
            isa.dispatch(Conv {
                input: &input[rows.start * stride..rows.end * stride],
                stride,
                spec,
                first,
                weight: weight.values(),
                bias: bias.map(CpuVector::values),
                state,
                out: out.pointer(
                    rows.start * channels + first,
                    (rows.len() - 1) * channels + LANES,
                ),
            });
        })
    }
}

/// Largest number of taps of a convolution.
const MOST_TAPS: usize = *ConvSpec::TAPS.end();

/// Returns the memory for states.
fn require_states<'a>(
    operation: &'static str,
    states: &'a mut Option<(StateShape, Buffer<f32>)>,
) -> Result<(StateShape, &'a mut [f32]), DeviceError> {
    match states {
        Some((shape, states)) => Ok((*shape, states)),
        None => Err(DeviceError::Failed {
            device: "cpu",
            operation,
            reason: "the cache has no memory for states".to_owned(),
        }),
    }
}

fn out_of_range(slot: u32, shape: &StateShape) -> String {
    let slots = shape.slots;
    format!("slot {slot} is out of range: there are {slots} slots")
}

impl CpuDevice {
    /// Calls `compute(piece, rows, state)` on all threads for each sequence of the step and for
    /// each of `pieces` pieces of equal size of a layer's part of its state. `rows` are rows of
    /// the step, of which there is at least one. `state` is the piece of the state before them
    /// and becomes that after them. If a state is kept within the step, there is one call for the
    /// rows before it and one for those after it.
    pub(super) fn over_states(
        &mut self,
        operation: &'static str,
        cache: &mut CpuCache,
        part: StatePart,
        pieces: usize,
        compute: impl Fn(usize, Range<usize>, &mut [f32]) + Sync,
    ) -> Result<(), DeviceError> {
        let (shape, states) = require_states(operation, &mut cache.states)?;
        let (sequences, slots) = (&self.staged.sequences, &self.staged.states);
        require(slots.len() == sequences.len(), operation, || {
            format!("{} sequences have {} states", sequences.len(), slots.len())
        })?;
        let fits = pieces > 0
            && part.elements.is_multiple_of(pieces)
            && part.offset + part.elements <= shape.elements;
        require(fits, operation, || {
            format!("{part:?} in {pieces} pieces does not fit {shape:?}")
        })?;
        let used = slots.iter().flat_map(BatchState::slots);
        require_ok(
            operation,
            used.filter(|slot| *slot as usize >= shape.slots)
                .map(|slot| Err(out_of_range(slot, &shape)))
                .next()
                .unwrap_or(Ok(())),
        )?;
        let elements = part.elements / pieces;
        let states = Disjoint::new(states);
        let at = |slot: u32, piece: usize| {
            slot as usize * shape.elements + part.offset + piece * elements
        };
        let items = sequences.len() * pieces;
        self.workers.run(operation, items, 1, |range| {
            for item in range {
                let (index, piece) = (item / pieces, item % pieces);
                let (rows, slot) = (sequences[index].rows.clone(), slots[index]);
                if rows.is_empty() {
                    continue;
                }
                // SAFETY: each item has a piece and a sequence of its own. `check_states` has made
                // sure that no two sequences write a slot, and that none writes a slot that
                // another one reads.
                let state = unsafe { states.range(at(slot.after, piece), elements) };
                match slot.before {
                    None => state.fill(0.0),
                    Some(before) if before == slot.after => {}
                    Some(before) => {
                        let before = states.pointer(at(before, piece), elements);
                        // SAFETY: no item writes this slot, as above, and it is another one than
                        // `state` is in.
                        state.copy_from_slice(unsafe {
                            std::slice::from_raw_parts(before, elements)
                        });
                    }
                }
                let mut next = rows.start;
                if let Some(snapshot) = slot.snapshot {
                    next += snapshot.rows;
                    compute(piece, rows.start..next, state);
                    // SAFETY: as for `state`; the slots differ.
                    let kept = unsafe { states.range(at(snapshot.slot, piece), elements) };
                    kept.copy_from_slice(state);
                }
                if next < rows.end {
                    compute(piece, next..rows.end, state);
                }
            }
        })
    }
}

/// The convolution of sixteen channels of consecutive rows. The state has the inputs of the
/// last tokens, the oldest first.
struct Conv<'a> {
    input: &'a [f32],
    /// Columns of the input.
    stride: usize,
    spec: &'a ConvSpec,
    /// First of the channels.
    first: usize,
    weight: &'a [f32],
    bias: Option<&'a [f32]>,
    state: &'a mut [f32],
    /// The first row's results of these channels. The rows are `spec.channels` elements apart.
    out: *mut f32,
}

impl Kernel for Conv<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (channels, taps, first) = (self.spec.channels, self.spec.taps, self.first);
        let zero = s.splat(0.0);
        // The inputs that take part in a row's result, the oldest first.
        let mut window = [zero; MOST_TAPS];
        let mut weights = [zero; MOST_TAPS];
        // SAFETY: the operands have the sizes that `short_conv` checks, and `first` is the first
        // of sixteen channels.
        unsafe {
            for (tap, weight) in weights[..taps].iter_mut().enumerate() {
                *weight = s.load(self.weight.as_ptr().add(tap * channels + first));
            }
            for (tap, input) in window[1..taps].iter_mut().enumerate() {
                *input = s.load(self.state.as_ptr().add(tap * LANES));
            }
            let bias = match self.bias {
                Some(bias) => s.load(bias.as_ptr().add(first)),
                None => zero,
            };
            for (row, input) in self.input.chunks_exact(self.stride).enumerate() {
                window.copy_within(1..taps, 0);
                let input = input.as_ptr();
                window[taps - 1] = match self.spec.input {
                    ConvInput::Columns(column) => s.load(input.add(column + first)),
                    ConvInput::Gated => {
                        let b = s.load(input.add(first));
                        s.mul(b, s.load(input.add(2 * channels + first)))
                    }
                };
                let mut sum = bias;
                for (weight, input) in weights[..taps].iter().zip(&window) {
                    sum = s.fma(*weight, *input, sum);
                }
                if self.spec.silu {
                    sum = super::activation::silu(s, sum);
                }
                if self.spec.input == ConvInput::Gated {
                    sum = s.mul(sum, s.load(input.add(channels + first)));
                }
                s.store(self.out.add(row * channels), sum);
            }
            for (tap, input) in window[1..taps].iter().enumerate() {
                s.store(self.state.as_mut_ptr().add(tap * LANES), *input);
            }
        }
    }
}
