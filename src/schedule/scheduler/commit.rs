//! Records the results of steps: what they have written, and the tokens that they have sampled.

use super::Scheduler;
use crate::id::StepId;
use crate::sampling::ConstraintError;
use crate::schedule::{
    FinishReason, PlanItem, Sequence, SequenceKey, SequenceState, StepPlan, Task,
};

/// Result of committing a run of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commit {
    /// All tokens were appended, and the sequence goes on.
    Continues,
    /// The sequence has ended. It holds its blocks until the caller closes it.
    Finished {
        /// How many tokens of the run were appended. Those after them are discarded.
        tokens: usize,
        /// Why the sequence has ended.
        reason: FinishReason,
    },
    /// The sequence's constraint failed, and the caller must close the sequence.
    Failed {
        /// How many tokens of the run were appended. The constraint failed with the next one.
        tokens: usize,
        /// The error of the constraint.
        error: ConstraintError,
    },
    /// The sequence no longer exists, and the tokens were discarded.
    Discarded,
}

impl Scheduler {
    /// Records that step `step` and all before it have completed on the device.
    pub fn step_completed(&mut self, step: StepId) {
        self.cache.step_completed(step);
    }

    /// Records that a step of `tokens` tokens took `seconds`, from which the cost of recomputing is
    /// estimated.
    pub fn observe_step(&mut self, tokens: usize, seconds: f64) {
        self.speed.observe(tokens, seconds);
    }

    /// Records that the step of `plan` has completed without an error. The keys and values that
    /// its items wrote exist now, and other sequences may find the complete blocks.
    pub fn step_succeeded(&mut self, plan: &StepPlan) {
        for item in &plan.items {
            let Some(sequence) = self.sequences.get_mut(item.key) else {
                continue;
            };
            // The sequence may have been preempted since, and even restarted.
            if sequence.state != SequenceState::Running || plan.step < sequence.started_step {
                continue;
            }
            sequence.written_tokens = item.written_tokens();
            self.cache.publish(
                &mut sequence.table,
                &sequence.tokens,
                sequence.written_tokens,
                sequence.last_step,
            );
            self.cache.publish_states(
                &mut sequence.table,
                sequence.written_tokens,
                sequence.prompt_tokens,
                sequence.last_step,
            );
            // After publishing, so that others can still find the blocks.
            let next = sequence.written_tokens.min(sequence.tokens.len());
            self.cache
                .give_back(&mut sequence.table, next, sequence.last_step);
            if sequence.written_tokens >= sequence.prompt_tokens && !sequence.followers.is_empty() {
                for follower in std::mem::take(&mut sequence.followers) {
                    self.unblock(follower);
                }
            }
        }
    }

    /// Records that the step of `plan` has failed. Blocks that it should have copied to the
    /// host are lost, and their tokens are recomputed. The caller must end the sequences of its
    /// items.
    pub fn step_failed(&mut self, plan: &StepPlan) {
        if plan.transfers.swap_out.is_empty() {
            return;
        }
        for sequence in self.sequences.values_mut() {
            let lost = sequence
                .swapped
                .take_if(|swapped| swapped.step == plan.step);
            if let Some(swapped) = lost {
                self.host.release(swapped.blocks);
                self.cache.release(&mut sequence.table, sequence.last_step);
            }
        }
    }

    /// Commits the run of one item of step `step`: the tokens that follow its first sampled
    /// position. The run is cut after the token that ends the sequence. Call it after
    /// [`Scheduler::step_succeeded`].
    pub fn commit(
        &mut self,
        step: StepId,
        item: &PlanItem,
        run: impl IntoIterator<Item = u32>,
    ) -> Commit {
        let Some(sequence) = self.sequences.get_mut(item.key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        let mut tokens = 0;
        let mut commit = Commit::Continues;
        for token in run {
            match append(sequence, token) {
                Ok(reason) => {
                    tokens += 1;
                    if let Some(reason) = reason {
                        commit = Commit::Finished { tokens, reason };
                        break;
                    }
                }
                Err(error) => {
                    commit = Commit::Failed { tokens, error };
                    break;
                }
            }
        }
        let blocked = sequence.state == SequenceState::Blocked;
        if item.sampled.len() > 1 {
            self.settle_drafts(step, item, tokens);
        }
        if blocked {
            self.unblock(item.key);
        }
        commit
    }

    /// Decides which tokens of drafts count as written: those of the committed tokens except the
    /// last, from which the run may differ from the drafts. The other positions are computed
    /// again.
    fn settle_drafts(&mut self, step: StepId, item: &PlanItem, committed: usize) {
        let Some(sequence) = self.sequences.get_mut(item.key) else {
            return;
        };
        let right = item.sampled.start + committed.max(1);
        if let Some(swapped) = &mut sequence.swapped {
            swapped.tokens = swapped.tokens.min(right);
        }
        // As in `step_succeeded`.
        if sequence.state != SequenceState::Running || step < sequence.started_step {
            return;
        }
        sequence.written_tokens = right.min(item.start + item.count);
        sequence.launched_tokens = sequence.written_tokens;
        self.cache.publish(
            &mut sequence.table,
            &sequence.tokens,
            sequence.written_tokens,
            sequence.last_step,
        );
    }

    /// Commits the end of the prompt of a sequence that ends with it.
    pub fn commit_end(&mut self, key: SequenceKey) -> Commit {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        let reason = match sequence.spec.task {
            Task::Embed(_) => FinishReason::Stop,
            Task::Generate | Task::Score { .. } => FinishReason::Length,
        };
        self.unblock(key);
        Commit::Finished { tokens: 0, reason }
    }
}

/// Appends a token to a sequence. Returns why the sequence ends with it, if it does. A token
/// that the constraint refuses is not appended.
#[inline]
fn append(sequence: &mut Sequence, token: u32) -> Result<Option<FinishReason>, ConstraintError> {
    let spec = &mut sequence.spec;
    let mut stopped = spec.stop_tokens.contains(&token);
    if let Some(constraint) = spec.constraint.as_mut().filter(|_| !stopped) {
        stopped = constraint.accept(token)?;
    }
    sequence.tokens.push(token);
    let full = sequence.tokens.len() >= sequence.spec.max_tokens;
    Ok(match (stopped, full) {
        (true, _) => Some(FinishReason::Stop),
        (false, true) => Some(FinishReason::Length),
        (false, false) => None,
    })
}
