//! Turns a plan into the flat arrays that a device takes.

use crate::cache::{GroupBlocks, StateSlot, StepState};
use crate::device::{Batch, BatchState, Feedback, StateSnapshot};
use crate::sampling::{SampleRow, SamplingParams};
use crate::schedule::{PlanItem, Report, Sequence, Sequences, StepPlan, Task, TokenInput};
use std::ops::Range;
use std::sync::Arc;

/// The inputs of one step, in the form that a device takes.
#[derive(Default)]
pub(super) struct Inputs {
    pub batch: Batch,
    /// One entry per sample row of the batch.
    pub samples: Vec<SampleRow>,
    /// Ranges of rows whose hidden states are summed.
    pub pooled: Vec<Range<usize>>,
    /// Histories of earlier steps, whose allocations are reused.
    spare_histories: Vec<Vec<u32>>,
}

impl Inputs {
    /// Creates empty inputs for this many groups of layers, with room for `blocks` entries in
    /// the block tables of each group. A block that several sequences hold takes several entries.
    pub fn new(groups: usize, blocks: usize) -> Self {
        let mut batch = Batch::new(groups);
        for group in &mut batch.groups {
            group.entries.reserve_exact(blocks);
        }
        Self {
            batch,
            ..Self::default()
        }
    }

    /// Fills the inputs from a plan and reuses their allocations. Items whose sequence no
    /// longer exists are skipped; the scheduler thread launches each plan before any of its
    /// sequences can end.
    pub fn fill(&mut self, plan: &StepPlan, sequences: &Sequences, block_tokens: usize) {
        self.clear();
        let Self {
            batch,
            samples,
            pooled,
            spare_histories,
        } = self;
        for item in &plan.items {
            let Some(sequence) = sequences.get(item.key) else {
                continue;
            };
            let first_row = batch.rows();
            add_item(item, sequence, block_tokens, batch);
            batch.states.extend(item.state.map(batch_state));
            let row = |position: usize| first_row + position - item.start;
            match &item.report {
                Report::Nothing => {}
                Report::Scores(rows) => {
                    batch.sample_rows.extend(row(rows.start)..row(rows.end));
                    samples.extend(score_rows(rows.clone(), sequence));
                }
                Report::Sum(rows) => pooled.push(row(rows.start)..row(rows.end)),
            }
            for position in item.sampled.clone() {
                batch.sample_rows.push(row(position));
                samples.push(sample_row(position, sequence, spare_histories));
            }
        }
    }

    /// Drops the inputs of a step that the device has taken. This also releases the masks of
    /// its constraints, so that they can be written again.
    pub fn clear(&mut self) {
        self.batch.clear();
        self.pooled.clear();
        if self.samples.is_empty() {
            return;
        }
        // Keep as many histories as this step had. The first one is at the end, where the next
        // step, which usually has the same rows, takes it first.
        self.spare_histories.clear();
        let histories = self.samples.drain(..).rev().map(|row| row.history);
        let used = histories.filter(|history| history.capacity() > 0);
        self.spare_histories.extend(used);
    }
}

fn add_item(item: &PlanItem, sequence: &Sequence, block_tokens: usize, batch: &mut Batch) {
    let end = item.start + item.count;
    let tokens = match item.input {
        TokenInput::Known => &sequence.tokens[item.start..end],
        TokenInput::Feedback { sample } => {
            let row = batch.rows();
            batch.feedback.push(Feedback { row, sample });
            &[0]
        }
    };
    // The scheduler has allocated blocks for every position that it plans.
    let tables = (0..batch.groups.len()).map(|group| {
        let GroupBlocks { first, blocks } = sequence.table.group(group);
        let needed = end.div_ceil(block_tokens).saturating_sub(first);
        debug_assert!(needed <= blocks.len(), "position {} has no block", end - 1);
        let blocks = blocks.iter().take(needed);
        (first, blocks.map(|block| block.index() as u32))
    });
    batch.push(tokens, item.start, block_tokens, tables);
}

/// Returns the slots of an item, as a device takes them.
fn batch_state(state: StepState) -> BatchState {
    let index = |slot: StateSlot| slot.index() as u32;
    BatchState {
        before: state.before.map(index),
        after: index(state.after),
        snapshot: state.snapshot.map(|(rows, slot)| StateSnapshot {
            rows,
            slot: index(slot),
        }),
    }
}

/// Returns the row that samples the token after `position`. If the sampling needs the tokens
/// before it, they are copied into an allocation from `spares`.
fn sample_row(position: usize, sequence: &Sequence, spares: &mut Vec<Vec<u32>>) -> SampleRow {
    let next = position + 1;
    let params = &sequence.spec.params;
    let mut history = Vec::new();
    if params.needs_history() {
        history = spares.pop().unwrap_or_default();
        history.clear();
        // Reserve the sequence's capacity, because the history of the next step is longer.
        history.reserve_exact(sequence.tokens.capacity());
        // A token that is fed back is not known yet.
        let known = sequence.tokens.len().min(next);
        history.extend_from_slice(&sequence.tokens[..known]);
    }
    SampleRow {
        params: Arc::clone(params),
        position: next as u32,
        history,
        prompt_tokens: sequence.prompt_tokens,
        mask: sequence
            .spec
            .constraint
            .as_ref()
            .map(|constraint| Arc::clone(constraint.mask())),
        forced: None,
    }
}

/// Returns the rows that compute log probabilities of the known tokens after those of `rows`.
fn score_rows(rows: Range<usize>, sequence: &Sequence) -> impl Iterator<Item = SampleRow> {
    let top = match sequence.spec.task {
        Task::Score { top } => top,
        Task::Generate | Task::Embed(_) => 0,
    };
    let params = Arc::new(SamplingParams {
        logprobs: Some(top),
        ..SamplingParams::greedy()
    });
    let next = rows.start + 1..rows.end + 1;
    let tokens = next.clone().zip(&sequence.tokens[next]);
    tokens.map(move |(position, &token)| SampleRow {
        params: Arc::clone(&params),
        position: position as u32,
        forced: Some(token),
        ..SampleRow::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::BlockCache;
    use crate::config::Preemption;
    use crate::id::RequestId;
    use crate::schedule::{Commit, Policy, Scheduler, SequenceSpec};

    /// I10: random numbers depend only on the position of the chosen token, and not on what
    /// happened to the sequence before.
    #[test]
    fn a_sample_has_the_position_of_its_token_even_after_a_recompute() {
        let policy = Policy {
            preemption: Preemption::Recompute,
            ..Policy::default()
        };
        let mut scheduler = Scheduler::new(policy, BlockCache::new(6, 4, false));
        for (id, length) in [(1, 11), (2, 6)] {
            let prompt: Vec<u32> = (0..length).map(|token| token * 31 + id).collect();
            let spec = SequenceSpec::new(prompt, length as usize + 8);
            scheduler.add(RequestId(u64::from(id)), spec);
        }
        let mut inputs = Inputs::new(1, 6);
        let mut recomputed = 0;
        while let Some(plan) = scheduler.plan() {
            inputs.fill(&plan, scheduler.sequences(), 4);
            assert_eq!(plan.samples().count(), inputs.samples.len());
            for (item, sample) in plan.samples().zip(&inputs.samples) {
                let sequence = &scheduler.sequences()[item.key];
                assert_eq!(sample.position as usize, sequence.tokens.len());
                recomputed += usize::from(item.count > 1 && sequence.generated() > 0);
            }
            for item in plan.samples() {
                if let Commit::Finished { .. } = scheduler.commit(plan.step, item, [7]) {
                    scheduler.remove(item.key);
                }
            }
            scheduler.step_completed(plan.step);
        }
        assert!(scheduler.sequences().is_empty());
        assert!(recomputed > 0, "nothing was recomputed");
    }
}
