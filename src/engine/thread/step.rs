//! The life of a step: it is planned, launched, collected and committed.

use super::SchedulerThread;
use crate::device::DeviceError;
use crate::engine::EngineFault;
use crate::engine::event::{PromptReport, Token};
use crate::engine::metrics::Phase;
use crate::id::StepId;
use crate::runner::StepOutput;
use crate::sampling::{ConstraintError, Sampled};
use crate::schedule::{Commit, PlanItem, Report, SequenceKey, StepPlan};
use std::time::Instant;

impl SchedulerThread {
    /// Plans the next step. Returns `None` if there is nothing to compute.
    pub(super) fn plan(&mut self) -> Option<StepPlan> {
        if self.closing {
            return None;
        }
        let from = Instant::now();
        let mut plan = self.spare_plans.pop().unwrap_or_default();
        if !self.scheduler.plan_into(&mut plan) {
            self.spare_plans.push(plan);
            return None;
        }
        self.metrics.phase(Phase::Plan, from);
        Some(plan)
    }

    /// Enqueues a step. If the launch fails, the requests of that step fail.
    pub(super) fn launch(&mut self, plan: StepPlan) -> Result<(), EngineFault> {
        if self.audit {
            self.poison_freed()?;
        }
        let unmasked = self.refresh_masks(&plan);
        let from = Instant::now();
        if self.in_flight.is_empty() {
            self.step_began = from;
        }
        self.note_starts(&plan, from);
        self.pulse.begin_call(plan.step);
        let launched = self.runner.launch(&plan, self.scheduler.sequences());
        self.pulse.end_call()?;
        self.metrics.phase(Phase::Launch, from);
        match launched {
            Ok(()) => {
                self.in_flight.push_back(plan);
                // The rows of these requests are already in the step; their results are
                // discarded.
                for (key, error) in unmasked {
                    if self.apply_cancel(key).is_none() {
                        let fault = EngineFault::Constraint(error);
                        self.end_request(key, Err(Box::new(fault)));
                    }
                }
                Ok(())
            }
            Err(error) => {
                self.fail_step(&plan, &error);
                // Feedback refers to the samples of the previous step, and the failed step has
                // none. Empty the pipeline, so that no step takes feedback from it.
                while !self.in_flight.is_empty() {
                    self.collect()?;
                }
                self.step_completed(self.completed);
                self.closes_engine(error)
            }
        }
    }

    /// Updates the masks of allowed tokens for the constrained sequences that the step samples.
    /// Returns the sequences whose constraints failed.
    fn refresh_masks(&mut self, plan: &StepPlan) -> Vec<(SequenceKey, ConstraintError)> {
        let sequences = self.scheduler.sequences();
        let constrained = |item: &PlanItem| {
            let sequence = sequences.get(item.key);
            sequence.is_some_and(|sequence| sequence.spec.constraint.is_some())
        };
        if !plan.samples().any(constrained) {
            return Vec::new();
        }
        let from = Instant::now();
        let failed = self.scheduler.refresh_masks(plan);
        self.metrics.phase(Phase::Mask, from);
        failed
    }

    /// Records the requests whose prompts this step begins or continues.
    fn note_starts(&mut self, plan: &StepPlan, at: Instant) {
        for item in &plan.items {
            let sequence = self.scheduler.sequences().get(item.key);
            let at_prompt = sequence.filter(|sequence| item.start < sequence.prompt_tokens);
            if let Some(sequence) = at_prompt {
                let cached = sequence.cached_tokens;
                self.ledger.started(item.key, at, cached);
            }
        }
    }

    /// Overwrites freed blocks, so that a step that still reads them produces visibly wrong
    /// tokens.
    fn poison_freed(&mut self) -> Result<(), EngineFault> {
        let freed = self.scheduler.take_freed();
        if freed.is_empty() {
            return Ok(());
        }
        self.pulse.begin_call(self.scheduler.launched());
        let poisoned = self.runner.poison(&freed);
        self.pulse.end_call()?;
        poisoned.map_err(EngineFault::Device)
    }

    /// Waits for the oldest step in flight and commits it.
    pub(super) fn collect(&mut self) -> Result<(), EngineFault> {
        let from = Instant::now();
        let step = self
            .in_flight
            .front()
            .map_or(self.completed, |plan| plan.step);
        self.pulse.begin_call(step);
        let outcome = self.runner.collect();
        self.pulse.end_call()?;
        self.metrics.phase(Phase::Collect, from);
        let Some(plan) = self.in_flight.pop_front() else {
            return Ok(());
        };
        let from = Instant::now();
        self.observe(&plan, from);
        // Apply the cancels that were posted while the step ran, so that it delivers no token
        // for them.
        for _ in 0..self.commands.len() {
            match self.commands.try_recv() {
                Ok(command) => self.apply(command),
                Err(_) => break,
            }
        }
        self.handle_deadlines();
        let failed = match outcome {
            Ok(output) => {
                match complete(&plan, &output) {
                    Ok(()) => self.commit_step(&plan, output),
                    Err(error) => self.fail_step(&plan, &error),
                }
                Ok(())
            }
            Err(error) => {
                self.fail_step(&plan, &error);
                self.closes_engine(error)
            }
        };
        self.step_completed(plan.step);
        self.spare_plans.push(plan);
        self.flush();
        self.publish();
        self.metrics.phase(Phase::Commit, from);
        if self.audit {
            self.scheduler.audit()?;
        }
        failed
    }

    /// Delivers the results of a step to the requests in it.
    fn commit_step(&mut self, plan: &StepPlan, mut output: StepOutput) {
        self.end_not_finite(plan, &output.samples);
        // Publish complete blocks before any other item ends, so that they can be reused.
        self.scheduler.step_succeeded(plan);
        let mut samples = output.samples.drain(..).map(Token::from);
        let mut sums = output.sums.drain(..);
        for item in &plan.items {
            let report = match &item.report {
                Report::Nothing => None,
                Report::Scores(rows) => {
                    let scores = samples.by_ref().take(rows.len());
                    Some(PromptReport::Scores(scores.collect()))
                }
                Report::Sum(_) => sums.next().map(PromptReport::Sum),
            };
            if let Some(report) = report {
                self.ledger.report(item.key, report);
            }
            if let Some(token) = item.sample.then(|| samples.next()).flatten() {
                self.commit(item.key, token);
            }
            if item.end {
                self.commit_end(item.key);
            }
        }
        drop((samples, sums));
        self.runner.recycle(output);
    }

    /// Ends the requests whose logits are not finite, before their blocks are published.
    fn end_not_finite(&mut self, plan: &StepPlan, samples: &[Sampled]) {
        if samples.iter().all(|sample| sample.is_finite) {
            return;
        }
        let mut samples = samples.iter();
        for item in &plan.items {
            let scores = match &item.report {
                Report::Scores(rows) => rows.len(),
                Report::Nothing | Report::Sum(_) => 0,
            };
            let own = samples.by_ref().take(scores + usize::from(item.sample));
            let broken = own.filter(|sample| !sample.is_finite).count() > 0;
            if broken && self.apply_cancel(item.key).is_none() {
                let tokens = item.start + item.count;
                let fault = EngineFault::NotFinite { tokens };
                self.end_request(item.key, Err(Box::new(fault)));
            }
        }
    }

    fn commit(&mut self, key: SequenceKey, token: Token) {
        // Read the flag again: a cancel that was posted meanwhile wins over the token.
        if self.apply_cancel(key).is_some() {
            self.ledger.discarded(key);
            return;
        }
        match self.scheduler.commit(key, token.id) {
            Commit::Discarded => self.ledger.discarded(key),
            Commit::Token => {
                self.tokens_generated += 1;
                self.ledger.token(key, token);
            }
            Commit::Failed(error) => {
                let fault = EngineFault::Constraint(error);
                self.end_request(key, Err(Box::new(fault)));
            }
            Commit::Finished(reason) => {
                self.tokens_generated += 1;
                self.ledger.token(key, token);
                self.end_request(key, Ok(reason.into()));
            }
        }
    }

    /// Ends a request whose work ends with its prompt. If it was cancelled meanwhile, it ends
    /// as cancelled.
    fn commit_end(&mut self, key: SequenceKey) {
        if self.apply_cancel(key).is_none()
            && let Commit::Finished(reason) = self.scheduler.commit_end(key)
        {
            self.end_request(key, Ok(reason.into()));
        }
    }

    /// Measures how fast prompts are computed, to estimate the cost of recomputing. The device
    /// may not wait for a step without results, so its rows are counted with the next step that
    /// has some.
    fn observe(&mut self, plan: &StepPlan, now: Instant) {
        let prompts = plan.items.iter().filter(|item| item.count > 1);
        self.prompt_rows += prompts.map(|item| item.count).sum::<usize>();
        self.rows += plan.rows();
        if plan.sample_count() == 0 && plan.sums().next().is_none() {
            return;
        }
        let took = now.saturating_duration_since(self.step_began);
        // Decoding takes longer per token and says nothing about the cost of recomputing a
        // prompt.
        if 2 * self.prompt_rows > self.rows {
            self.scheduler.observe_step(self.rows, took.as_secs_f64());
        }
        (self.rows, self.prompt_rows, self.step_began) = (0, 0, now);
    }

    /// Records that all steps up to `step` have completed. If no step is in flight, every
    /// planned step is over, including those whose launch failed.
    fn step_completed(&mut self, step: StepId) {
        let step = if self.in_flight.is_empty() {
            self.scheduler.launched()
        } else {
            step
        };
        self.completed = self.completed.max(step);
        self.scheduler.step_completed(self.completed);
        self.ledger.settle(self.completed);
    }

    fn flush(&mut self) {
        let mut changes = std::mem::take(&mut self.paused);
        self.ledger.flush(&mut changes);
        for (key, paused) in changes.drain(..) {
            self.scheduler.set_paused(key, paused);
            let deadline = self.slow_consumer_deadline.filter(|_| paused);
            let due = deadline.and_then(|within| Instant::now().checked_add(within));
            self.ledger.catch_up_due(key, due);
        }
        self.paused = changes;
    }

    fn fail_step(&mut self, plan: &StepPlan, error: &DeviceError) {
        tracing::error!(%error, step = %plan.step, requests = plan.items.len(), "a step failed");
        self.scheduler.step_failed(plan);
        for item in &plan.items {
            // A request that has already been cancelled stays cancelled.
            if self.apply_cancel(item.key).is_none() {
                let fault = EngineFault::Device(error.clone());
                self.end_request(item.key, Err(Box::new(fault)));
            }
        }
    }

    /// Returns an error if a device error ends the engine rather than only the requests of one
    /// step.
    fn closes_engine(&self, error: DeviceError) -> Result<(), EngineFault> {
        match error {
            DeviceError::Lost { .. } => Err(EngineFault::Device(error)),
            _ => Ok(()),
        }
    }
}

/// Returns an error unless a step has delivered as many results as its plan asks for.
fn complete(plan: &StepPlan, output: &StepOutput) -> Result<(), DeviceError> {
    let given = (output.samples.len(), output.sums.len());
    let wanted = (plan.sample_count(), plan.sums().count());
    if given == wanted {
        return Ok(());
    }
    Err(DeviceError::Failed {
        device: "runner",
        operation: "collect",
        reason: format!(
            "the step returned {} samples and {} sums, but its plan asks for {} and {}",
            given.0, given.1, wanted.0, wanted.1
        ),
    })
}
