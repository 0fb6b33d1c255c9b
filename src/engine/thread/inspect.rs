//! Describes the state of the engine: its statistics, its metrics and snapshots of it.

use super::SchedulerThread;
use super::ledger::{Ended, Origin};
use crate::cache::{BlockState, BlockTable};
use crate::engine::snapshot::{
    BlockMap, BlockUse, EngineSnapshot, RequestEnd, RequestPhase, RequestState, SessionState,
};
use crate::engine::stats::EngineStats;
use crate::schedule::{Sequence, SequenceKey, SequenceState};
use std::time::Instant;

impl SchedulerThread {
    /// Updates the metrics.
    pub(super) fn publish(&mut self) {
        let now = self.stats();
        self.metrics.publish(&now, &self.published);
        self.published = now;
    }

    pub(super) fn stats(&self) -> EngineStats {
        let counts = self.scheduler.counts();
        EngineStats {
            blocks: self.scheduler.cache().counts(),
            block_tokens: self.scheduler.cache().block_tokens(),
            states: self.scheduler.cache().state_counts(),
            running: counts.running,
            waiting: counts.waiting,
            paused: counts.paused,
            open: self.ledger.open_accounts(),
            closing: self.ledger.closing_accounts(),
            preemptions: counts.preemptions,
            swaps: counts.swaps,
            swaps_in: counts.swaps_in,
            swapped_blocks: counts.swapped_blocks,
            prefix_queries: counts.prefix_queries,
            prefix_hits: counts.prefix_hits,
            prefix_misses: counts.prefix_misses,
            retained_sessions: counts.retained_sessions,
            retained_blocks: counts.retained_blocks,
            pinned_blocks: counts.pinned_blocks,
            pins_refused: counts.pins_refused,
            outcomes: self.ledger.outcomes(),
            prompt_tokens: self.prompt_tokens,
            tokens_generated: self.tokens_generated,
            steps: self.completed,
        }
    }

    /// Takes a snapshot.
    pub(super) fn snapshot(&self) -> EngineSnapshot {
        let (scheduler, ledger, stats) = (&self.scheduler, &self.ledger, self.stats());
        let now = Instant::now();
        let mut sequences: Vec<(SequenceKey, &Sequence)> = scheduler.sequences().iter().collect();
        sequences.sort_unstable_by_key(|(_, sequence)| sequence.id);
        let retained = scheduler.retained_sessions();
        let requests = sequences.iter().map(|(key, sequence)| {
            let origin = ledger.origin(*key);
            request_state(sequence, origin, now)
        });
        let sessions = retained.iter().map(|(id, retained, _)| SessionState {
            id: *id,
            retained: *retained,
        });
        let ends = ledger.recent_ends().rev();
        EngineSnapshot {
            stats,
            steps_in_flight: scheduler.launched().0 - stats.steps.0,
            requests: requests.collect(),
            sessions: sessions.collect(),
            blocks: owners(
                scheduler.cache().states(),
                sequences
                    .iter()
                    .map(|(_, sequence)| blocks(&sequence.table)),
                retained.iter().map(|(_, _, table)| blocks(table)),
            ),
            states: owners(
                scheduler.cache().slot_states(),
                sequences.iter().map(|(_, sequence)| slots(&sequence.table)),
                retained.iter().map(|(_, _, table)| slots(table)),
            ),
            recent_ends: ends.map(|ended| request_end(ended, now)).collect(),
        }
    }
}

fn request_state(sequence: &Sequence, origin: Option<Origin>, now: Instant) -> RequestState {
    let phase = if sequence.is_paused() {
        RequestPhase::Paused
    } else if sequence.is_preempted() {
        RequestPhase::Preempted
    } else if sequence.state() == SequenceState::Running {
        RequestPhase::Running
    } else {
        RequestPhase::Waiting
    };
    let table = &sequence.table;
    let submitted = origin.as_ref().map_or(now, |origin| origin.submitted);
    let owner = origin.as_ref().and_then(|origin| origin.owner);
    RequestState {
        id: sequence.id,
        phase,
        session: sequence.spec.session,
        label: origin.and_then(|origin| origin.label),
        owner,
        tenant: sequence.spec.tenant.clone(),
        priority: sequence.spec.priority,
        prompt_tokens: sequence.prompt_tokens,
        cached_tokens: sequence.cached_tokens,
        computed_tokens: sequence.written_tokens(),
        generated_tokens: sequence.generated(),
        blocks: blocks(table).map(|block| block as u32).collect(),
        states: slots(table).map(|slot| slot as u32).collect(),
        age: now.saturating_duration_since(submitted),
    }
}

fn request_end(ended: &Ended, now: Instant) -> RequestEnd {
    let receipt = &ended.receipt;
    RequestEnd {
        id: ended.id,
        outcome: ended.end.outcome(),
        reason: ended.end.reason(),
        generated_tokens: receipt.tokens_generated,
        blocks_freed: receipt.blocks_freed,
        states_freed: receipt.states_freed,
        step: receipt.step,
        posted_to_freed: receipt
            .freed_at
            .saturating_duration_since(receipt.posted_at),
        age: now.saturating_duration_since(receipt.freed_at),
    }
}

/// Returns the indices of the blocks that a table holds.
fn blocks(table: &BlockTable) -> impl Iterator<Item = usize> + '_ {
    table.blocks().map(|block| block.index())
}

/// Returns the indices of the slots whose states a table holds.
fn slots(table: &BlockTable) -> impl Iterator<Item = usize> + '_ {
    table.state_slots().map(|slot| slot.index())
}

/// Combines the state of each block or slot with those that requests and sessions hold.
fn owners<Held: Iterator<Item = usize>>(
    states: impl Iterator<Item = BlockState>,
    requests: impl Iterator<Item = Held>,
    sessions: impl Iterator<Item = Held>,
) -> BlockMap {
    let mut map: Vec<BlockUse> = states
        .map(|state| match state {
            BlockState::Cached => BlockUse::Cached,
            BlockState::Deferred => BlockUse::Deferred,
            // The block tables below tell who holds a referenced block.
            BlockState::Free | BlockState::Referenced => BlockUse::Free,
        })
        .collect();
    let requests = (0..).map(BlockUse::Request).zip(requests);
    let sessions = (0..).map(BlockUse::Session).zip(sessions);
    for (owner, held) in requests.chain(sessions) {
        for index in held {
            if let Some(held) = map.get_mut(index) {
                *held = match held {
                    BlockUse::Free => owner,
                    _ => BlockUse::Shared,
                };
            }
        }
    }
    BlockMap(map)
}
