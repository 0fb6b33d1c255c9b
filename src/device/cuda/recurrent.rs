//! Recurrent layers: the memory for their states, and causal convolutions.

use super::CudaDevice;
use super::cache::{CudaCache, States};
use super::error::{failed, require, require_ok, unsupported};
use super::launch::{Grid, kernels};
use super::memory::Ptr;
use super::norm::CudaVector;
use super::step::Bounds;
use super::tensor::{CudaTensor, require_shape};
use crate::device::blocks::check_blocks;
use crate::device::{
    ConvInput, ConvSpec, DeviceError, Precision, RecurrentOps, SNAPSHOT_TOKENS, StatePart,
    StateShape,
};

kernels! {
    /// Kernels of `kernels/recurrent.cu`.
    pub(super) struct RecurrentKernels in "recurrent" {
        short_conv(
            out: Ptr, input: Ptr, weight: Ptr, bias: Ptr, states: Ptr, sequences: Ptr,
            slot_elements: u32, stride: u32, column: u32, channels: u32, taps: u32, gated: u32,
            silu: u32
        );
        gated_delta(
            out: Ptr, qkv: Ptr, gates: Ptr, decay: Ptr, bias: Ptr, states: Ptr, sequences: Ptr,
            query_scale: f32, slot_elements: u32, key_heads: u32, value_heads: u32, key_dim: u32,
            value_dim: u32, tiled: u32
        );
        gated_delta_token(
            out: Ptr, qkv: Ptr, gates: Ptr, decay: Ptr, bias: Ptr, states: Ptr, sequences: Ptr,
            query_scale: f32, slot_elements: u32, key_heads: u32, value_heads: u32, key_dim: u32,
            value_dim: u32, tiled: u32
        );
        mamba2(
            out: Ptr, projected: Ptr, convolved: Ptr, rates: Ptr, skips: Ptr, step_biases: Ptr,
            states: Ptr, sequences: Ptr, least: f32, most: f32, slot_elements: u32, heads: u32,
            head_dim: u32, state_size: u32, groups: u32
        );
        mamba2_token(
            out: Ptr, projected: Ptr, convolved: Ptr, rates: Ptr, skips: Ptr, step_biases: Ptr,
            states: Ptr, sequences: Ptr, least: f32, most: f32, slot_elements: u32, heads: u32,
            head_dim: u32, state_size: u32, groups: u32
        );
        gated_rms_norm(
            x: Ptr, gates: Ptr, weight: Ptr, epsilon: f32, columns: u32, width: u32, stride: u32
        );
        gated_norm(
            x: Ptr, gates: Ptr, weight: Ptr, epsilon: f32, width: u32, stride: u32
        );
    }
}

/// Columns of a recurrence that a warp computes.
pub(super) const WARP_COLUMNS: usize = 16;
/// Warps per block of a recurrence, all of which compute the same head.
const WARPS: usize = 4;
/// Columns of a head that a block computes.
const BLOCK_COLUMNS: usize = WARP_COLUMNS * WARPS;
/// Tokens after which the matrix of a recurrence is advanced, counted from the first one.
const INTERVAL: usize = SNAPSHOT_TOKENS;
/// Largest number of keys of a recurrence: what the lanes of a warp have registers for.
pub(super) const MOST_KEYS: usize = 128;

/// Returns the number of elements that heads of `columns` columns with this many keys each keep:
/// a matrix of keys and columns, what each token of an interval adds to each column, and for
/// each block the keys of these tokens, of 16 bits, and products of their decays. See
/// `kernels/recurrence.cuh`.
pub(super) fn recurrence_elements(heads: usize, columns: usize, keys: usize) -> usize {
    let blocks = columns.div_ceil(BLOCK_COLUMNS);
    let of_block = INTERVAL / 2 * keys + INTERVAL;
    heads * (columns * (keys + INTERVAL) + blocks * of_block)
}

/// Returns the grid of a recurrence with heads of `columns` columns.
pub(super) fn recurrence_grid(heads: usize, columns: usize, sequences: usize) -> Grid {
    let blocks = heads * columns.div_ceil(BLOCK_COLUMNS);
    let threads = 32 * WARPS as u32;
    Grid::new([blocks as u32, sequences as u32, 1], [threads, 1, 1])
}

/// The part of the states that an operation reads and writes.
#[derive(Clone, Copy)]
pub(super) struct PartOfStates {
    /// Address of the part in the first slot.
    pub(super) start: Ptr,
    /// Number of elements from a slot to the next.
    pub(super) slot_elements: u32,
}

impl CudaDevice {
    /// Returns where an operation that needs `elements` numbers of a state finds them, after
    /// checking that the step and its replays use only slots that exist.
    pub(super) fn part_of_states(
        &mut self,
        operation: &'static str,
        cache: &CudaCache,
        part: StatePart,
        elements: usize,
    ) -> Result<PartOfStates, DeviceError> {
        let States { shape, buffer } = require_states(operation, cache)?;
        let fits = part.elements == elements
            && part.offset.is_multiple_of(4)
            && part.offset.saturating_add(part.elements) <= shape.elements;
        require(fits, operation, || {
            format!("{part:?} with {elements} elements does not fit {shape:?}")
        })?;
        let bounds = Bounds {
            states: shape.slots,
            ..Bounds::UNLIMITED
        };
        self.step.require_within(bounds, operation)?;
        self.graphs.limit(bounds);
        Ok(PartOfStates {
            start: buffer.ptr().offset_bytes(part.offset * size_of::<f32>()),
            slot_elements: shape.elements as u32,
        })
    }
}

fn require_states<'a>(
    operation: &'static str,
    cache: &'a CudaCache,
) -> Result<&'a States, DeviceError> {
    let none = || failed(operation, "the cache has no memory for states");
    cache.states.as_ref().ok_or_else(none)
}

/// Threads per block of the convolution, each of which has eight channels.
const CONV_THREADS: usize = 128;
/// Blocks that a convolution is spread over at most, unless there are more sequences and channels
/// than that.
const CONV_BLOCKS: usize = 2048;

impl RecurrentOps for CudaDevice {
    fn allocate_states(
        &mut self,
        cache: &mut CudaCache,
        shape: &StateShape,
    ) -> Result<(), DeviceError> {
        let countable = shape.elements.is_multiple_of(4)
            && u32::try_from(shape.elements).is_ok()
            && u32::try_from(shape.slots).is_ok();
        if !countable {
            return Err(unsupported(
                format!("memory for states of {shape:?}"),
                "a slot must have a multiple of 4 elements, and fewer than 2³²",
            ));
        }
        let bytes = self.state_bytes(shape);
        let buffer = self
            .context
            .allocate_zeroed(bytes, "the states of recurrent layers")?;
        let shape = *shape;
        cache.states = Some(States { shape, buffer });
        Ok(())
    }

    fn poison_states(&mut self, cache: &mut CudaCache, slots: &[u32]) -> Result<(), DeviceError> {
        const NAME: &str = "poison_states";
        let States { shape, buffer } = require_states(NAME, cache)?;
        require_ok(NAME, check_blocks(slots.iter().copied(), shape.slots))?;
        self.context.refuse_in_capture(NAME)?;
        if slots.is_empty() {
            return Ok(());
        }
        let list = self.lists.write(&self.context, slots)?;
        // A slot is filled like a block of a cache with a single array.
        let grid = Grid::new([slots.len() as u32, 1, 1], [256, 1, 1]);
        let (count, vectors) = (shape.slots as u32, shape.elements as u32 / 4);
        let (context, array) = (&self.context, buffer.ptr());
        self.cache
            .poison_blocks(context, grid, array, list, count, vectors)
    }

    fn short_conv(
        &mut self,
        input: &CudaTensor,
        spec: &ConvSpec,
        (weight, bias): (&CudaVector, Option<&CudaVector>),
        cache: &mut CudaCache,
        part: StatePart,
        out: &mut CudaTensor,
    ) -> Result<(), DeviceError> {
        const NAME: &str = "short_conv";
        let (rows, channels) = (self.step.padded(self.step.rows()), spec.channels);
        let (column, columns) = match spec.input {
            ConvInput::Columns(first) => (first, first + channels),
            ConvInput::Gated => (0, 3 * channels),
        };
        let stride = input.columns();
        require(stride >= columns, NAME, || {
            format!("the input has {stride} columns, but {columns} are needed")
        })?;
        let activation = Precision::Activation;
        require_shape(NAME, "the input", input, (rows, stride), activation)?;
        require_shape(NAME, "the result", out, (rows, channels), activation)?;
        let fits = channels.is_multiple_of(16)
            && column.is_multiple_of(8)
            && (2..=channels).contains(&spec.taps)
            && weight.length() == spec.taps * channels
            && bias.is_none_or(|bias| bias.length() == channels);
        require(fits, NAME, || format!("{spec:?} does not fit its operands"))?;
        let states = self.part_of_states(NAME, cache, part, spec.state_elements())?;
        let (sequences, longest) = self.step.state_sequences();
        let blocks = channels.div_ceil(8 * CONV_THREADS);
        // In a step that only decodes, no sequence can be divided.
        let parts = (CONV_BLOCKS / (blocks * sequences).max(1)).clamp(1, longest.max(1));
        let grid = [blocks as u32, sequences as u32, parts as u32];
        self.recurrent.short_conv(
            &self.context,
            Grid::new(grid, [CONV_THREADS as u32, 1, 1]),
            out.ptr(),
            input.ptr(),
            weight.ptr(),
            bias.map_or(Ptr::NULL, CudaVector::ptr),
            states.start,
            self.step.states(),
            states.slot_elements,
            stride as u32,
            column as u32,
            channels as u32,
            spec.taps as u32,
            u32::from(spec.input == ConvInput::Gated),
            u32::from(spec.silu),
        )
    }
}
