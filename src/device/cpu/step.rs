//! Inputs of the step in progress, checked once so that operations need not check them.

use super::CpuDevice;
use crate::device::{Batch, BatchSequence, DeviceError, Finished, Staged, StepOps};

/// A checked batch: every row has a token, the sequences cover the rows in order, and no two
/// rows write the same slot.
#[derive(Default)]
pub(crate) struct StagedBatch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) slots: Vec<u32>,
    pub(crate) sequences: Vec<BatchSequence>,
    pub(crate) tables: Vec<u32>,
    pub(crate) sample_rows: Vec<usize>,
    /// Number of the batch. Values computed for another number are stale.
    pub(crate) generation: u64,
    /// One more than the largest position, slot and block; 0 for an empty batch.
    pub(crate) position_end: usize,
    pub(crate) slot_end: usize,
    pub(crate) block_end: usize,
    sorted: Vec<u32>,
}

fn end(values: &[u32]) -> usize {
    values
        .iter()
        .max()
        .map_or(0, |&largest| largest as usize + 1)
}

/// Replaces the contents of `to` with `from`. Reserves the capacity of `from` as well, so that
/// `to` does not reallocate as long as `from` does not.
fn copy<T: Clone>(to: &mut Vec<T>, from: &Vec<T>) {
    to.clear();
    to.reserve_exact(from.capacity());
    to.extend_from_slice(from);
}

impl StagedBatch {
    /// Returns the number of rows.
    pub(crate) fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Takes `batch`. Tokens that only the device knows are read from `sampled`.
    pub(crate) fn take(&mut self, batch: &Batch, sampled: &[u32]) -> Result<(), DeviceError> {
        self.generation += 1;
        let outcome = self.check(batch, sampled);
        if outcome.is_err() {
            // A rejected batch must not be computed.
            self.tokens.clear();
            self.sequences.clear();
            self.sample_rows.clear();
        }
        outcome.map_err(|reason| DeviceError::Failed {
            device: "cpu",
            operation: "stage",
            reason,
        })
    }

    fn check(&mut self, batch: &Batch, sampled: &[u32]) -> Result<(), String> {
        let rows = batch.rows();
        if batch.positions.len() != rows || batch.slots.len() != rows {
            let (positions, slots) = (batch.positions.len(), batch.slots.len());
            return Err(format!(
                "{rows} tokens have {positions} positions and {slots} slots"
            ));
        }
        copy(&mut self.tokens, &batch.tokens);
        copy(&mut self.positions, &batch.positions);
        copy(&mut self.slots, &batch.slots);
        copy(&mut self.sequences, &batch.sequences);
        copy(&mut self.tables, &batch.tables);
        copy(&mut self.sample_rows, &batch.sample_rows);
        for feedback in &batch.feedback {
            let (row, sample) = (feedback.row, feedback.sample);
            let token = self.tokens.get_mut(row);
            let token = token
                .ok_or_else(|| format!("feedback for row {row}, but the batch has {rows} rows"))?;
            *token = *sampled.get(sample).ok_or_else(|| {
                format!(
                    "row {row} needs sample {sample}, but the last step had {} samples",
                    sampled.len()
                )
            })?;
        }
        self.check_sequences(rows)?;
        if let Some(row) = self.sample_rows.iter().find(|&&row| row >= rows) {
            return Err(format!(
                "sample row {row} is out of range: the batch has {rows} rows"
            ));
        }
        copy(&mut self.sorted, &batch.slots);
        self.sorted.sort_unstable();
        if let Some(pair) = self.sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(format!("two rows write slot {}", pair[0]));
        }
        self.position_end = end(&self.positions);
        self.slot_end = end(&self.slots);
        self.block_end = end(&self.tables);
        Ok(())
    }

    fn check_sequences(&self, rows: usize) -> Result<(), String> {
        let mut next = 0;
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
            if positions
                .windows(2)
                .any(|pair| pair[0].checked_add(1) != Some(pair[1]))
            {
                return Err(format!(
                    "the positions of sequence {index} are not consecutive"
                ));
            }
            let table = &sequence.table;
            if table.start > table.end || table.end > self.tables.len() {
                let tables = self.tables.len();
                return Err(format!(
                    "block table {table:?} of sequence {index} is outside the batch's {tables} \
                     table entries"
                ));
            }
        }
        if next != rows {
            return Err(format!("sequences cover {next} of {rows} rows"));
        }
        Ok(())
    }
}

impl StepOps for CpuDevice {
    fn stage(&mut self, batch: &Batch) -> Result<Staged, DeviceError> {
        self.staged.take(batch, &self.sampled)?;
        self.workers.begin_step();
        Ok(Staged::Enqueue)
    }

    fn finish(&mut self, outcome: Result<(), DeviceError>) -> Result<Finished, DeviceError> {
        self.workers.end_step();
        outcome.map(|()| Finished::Done)
    }
}
