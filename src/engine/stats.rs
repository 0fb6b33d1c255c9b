//! The state of an engine in numbers, as the scheduler thread reports it.

use crate::cache::BlockCounts;
use crate::id::StepId;
use crate::schedule::PrefixMisses;
use serde::Serialize;

/// Number of requests that were accepted since the start, and how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Outcomes {
    /// Requests accepted by the scheduler thread.
    pub accepted: u64,
    /// Requests that ended at a stop token or a stop string.
    pub stopped: u64,
    /// Requests that ended at a length limit.
    pub length: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
}

/// The state of an engine at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct EngineStats {
    /// Blocks of the KV cache, by state.
    pub blocks: BlockCounts,
    /// Tokens per KV cache block.
    pub block_tokens: usize,
    /// Slots for the states of recurrent layers, by state; all 0 for models without such layers.
    pub states: BlockCounts,
    /// Requests that hold blocks and take part in steps.
    pub running: usize,
    /// Requests that wait to be started, including preempted ones.
    pub waiting: usize,
    /// Requests, running or waiting, that are paused because their readers lag behind.
    pub paused: usize,
    /// Requests that have not ended.
    pub open: usize,
    /// Requests that have ended but whose blocks a step in flight may still touch, and sessions
    /// whose receipts are due.
    pub closing: usize,
    /// Preemptions since the start.
    pub preemptions: u64,
    /// Number of those preemptions that copied the blocks to host memory.
    pub swaps: u64,
    /// Number of swapped-out requests that resumed without recomputing anything, since the start.
    pub swaps_in: u64,
    /// Blocks of host memory that hold swapped-out KV cache blocks.
    pub swapped_blocks: usize,
    /// Prompt tokens that were looked up in the prefix cache or in a session, since the start.
    pub prefix_queries: u64,
    /// Number of those tokens that were found.
    pub prefix_hits: u64,
    /// Number of those tokens that were not found, by reason.
    pub prefix_misses: PrefixMisses,
    /// Sessions that keep keys and values between their turns.
    pub retained_sessions: usize,
    /// Blocks that those sessions keep.
    pub retained_blocks: usize,
    /// Number of those blocks that are pinned.
    pub pinned_blocks: usize,
    /// Pins that were refused since the start because the limit on pinned blocks was reached.
    pub pins_refused: u64,
    /// Number of requests accepted since the start, and how they ended.
    pub outcomes: Outcomes,
    /// Prompt tokens accepted since the start.
    pub prompt_tokens: u64,
    /// Tokens generated since the start.
    pub tokens_generated: u64,
    /// Number of the last completed step.
    pub steps: StepId,
}

impl EngineStats {
    /// Returns whether no request is open and no block is held. The prefix cache may still hold
    /// the contents of blocks.
    pub fn is_idle(&self) -> bool {
        self.open == 0
            && self.closing == 0
            && self.running + self.waiting == 0
            && self.retained_sessions + self.swapped_blocks == 0
            && self.blocks.available() == self.blocks.total
            && self.states.available() == self.states.total
    }
}
