//! Blocks that were given back while a step in flight may still touch them.

use super::BlockId;
use crate::id::StepId;
use std::collections::VecDeque;

/// Holds blocks back until the step that may touch them has completed (I4).
#[derive(Debug, Default)]
pub struct Fence {
    /// In ascending order of the step.
    waiting: VecDeque<(StepId, Vec<BlockId>)>,
    completed: StepId,
    blocks: usize,
}

impl Fence {
    /// Blocks held back.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Whether `step` has completed.
    pub fn is_completed(&self, step: StepId) -> bool {
        step <= self.completed
    }

    /// The blocks held back.
    pub fn iter(&self) -> impl Iterator<Item = BlockId> + '_ {
        self.waiting
            .iter()
            .flat_map(|(_, blocks)| blocks.iter().copied())
    }

    pub(super) fn defer(&mut self, blocks: Vec<BlockId>, until: StepId) {
        self.blocks += blocks.len();
        let at = self.waiting.partition_point(|(step, _)| *step <= until);
        self.waiting.insert(at, (until, blocks));
    }

    pub(super) fn complete(&mut self, step: StepId, mut free: impl FnMut(&[BlockId])) {
        self.completed = self.completed.max(step);
        while let Some((_, blocks)) = self
            .waiting
            .pop_front_if(|(until, _)| *until <= self.completed)
        {
            self.blocks -= blocks.len();
            free(&blocks);
        }
    }
}
