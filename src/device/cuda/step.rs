//! The inputs of the step in progress, in device memory.
//!
//! All arrays of a step form one run of words, uploaded in one copy. In a decode step, where an
//! array starts depends only on the padded number of rows, so a replayed step finds its inputs
//! where they were when it was recorded.

use super::CudaDevice;
use super::context::Context;
use super::error;
use super::memory::{Buffer, Ptr};
use super::transfer::Uploads;
use crate::device::{Batch, DeviceError, DeviceLimits, Finished, Staged, StepOps};
use std::ops::Range;

/// Sentinel: no row, no slot.
pub(super) const NONE: u32 = u32::MAX;

/// Packed query rows per work item of prefill attention.
pub(super) const PREFILL_ROWS: usize = 64;

/// Keys per unit of attention.
pub(super) const UNIT: usize = 128;

/// Maximum number of units per launch of decode attention (2²¹ keys), unless the launch has
/// only one sequence. It bounds the memory for partial results, however many blocks sequences
/// share: 260 MiB for 32 heads of 128 elements.
pub(super) const MOST_UNITS: usize = 1 << 14;

/// Alignment of each array, in words: 64 bytes.
const ALIGNMENT: usize = 16;

/// Offset of each array of a step in its run of words, in words.
#[derive(Clone, Copy, Debug, Default)]
struct Layout {
    tokens: usize,
    feedback: usize,
    positions: usize,
    slots: usize,
    sample_rows: usize,
    sequences: usize,
    decode_list: usize,
    tables: usize,
}

/// Exclusive upper bounds on the positions, slots and blocks that a step uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) blocks: usize,
}

impl Bounds {
    /// No bounds.
    pub(super) const UNLIMITED: Self = Self {
        positions: usize::MAX,
        slots: usize::MAX,
        blocks: usize::MAX,
    };

    /// Returns the lower of each pair of bounds.
    pub(super) fn min(self, other: Self) -> Self {
        Self {
            positions: self.positions.min(other.positions),
            slots: self.slots.min(other.slots),
            blocks: self.blocks.min(other.blocks),
        }
    }
}

/// Size of a decode step: everything that the launches of a recorded step depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepKey {
    /// Number of rows, padded. Each row is a sequence of its own, and all are sampled in order.
    pub(super) rows: usize,
    /// Units of the longest sequence, rounded up: [`StepInputs::max_units`].
    pub(super) units: usize,
}

/// The arrays that `stage` uploads, and what the host needs to know about them.
///
/// A step that only decodes may be *padded* to a bucket; see [`StepInputs::padded`].
pub(super) struct StepInputs {
    limits: Option<DeviceLimits>,
    uploads: Uploads,
    work_uploads: Uploads,
    base: Ptr,
    layout: Layout,
    words: Vec<u32>,
    sorted: Vec<u32>,
    rows: usize,
    padded_rows: usize,
    samples: usize,
    /// Range of entries of the decode list, per launch.
    decodes: Vec<Range<usize>>,
    max_units: usize,
    /// Largest number of units in one launch.
    decode_units: usize,
    /// Number of units that attention has scratch memory for; `None` before its first use.
    unit_room: Option<usize>,
    key: Option<StepKey>,
    bounds: Bounds,
    /// Index and number of rows of each sequence with several rows.
    prefills: Vec<(u32, usize)>,
    /// The uploaded prefill work list, if there is one: the query heads per group that it is
    /// for, its address, and its number of items.
    work: Option<(usize, Ptr, usize)>,
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

/// Returns one more than the largest value, or 0 if there is none.
fn end(values: impl Iterator<Item = u32>) -> usize {
    values.max().map_or(0, |largest| largest as usize + 1)
}

/// Appends an aligned array and returns its offset.
fn append(words: &mut Vec<u32>, array: impl IntoIterator<Item = u32>) -> usize {
    words.resize(words.len().next_multiple_of(ALIGNMENT), 0);
    let start = words.len();
    words.extend(array);
    start
}

/// The decode list, cut into launches of at most [`MOST_UNITS`] units.
#[derive(Default)]
struct DecodeList {
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
    /// Appends a sequence that has `units` units.
    fn push(&mut self, sequence: u32, units: usize) {
        let entry = self.words.len() / 2;
        match self.launches.last_mut() {
            Some(launch) if self.units + units <= MOST_UNITS => launch.end = entry + 1,
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

impl StepInputs {
    pub(super) fn new() -> Self {
        Self {
            limits: None,
            uploads: Uploads::new("the inputs of a step"),
            work_uploads: Uploads::new("the inputs of a step"),
            base: Ptr::NULL,
            layout: Layout::default(),
            words: Vec::new(),
            sorted: Vec::new(),
            rows: 0,
            padded_rows: 0,
            samples: 0,
            decodes: Vec::new(),
            max_units: 0,
            decode_units: 0,
            unit_room: None,
            key: None,
            bounds: Bounds::UNLIMITED,
            prefills: Vec::new(),
            work: None,
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

    /// Returns the cache slots: `u32` per row, [`NONE`] for padding.
    pub(super) fn slots(&self) -> Ptr {
        self.at(self.layout.slots)
    }

    /// Returns the sampled rows: `u32` per sample.
    pub(super) fn sample_rows(&self) -> Ptr {
        self.at(self.layout.sample_rows)
    }

    /// Returns the sequences: `uint4` per sequence, {first row, number of rows, tokens in the
    /// cache including this step's, offset of its table in [`StepInputs::tables`]}. Padding has
    /// 0 tokens.
    pub(super) fn sequences(&self) -> Ptr {
        self.at(self.layout.sequences)
    }

    /// Returns the block tables: `u32` per entry, one table after the other.
    pub(super) fn tables(&self) -> Ptr {
        self.at(self.layout.tables)
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
    /// power of two so that few values occur.
    pub(super) fn max_units(&self) -> usize {
        self.max_units
    }

    /// Returns the largest number of units in one launch of decode attention.
    pub(super) fn decode_units(&self) -> usize {
        self.decode_units
    }

    /// Returns the number of units that attention has scratch memory for so far.
    pub(super) fn unit_room(&self) -> usize {
        self.unit_room.unwrap_or(0)
    }

    /// Sets the number of units that attention has scratch memory for. Steps with more units
    /// are neither recorded nor replayed until the memory has grown.
    pub(super) fn set_unit_room(&mut self, units: usize) {
        self.unit_room = Some(units);
    }

    /// Returns the address and the number of the work items of prefill attention, for `group`
    /// query heads per key-value head. An item covers 64 packed rows and is a `uint2`: {index
    /// of a sequence with several rows, first packed row}.
    pub(super) fn prefill_work(
        &mut self,
        context: &Context,
        group: usize,
    ) -> Result<(Ptr, usize), DeviceError> {
        if let Some((of, ptr, count)) = self.work
            && of == group
        {
            return Ok((ptr, count));
        }
        let mut words = Vec::new();
        for &(sequence, rows) in &self.prefills {
            for first in (0..rows * group).step_by(PREFILL_ROWS) {
                words.extend([sequence, first as u32]);
            }
        }
        let ptr = match words.is_empty() {
            true => Ptr::NULL,
            false => self.work_uploads.write(context, &words)?,
        };
        self.work = Some((group, ptr, words.len() / 2));
        Ok((ptr, words.len() / 2))
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
        ] {
            error::require(reached <= end, operation, || {
                let last = reached.saturating_sub(1);
                format!("{what} {last} is out of range: there are {end}")
            })?;
        }
        Ok(())
    }

    /// Returns the key under which the step is recorded, or `None` if it must not be recorded.
    pub(super) fn key(&self) -> Option<StepKey> {
        self.key
    }

    /// Sets the number of token ids that were sampled, to which the next step may refer.
    pub(super) fn set_sampled(&mut self, count: usize) {
        self.sampled_count = count;
    }

    /// Makes room for steps within `limits`.
    pub(super) fn reserve(
        &mut self,
        context: &Context,
        limits: &DeviceLimits,
    ) -> Result<(), DeviceError> {
        let blocks = limits.sequence_tokens.div_ceil(limits.block_tokens.max(1));
        // Many long sequences at once are rare. More room is made if they occur.
        let tables = limits.sequences.saturating_mul(blocks).min(1 << 18);
        let arrays = 5 * limits.rows + 7 * limits.sequences;
        self.uploads
            .reserve(context, arrays + tables + 9 * ALIGNMENT)?;
        self.make_room(context, limits.rows, limits.sequences)?;
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
        (self.rows, self.padded_rows, self.samples) = (0, 0, 0);
        (self.key, self.work) = (None, None);
        self.decodes.clear();
        self.prefills.clear();
        self.check(batch)
            .map_err(|reason| error::failed("stage", reason))?;
        let rows = batch.rows();
        let decode = batch
            .sequences
            .iter()
            .all(|sequence| sequence.rows.len() == 1)
            && batch.sample_rows.iter().copied().eq(0..rows);
        let largest = match self.limits {
            Some(limits) if pad && decode => limits.rows.min(limits.sequences),
            _ => 0,
        };
        let recorded = rows > 0 && rows <= largest;
        let padded = if recorded {
            bucket(rows).min(largest)
        } else {
            rows
        };
        self.make_room(
            context,
            padded,
            batch.sample_rows.len().max(self.sampled_count),
        )?;
        self.lay_out(batch, padded);
        self.base = self.uploads.write(context, &self.words)?;
        (self.rows, self.padded_rows, self.samples) = (rows, padded, batch.sample_rows.len());
        self.bounds = Bounds {
            positions: end(batch.positions.iter().copied()),
            slots: end(batch.slots.iter().copied()),
            blocks: end(batch.tables.iter().copied()),
        };
        let fits =
            self.unit_room.is_none_or(|room| self.decode_units <= room) && self.decodes.len() <= 1;
        self.key = (recorded && fits).then_some(StepKey {
            rows: padded,
            units: self.max_units,
        });
        Ok(())
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
        let slots = append(words, batch.slots.iter().copied().chain(extra(NONE)));
        let samples = batch.sample_rows.iter().map(|&row| row as u32);
        let padding = padding.map(|row| row as u32);
        let sample_rows = append(words, samples.chain(padding.clone()));
        let sequences = append(words, []);
        let mut decodes = DecodeList::default();
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let (first, count) = (sequence.rows.start, sequence.rows.len());
            let last = sequence.rows.clone().last();
            let length = last.map_or(0, |last| batch.positions[last] as usize + 1);
            let start = sequence.table.start;
            words.extend([first as u32, count as u32, length as u32, start as u32]);
            match count {
                0 => {}
                1 => decodes.push(index as u32, length.div_ceil(UNIT)),
                _ => self.prefills.push((index as u32, count)),
            }
        }
        let count = batch.sequences.len() as u32;
        for (offset, row) in padding.enumerate() {
            words.extend([row, 1, 0, 0]);
            decodes.push(count + offset as u32, 0);
        }
        self.max_units = decodes.longest.next_power_of_two();
        self.decode_units = decodes.most;
        let decode_list = append(words, decodes.words);
        self.decodes = decodes.launches;
        let tables = append(words, batch.tables.iter().copied());
        self.layout = Layout {
            tokens,
            feedback,
            positions,
            slots,
            sample_rows,
            sequences,
            decode_list,
            tables,
        };
    }

    /// Checks that a batch is consistent. The error says why it is not.
    fn check(&mut self, batch: &Batch) -> Result<(), String> {
        let rows = batch.rows();
        let (positions, slots) = (batch.positions.len(), batch.slots.len());
        if positions != rows || slots != rows {
            return Err(format!(
                "{rows} tokens have {positions} positions and {slots} slots"
            ));
        }
        for entry in &batch.feedback {
            let (row, sample, count) = (entry.row, entry.sample, self.sampled_count);
            if row >= rows {
                return Err(format!(
                    "feedback for row {row}, but the batch has {rows} rows"
                ));
            }
            if sample >= count {
                return Err(format!(
                    "row {row} needs sample {sample}, but the last step had {count} samples"
                ));
            }
        }
        self.check_sequences(batch)?;
        if let Some(row) = batch.sample_rows.iter().find(|&&row| row >= rows) {
            return Err(format!(
                "sample row {row} is out of range: the batch has {rows} rows"
            ));
        }
        self.sorted.clear();
        self.sorted.extend_from_slice(&batch.slots);
        self.sorted.sort_unstable();
        if let Some(pair) = self.sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two rows write slot {}", pair[0]));
        }
        Ok(())
    }

    fn check_sequences(&self, batch: &Batch) -> Result<(), String> {
        let (mut next, rows, tables) = (0, batch.rows(), batch.tables.len());
        for (index, sequence) in batch.sequences.iter().enumerate() {
            let range = &sequence.rows;
            if range.start != next || range.end < range.start || range.end > rows {
                return Err(format!(
                    "sequence {index} has rows {range:?}, but must start at row {next} and stay \
                     within the batch"
                ));
            }
            next = range.end;
            let positions = &batch.positions[range.clone()];
            let follows = |pair: &[u32]| pair[0].checked_add(1) == Some(pair[1]);
            if !positions.windows(2).all(follows) {
                return Err(format!(
                    "the positions of sequence {index} are not consecutive"
                ));
            }
            let table = &sequence.table;
            if table.start > table.end || table.end > tables {
                return Err(format!(
                    "block table {table:?} of sequence {index} is outside the batch's {tables} \
                     table entries"
                ));
            }
            if let (Some(limits), Some(&last)) = (self.limits, positions.last()) {
                let tokens = table.len() * limits.block_tokens;
                if last as usize >= tokens {
                    return Err(format!(
                        "the block table of sequence {index} covers {tokens} tokens, but position \
                         {last} is needed"
                    ));
                }
            }
        }
        if next != rows {
            return Err(format!("sequences cover {next} of {rows} rows"));
        }
        Ok(())
    }
}

impl StepOps for CudaDevice {
    fn reserve(&mut self, limits: &DeviceLimits) -> Result<(), DeviceError> {
        self.limits = Some(*limits);
        self.step.reserve(&self.context, limits)
    }

    fn depth(&self) -> usize {
        2
    }

    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError> {
        self.graphs.abandon(&self.context);
        self.step.take(&self.context, batch, self.options.graphs)?;
        self.graphs.begin(&self.context, &self.step)
    }

    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        self.graphs.finish(&self.context, outcome)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{BatchSequence, Feedback};

    /// Returns a batch of sequences, each given by its number of rows and the position of its
    /// last token.
    fn batch(sequences: &[(usize, u32)]) -> Batch {
        let mut batch = Batch::default();
        for &(rows, last) in sequences {
            let first = batch.rows();
            let table = batch.tables.len();
            for row in 0..rows as u32 {
                let position = last + 1 - rows as u32 + row;
                batch.tokens.push(100 + position);
                batch.positions.push(position);
                batch.slots.push((first as u32 + row) * 1000);
            }
            let blocks = last as usize / 16 + 1;
            batch
                .tables
                .extend((0..blocks as u32).map(|block| 7 + block));
            batch.sequences.push(BatchSequence {
                rows: first..first + rows,
                table: table..table + blocks,
            });
            batch.sample_rows.push(first + rows - 1);
        }
        batch
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
        assert_eq!(at(layout.slots, 4), [0, 1000, 2000, NONE]);
        assert_eq!(at(layout.sample_rows, 4), [0, 1, 2, 3]);
        let sequences = [0, 1, 1, 0, 1, 1, 301, 1, 2, 1, 128, 20, 3, 1, 0, 0];
        assert_eq!(at(layout.sequences, 16), sequences);
        assert_eq!(at(layout.decode_list, 8), [0, 0, 1, 1, 2, 4, 3, 5]);
        assert_eq!(step.decodes, vec![0..4; 1]);
        assert_eq!((step.max_units, step.decode_units), (4, 5));
        assert_eq!(at(layout.tables, 28), &batch.tables[..]);
    }

    #[test]
    fn array_offsets_depend_only_on_the_padded_rows() {
        let short = laid_out(&batch(&[(1, 3), (1, 4), (1, 5)]), 4).layout;
        let long = laid_out(&batch(&[(1, 900), (1, 400), (1, 5), (1, 77)]), 4).layout;
        assert_eq!(format!("{short:?}"), format!("{long:?}"));
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
        refused(|batch| batch.slots[0] = batch.slots[1]);
        refused(|batch| batch.positions[0] = 7);
        refused(|batch| batch.sequences[1].rows = 1..3);
        refused(|batch| batch.sequences[1].table = 0..1000);
        refused(|batch| batch.sample_rows[0] = 3);
        refused(|batch| batch.feedback.push(Feedback { row: 9, sample: 0 }));
        refused(|batch| batch.sequences.truncate(batch.sequences.len() - 1));
    }
}
