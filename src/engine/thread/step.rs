//! The life of a step: it is planned, launched, collected and committed.

use super::SchedulerThread;
use crate::device::DeviceError;
use crate::engine::EngineFault;
use crate::engine::event::{Outcome, PromptReport};
use crate::engine::metrics::Phase;
use crate::id::StepId;
use crate::runner::StepOutput;
use crate::sampling::{ConstraintError, Samples, TokenRun};
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
        if self.in_flight.is_empty() && self.measured_tokens == 0 {
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

    /// Overwrites freed blocks and slots of states, so that a step that still reads them produces
    /// visibly wrong tokens.
    fn poison_freed(&mut self) -> Result<(), EngineFault> {
        let freed = self.scheduler.take_freed();
        let states = self.scheduler.take_freed_states();
        if freed.is_empty() && states.is_empty() {
            return Ok(());
        }
        self.pulse.begin_call(self.scheduler.launched());
        let mut poisoned = self.runner.poison(&freed);
        if poisoned.is_ok() && !states.is_empty() {
            poisoned = self.runner.poison_states(&states);
        }
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
                match complete(&plan, &output, self.in_flight.is_empty()) {
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
        self.end_not_finite(plan, &output);
        // Publish complete blocks before any other item ends, so that they can be reused.
        self.scheduler.step_succeeded(plan);
        let StepOutput {
            samples: Samples { tokens, .. },
            runs,
            sums,
        } = &mut output;
        let (mut tokens, mut sums) = (tokens.drain(..), sums.drain(..));
        for (item, length) in plan.items.iter().zip(run_lengths(plan, runs)) {
            let report = match &item.report {
                Report::Nothing => None,
                Report::Scores(rows) => {
                    let scores = tokens.by_ref().take(rows.len());
                    Some(PromptReport::Scores(scores.collect()))
                }
                Report::Sum(_) => sums.next().map(PromptReport::Sum),
            };
            if let Some(report) = report {
                self.ledger.report(item.key, report);
            }
            let run = match length {
                // Nearly all runs. Collecting one token takes longer.
                1 => tokens.next().map(TokenRun::from),
                _ => (length > 0).then(|| tokens.by_ref().take(length).collect()),
            };
            if let Some(run) = run {
                self.commit(plan.step, item, run);
            }
            if item.end {
                self.commit_end(item.key);
            }
        }
        drop((tokens, sums));
        self.runner.recycle(output);
    }

    /// Ends the requests whose logits are not finite, before their blocks are published. Blocks
    /// that were published after earlier steps may be the cause, so no later request finds them.
    fn end_not_finite(&mut self, plan: &StepPlan, output: &StepOutput) {
        let not_finite = &output.samples.not_finite;
        if not_finite.is_empty() {
            return;
        }
        let mut next = 0;
        for (item, length) in plan.items.iter().zip(run_lengths(plan, &output.runs)) {
            let own = next..next + item.report.scored().len() + length;
            next = own.end;
            let broken = not_finite.iter().any(|index| own.contains(index));
            if broken && self.apply_cancel(item.key).is_none() {
                let tokens = item.start + item.count;
                self.scheduler.forget_prefix(item.key);
                let fault = EngineFault::NotFinite { tokens };
                self.end_request(item.key, Err(Box::new(fault)));
            }
        }
    }

    /// Commits the run of an item: delivers the tokens up to the one that ends the request, if
    /// one does, and counts those after it as discarded.
    fn commit(&mut self, step: StepId, item: &PlanItem, run: TokenRun) {
        let (key, count) = (item.key, run.len());
        // Read the flag again: a cancel that was posted meanwhile wins over the tokens.
        if self.apply_cancel(key).is_some() {
            self.ledger.discarded(key, count);
            return;
        }
        match self.scheduler.commit(step, item, run.ids()) {
            Commit::Discarded => self.ledger.discarded(key, count),
            Commit::Continues => self.deliver(key, run, count),
            Commit::Finished { tokens, reason } => {
                self.deliver(key, run, tokens);
                self.end_request(key, Ok(Outcome::of(reason)));
                self.ledger.discarded(key, count - tokens);
            }
            Commit::Failed { tokens, error } => {
                if tokens > 0 {
                    // Only a normal ending comes with tokens, so these are sent before it.
                    self.deliver(key, run, tokens);
                    self.flush();
                }
                let fault = EngineFault::Constraint(error);
                self.end_request(key, Err(Box::new(fault)));
                self.ledger.discarded(key, count - tokens - 1);
            }
        }
    }

    /// Records the first `committed` tokens of a run for the request's reader.
    fn deliver(&mut self, key: SequenceKey, mut run: TokenRun, committed: usize) {
        run.truncate(committed);
        self.tokens_generated += committed as u64;
        self.ledger.tokens(key, run);
    }

    /// Ends a request whose work ends with its prompt. If it was cancelled meanwhile, it ends
    /// as cancelled.
    fn commit_end(&mut self, key: SequenceKey) {
        if self.apply_cancel(key).is_none()
            && let Commit::Finished { reason, .. } = self.scheduler.commit_end(key)
        {
            self.end_request(key, Ok(Outcome::of(reason)));
        }
    }

    /// Measures how fast prompts are computed, to estimate the cost of recomputing. The device
    /// may not wait for a step without results, so its tokens are counted with the next step that
    /// has some.
    fn observe(&mut self, plan: &StepPlan, now: Instant) {
        let prompts = plan.items.iter().filter(|item| item.count > 1);
        self.measured_prompt_tokens += prompts.map(|item| item.count).sum::<usize>();
        self.measured_tokens += plan.tokens();
        let has_results =
            |item: &PlanItem| item.sample_count() > 0 || matches!(item.report, Report::Sum(_));
        if !plan.items.iter().any(has_results) {
            return;
        }
        let took = now.saturating_duration_since(self.step_began);
        // Decoding takes longer per token and says nothing about the cost of recomputing a
        // prompt.
        if 2 * self.measured_prompt_tokens > self.measured_tokens {
            self.scheduler
                .observe_step(self.measured_tokens, took.as_secs_f64());
        }
        (
            self.measured_tokens,
            self.measured_prompt_tokens,
            self.step_began,
        ) = (0, 0, now);
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

/// Returns the number of tokens in the run of each item, which is 0 for an item that is not
/// sampled. `runs` is [`StepOutput::runs`].
fn run_lengths(plan: &StepPlan, runs: &[usize]) -> impl Iterator<Item = usize> {
    let mut runs = runs.iter().copied();
    plan.items.iter().map(move |item| match item.sampled.len() {
        0 => 0,
        positions => runs.next().unwrap_or(positions),
    })
}

/// Returns an error unless the results of a step are those that its plan asks for. Only the
/// `last` step in flight may have runs of several tokens.
fn complete(plan: &StepPlan, output: &StepOutput, last: bool) -> Result<(), DeviceError> {
    let failed = |reason| {
        Err(DeviceError::Failed {
            device: "runner",
            operation: "collect",
            reason,
        })
    };
    let runs = &output.runs;
    if !runs.is_empty() {
        let wanted = plan.samples().count();
        if runs.len() != wanted || runs.contains(&0) {
            return failed(format!(
                "the step returned runs of {runs:?} tokens, but its plan asks for {wanted} runs of at least one token"
            ));
        }
    }
    // One pass, because every step is checked.
    let (mut wanted, mut wanted_sums, mut several) = (0, 0, false);
    for (item, length) in plan.items.iter().zip(run_lengths(plan, runs)) {
        wanted += item.report.scored().len() + length;
        wanted_sums += usize::from(matches!(item.report, Report::Sum(_)));
        several |= item.sampled.len() > 1 || length > 1;
    }
    // The step after this one continues after one token.
    if several && !last {
        return failed(format!(
            "the step returned runs of {runs:?} tokens, but the step after it is in flight and continues after one token"
        ));
    }
    let (samples, sums) = (output.samples.tokens.len(), output.sums.len());
    if (samples, sums) == (wanted, wanted_sums) {
        return Ok(());
    }
    failed(format!(
        "the step returned {samples} samples and {sums} sums, but its plan asks for {wanted} and {wanted_sums}"
    ))
}
