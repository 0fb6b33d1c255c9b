//! The inputs of the step in progress, in device memory.
//!
//! All arrays of a step are one block of words, uploaded in one copy. Where an array
//! lies in it depends on the number of rows only, so that a recorded step finds its
//! inputs where they were when it was recorded.

use super::context::Context;
use super::error;
use super::memory::{Buffer, Ptr};
use super::transfer::Uploads;
use crate::device::{Batch, DeviceError, DeviceLimits};
use std::ops::Range;

/// A row or slot that is none.
pub(super) const NONE: u32 = u32::MAX;

/// Rows of packed queries of one work item of prefill attention.
pub(super) const PREFILL_ROWS: usize = 64;

/// Keys of one unit of attention.
pub(super) const UNIT: usize = 128;

/// Units of all sequences of a launch of decode attention, unless it has only one sequence:
/// 2²¹ keys. Bounds the memory for their results, whatever blocks sequences share: 260 MiB
/// for 32 heads of 128 elements.
pub(super) const MOST_UNITS: usize = 1 << 14;

/// Arrays begin at multiples of so many words: 64 bytes.
const ALIGNMENT: usize = 16;

/// Where the arrays of a step lie in its one block of inputs, in words.
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

/// What a step must not reach: its largest position, slot and block lie below.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ends {
    pub(super) positions: usize,
    pub(super) slots: usize,
    pub(super) blocks: usize,
}

impl Ends {
    /// Beyond everything.
    pub(super) const NONE: Self = Self {
        positions: usize::MAX,
        slots: usize::MAX,
        blocks: usize::MAX,
    };

    /// The lower of both.
    pub(super) fn min(self, other: Self) -> Self {
        Self {
            positions: self.positions.min(other.positions),
            slots: self.slots.min(other.slots),
            blocks: self.blocks.min(other.blocks),
        }
    }
}

/// What the launches of a recorded step depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct StepKey {
    /// Rows, padded; each is a sequence of its own, and all are sampled in order.
    pub(super) rows: usize,
    /// Units of attention that there is room for.
    pub(super) units: usize,
}

/// The arrays that `stage` uploads, and what the host has to know of them.
///
/// Pure decode steps may be *padded* to a bucket: see [`StepInputs::padded`].
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
    /// Entries of the decode list, a range a launch.
    decodes: Vec<Range<usize>>,
    max_units: usize,
    /// Units of the launch that has the most.
    decode_units: usize,
    /// Units that attention has room for; `None` before its first use.
    unit_room: Option<usize>,
    key: Option<StepKey>,
    ends: Ends,
    /// Index and rows of the sequences with several rows.
    prefills: Vec<(u32, usize)>,
    /// For how many heads a group the work list is, where it is, and its length.
    work: Option<(usize, Ptr, usize)>,
    /// Ids that the last step sampled, one a sample; what feedback reads.
    sampled: Option<Buffer>,
    sampled_count: usize,
    /// Token ids after feedback, one a row.
    resolved: Option<Buffer>,
}

/// Rows that decode steps are padded to: few sizes, little waste.
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

/// One more than the largest value; 0 if there is none.
fn end(values: impl Iterator<Item = u32>) -> usize {
    values.max().map_or(0, |largest| largest as usize + 1)
}

/// Appends an array, aligned; gives where it begins.
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
    /// Units of the last launch so far.
    units: usize,
    /// Units of the longest sequence, and of the launch that has the most.
    longest: usize,
    most: usize,
}

impl DecodeList {
    /// Appends a sequence with so many units.
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
            ends: Ends::NONE,
            prefills: Vec::new(),
            work: None,
            sampled: None,
            sampled_count: 0,
            resolved: None,
        }
    }

    /// Rows of the step as the caller knows them.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// How many rows to compute where the caller says `rows`: more, when the step is
    /// padded to a bucket. The rows beyond `rows` hold inputs that are safe to
    /// compute with, and their results are not used.
    pub(super) fn padded(&self, rows: usize) -> usize {
        if rows == self.rows {
            self.padded_rows
        } else {
            rows
        }
    }

    /// Sample rows, padded.
    pub(super) fn samples(&self) -> usize {
        self.padded(self.samples)
    }

    fn at(&self, word: usize) -> Ptr {
        self.base.offset_bytes(4 * word)
    }

    /// `u32` a row; not to be used where `feedback` is one.
    pub(super) fn tokens(&self) -> Ptr {
        self.at(self.layout.tokens)
    }

    /// `u32` a row: which sample of the previous step, or [`NONE`].
    pub(super) fn feedback(&self) -> Ptr {
        self.at(self.layout.feedback)
    }

    /// `u32` a row.
    pub(super) fn positions(&self) -> Ptr {
        self.at(self.layout.positions)
    }

    /// `u32` a row; [`NONE`] for padding.
    pub(super) fn slots(&self) -> Ptr {
        self.at(self.layout.slots)
    }

    /// `u32` a sample.
    pub(super) fn sample_rows(&self) -> Ptr {
        self.at(self.layout.sample_rows)
    }

    /// `uint4` a sequence: first row, rows, tokens in the cache with this step's,
    /// where its table begins in [`StepInputs::tables`]. All 0 tokens for padding.
    pub(super) fn sequences(&self) -> Ptr {
        self.at(self.layout.sequences)
    }

    /// `u32` each: the block tables.
    pub(super) fn tables(&self) -> Ptr {
        self.at(self.layout.tables)
    }

    /// The launches of decode attention, each with the number of its entries and where they
    /// begin: `uint2` each, a sequence with one row and how many units of attention those
    /// before it in the launch have.
    pub(super) fn decodes(&self) -> impl Iterator<Item = (Ptr, usize)> {
        let at = |entry: usize| self.at(self.layout.decode_list + 2 * entry);
        self.decodes
            .iter()
            .map(move |launch| (at(launch.start), launch.len()))
    }

    /// At least as many units of 128 keys as the longest sequence of the decode list
    /// has; a power of two, so that few values occur.
    pub(super) fn max_units(&self) -> usize {
        self.max_units
    }

    /// Units of 128 keys that all sequences of a launch have together, at most.
    pub(super) fn decode_units(&self) -> usize {
        self.decode_units
    }

    /// Units that attention has had room for so far.
    pub(super) fn unit_room(&self) -> usize {
        self.unit_room.unwrap_or(0)
    }

    /// Notes that a recorded step may have so many units together: longer ones are
    /// enqueued anew.
    pub(super) fn set_unit_room(&mut self, units: usize) {
        self.unit_room = Some(units);
    }

    /// Prefill attention's work, for `group` query heads a kv head: `uint2` each,
    /// {index of a sequence with several rows, first packed row}, 64 packed rows an
    /// item. With the number of items.
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

    /// `u32` a sample: the ids that the sampler chose last.
    pub(super) fn sampled(&self) -> Ptr {
        self.sampled.as_ref().map_or(Ptr::NULL, Buffer::ptr)
    }

    /// `u32` a row: token ids after feedback.
    pub(super) fn resolved(&self) -> Ptr {
        self.resolved.as_ref().map_or(Ptr::NULL, Buffer::ptr)
    }

    /// `Failed` if the step reaches one of `ends`, which are those of the cache and
    /// of the rotary embedding.
    pub(super) fn require_within(
        &self,
        ends: Ends,
        operation: &'static str,
    ) -> Result<(), DeviceError> {
        for (what, reached, end) in [
            ("position", self.ends.positions, ends.positions),
            ("slot", self.ends.slots, ends.slots),
            ("block", self.ends.blocks, ends.blocks),
        ] {
            error::require(reached <= end, operation, || {
                let last = reached.saturating_sub(1);
                format!("{what} {last} is beyond the {end} that there are")
            })?;
        }
        Ok(())
    }

    /// What the step would be recorded under; `None` for one that is not recorded.
    pub(super) fn key(&self) -> Option<StepKey> {
        self.key
    }

    /// Notes that so many ids were sampled, which the next step may refer to.
    pub(super) fn set_sampled(&mut self, count: usize) {
        self.sampled_count = count;
    }

    /// Makes room for steps of this size.
    pub(super) fn reserve(
        &mut self,
        context: &Context,
        limits: &DeviceLimits,
    ) -> Result<(), DeviceError> {
        let blocks = limits.sequence_tokens.div_ceil(limits.block_tokens.max(1));
        // Many long sequences at once are rare: room for more is made when they come.
        let tables = limits.sequences.saturating_mul(blocks).min(1 << 18);
        let arrays = 5 * limits.rows + 7 * limits.sequences;
        self.uploads
            .reserve(context, arrays + tables + 9 * ALIGNMENT)?;
        self.make_room(context, limits.rows, limits.sequences)?;
        self.limits = Some(*limits);
        Ok(())
    }

    /// Room for so many resolved and sampled ids; what was sampled is kept.
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

    /// Takes `batch` and enqueues its upload. A pure decode step is padded to a
    /// bucket if `pad`.
    pub(super) fn take(
        &mut self,
        context: &Context,
        batch: &Batch,
        pad: bool,
    ) -> Result<(), DeviceError> {
        // Nothing may be computed from a batch that was refused.
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
        self.ends = Ends {
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

    /// Writes all arrays, padded to `padded` rows, into `words`.
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

    /// Why a batch makes no sense.
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
                return Err(format!("row {row} of {rows} awaits a sample"));
            }
            if sample >= count {
                return Err(format!(
                    "row {row} awaits sample {sample}, but the last step had {count}"
                ));
            }
        }
        self.check_sequences(batch)?;
        if let Some(row) = batch.sample_rows.iter().find(|&&row| row >= rows) {
            return Err(format!("logits are wanted of row {row} of {rows}"));
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
                    "sequence {index} has rows {range:?}, row {next} is next"
                ));
            }
            next = range.end;
            let positions = &batch.positions[range.clone()];
            let follows = |pair: &[u32]| pair[0].checked_add(1) == Some(pair[1]);
            if !positions.windows(2).all(follows) {
                return Err(format!(
                    "the positions of sequence {index} do not follow each other"
                ));
            }
            let table = &sequence.table;
            if table.start > table.end || table.end > tables {
                return Err(format!(
                    "sequence {index} has table {table:?} of {tables} entries"
                ));
            }
            if let (Some(limits), Some(&last)) = (self.limits, positions.last()) {
                let tokens = table.len() * limits.block_tokens;
                if last as usize >= tokens {
                    return Err(format!(
                        "the table of sequence {index} ends at {tokens}, before {last}"
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{BatchSequence, Feedback};

    /// Sequences of so many rows each, whose last token is at the position given.
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
    fn buckets_hold_what_they_are_for_and_waste_little() {
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
    fn where_the_arrays_lie_depends_on_the_padded_rows_only() {
        let short = laid_out(&batch(&[(1, 3), (1, 4), (1, 5)]), 4).layout;
        let long = laid_out(&batch(&[(1, 900), (1, 400), (1, 5), (1, 77)]), 4).layout;
        assert_eq!(format!("{short:?}"), format!("{long:?}"));
    }

    #[test]
    fn sequences_are_listed_by_what_they_are() {
        let step = laid_out(&batch(&[(5, 4), (1, 40), (3, 130)]), 9);
        assert_eq!(step.decodes, vec![0..1; 1]);
        assert_eq!(step.words[step.layout.decode_list..][..2], [1, 0]);
        assert_eq!(step.prefills, [(0, 5), (2, 3)]);
        assert_eq!((step.max_units, step.decode_units), (1, 1));
    }

    #[test]
    fn what_one_launch_has_no_room_for_is_cut_into_several() {
        let tokens = |units: usize| (units * UNIT) as u32 - 1;
        let half = (1, tokens(MOST_UNITS / 2));
        let step = laid_out(&batch(&[half, half, (1, 0), half, (1, 40)]), 5);
        assert_eq!(step.decodes, [0..2, 2..5]);
        let list = &step.words[step.layout.decode_list..][..10];
        let after = MOST_UNITS as u32 / 2;
        assert_eq!(list, [0, 0, 1, after, 2, 0, 3, 1, 4, after + 1]);
        assert_eq!(step.decode_units, MOST_UNITS);
        assert_eq!(step.max_units, MOST_UNITS / 2);
        // One that is longer has a launch of its own.
        let step = laid_out(&batch(&[(1, 0), (1, tokens(MOST_UNITS + 1)), (1, 0)]), 3);
        assert_eq!(step.decodes, [0..1, 1..2, 2..3]);
        assert_eq!(step.decode_units, MOST_UNITS + 1);
    }

    #[test]
    fn a_batch_that_makes_no_sense_is_refused() {
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
