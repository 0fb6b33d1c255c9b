//! The state of an engine at one moment, as the scheduler thread reports it.

use crate::cache::Books;
use crate::id::StepId;
use serde::Serialize;

/// How many requests were accepted, and how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Outcomes {
    /// Requests accepted by the scheduler thread.
    pub accepted: u64,
    /// Ended at a stop token or stop string.
    pub stopped: u64,
    /// Ended at a length limit.
    pub length: u64,
    /// Cancelled.
    pub cancelled: u64,
    /// Failed.
    pub failed: u64,
}

/// The state of an engine at one moment, read off its books.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct EngineStats {
    /// Use of the key-value cache.
    pub blocks: Books,
    /// Tokens a block.
    pub block_tokens: usize,
    /// Requests that hold blocks and are computed.
    pub running: usize,
    /// Requests that wait for blocks.
    pub waiting: usize,
    /// Of both, those whose reader is too slow.
    pub paused: usize,
    /// Requests without a terminal.
    pub open: usize,
    /// Ended requests whose blocks a step in flight may still touch.
    pub closing: usize,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Of these, how many copied the blocks to host memory instead of giving them up.
    pub swaps: u64,
    /// Blocks of host memory that hold swapped-out blocks.
    pub swapped_blocks: usize,
    /// Prompt tokens that were looked for in the cache since the start.
    pub prefix_queries: u64,
    /// Of these, how many the cache held already.
    pub prefix_hits: u64,
    /// Sessions that keep keys and values between their turns.
    pub retained_sessions: usize,
    /// Blocks that they keep.
    pub retained_blocks: usize,
    /// Of these, how many are pinned.
    pub pinned_blocks: usize,
    /// Pins refused since the start because of their cap.
    pub pins_refused: u64,
    /// How requests ended since the start.
    pub outcomes: Outcomes,
    /// Prompt tokens accepted since the start.
    pub prompt_tokens: u64,
    /// Tokens generated since the start.
    pub tokens_generated: u64,
    /// The last completed step.
    pub steps: StepId,
}

impl EngineStats {
    /// Nothing open, nothing held: invariant I12.
    pub fn is_idle(&self) -> bool {
        self.open == 0
            && self.closing == 0
            && self.running + self.waiting == 0
            && self.retained_sessions + self.swapped_blocks == 0
            && self.blocks.available() == self.blocks.total
    }
}
