//! Blocks that were released while a step in flight may still touch them.

use super::BlockId;
use crate::id::StepId;
use std::collections::VecDeque;

/// Blocks that were released together.
#[derive(Debug)]
pub(super) struct Release {
    /// Ascending number. If a block is in several releases, only the latest one settles it.
    pub number: u64,
    pub blocks: Vec<BlockId>,
}

/// Remembers which released blocks to settle when a step has completed (I4).
#[derive(Debug, Default)]
pub struct Fence {
    /// Releases in ascending order of the step that may still touch the blocks.
    waiting: VecDeque<(StepId, Release)>,
    completed: StepId,
}

impl Fence {
    /// Returns the last step that has completed.
    pub fn completed(&self) -> StepId {
        self.completed
    }

    /// Returns the blocks that wait to be settled. Every deferred block is among them, perhaps
    /// more than once.
    pub fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.waiting
            .iter()
            .flat_map(|(_, release)| release.blocks.iter().copied())
    }

    pub(super) fn defer(&mut self, release: Release, until: StepId) {
        let at = self.waiting.partition_point(|(step, _)| *step <= until);
        self.waiting.insert(at, (until, release));
    }

    pub(super) fn complete(&mut self, step: StepId, mut settle: impl FnMut(&Release)) {
        self.completed = self.completed.max(step);
        while let Some((_, release)) = self
            .waiting
            .pop_front_if(|(until, _)| *until <= self.completed)
        {
            settle(&release);
        }
    }
}
