//! The inputs of the step in progress, in device memory.
//!
//! All arrays of a step form one run of words, uploaded in one copy. In a decode step, where an
//! array starts depends only on the padded number of rows and on the number of groups of layers,
//! so a replayed step finds its inputs where they were when it was recorded.

use super::context::Context;
use super::error;
use super::memory::{Buffer, Ptr};
use super::transfer::Uploads;
use crate::device::attention::check_window;
use crate::device::{
    ATTENTION_SPAN, Batch, BatchSequence, BatchState, DeviceError, DeviceLimits, SNAPSHOT_TOKENS,
};
use std::ops::Range;

/// Sentinel: no row, no slot.
pub(super) const NONE: u32 = u32::MAX;

/// Packed query rows per work item of prefill attention.
pub(super) const PREFILL_ROWS: usize = 64;

/// Keys per unit of attention.
pub(super) const UNIT: usize = ATTENTION_SPAN;

/// Maximum number of units per launch of decode attention (2²¹ keys), unless the launch has
/// only one sequence. It bounds the memory for partial results, however many blocks sequences
/// share: 260 MiB for 32 heads of 128 elements.
pub(super) const MOST_UNITS: usize = 1 << 14;

/// Maximum number of entries of the block tables that memory is reserved for. Many long
/// sequences at once are rare; more room is made if they occur.
const MOST_TABLE_ENTRIES: usize = 1 << 21;

/// Words per sequence that say where its states are.
const STATE_WORDS: usize = 8;

/// Alignment of each array, in words: 64 bytes.
const ALIGNMENT: usize = 16;

/// Offset of each array of a step in its run of words, in words.
#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    tokens: usize,
    feedback: usize,
    positions: usize,
    slots: GroupArrays,
    sample_rows: usize,
    sequences: GroupArrays,
    decode_list: usize,
    states: usize,
    tables: usize,
}

/// Offsets of arrays of the same length, one per group of layers, in words.
#[derive(Clone, Copy, Debug, Default)]
struct GroupArrays {
    first: usize,
    stride: usize,
}

impl GroupArrays {
    /// Returns the offset of the array of a group.
    fn of(self, group: usize) -> usize {
        self.first + group * self.stride
    }
}

/// Exclusive upper bounds on the positions, slots, blocks and slots of states that a step uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) blocks: usize,
    pub(super) states: usize,
}

impl Bounds {
    /// No bounds.
    pub(super) const UNLIMITED: Self = Self {
        positions: usize::MAX,
        slots: usize::MAX,
        blocks: usize::MAX,
        states: usize::MAX,
    };

    /// Returns the lower of each pair of bounds.
    pub(super) fn min(self, other: Self) -> Self {
        Self {
            positions: self.positions.min(other.positions),
            slots: self.slots.min(other.slots),
            blocks: self.blocks.min(other.blocks),
            states: self.states.min(other.states),
        }
    }
}

/// Size of a decode step: everything that the launches of a recorded step depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepKey {
    /// Number of rows, padded. Each row is a sequence of its own, and all are sampled in order.
    pub(super) rows: usize,
    /// Units of the longest sequence, as [`UnitSpread::rounded`] rounds them.
    pub(super) units: usize,
    /// Number of groups of layers, on which the offsets of the arrays depend.
    pub(super) groups: usize,
}

/// How the units of the longest sequence determine the launches of decode attention.
#[derive(Clone, Copy, Debug)]
pub(super) struct UnitSpread {
    /// Units that one CUDA block computes at a time. A power of two.
    pub(super) block_units: usize,
    /// Number of CUDA blocks that one key-value head of all rows is spread over at most. Beyond
    /// it, blocks compute several units one after the other.
    pub(super) most_blocks: usize,
}

impl UnitSpread {
    /// Rounds the units of the longest sequence of a step so that few values occur. If two
    /// steps of `rows` rows have the same value, they have the same launches.
    pub(super) fn rounded(self, longest: usize, rows: usize) -> usize {
        let blocks = (self.most_blocks / rows.max(1)).max(1);
        let units = longest.next_power_of_two();
        units.clamp(self.block_units, self.block_units * blocks)
    }
}

/// The arrays that `stage` uploads, and what the host needs to know about them.
///
/// A step that only decodes may be *padded* to a bucket; see [`StepInputs::padded`].
pub(super) struct StepInputs {
    limits: Option<DeviceLimits>,
    spread: UnitSpread,
    uploads: Uploads,
    /// For each number of query heads per key-value head of the model.
    work: Vec<PrefillWork>,
    base: Ptr,
    layout: Layout,
    words: Vec<u32>,
    sorted: Vec<u32>,
    rows: usize,
    padded_rows: usize,
    samples: usize,
    /// Number of sequences, with padding, and the largest number of rows of one of them.
    sequences: (usize, usize),
    /// Whether each sequence has slots for its states.
    has_states: bool,
    /// Range of entries of the decode list, per launch.
    decodes: Vec<Range<usize>>,
    max_units: usize,
    /// Largest number of units in one launch.
    decode_units: usize,
    /// Number of units that attention has scratch memory for.
    unit_room: usize,
    key: Option<StepKey>,
    bounds: Bounds,
    /// For each group of layers, the longest window for which the tables begin early enough.
    windows: Vec<usize>,
    /// Index and number of rows of each sequence with several rows.
    prefills: Vec<(u32, usize)>,
    /// Token ids that the last step sampled, one per sample. Feedback reads them.
    sampled: Option<Buffer>,
    sampled_count: usize,
    /// Token ids after feedback, one per row.
    resolved: Option<Buffer>,
}

/// Returns the number of rows to which a decode step is padded: one of few sizes, less than
/// twice `rows`.
fn bucket(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=8 => 8,
        _ => {
            // 16, 24, 32, 48, 64, 96, …
            let power = rows.next_power_of_two();
            if rows <= power / 4 * 3 && power > 16 {
                power / 4 * 3
            } else {
                power
            }
        }
    }
}

/// Returns the bucket of a decode step with `rows` rows, or `None` if such steps are not padded
/// and recorded.
pub(super) fn bucket_within(limits: &DeviceLimits, rows: usize) -> Option<usize> {
    let largest = limits.rows.min(limits.sequences);
    (1..=largest)
        .contains(&rows)
        .then(|| bucket(rows).min(largest))
}

/// Returns the sizes of all decode steps within `limits`, those of short sequences first.
pub(super) fn keys_within(limits: &DeviceLimits, spread: UnitSpread) -> Vec<StepKey> {
    let buckets = (1..=limits.rows.min(limits.sequences)).filter_map(|rows| {
        // Buckets are their own buckets.
        bucket_within(limits, rows).filter(|bucket| *bucket == rows)
    });
    let longest = limits.sequence_tokens.div_ceil(UNIT).max(1);
    let doublings = 0..=longest.next_power_of_two().trailing_zeros();
    let mut keys: Vec<StepKey> = buckets
        .flat_map(|rows| {
            let units = doublings
                .clone()
                .map(|power| spread.rounded(1 << power, rows));
            let key = |units| StepKey {
                rows,
                units,
                groups: limits.groups,
            };
            units.map(key).collect::<Vec<_>>()
        })
        .collect();
    keys.sort_by_key(|key| (key.units, key.rows));
    keys.dedup();
    keys
}

/// Returns the number of words to reserve for the inputs of a step.
pub(super) fn input_words(limits: &DeviceLimits) -> usize {
    let blocks = limits.sequence_tokens.div_ceil(limits.block_tokens.max(1));
    let tables = limits.sequences.saturating_mul(blocks);
    let tables = tables.saturating_mul(limits.groups).min(MOST_TABLE_ENTRIES);
    let arrays = 4 * limits.rows + (3 + STATE_WORDS) * limits.sequences;
    let of_groups = limits.groups * (limits.rows + 4 * limits.sequences + 2 * ALIGNMENT);
    arrays + of_groups + tables + 8 * ALIGNMENT
}

/// Returns, for each number of query heads per key-value head of the model, the maximum number of
/// words of the work items of prefill attention.
pub(super) fn work_words(limits: &DeviceLimits) -> Vec<(usize, usize)> {
    let groups = limits.model.all_heads();
    let groups = groups.filter_map(|heads| heads.q_heads.checked_div(heads.kv_heads));
    let mut groups: Vec<usize> = groups.collect();
    groups.sort_unstable();
    groups.dedup();
    let sequences = limits.rows.min(limits.sequences);
    let words = |group: usize| 2 * ((limits.rows * group).div_ceil(PREFILL_ROWS) + sequences);
    groups
        .into_iter()
        .map(|group| (group, words(group)))
        .collect()
}

/// Returns the bytes of the token ids of a step that stay on the device.
pub(super) fn token_bytes(limits: &DeviceLimits) -> usize {
    4 * (limits.rows + limits.sequences)
}

/// Appends an aligned array and returns its offset.
fn append(words: &mut Vec<u32>, array: impl IntoIterator<Item = u32>) -> usize {
    words.resize(words.len().next_multiple_of(ALIGNMENT), 0);
    let start = words.len();
    words.extend(array);
    start
}

/// Appends one aligned array per group, all of the same length, and returns their offsets.
fn append_each<Array: IntoIterator<Item = u32>>(
    words: &mut Vec<u32>,
    arrays: impl Iterator<Item = Array>,
) -> GroupArrays {
    let first = append(words, []);
    let mut stride = 0;
    for array in arrays {
        let start = append(words, array);
        stride = (words.len() - start).next_multiple_of(ALIGNMENT);
    }
    GroupArrays { first, stride }
}

/// Returns the entry of [`StepInputs::states`] of a sequence with these rows, {first, count}, of
/// which the first one is at position `start`.
fn words_of_state(rows: [u32; 2], start: u32, state: Option<&BatchState>) -> [u32; STATE_WORDS] {
    let before = state.and_then(|state| state.before).unwrap_or(NONE);
    let after = state.map_or(NONE, |state| state.after);
    let kept = state.and_then(|state| state.snapshot);
    let [kept_rows, kept] = kept.map_or([0, NONE], |kept| [kept.rows as u32, kept.slot]);
    [rows[0], rows[1], before, after, kept_rows, kept, start, 0]
}

/// Checks that states are kept only at the end of an interval. What tokens in the middle of one
/// leave for those after them is not copied.
fn check_snapshots(batch: &Batch) -> Result<(), String> {
    for (sequence, state) in batch.sequences.iter().zip(&batch.states) {
        let Some(kept) = state.snapshot else { continue };
        let start = batch.positions.get(sequence.rows.start).copied();
        let tokens = start.unwrap_or(0) as usize + kept.rows;
        if !tokens.is_multiple_of(SNAPSHOT_TOKENS) {
            return Err(format!(
                "a state is kept after {tokens} tokens, which is no multiple of {SNAPSHOT_TOKENS}"
            ));
        }
    }
    Ok(())
}

/// The decode list, cut into launches.
struct DecodeList {
    /// Maximum number of units per launch, unless it has only one sequence.
    room: usize,
    words: Vec<u32>,
    launches: Vec<Range<usize>>,
    /// Units in the last launch so far.
    units: usize,
    /// Units of the longest sequence.
    longest: usize,
    /// Largest number of units in one launch.
    most: usize,
}

impl DecodeList {
    fn new(room: usize) -> Self {
        Self {
            room,
            words: Vec::new(),
            launches: Vec::new(),
            units: 0,
            longest: 0,
            most: 0,
        }
    }

    /// Appends a sequence that has `units` units.
    fn push(&mut self, sequence: u32, units: usize) {
        let entry = self.words.len() / 2;
        match self.launches.last_mut() {
            Some(launch) if self.units + units <= self.room => launch.end = entry + 1,
            _ => {
                self.launches.push(entry..entry + 1);
                self.units = 0;
            }
        }
        self.words.extend([sequence, self.units as u32]);
        self.units += units;
        self.longest = self.longest.max(units);
        self.most = self.most.max(self.units);
    }
}

/// The work items of prefill attention. Layers whose numbers of heads differ by more than a factor
/// need different ones; each list is uploaded once per step.
struct PrefillWork {
    /// Query heads per key-value head.
    group: usize,
    uploads: Uploads,
    /// The address and the number of the items of this step.
    list: Option<(Ptr, usize)>,
}

impl PrefillWork {
    fn new(group: usize) -> Self {
        Self {
            group,
            // Only steps with prefill read them, which are not recorded.
            uploads: Uploads::outside_graphs("the inputs of a step"),
            list: None,
        }
    }
}

impl StepInputs {
    pub(super) fn new() -> Self {
        Self {
            limits: None,
            spread: UnitSpread {
                block_units: 1,
                most_blocks: 1,
            },
            uploads: Uploads::new("the inputs of a step"),
            work: Vec::new(),
            base: Ptr::NULL,
            layout: Layout::default(),
            words: Vec::new(),
            sorted: Vec::new(),
            rows: 0,
            padded_rows: 0,
            samples: 0,
            sequences: (0, 0),
            has_states: false,
            decodes: Vec::new(),
            max_units: 0,
            decode_units: 0,
            unit_room: MOST_UNITS,
            key: None,
            bounds: Bounds::UNLIMITED,
            windows: Vec::new(),
            prefills: Vec::new(),
            sampled: None,
            sampled_count: 0,
            resolved: None,
        }
    }

    /// Returns the number of rows of the batch, without padding.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Returns how many rows to compute when the caller asks for `rows`: more than that if the
    /// step is padded to a bucket. The extra rows hold inputs that are safe to compute with,
    /// and their results are not used.
    pub(super) fn padded(&self, rows: usize) -> usize {
        if rows == self.rows {
            self.padded_rows
        } else {
            rows
        }
    }

    /// Returns the number of sample rows, padded.
    pub(super) fn samples(&self) -> usize {
        self.padded(self.samples)
    }

    fn at(&self, word: usize) -> Ptr {
        self.base.offset_bytes(4 * word)
    }

    /// Returns the token ids: `u32` per row, ignored for rows with feedback.
    pub(super) fn tokens(&self) -> Ptr {
        self.at(self.layout.tokens)
    }

    /// Returns the feedback: `u32` per row, the index of a sample of the previous step or
    /// [`NONE`].
    pub(super) fn feedback(&self) -> Ptr {
        self.at(self.layout.feedback)
    }

    /// Returns the positions: `u32` per row.
    pub(super) fn positions(&self) -> Ptr {
        self.at(self.layout.positions)
    }

    /// Returns the cache slots of a group: `u32` per row, [`NONE`] for padding.
    pub(super) fn slots(&self, group: usize) -> Ptr {
        self.at(self.layout.slots.of(group))
    }

    /// Returns the sampled rows: `u32` per sample.
    pub(super) fn sample_rows(&self) -> Ptr {
        self.at(self.layout.sample_rows)
    }

    /// Returns the sequences as a group of layers sees them: `uint4` per sequence, {first row,
    /// number of rows, tokens in the cache including this step's, index in
    /// [`StepInputs::tables`] of the block of position 0}. Padding has 0 tokens.
    ///
    /// If a table begins in the middle of its sequence, the block of position 0 is not in it, and
    /// the index may be negative. It is used modulo 2³², so the indices of the blocks that are in
    /// the table are correct.
    pub(super) fn sequences(&self, group: usize) -> Ptr {
        self.at(self.layout.sequences.of(group))
    }

    /// Returns the number of sequences, padding included. In a step that is recorded, it is the
    /// number of rows.
    pub(super) fn sequence_count(&self) -> usize {
        self.sequences.0
    }

    /// Returns the block tables of all groups: `u32` per entry, one table after the other.
    pub(super) fn tables(&self) -> Ptr {
        self.at(self.layout.tables)
    }

    /// Returns where the sequences find and leave their states: two `uint4` per sequence, {first
    /// row, number of rows, slot of the state before them, slot of that after them} and {number
    /// of rows after which the state is kept, slot that gets it, position of the first row, 0}.
    /// [`NONE`] stands for a state of zeros, or for a state that is not kept; nothing is kept
    /// after 0 rows.
    pub(super) fn states(&self) -> Ptr {
        self.at(self.layout.states)
    }

    /// Returns the number of sequences in [`StepInputs::states`], and the largest number of
    /// rows of one of them. Both are the same in all steps with the same key.
    pub(super) fn state_sequences(&self) -> (usize, usize) {
        self.sequences
    }

    /// Returns whether a sequence of the step has several rows.
    pub(super) fn has_prefills(&self) -> bool {
        !self.prefills.is_empty()
    }

    /// Returns the launches of decode attention: the address and the number of entries of each.
    /// An entry is a `uint2`: {index of a sequence with one row, units of attention of the
    /// entries before it in the launch}.
    pub(super) fn decodes(&self) -> impl Iterator<Item = (Ptr, usize)> {
        let at = |entry: usize| self.at(self.layout.decode_list + 2 * entry);
        self.decodes
            .iter()
            .map(move |launch| (at(launch.start), launch.len()))
    }

    /// Returns the number of units of the longest sequence in the decode list, rounded up to a
    /// power of two, and in a padded step as [`UnitSpread::rounded`] does it.
    pub(super) fn max_units(&self) -> usize {
        self.max_units
    }

    /// Returns the number of units that a launch of decode attention must have scratch memory
    /// for. It is the same in all steps, except in one with a sequence longer than the limits
    /// allow, which is not recorded.
    pub(super) fn unit_room(&self) -> usize {
        self.unit_room.max(self.decode_units)
    }

    /// Returns the address and the number of the work items of prefill attention, for `group`
    /// query heads per key-value head. An item covers 64 packed rows and is a `uint2`: {index
    /// of a sequence with several rows, first packed row}.
    pub(super) fn prefill_work(
        &mut self,
        context: &Context,
        group: usize,
    ) -> Result<(Ptr, usize), DeviceError> {
        let known = self.work.iter().position(|work| work.group == group);
        let index = known.unwrap_or_else(|| {
            self.work.push(PrefillWork::new(group));
            self.work.len() - 1
        });
        let work = &mut self.work[index];
        if let Some(list) = work.list {
            return Ok(list);
        }
        let mut words = Vec::new();
        for &(sequence, rows) in &self.prefills {
            for first in (0..rows * group).step_by(PREFILL_ROWS) {
                words.extend([sequence, first as u32]);
            }
        }
        let ptr = match words.is_empty() {
            true => Ptr::NULL,
            false => work.uploads.write(context, &words)?,
        };
        Ok(*work.list.insert((ptr, words.len() / 2)))
    }

    /// Returns the token ids that the sampler chose last: `u32` per sample.
    pub(super) fn sampled(&self) -> Ptr {
        self.sampled.as_ref().map_or(Ptr::NULL, Buffer::ptr)
    }

    /// Returns the token ids after feedback: `u32` per row.
    pub(super) fn resolved(&self) -> Ptr {
        self.resolved.as_ref().map_or(Ptr::NULL, Buffer::ptr)
    }

    /// Fails if the step exceeds one of `bounds`, the bounds of the cache and of the rotary
    /// embedding.
    pub(super) fn require_within(
        &self,
        bounds: Bounds,
        operation: &'static str,
    ) -> Result<(), DeviceError> {
        for (what, reached, end) in [
            ("position", self.bounds.positions, bounds.positions),
            ("slot", self.bounds.slots, bounds.slots),
            ("block", self.bounds.blocks, bounds.blocks),
            ("slot of states", self.bounds.states, bounds.states),
        ] {
            error::require(reached <= end, operation, || {
                let last = reached.saturating_sub(1);
                format!("{what} {last} is out of range: there are {end}")
            })?;
        }
        let needs_states = bounds.states < usize::MAX;
        error::require(self.has_states || !needs_states, operation, || {
            "the sequences of the step have no states".to_owned()
        })?;
        Ok(())
    }

    /// Fails if the step has no such group of layers.
    pub(super) fn require_group(
        &self,
        group: usize,
        operation: &'static str,
    ) -> Result<(), DeviceError> {
        let groups = self.windows.len();
        error::require(group < groups, operation, || {
            format!("group {group} of layers is out of range: the batch has {groups} groups")
        })
    }

    /// Fails if a block table of the group begins too late for a window of this many
    /// tokens; `usize::MAX` stands for no window.
    pub(super) fn require_window(
        &self,
        group: usize,
        window: usize,
        operation: &'static str,
    ) -> Result<(), DeviceError> {
        self.require_group(group, operation)?;
        let longest = self.windows[group];
        error::require_ok(operation, check_window(group, window, longest))
    }

    /// Returns the key under which the step is recorded, or `None` if it must not be recorded.
    pub(super) fn key(&self) -> Option<StepKey> {
        self.key
    }

    /// Sets the number of token ids that were sampled, to which the next step may refer.
    pub(super) fn set_sampled(&mut self, count: usize) {
        self.sampled_count = count;
    }

    /// Makes room for steps within `limits`, whose launches of decode attention have scratch
    /// memory for `unit_room` units.
    pub(super) fn reserve(
        &mut self,
        context: &Context,
        limits: &DeviceLimits,
        (spread, unit_room): (UnitSpread, usize),
    ) -> Result<(), DeviceError> {
        self.uploads.reserve(context, input_words(limits))?;
        self.work.clear();
        for (group, words) in work_words(limits) {
            let mut work = PrefillWork::new(group);
            work.uploads.reserve(context, words)?;
            self.work.push(work);
        }
        self.make_room(context, limits.rows, limits.sequences)?;
        (self.spread, self.unit_room) = (spread, unit_room);
        self.limits = Some(*limits);
        Ok(())
    }

    /// Makes room for `rows` resolved and `samples` sampled token ids. Keeps the ids that were
    /// sampled last.
    fn make_room(
        &mut self,
        context: &Context,
        rows: usize,
        samples: usize,
    ) -> Result<(), DeviceError> {
        let what = "the tokens of a step";
        if self
            .resolved
            .as_ref()
            .is_none_or(|ids| ids.bytes() < 4 * rows)
        {
            self.resolved = None;
            self.resolved = Some(context.allocate(4 * rows, what)?);
        }
        let old = self.sampled.as_ref().map_or(0, Buffer::bytes);
        if old < 4 * samples {
            let larger = context.allocate(4 * samples, what)?;
            if let Some(ids) = &self.sampled {
                let count = (4 * self.sampled_count).min(old);
                context.copy(larger.ptr(), ids.ptr(), count)?;
            }
            self.sampled = Some(larger);
        }
        Ok(())
    }

    /// Checks `batch` and enqueues its upload. If `pad`, a step that only decodes is padded to
    /// a bucket.
    pub(super) fn take(
        &mut self,
        context: &Context,
        batch: &Batch,
        pad: bool,
    ) -> Result<(), DeviceError> {
        // If the batch is refused, nothing may be computed from the previous one.
        self.clear();
        self.check(batch)
            .map_err(|reason| error::failed("stage", reason))?;
        let rows = batch.rows();
        let decode = batch
            .sequences
            .iter()
            .all(|sequence| sequence.rows.len() == 1)
            && batch.sample_rows.iter().copied().eq(0..rows);
        let bucket = match &self.limits {
            Some(limits) if pad && decode => bucket_within(limits, rows),
            _ => None,
        };
        let padded = bucket.unwrap_or(rows);
        self.make_room(
            context,
            padded,
            batch.sample_rows.len().max(self.sampled_count),
        )?;
        self.lay_out(batch, padded);
        if let Some(rows) = bucket {
            self.max_units = self.spread.rounded(self.max_units, rows);
        }
        self.base = self.uploads.write(context, &self.words)?;
        (self.rows, self.padded_rows, self.samples) = (rows, padded, batch.sample_rows.len());
        let [positions, slots, blocks] = batch.ends();
        let slots_of_states = batch.states.iter().flat_map(BatchState::slots);
        self.bounds = Bounds {
            positions,
            slots,
            blocks,
            states: slots_of_states.max().map_or(0, |last| last as usize + 1),
        };
        self.has_states = !batch.states.is_empty();
        let fits = self.decode_units <= self.unit_room && self.decodes.len() <= 1;
        self.key = bucket.filter(|_| fits).map(|rows| StepKey {
            rows,
            units: self.max_units,
            groups: batch.groups.len(),
        });
        Ok(())
    }

    /// Enqueues the upload of a decode step of this size whose rows are all padding, so that it
    /// touches no block of the cache.
    pub(super) fn take_padding(
        &mut self,
        context: &Context,
        key: StepKey,
    ) -> Result<(), DeviceError> {
        self.clear();
        self.make_room(context, key.rows, key.rows.max(self.sampled_count))?;
        self.lay_out(&Batch::new(key.groups), key.rows);
        self.max_units = key.units;
        self.base = self.uploads.write(context, &self.words)?;
        (self.rows, self.padded_rows, self.samples) = (key.rows, key.rows, key.rows);
        self.bounds = Bounds {
            positions: 0,
            slots: 0,
            blocks: 0,
            states: 0,
        };
        self.has_states = true;
        self.windows.resize(key.groups, usize::MAX);
        self.key = Some(key);
        Ok(())
    }

    /// Forgets the batch.
    fn clear(&mut self) {
        (self.rows, self.padded_rows, self.samples) = (0, 0, 0);
        self.key = None;
        for work in &mut self.work {
            work.list = None;
        }
        (self.sequences, self.has_states) = ((0, 0), false);
        self.windows.clear();
        self.decodes.clear();
        self.prefills.clear();
    }

    /// Writes all arrays to `words`, padded to `padded` rows.
    fn lay_out(&mut self, batch: &Batch, padded: usize) {
        let rows = batch.rows();
        let padding = rows..padded;
        let extra = |value: u32| std::iter::repeat_n(value, padding.len());
        let words = &mut self.words;
        words.clear();
        let tokens = append(words, batch.tokens.iter().copied().chain(extra(0)));
        let feedback = append(words, std::iter::repeat_n(NONE, padded));
        for entry in &batch.feedback {
            words[feedback + entry.row] = entry.sample as u32;
        }
        let positions = append(words, batch.positions.iter().copied().chain(extra(0)));
        let slots = batch.groups.iter().map(|group| &group.slots);
        let slots = slots.map(|slots| slots.iter().copied().chain(extra(NONE)));
        let slots = append_each(words, slots);
        let samples = batch.sample_rows.iter().map(|&row| row as u32);
        let padding = padding.map(|row| row as u32);
        let sample_rows = append(words, samples.chain(padding.clone()));
        let describe = |sequence: &BatchSequence| {
            let last = sequence.rows.clone().last();
            let length = last.map_or(0, |last| batch.positions[last] as usize + 1);
            (sequence.rows.start, sequence.rows.len(), length)
        };
        // The tables of all groups follow each other.
        let mut begin = 0;
        let groups = batch.groups.iter().map(|group| {
            let offset = begin;
            begin += group.entries.len();
            let each = batch.sequences.iter().zip(&group.tables);
            let each = each.map(move |(sequence, table)| {
                let (first, count, length) = describe(sequence);
                let start = (offset + table.entries.start) as u32;
                let origin = start.wrapping_sub(table.first as u32);
                [first as u32, count as u32, length as u32, origin]
            });
            let padding = padding.clone().map(|row| [row, 1, 0, 0]);
            each.chain(padding).flatten()
        });
        let sequences = append_each(words, groups);
        let mut decodes = DecodeList::new(self.unit_room);
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let (_, count, length) = describe(sequence);
            match count {
                0 => {}
                1 => decodes.push(index as u32, length.div_ceil(UNIT)),
                _ => self.prefills.push((index as u32, count)),
            }
        }
        for sequence in batch.sequences.len()..batch.sequences.len() + padding.len() {
            decodes.push(sequence as u32, 0);
        }
        self.max_units = decodes.longest.next_power_of_two();
        self.decode_units = decodes.most;
        let decode_list = append(words, decodes.words);
        self.decodes = decodes.launches;
        // Padding has the state of an empty sequence, and leaves none.
        let states = (0..).zip(&batch.sequences).map(|(index, sequence)| {
            let (first, count, _) = describe(sequence);
            let rows = [first as u32, count as u32];
            let start = batch.positions.get(first).copied().unwrap_or(0);
            words_of_state(rows, start, batch.states.get(index))
        });
        let padded_states = padding.clone().map(|row| words_of_state([row, 1], 0, None));
        let states = append(words, states.chain(padded_states).flatten());
        let lengths = batch.sequences.iter().map(|sequence| sequence.rows.len());
        let longest = lengths.chain(padding.clone().map(|_| 1)).max();
        let sequences_of_states = batch.sequences.len() + padding.len();
        self.sequences = (sequences_of_states, longest.unwrap_or(0));
        let entries = batch.groups.iter().flat_map(|group| &group.entries);
        let tables = append(words, entries.copied());
        self.layout = Layout {
            tokens,
            feedback,
            positions,
            slots,
            sample_rows,
            sequences,
            decode_list,
            states,
            tables,
        };
    }

    /// Checks that a batch is consistent, and finds out how far its tables reach back. The error
    /// says why it is not.
    fn check(&mut self, batch: &Batch) -> Result<(), String> {
        batch.check(self.sampled_count, &mut self.sorted)?;
        check_snapshots(batch)?;
        for group in &batch.groups {
            let mut longest = usize::MAX;
            if let Some(DeviceLimits { block_tokens, .. }) = self.limits {
                let (sequences, positions) = (&batch.sequences, &batch.positions);
                group.check_ends(sequences, positions, block_tokens)?;
                longest = group.longest_window(sequences, positions, block_tokens);
            }
            self.windows.push(longest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{BatchGroup, Feedback, ModelShape, StateSnapshot};

    /// Returns a batch of sequences, each given by its number of rows and the position of its
    /// last token. There is one group per entry of `firsts`, the first blocks of its tables.
    fn batch_of(firsts: &[usize], sequences: &[(usize, u32)]) -> Batch {
        let mut batch = Batch::new(firsts.len());
        for &(rows, last) in sequences {
            let first = last + 1 - rows as u32;
            let tokens: Vec<u32> = (first..=last).map(|position| 100 + position).collect();
            let blocks = last / 16 + 1;
            let tables = firsts
                .iter()
                .map(|&first| (first, 7 + first as u32..7 + blocks));
            batch.push(&tokens, first as usize, 16, tables);
            batch.sample_rows.push(batch.rows() - 1);
        }
        let mut slots = batch.groups.iter_mut().flat_map(|group| &mut group.slots);
        (0..)
            .zip(&mut slots)
            .for_each(|(row, slot)| *slot = row * 1000);
        batch
    }

    fn batch(sequences: &[(usize, u32)]) -> Batch {
        batch_of(&[0], sequences)
    }

    fn laid_out(batch: &Batch, padded: usize) -> StepInputs {
        let mut step = StepInputs::new();
        step.check(batch).unwrap();
        step.lay_out(batch, padded);
        step
    }

    #[test]
    fn buckets_are_large_enough_and_less_than_twice_the_rows() {
        for rows in 1..2000 {
            let bucket = bucket(rows);
            assert!(bucket >= rows && super::bucket(bucket) == bucket);
            assert!(2 * rows > bucket, "{rows} rows are padded to {bucket}");
        }
        let all: std::collections::BTreeSet<_> = (1..=256).map(bucket).collect();
        let expected = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];
        assert!(all.into_iter().eq(expected));
    }

    #[test]
    fn every_decode_step_has_one_of_the_sizes_within_the_limits() {
        // Llama 3.1 8B on a GPU, with the default limits.
        let limits = DeviceLimits {
            rows: 8192,
            sequences: 256,
            sequence_tokens: 131_072,
            groups: 1,
            ..DeviceLimits::default()
        };
        let spread = UnitSpread {
            block_units: 4,
            most_blocks: 4096 / 8,
        };
        let keys = keys_within(&limits, spread);
        assert_eq!(keys.len(), 70);
        assert!(keys.is_sorted_by_key(|key| key.units));
        for rows in 1..=256 {
            for units in [1, 4, 5, 16, 100, 1000, 1024] {
                let rows = bucket_within(&limits, rows).unwrap();
                let key = StepKey {
                    rows,
                    units: spread.rounded(units, rows),
                    groups: 1,
                };
                assert!(keys.contains(&key), "{key:?}");
            }
        }
        assert_eq!(bucket_within(&limits, 257), None);
        let uneven = DeviceLimits {
            sequences: 100,
            ..limits
        };
        assert_eq!(bucket_within(&uneven, 97), Some(100));
        let rows = keys_within(&uneven, spread)
            .iter()
            .map(|key| key.rows)
            .max();
        assert_eq!(rows, Some(100));
    }

    #[test]
    fn a_decode_step_is_padded_with_rows_that_touch_nothing() {
        let mut batch = batch(&[(1, 0), (1, 300), (1, 127)]);
        batch.feedback = vec![Feedback { row: 1, sample: 2 }];
        let mut step = StepInputs::new();
        assert!(step.check(&batch).is_err(), "nothing was sampled yet");
        step.set_sampled(3);
        step.check(&batch).unwrap();
        step.lay_out(&batch, 4);
        let at = |start: usize, count: usize| &step.words[start..start + count];
        let layout = step.layout;
        assert_eq!(at(layout.tokens, 4), [100, 400, 227, 0]);
        assert_eq!(at(layout.feedback, 4), [NONE, 2, NONE, NONE]);
        assert_eq!(at(layout.positions, 4), [0, 300, 127, 0]);
        assert_eq!(at(layout.slots.of(0), 4), [0, 1000, 2000, NONE]);
        assert_eq!(at(layout.sample_rows, 4), [0, 1, 2, 3]);
        let sequences = [0, 1, 1, 0, 1, 1, 301, 1, 2, 1, 128, 20, 3, 1, 0, 0];
        assert_eq!(at(layout.sequences.of(0), 16), sequences);
        assert_eq!(at(layout.decode_list, 8), [0, 0, 1, 1, 2, 4, 3, 5]);
        assert_eq!(step.decodes, vec![0..4; 1]);
        assert_eq!((step.max_units, step.decode_units), (4, 5));
        assert_eq!(at(layout.tables, 28), &batch.groups[0].entries[..]);
    }

    #[test]
    fn each_sequence_has_its_rows_and_its_slots_of_states() {
        let mut batch = batch(&[(1, 0), (3, 304)]);
        batch.states = vec![
            BatchState {
                before: Some(4),
                after: 5,
                snapshot: None,
            },
            BatchState {
                before: None,
                after: 7,
                snapshot: Some(StateSnapshot { rows: 2, slot: 9 }),
            },
        ];
        let step = laid_out(&batch, 5);
        let found = &step.words[step.layout.states..][..3 * STATE_WORDS];
        let expected = [
            [0, 1, 4, 5, 0, NONE, 0, 0],
            [1, 3, NONE, 7, 2, 9, 302, 0],
            [4, 1, NONE, NONE, 0, NONE, 0, 0],
        ];
        assert_eq!(found, expected.as_flattened());
        assert_eq!(step.state_sequences(), (3, 3));
        batch.states.clear();
        let step = laid_out(&batch, 4);
        let found = &step.words[step.layout.states..][..STATE_WORDS];
        assert_eq!(found, [0, 1, NONE, NONE, 0, NONE, 0, 0]);
        assert_eq!(step.state_sequences(), (2, 3));
    }

    #[test]
    fn array_offsets_depend_only_on_the_padded_rows_and_the_number_of_groups() {
        for firsts in [&[0][..], &[0, 0, 0]] {
            let short = batch_of(firsts, &[(1, 3), (1, 4), (1, 5)]);
            let long = batch_of(firsts, &[(1, 900), (1, 400), (1, 5), (1, 77)]);
            let [short, long] = [short, long].map(|batch| laid_out(&batch, 4).layout);
            assert_eq!(format!("{short:?}"), format!("{long:?}"));
        }
    }

    #[test]
    fn each_group_has_slots_and_sequences_of_its_own() {
        let batch = batch_of(&[0, 20], &[(1, 330), (2, 400)]);
        let step = laid_out(&batch, 3);
        let at = |start: usize, count: usize| &step.words[start..start + count];
        let layout = step.layout;
        assert_eq!(at(layout.slots.of(0), 3), [0, 1000, 2000]);
        assert_eq!(at(layout.slots.of(1), 3), [3000, 4000, 5000]);
        let entries = batch.groups.iter().flat_map(|group| &group.entries);
        let entries: Vec<u32> = entries.copied().collect();
        assert_eq!(at(layout.tables, entries.len()), entries);
        for (
            group,
            BatchGroup {
                tables, entries, ..
            },
        ) in batch.groups.iter().enumerate()
        {
            let sequences = at(layout.sequences.of(group), 8);
            assert_eq!(sequences[..3], [0, 1, 331]);
            assert_eq!(sequences[4..7], [1, 2, 401]);
            for (sequence, table) in sequences.chunks(4).zip(tables) {
                // The last block of each table, found as a kernel does.
                let block = (sequence[2] - 1) / 16;
                let index = sequence[3].wrapping_add(block) as usize;
                let expected = entries[table.entries.end - 1];
                assert_eq!(step.words[layout.tables + index], expected);
            }
        }
    }

    #[test]
    fn the_windows_of_a_step_are_those_that_its_tables_begin_early_enough_for() {
        let mut step = StepInputs::new();
        step.limits = Some(DeviceLimits {
            rows: 8,
            sequences: 8,
            sequence_tokens: 512,
            block_tokens: 16,
            groups: 2,
            vocabulary: 1,
            model: ModelShape::default(),
        });
        step.check(&batch_of(&[0, 16], &[(1, 330)])).unwrap();
        assert_eq!(step.windows, [usize::MAX, 75]);
        step.require_window(0, usize::MAX, "attend").unwrap();
        step.require_window(1, 75, "attend").unwrap();
        for (group, window) in [(1, 76), (1, usize::MAX), (2, 1)] {
            let error = step.require_window(group, window, "attend").unwrap_err();
            assert!(matches!(error, DeviceError::Failed { .. }), "{error}");
        }
    }

    #[test]
    fn decodes_and_prefills_are_listed_separately() {
        let step = laid_out(&batch(&[(5, 4), (1, 40), (3, 130)]), 9);
        assert_eq!(step.decodes, vec![0..1; 1]);
        assert_eq!(step.words[step.layout.decode_list..][..2], [1, 0]);
        assert_eq!(step.prefills, [(0, 5), (2, 3)]);
        assert_eq!((step.max_units, step.decode_units), (1, 1));
    }

    #[test]
    fn a_decode_list_beyond_the_unit_limit_is_split_into_launches() {
        let tokens = |units: usize| (units * UNIT) as u32 - 1;
        let half = (1, tokens(MOST_UNITS / 2));
        let step = laid_out(&batch(&[half, half, (1, 0), half, (1, 40)]), 5);
        assert_eq!(step.decodes, [0..2, 2..5]);
        let list = &step.words[step.layout.decode_list..][..10];
        let after = MOST_UNITS as u32 / 2;
        assert_eq!(list, [0, 0, 1, after, 2, 0, 3, 1, 4, after + 1]);
        assert_eq!(step.decode_units, MOST_UNITS);
        assert_eq!(step.max_units, MOST_UNITS / 2);
        // A sequence with more units has a launch of its own.
        let step = laid_out(&batch(&[(1, 0), (1, tokens(MOST_UNITS + 1)), (1, 0)]), 3);
        assert_eq!(step.decodes, [0..1, 1..2, 2..3]);
        assert_eq!(step.decode_units, MOST_UNITS + 1);
    }

    #[test]
    fn an_inconsistent_batch_is_refused() {
        let good = batch(&[(2, 1), (1, 40)]);
        let mut step = StepInputs::new();
        assert_eq!(step.check(&good), Ok(()));
        let mut refused = |change: fn(&mut Batch)| {
            let mut batch = good.clone();
            change(&mut batch);
            step.check(&batch).unwrap_err()
        };
        refused(|batch| batch.tokens.push(1));
        refused(|batch| batch.groups[0].slots[0] = batch.groups[0].slots[1]);
        refused(|batch| batch.positions[0] = 7);
        refused(|batch| batch.sequences[1].rows = 1..3);
        refused(|batch| batch.groups[0].tables[1].entries = 0..1000);
        let reason = refused(|batch| {
            let states = (0..).zip(&batch.sequences).map(|(after, _)| BatchState {
                before: None,
                after,
                snapshot: None,
            });
            batch.states = states.collect();
            batch.states[0].snapshot = Some(StateSnapshot { rows: 1, slot: 9 });
        });
        assert!(reason.contains("no multiple of 16"), "{reason}");
        refused(|batch| batch.sample_rows[0] = 3);
        refused(|batch| batch.feedback.push(Feedback { row: 9, sample: 0 }));
        refused(|batch| batch.sequences.truncate(batch.sequences.len() - 1));
    }
}
