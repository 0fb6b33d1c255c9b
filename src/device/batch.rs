//! The inputs of a step: its rows, and where the keys and values of their sequences are.
//!
//! The layers of a model are divided into *groups*. The layers of a group share the block tables
//! and the slots, because they attend to the same tokens: all of them, or those within a window.
//! A table may therefore begin in the middle of its sequence. All groups take their blocks from
//! the same cache, and each block belongs to one group.

use super::attention::ATTENTION_SPAN;
use super::recurrent::{BatchState, check_states};
use std::ops::Range;

/// The rows of one sequence in a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchSequence {
    /// Rows of the sequence, which are consecutive tokens.
    pub rows: Range<usize>,
}

/// Block table of one sequence in one group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchTable {
    /// Range of the table in [`BatchGroup::entries`].
    pub entries: Range<usize>,
    /// Index of the first entry's block, counted from the start of the sequence. Entry `i` is
    /// the block of the positions from `(first + i) · block_tokens`.
    pub first: usize,
}

/// Where the layers of one group find keys and values in a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchGroup {
    /// Slot that each row's key and value are written to: `block · block_tokens + offset`.
    pub slots: Vec<u32>,
    /// One entry per sequence of the batch.
    pub tables: Vec<BatchTable>,
    /// Blocks of the tables, one table after the other.
    pub entries: Vec<u32>,
}

/// Reference to a token id that so far only the device knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feedback {
    /// Row that takes the token.
    pub row: usize,
    /// Index of the sample in the previous step.
    pub sample: usize,
}

/// Input of one step, as flat arrays with one entry per row unless stated otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Token ids. The entry of a row that `feedback` names is ignored.
    pub tokens: Vec<u32>,
    /// Rows whose token is a sample of the previous step.
    pub feedback: Vec<Feedback>,
    /// Position of each token in its sequence, from 0.
    pub positions: Vec<u32>,
    /// One entry per sequence. Their rows follow each other without gaps.
    pub sequences: Vec<BatchSequence>,
    /// One entry per group of layers.
    pub groups: Vec<BatchGroup>,
    /// One entry per sequence; none if the model has no recurrent layers.
    pub states: Vec<BatchState>,
    /// Rows whose logits are needed, in ascending order.
    pub sample_rows: Vec<usize>,
}

impl Batch {
    /// Creates an empty batch for a model with this many groups of layers.
    pub fn new(groups: usize) -> Self {
        Self {
            groups: vec![BatchGroup::default(); groups],
            ..Self::default()
        }
    }

    /// Returns the number of tokens.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Empties every array but keeps its memory, and keeps the number of groups.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.feedback.clear();
        self.positions.clear();
        self.sequences.clear();
        for group in &mut self.groups {
            group.slots.clear();
            group.tables.clear();
            group.entries.clear();
        }
        self.states.clear();
        self.sample_rows.clear();
    }

    /// Appends a sequence whose rows are `tokens`, from position `start` on. `tables` has one
    /// entry per group: [`BatchTable::first`], and the blocks from there on. A row whose position
    /// is in none of the blocks gets a slot that devices refuse.
    pub fn push<Blocks: IntoIterator<Item = u32>>(
        &mut self,
        tokens: &[u32],
        start: usize,
        block_tokens: usize,
        tables: impl IntoIterator<Item = (usize, Blocks)>,
    ) {
        let first_row = self.rows();
        let positions = start..start + tokens.len();
        self.tokens.extend_from_slice(tokens);
        let each = positions.clone().map(|position| position as u32);
        self.positions.extend(each);
        let rows = first_row..self.rows();
        self.sequences.push(BatchSequence { rows });
        for (group, (first, blocks)) in self.groups.iter_mut().zip(tables) {
            group.push(positions.clone(), block_tokens, first, blocks);
        }
    }

    /// Returns one more than the largest position, slot and block; 0 if there is none.
    pub(super) fn ends(&self) -> [usize; 3] {
        let end = |values: &[u32]| values.iter().max().map_or(0, |last| *last as usize + 1);
        let of_groups = |array: fn(&BatchGroup) -> &[u32]| {
            let ends = self.groups.iter().map(|group| end(array(group)));
            ends.max().unwrap_or(0)
        };
        [
            end(&self.positions),
            of_groups(|group| &group.slots),
            of_groups(|group| &group.entries),
        ]
    }

    /// Checks that the arrays fit together. `samples` is the number of samples of the previous
    /// step, and `sorted` is a buffer. The error says what is wrong.
    pub(super) fn check(&self, samples: usize, sorted: &mut Vec<u32>) -> Result<(), String> {
        let rows = self.rows();
        if self.positions.len() != rows {
            let positions = self.positions.len();
            return Err(format!("{rows} tokens have {positions} positions"));
        }
        for &Feedback { row, sample } in &self.feedback {
            if row >= rows {
                return Err(format!(
                    "feedback for row {row}, but the batch has {rows} rows"
                ));
            }
            if sample >= samples {
                return Err(format!(
                    "row {row} needs sample {sample}, but the last step had {samples} samples"
                ));
            }
        }
        self.check_sequences()?;
        let rows_of = self.sequences.iter().map(|sequence| sequence.rows.len());
        check_states(&self.states, rows_of, sorted)?;
        if let Some(row) = self.sample_rows.iter().find(|&&row| row >= rows) {
            return Err(format!(
                "sample row {row} is out of range: the batch has {rows} rows"
            ));
        }
        sorted.clear();
        for (index, group) in self.groups.iter().enumerate() {
            group
                .check(rows, self.sequences.len())
                .map_err(|reason| format!("group {index}: {reason}"))?;
            sorted.extend_from_slice(&group.slots);
        }
        sorted.sort_unstable();
        match sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(format!("two rows write slot {}", pair[0])),
            None => Ok(()),
        }
    }

    fn check_sequences(&self) -> Result<(), String> {
        let (mut next, rows) = (0, self.rows());
        for (index, sequence) in self.sequences.iter().enumerate() {
            let range = &sequence.rows;
            if range.start != next || range.end < range.start || range.end > rows {
                return Err(format!(
                    "sequence {index} has rows {range:?}, but must start at row {next} and stay \
                     within the batch"
                ));
            }
            next = range.end;
            let positions = &self.positions[range.clone()];
            let follows = |pair: &[u32]| pair[0].checked_add(1) == Some(pair[1]);
            if !positions.windows(2).all(follows) {
                return Err(format!(
                    "the positions of sequence {index} are not consecutive"
                ));
            }
        }
        if next != rows {
            return Err(format!("sequences cover {next} of {rows} rows"));
        }
        Ok(())
    }
}

impl BatchGroup {
    fn push(
        &mut self,
        positions: Range<usize>,
        block_tokens: usize,
        first: usize,
        blocks: impl IntoIterator<Item = u32>,
    ) {
        let start = self.entries.len();
        self.entries.extend(blocks);
        let table = &self.entries[start..];
        self.slots.extend(positions.map(|position| {
            let index = (position / block_tokens).checked_sub(first);
            let block = index.and_then(|index| table.get(index));
            let offset = (position % block_tokens) as u32;
            block.map_or(u32::MAX, |block| block * block_tokens as u32 + offset)
        }));
        self.tables.push(BatchTable {
            entries: start..self.entries.len(),
            first,
        });
    }

    /// Checks that the tables of these sequences have a block for their last position.
    pub(super) fn check_ends(
        &self,
        sequences: &[BatchSequence],
        positions: &[u32],
        block_tokens: usize,
    ) -> Result<(), String> {
        for (index, (sequence, table)) in sequences.iter().zip(&self.tables).enumerate() {
            let Some(last) = sequence.rows.clone().last() else {
                continue;
            };
            let blocks = table.first.saturating_add(table.entries.len());
            let (position, tokens) = (positions[last], blocks.saturating_mul(block_tokens));
            if position as usize >= tokens {
                return Err(format!(
                    "the block table of sequence {index} ends after {tokens} tokens, but position \
                     {position} is needed"
                ));
            }
        }
        Ok(())
    }

    /// Returns the longest window for which the tables of these sequences begin early enough:
    /// `usize::MAX` if all of them begin at the first token, and 0 if one begins too late for
    /// any window. See [`ATTENTION_SPAN`].
    pub(super) fn longest_window(
        &self,
        sequences: &[BatchSequence],
        positions: &[u32],
        block_tokens: usize,
    ) -> usize {
        let each = sequences.iter().zip(&self.tables);
        let late = each.filter(|(sequence, table)| table.first > 0 && !sequence.rows.is_empty());
        let windows = late.map(|(sequence, table)| {
            let begin = table.first.saturating_mul(block_tokens);
            let span = begin
                .div_ceil(ATTENTION_SPAN)
                .saturating_mul(ATTENTION_SPAN);
            (positions[sequence.rows.start] as usize + 1).saturating_sub(span)
        });
        windows.min().unwrap_or(usize::MAX)
    }

    /// Checks the arrays of a batch with this many rows and sequences, but not the slots.
    fn check(&self, rows: usize, sequences: usize) -> Result<(), String> {
        if self.slots.len() != rows {
            return Err(format!("{rows} rows have {} slots", self.slots.len()));
        }
        if self.tables.len() != sequences {
            let tables = self.tables.len();
            return Err(format!("{sequences} sequences have {tables} block tables"));
        }
        let end = self.entries.len();
        let wrong = |table: &BatchTable| {
            let entries = &table.entries;
            entries.start > entries.end || entries.end > end
        };
        match self.tables.iter().position(wrong) {
            Some(index) => Err(format!(
                "block table {:?} of sequence {index} is outside the {end} table entries",
                self.tables[index].entries
            )),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a batch of one group with these sequences: the range of their positions, the first
    /// block of the table, and the blocks.
    fn batch(sequences: &[(Range<usize>, usize, &[u32])]) -> Batch {
        let mut batch = Batch::new(1);
        for (positions, first, blocks) in sequences {
            let tokens = vec![0; positions.len()];
            let table = [(*first, blocks.iter().copied())];
            batch.push(&tokens, positions.start, 16, table);
        }
        batch
    }

    fn longest_window(batch: &Batch) -> usize {
        batch.groups[0].longest_window(&batch.sequences, &batch.positions, 16)
    }

    #[test]
    fn slots_follow_from_the_table_wherever_it_begins() {
        let batch = batch(&[(30..34, 0, &[9, 4, 7]), (200..201, 12, &[5])]);
        assert_eq!(batch.positions, [30, 31, 32, 33, 200]);
        let group = &batch.groups[0];
        assert_eq!(group.slots, [78, 79, 112, 113, 88]);
        assert_eq!(group.entries, [9, 4, 7, 5]);
        assert_eq!(
            (group.tables[1].first, &group.tables[1].entries),
            (12, &(3..4))
        );
        assert_eq!(batch.check(0, &mut Vec::new()), Ok(()));
    }

    #[test]
    fn a_row_without_a_block_gets_a_slot_that_no_cache_has() {
        for first in [0, 3] {
            let batch = batch(&[(32..33, first, &[9, 4])]);
            assert_eq!(batch.groups[0].slots, [u32::MAX]);
        }
    }

    #[test]
    fn a_cleared_batch_keeps_its_groups() {
        let mut batch = Batch::new(2);
        batch.push(&[1], 0, 16, [(0, [3]), (0, [4])]);
        assert_eq!(batch.groups[1].slots, [64]);
        batch.clear();
        assert_eq!(batch, Batch::new(2));
    }

    #[test]
    fn tables_that_end_before_the_last_row_are_refused() {
        let ends = |positions: Range<usize>, first, blocks: &[u32]| {
            let batch = batch(&[(0..1, 0, &[0]), (positions, first, blocks)]);
            batch.groups[0].check_ends(&batch.sequences, &batch.positions, 16)
        };
        assert_eq!(ends(200..208, 12, &[5]), Ok(()));
        let error = ends(200..209, 12, &[5]).unwrap_err();
        assert!(
            error.contains("sequence 1 ends after 208 tokens"),
            "{error}"
        );
        assert!(ends(0..17, 0, &[5]).is_err());
    }

    #[test]
    fn a_table_reaches_back_to_the_span_in_which_the_window_begins() {
        let window = |position, first| {
            let blocks = [1; 100];
            longest_window(&batch(&[(position..position + 4, first, &blocks)]))
        };
        assert_eq!(window(700, 0), usize::MAX);
        // The window of 445 tokens before position 700 begins at position 256.
        assert_eq!(window(700, 16), 445);
        // Without one more block, only the span from 384 on is there as a whole.
        assert_eq!(window(700, 17), 317);
        assert_eq!(window(700, 24), 317);
        // No span that begins in the table contains the position.
        assert_eq!(window(700, 41), 0);
        assert_eq!(window(700, 60), 0);
        // The shortest counts.
        let blocks = [1; 100];
        let two = batch(&[(700..701, 16, &blocks), (900..901, 24, &blocks)]);
        assert_eq!(longest_window(&two), 445);
    }

    #[test]
    fn groups_are_refused_by_number() {
        let good = {
            let mut batch = Batch::new(2);
            batch.push(&[1, 2], 15, 16, [(0, [0, 1]), (0, [2, 3])]);
            batch
        };
        assert_eq!(good.check(0, &mut Vec::new()), Ok(()));
        let refused = |change: fn(&mut BatchGroup), complaint: &str| {
            let mut batch = good.clone();
            change(&mut batch.groups[1]);
            let error = batch.check(0, &mut Vec::new()).unwrap_err();
            assert!(error.contains(complaint), "{error}");
        };
        refused(
            |group| group.slots.truncate(1),
            "group 1: 2 rows have 1 slots",
        );
        refused(|group| group.tables.clear(), "group 1: 1 sequences have 0");
        refused(
            |group| group.tables[0].entries = 1..3,
            "group 1: block table 1..3",
        );
        // The groups share the cache.
        refused(|group| group.slots[0] = 16, "two rows write slot 16");
    }
}
