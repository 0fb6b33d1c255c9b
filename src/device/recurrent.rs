//! States of recurrent layers: what a layer keeps of all tokens before a position, in place of
//! their keys and values.
//!
//! A *slot* holds the states of all recurrent layers of one sequence. A step reads the state
//! before its first row from one slot and leaves the state after its last row in another slot or in
//! the same one. A slot that a step only reads stays as it is, so a state can be shared and kept
//! without being copied.

use super::{CacheOps, DeviceError};
use std::ops::RangeInclusive;

/// Where the recurrent layers of a step find and leave the state of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchState {
    /// Slot of the state before the first row. `None` stands for the state of an empty sequence,
    /// which is all zeros.
    pub before: Option<u32>,
    /// Slot that gets the state after the last row. May be the same as `before`.
    pub after: u32,
    /// A slot that gets the state after some of the rows, if one is wanted.
    pub snapshot: Option<StateSnapshot>,
}

impl BatchState {
    /// Returns the slots that are read or written.
    pub(super) fn slots(&self) -> impl Iterator<Item = u32> + use<> {
        let snapshot = self.snapshot.map(|snapshot| snapshot.slot);
        [self.before, Some(self.after), snapshot]
            .into_iter()
            .flatten()
    }
}

/// States are kept after multiples of this many tokens only, so that a device may advance them in
/// steps of that size.
pub const SNAPSHOT_TOKENS: usize = 16;

/// A state to keep, which is copied when it is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateSnapshot {
    /// Number of rows of the sequence in this step after which the state is kept, from 1 on. The
    /// number of tokens before the next row is a multiple of [`SNAPSHOT_TOKENS`].
    pub rows: usize,
    /// Slot that gets the state.
    pub slot: u32,
}

/// Dimensions of the memory for states.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StateShape {
    /// Number of slots.
    pub slots: usize,
    /// Number of float32 numbers per slot.
    pub elements: usize,
}

/// The part of a slot that belongs to one operation of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatePart {
    /// Index of the first element in the slot; a multiple of 16.
    pub offset: usize,
    /// Number of elements; a multiple of 16.
    pub elements: usize,
}

/// A causal convolution of each channel on its own, over the last few tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConvSpec {
    /// Number of channels; a multiple of [`ConvSpec::CHANNELS`].
    pub channels: usize,
    /// Number of tokens that take part in a result, its own included; one of [`ConvSpec::TAPS`].
    /// The state has the inputs of one token less.
    pub taps: usize,
    /// What the channels are read from and multiplied by.
    pub input: ConvInput,
    /// Whether the results go through SiLU.
    pub silu: bool,
}

/// What the channels of a convolution are read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConvInput {
    /// The columns of the input from this one on.
    Columns(usize),
    /// The input has three times as many columns as there are channels, `[b | c | x]`. The
    /// channels are `b · x`, and the results are multiplied by `c` (LFM2).
    Gated,
}

impl ConvSpec {
    /// The number of channels is a multiple of this.
    pub const CHANNELS: usize = 16;
    /// Possible numbers of tokens that take part in a result.
    pub const TAPS: RangeInclusive<usize> = 2..=8;

    /// Returns the number of elements of the state.
    pub fn state_elements(&self) -> usize {
        self.channels * (self.taps - 1)
    }
}

/// The part of a [`Device`](super::Device) that computes recurrent layers.
///
/// Results do not depend on how a sequence was cut into steps: a device computes its rows one
/// after the other, or in intervals at fixed positions. States are float32. What a device keeps in
/// a slot is its own matter; only the slot of a snapshot, or of the last step, is read again.
pub trait RecurrentOps: CacheOps {
    /// Returns the number of bytes that memory for states takes on this device.
    fn state_bytes(&self, shape: &StateShape) -> usize {
        let elements = shape.slots.saturating_mul(shape.elements);
        elements.saturating_mul(size_of::<f32>())
    }

    /// Allocates the memory for states as a part of `cache`.
    ///
    /// # Errors
    /// Returns [`DeviceError::Unsupported`] if the device computes no recurrent layers.
    fn allocate_states(
        &mut self,
        cache: &mut Self::Cache,
        shape: &StateShape,
    ) -> Result<(), DeviceError>;

    /// Overwrites slots with NaN, so that tests detect reads of slots that were freed.
    fn poison_states(&mut self, cache: &mut Self::Cache, slots: &[u32]) -> Result<(), DeviceError>;

    /// Computes a causal convolution of all rows. `weights` are those of
    /// the taps, `taps · channels` numbers, those of the oldest token first, and a bias per channel. `out` has `channels` columns.
    fn short_conv(
        &mut self,
        input: &Self::Tensor,
        spec: &ConvSpec,
        weights: (&Self::Vector, Option<&Self::Vector>),
        cache: &mut Self::Cache,
        part: StatePart,
        out: &mut Self::Tensor,
    ) -> Result<(), DeviceError>;
}

/// Checks the slots of a step with this many rows per sequence. The error says what is wrong.
pub(super) fn check_states(
    states: &[BatchState],
    rows: impl ExactSizeIterator<Item = usize>,
    sorted: &mut Vec<u32>,
) -> Result<(), String> {
    if states.is_empty() {
        return Ok(());
    }
    if states.len() != rows.len() {
        let (states, sequences) = (states.len(), rows.len());
        return Err(format!("{sequences} sequences have {states} states"));
    }
    sorted.clear();
    for (state, rows) in states.iter().zip(rows) {
        sorted.push(state.after);
        let Some(snapshot) = state.snapshot else {
            continue;
        };
        sorted.push(snapshot.slot);
        if snapshot.rows == 0 || snapshot.rows > rows {
            let after = snapshot.rows;
            return Err(format!("a state is kept after {after} of {rows} rows"));
        }
    }
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("two states are written to slot {}", pair[0]));
    }
    let writes = |slot: &u32| sorted.binary_search(slot).is_ok();
    let foreign = |state: &&BatchState| state.before != Some(state.after);
    let mut read = states.iter().filter(foreign).filter_map(|one| one.before);
    match read.find(writes) {
        Some(slot) => Err(format!("slot {slot} is read and written by two states")),
        None => Ok(()),
    }
}
