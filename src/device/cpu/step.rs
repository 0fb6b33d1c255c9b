//! Inputs of the step in progress, checked once so that operations need not check them.

use super::CpuDevice;
use crate::device::{
    Batch, BatchGroup, BatchSequence, BatchState, CacheLayer, DeviceError, Feedback, Finished,
    Staged, StepOps,
};

/// A checked batch: every row has a token, the sequences cover the rows in order, and no two
/// rows write the same slot.
#[derive(Default)]
pub(crate) struct StagedBatch {
    pub(crate) tokens: Vec<u32>,
    pub(crate) positions: Vec<u32>,
    pub(crate) sequences: Vec<BatchSequence>,
    groups: Vec<BatchGroup>,
    pub(crate) states: Vec<BatchState>,
    pub(crate) sample_rows: Vec<usize>,
    /// Number of the batch. Values computed for another number are stale.
    pub(crate) generation: u64,
    /// One more than the largest position, and the largest slot and block of any group; 0 for
    /// an empty batch.
    pub(crate) position_end: usize,
    pub(crate) slot_end: usize,
    pub(crate) block_end: usize,
    sorted: Vec<u32>,
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
            self.states.clear();
            self.sample_rows.clear();
        }
        outcome.map_err(|reason| DeviceError::Failed {
            device: "cpu",
            operation: "stage",
            reason,
        })
    }

    fn check(&mut self, batch: &Batch, sampled: &[u32]) -> Result<(), String> {
        batch.check(sampled.len(), &mut self.sorted)?;
        copy(&mut self.tokens, &batch.tokens);
        copy(&mut self.positions, &batch.positions);
        copy(&mut self.sequences, &batch.sequences);
        copy(&mut self.states, &batch.states);
        copy(&mut self.sample_rows, &batch.sample_rows);
        self.groups
            .resize_with(batch.groups.len(), Default::default);
        for (to, from) in self.groups.iter_mut().zip(&batch.groups) {
            copy(&mut to.slots, &from.slots);
            copy(&mut to.tables, &from.tables);
            copy(&mut to.entries, &from.entries);
        }
        [self.position_end, self.slot_end, self.block_end] = batch.ends();
        for &Feedback { row, sample } in &batch.feedback {
            self.tokens[row] = sampled[sample];
        }
        Ok(())
    }

    /// Returns the group of a layer.
    pub(crate) fn group(
        &self,
        operation: &'static str,
        layer: CacheLayer,
    ) -> Result<&BatchGroup, DeviceError> {
        let group = self.groups.get(layer.group);
        group.ok_or_else(|| DeviceError::Failed {
            device: "cpu",
            operation,
            reason: format!(
                "group {} of layers is out of range: the batch has {} groups",
                layer.group,
                self.groups.len()
            ),
        })
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
