//! Blocks that were given back while a step in flight may still touch them.

use super::BlockId;
use crate::id::StepId;
use std::collections::VecDeque;

/// Blocks that were given back together.
#[derive(Debug)]
pub(super) struct Release {
    /// Counted up: a block may be in several, of which the latest counts.
    pub number: u64,
    pub blocks: Vec<BlockId>,
}

/// Remembers what to look at again when a step has completed (I4).
#[derive(Debug, Default)]
pub struct Fence {
    /// In ascending order of the step that may touch the blocks.
    waiting: VecDeque<(StepId, Release)>,
    completed: StepId,
}

impl Fence {
    /// The last step that has completed.
    pub fn completed(&self) -> StepId {
        self.completed
    }

    /// The blocks to be looked at, each at least as often as it is deferred.
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
