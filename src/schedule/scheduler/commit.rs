//! Records the results of steps: what they have written, and the tokens that they have sampled.

use super::Scheduler;
use crate::id::StepId;
use crate::sampling::ConstraintError;
use crate::schedule::{FinishReason, SequenceKey, SequenceState, StepPlan, Task};

/// Result of committing one sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Commit {
    /// The token was appended, and the sequence goes on.
    Token,
    /// The token was appended, and the sequence has ended. It holds its blocks until the caller
    /// closes it.
    Finished(FinishReason),
    /// The sequence's constraint failed. The token was not appended, and the caller must close
    /// the sequence.
    Failed(ConstraintError),
    /// The sequence no longer exists, and the token was discarded.
    Discarded,
}

impl Scheduler {
    /// Records that step `step` and all before it have completed on the device.
    pub fn step_completed(&mut self, step: StepId) {
        self.cache.step_completed(step);
    }

    /// Records that a step of `rows` rows took `seconds`, from which the cost of recomputing is
    /// estimated.
    pub fn observe_step(&mut self, rows: usize, seconds: f64) {
        self.speed.observe(rows, seconds);
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
            sequence.written_tokens = item.start + item.count;
            self.cache.publish(
                &mut sequence.table,
                &sequence.tokens,
                sequence.written_tokens,
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
            }
        }
    }

    /// Commits the sample of one plan item.
    pub fn commit(&mut self, key: SequenceKey, token: u32) -> Commit {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        let mut stopped = sequence.spec.stop_tokens.contains(&token);
        if let Some(constraint) = sequence.spec.constraint.as_mut().filter(|_| !stopped) {
            match constraint.accept(token) {
                Ok(complete) => stopped = complete,
                Err(error) => return Commit::Failed(error),
            }
        }
        sequence.tokens.push(token);
        let commit = if stopped {
            Commit::Finished(FinishReason::Stop)
        } else if sequence.tokens.len() >= sequence.spec.max_tokens {
            Commit::Finished(FinishReason::Length)
        } else {
            Commit::Token
        };
        self.unblock(key);
        commit
    }

    /// Commits the end of the prompt of a sequence that ends with it.
    pub fn commit_end(&mut self, key: SequenceKey) -> Commit {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return Commit::Discarded;
        };
        sequence.in_flight -= 1;
        let reason = match sequence.spec.task {
            Task::Embed => FinishReason::Stop,
            Task::Generate | Task::Score { .. } => FinishReason::Length,
        };
        self.unblock(key);
        Commit::Finished(reason)
    }
}
