//! Chooses the tokens of the next step.

use super::Scheduler;
use crate::sampling::ConstraintError;
use crate::schedule::{PlanItem, Sequence, SequenceKey, SequenceState, StepPlan, TokenInput};

/// What is left of a step's limits.
pub(super) struct Budget {
    pub tokens: usize,
    pub samples: usize,
}

impl Scheduler {
    /// Chooses the tokens of the next step and allocates their blocks. Returns `None` if there is
    /// nothing to do until a step completes or a command arrives.
    #[cfg(any(test, feature = "internals"))]
    pub fn plan(&mut self) -> Option<StepPlan> {
        let mut plan = StepPlan::default();
        self.plan_into(&mut plan).then_some(plan)
    }

    /// Like [`Scheduler::plan`], but reuses the allocations of an earlier plan. Returns whether
    /// there is something to do.
    pub fn plan_into(&mut self, plan: &mut StepPlan) -> bool {
        plan.clear();
        plan.step = self.launched.next();
        let mut budget = Budget {
            tokens: self.policy.max_batch_tokens,
            samples: self.policy.max_samples(),
        };
        // Sequences that are more urgent than a running one are admitted before the running
        // ones are planned, while these can still be preempted.
        self.admit(plan, &mut budget, |urgent, running| {
            running.is_some_and(|last| urgent < last)
        });
        self.waits_for_room = false;
        self.plan_running(plan, &mut budget);
        let may_start = !self.waits_for_room;
        self.admit(plan, &mut budget, |_, _| may_start);
        self.host.release(self.read_back.drain(..));
        let some = !plan.items.is_empty() || !plan.transfers.is_empty();
        if some {
            self.launched = plan.step;
        }
        some
    }

    /// Plans the running sequences: first those that decode, then those that are still in
    /// prefill.
    fn plan_running(&mut self, plan: &mut StepPlan, budget: &mut Budget) {
        // Iterate over a copy, because making room changes the queue.
        let mut keys = std::mem::take(&mut self.scratch);
        keys.clear();
        keys.extend_from_slice(self.running.keys());
        // Sequences in prefill are moved to the front of `keys`, for the second loop.
        let mut prompts = 0;
        for index in 0..keys.len() {
            let key = keys[index];
            match self.plannable(key, plan) {
                _ if budget.tokens == 0 => break,
                0 => {}
                1 => self.plan_rows(key, 1, plan, budget),
                _ => {
                    keys[prompts] = key;
                    prompts += 1;
                }
            }
        }
        for &key in &keys[..prompts] {
            let count = self.plannable(key, plan).min(budget.tokens);
            if count > 0 {
                self.plan_rows(key, count, plan, budget);
            }
        }
        self.scratch = keys;
    }

    /// Returns how many more tokens of a sequence this step could compute. 1 is planned as a
    /// decode.
    fn plannable(&self, key: SequenceKey, plan: &StepPlan) -> usize {
        let runs = |sequence: &&Sequence| {
            let planned = sequence.last_step == plan.step;
            !planned && !sequence.paused && sequence.state == SequenceState::Running
        };
        let sequence = self.sequences.get(key).filter(runs);
        sequence.map_or(0, Sequence::pending)
    }

    /// Plans the next `count` tokens of a running sequence, or fewer, if there is room for
    /// them.
    #[inline]
    fn plan_rows(
        &mut self,
        key: SequenceKey,
        count: usize,
        plan: &mut StepPlan,
        budget: &mut Budget,
    ) {
        let sequence = self.sequences.get(key);
        let count = sequence.map_or(0, |own| {
            own.tokens_to_branch(own.tokens_within(count, budget.samples))
        });
        if count > 0 && self.make_room(key, count, plan) {
            self.push_item(plan, key, count, budget);
        }
    }

    /// Adds an item that is within the budget to the plan, and updates the sequence.
    #[inline]
    pub(super) fn push_item(
        &mut self,
        plan: &mut StepPlan,
        key: SequenceKey,
        count: usize,
        budget: &mut Budget,
    ) {
        let Some(sequence) = self.sequences.get_mut(key) else {
            return;
        };
        let start = sequence.launched_tokens;
        let next = start + count;
        let samples_last = usize::from(sequence.samples_last(count));
        let sampled = next - samples_last..next;
        let end = sequence.ends_with_prompt() && next == sequence.length();
        let report = sequence.report(count);
        let samples = report.scored().len() + samples_last;
        let state = self.cache.state_interval().and_then(|interval| {
            // Without a prefix cache, only a session can go back to a snapshot.
            let useful = self.cache.knows_prefixes() || sequence.spec.session.is_some();
            let wanted = useful.then(|| sequence.snapshot_within(count, interval));
            let wanted = wanted.flatten();
            self.cache
                .plan_state(&mut sequence.table, start..next, wanted)
        });
        let input = if start >= sequence.tokens.len() {
            TokenInput::Feedback {
                sample: sequence.last_sample,
            }
        } else {
            TokenInput::Known
        };
        sequence.launched_tokens = next;
        sequence.reported = sequence.reported.max(next.min(sequence.prompt_tokens));
        sequence.last_step = plan.step;
        sequence.in_flight += usize::from(end) + samples_last;
        budget.tokens -= count;
        budget.samples -= samples;
        // The next step may read this item's last sample as feedback; this is its index in the
        // step.
        sequence.last_sample = (self.policy.max_samples() - budget.samples).saturating_sub(1);
        self.tenants.charge(sequence.tenant, count, samples_last);
        plan.items.push(PlanItem {
            key,
            start,
            count,
            input,
            sampled,
            end,
            report,
            state,
        });
    }

    /// Computes the mask of allowed tokens for each constrained sequence that `plan` samples. It
    /// applies to the token after the first sampled position, because what may follow depends on
    /// that token. Returns the sequences whose constraint failed. The caller must close them after
    /// launching the step.
    pub fn refresh_masks(&mut self, plan: &StepPlan) -> Vec<(SequenceKey, ConstraintError)> {
        let mut failed = Vec::new();
        for item in plan.samples() {
            let sequence = self.sequences.get_mut(item.key);
            if let Some(constraint) =
                sequence.and_then(|sequence| sequence.spec.constraint.as_mut())
                && let Err(error) = constraint.refresh()
            {
                failed.push((item.key, error));
            }
        }
        failed
    }
}
