//! The inputs of the step in progress, in device memory.

use super::context::Context;
use super::error;
use super::memory::{Buffer, Ptr};
use super::transfer::Uploads;
use crate::device::{Batch, DeviceError, DeviceLimits};

/// A row or slot that is none.
pub(super) const NONE: u32 = u32::MAX;

/// Rows of packed queries of one work item of prefill attention.
pub(super) const PREFILL_ROWS: usize = 64;

/// Keys of one unit of attention.
pub(super) const UNIT: usize = 128;

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

/// The arrays that `stage` uploads, and what the host has to know of them.
///
/// Pure decode steps may be *padded* to a bucket: see [`StepInputs::padded`].
pub(super) struct StepInputs {
    uploads: Uploads,
    work_uploads: Uploads,
    base: Ptr,
    layout: Layout,
    words: Vec<u32>,
    rows: usize,
    padded_rows: usize,
    samples: usize,
    decodes: usize,
    max_units: usize,
    /// Index and rows of the sequences with several rows.
    prefills: Vec<(u32, usize)>,
    work: Option<(usize, Ptr, usize)>,
    /// Ids that the last step sampled, one a sample; what feedback reads.
    sampled: Option<Buffer>,
    /// Token ids after feedback, one a row.
    resolved: Option<Buffer>,
}

impl StepInputs {
    pub(super) fn new() -> Self {
        Self {
            uploads: Uploads::new("the inputs of a step"),
            work_uploads: Uploads::new("the inputs of a step"),
            base: Ptr::NULL,
            layout: Layout::default(),
            words: Vec::new(),
            rows: 0,
            padded_rows: 0,
            samples: 0,
            decodes: 0,
            max_units: 0,
            prefills: Vec::new(),
            work: None,
            sampled: None,
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

    /// `u32` each: the sequences with one row, [`StepInputs::decodes`] of them.
    pub(super) fn decode_list(&self) -> Ptr {
        self.at(self.layout.decode_list)
    }

    /// Entries of the decode list, padded.
    pub(super) fn decodes(&self) -> usize {
        self.decodes
    }

    /// At least as many units of 128 keys as the longest sequence of the decode list
    /// has; a power of two, so that few values occur.
    pub(super) fn max_units(&self) -> usize {
        self.max_units
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

    /// Makes room for steps of this size.
    pub(super) fn reserve(
        &mut self,
        context: &Context,
        limits: &DeviceLimits,
    ) -> Result<(), DeviceError> {
        let _ = (context, limits);
        Ok(())
    }

    /// Takes `batch` and enqueues its upload.
    pub(super) fn take(&mut self, context: &Context, batch: &Batch) -> Result<(), DeviceError> {
        let _ = (context, batch, &self.words, &self.uploads);
        Err(error::failed("stage", "not written yet"))
    }
}
