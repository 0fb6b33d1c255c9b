//! The scheduler thread: one loop that owns the device, the sequences and the KV cache.

use super::command::{Command, Submission};
use super::deadlines::Due;
use super::event::{CancelReason, Ending, Outcome, PromptReport, Receipt, RequestCell, Token};
use super::ledger::{Ledger, ReceiptReply, Remains};
use super::metrics::{EngineMetrics, NoEffect, Phase, cleanup_failed};
use super::snapshot;
use super::stats::EngineStats;
use super::sync::{Arc, Never, OnceLock, Receiver, RecvTimeoutError, TryRecvError};
use super::turn::{Stop, TurnCell, TurnEnd};
use super::waiting::Reply;
use super::watchdog::Pulse;
use super::{Drained, EngineFault};
use crate::config::EngineConfig;
use crate::device::DeviceError;
use crate::id::{SessionId, StepId};
use crate::runner::{Runner, StepOutput};
use crate::sampling::{ConstraintError, Sampled};
use crate::schedule::{
    Commit, Fate, PlanItem, Report, Scheduler, Sequence, SequenceKey, StepPlan, Task,
};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Maximum duration of a pin; longer pins are shortened to it.
const LONGEST_PIN: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Everything that the scheduler thread owns.
pub(super) struct SchedulerThread {
    scheduler: Scheduler,
    ledger: Ledger,
    runner: Box<dyn Runner>,
    /// Maximum number of steps in flight.
    depth: usize,
    /// Steps that are launched and not yet collected, oldest first.
    in_flight: VecDeque<StepPlan>,
    /// When the device could begin with the oldest step in flight.
    step_began: Instant,
    /// Rows collected since `step_began`, and the number of them that belong to prompts.
    rows: usize,
    prompt_rows: usize,
    completed: StepId,
    audit: bool,
    closing: bool,
    /// How long a request may stay paused because its reader lags behind.
    slow_consumer_deadline: Option<Duration>,
    /// Whether there is nothing to do until a command arrives or a deadline passes.
    idle: bool,
    /// Whether a command was applied since the last plan.
    applied: bool,
    tokens_generated: u64,
    prompt_tokens: u64,
    metrics: Arc<EngineMetrics>,
    /// The stats that the metrics show.
    published: EngineStats,
    /// Scratch buffer, kept to reuse its allocation.
    paused: Vec<(SequenceKey, bool)>,
    /// Plans of collected steps, kept to reuse their allocations.
    spare_plans: Vec<StepPlan>,
    /// Drains in progress.
    drains: Vec<Drain>,
    /// Whether a drain has begun. Requests that arrive later are cancelled.
    draining: bool,
    /// Number of requests that drains have cancelled.
    aborted: u64,
    // Fields are dropped in order. These come last, so that a thread that observes their end
    // finds everything else gone.
    commands: Receiver<Command>,
    /// Replies of shutdowns. Dropping them tells the callers that the thread has ended.
    shutdowns: Vec<Reply<Never>>,
    pulse: Pulse,
}

/// A drain in progress: it waits until no request is open.
struct Drain {
    /// When the remaining requests are cancelled.
    until: Option<Instant>,
    /// The totals when the drain began. They are subtracted from those at its end.
    before: Drained,
    /// Where the result is sent. `None` for a shutdown, which then ends the thread.
    reply: Option<Reply<Drained>>,
}

impl SchedulerThread {
    pub fn new(
        commands: Receiver<Command>,
        scheduler: Scheduler,
        runner: Box<dyn Runner>,
        metrics: Arc<EngineMetrics>,
        pulse: Pulse,
        config: &EngineConfig,
    ) -> Self {
        Self {
            scheduler,
            ledger: Ledger::new(Arc::clone(&metrics)),
            // A step can take feedback from the previous step only, so a depth above 2 is of no
            // use.
            depth: runner.depth().clamp(1, 2),
            runner,
            in_flight: VecDeque::new(),
            step_began: Instant::now(),
            rows: 0,
            prompt_rows: 0,
            completed: StepId::default(),
            audit: config.audit,
            slow_consumer_deadline: config.slow_consumer_deadline,
            closing: false,
            idle: true,
            applied: false,
            tokens_generated: 0,
            prompt_tokens: 0,
            metrics,
            published: EngineStats::default(),
            paused: Vec::new(),
            spare_plans: Vec::new(),
            drains: Vec::new(),
            draining: false,
            aborted: 0,
            commands,
            shutdowns: Vec::new(),
            pulse,
        }
    }

    /// Runs until no caller is left that could post a command, or until a shutdown or a fault.
    /// A panic is a fault: the engine closes, and everyone who waits learns the reason.
    pub fn run(mut self, fault: &Arc<OnceLock<EngineFault>>) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let cause = match outcome {
            Ok(Ok(())) => EngineFault::Shutdown,
            Ok(Err(cause)) => cause,
            Err(panic) => EngineFault::Panic(panic_message(&*panic)),
        };
        self.close(&cause, fault);
        // Dropping the receiver rejects later commands and drops those in the queue. A dropped
        // submission wakes its reader.
    }

    /// Runs after the last iteration of the loop: ends every request and reports the cause.
    fn close(&mut self, cause: &EngineFault, fault: &OnceLock<EngineFault>) {
        if !matches!(cause, EngineFault::Shutdown) {
            tracing::error!(%cause, "the engine has failed and is closing");
        }
        // Set the cause before waking anyone who waits, so that they find it.
        let _ = fault.set(cause.clone());
        // If a device call panicked, it is no longer running.
        let _ = self.pulse.end_call();
        // The runner itself may be broken, so nothing below uses it.
        let rest = catch_unwind(AssertUnwindSafe(|| self.fail_everything(cause)));
        if let Err(panic) = rest {
            tracing::error!(
                panic = panic_message(&*panic),
                "clean-up after a fault panicked"
            );
            cleanup_failed("fault");
        }
    }

    fn serve(&mut self) -> Result<(), EngineFault> {
        self.pulse.busy();
        while self.run_iteration()?.is_continue() {}
        Ok(())
    }

    /// Runs one complete iteration of the loop. Returns `Break` after a shutdown, or when no
    /// caller is left that could post a command.
    fn run_iteration(&mut self) -> Result<ControlFlow<()>, EngineFault> {
        if self.drain_commands() {
            return Ok(ControlFlow::Break(()));
        }
        self.handle_deadlines();
        self.applied = false;
        let plan = self.plan();
        let planned = plan.is_some();
        if let Some(plan) = plan {
            self.launch(plan)?;
        }
        let due = self.in_flight.len() >= self.depth || (!planned && !self.in_flight.is_empty());
        if due {
            self.collect()?;
        }
        // Collecting may have freed blocks, and commands may have arrived meanwhile. In both
        // cases, plan once more before sleeping.
        self.idle = !planned && !due && !self.applied;
        Ok(if self.closing && self.idle {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    }

    fn plan(&mut self) -> Option<StepPlan> {
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

    /// Applies the commands that have been posted. When idle, waits for one: if nothing can be
    /// planned and nothing is in flight, only a command or a deadline changes that. Returns
    /// `true` when no caller is left that could post a command.
    fn drain_commands(&mut self) -> bool {
        // Drain only what is queued now, so that a busy caller cannot starve the loop.
        let mut rest = self.commands.len();
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    self.apply(command);
                    if rest <= 1 {
                        // Settle here as well, because a busy queue may never be found empty.
                        self.ledger.settle(self.completed);
                        return false;
                    }
                    rest -= 1;
                }
                Err(TryRecvError::Disconnected) => {
                    // Collect what is in flight before ending, so that every receipt is sent.
                    self.ledger.settle(self.completed);
                    self.closing = true;
                    return self.in_flight.is_empty();
                }
                Err(TryRecvError::Empty) => {
                    self.ledger.settle(self.completed);
                    if !self.idle || self.closing {
                        return false;
                    }
                    self.publish();
                    match self.wait() {
                        Ok(command) => self.apply(command),
                        Err(RecvTimeoutError::Timeout) => return false,
                        Err(RecvTimeoutError::Disconnected) => return true,
                    }
                }
            }
        }
    }

    /// Waits for a command, but not beyond the next deadline.
    fn wait(&mut self) -> Result<Command, RecvTimeoutError> {
        let drains = self.drains.iter().filter_map(|drain| drain.until);
        let deadline = self.ledger.next_deadline().into_iter().chain(drains).min();
        self.pulse.idle();
        let command = match deadline {
            Some(deadline) => self.commands.recv_deadline(deadline),
            None => self.commands.recv().map_err(RecvTimeoutError::from),
        };
        self.pulse.busy();
        command
    }

    /// Returns how many requests have ended so far, here including those in `aborted`, and how
    /// many of them drains have cancelled.
    fn ended(&self) -> Drained {
        let outcomes = self.ledger.outcomes();
        Drained {
            finished: outcomes.accepted - self.ledger.open_accounts() as u64,
            aborted: self.aborted,
        }
    }

    fn begin_drain(&mut self, until: Option<Instant>, reply: Option<Reply<Drained>>) {
        self.draining = true;
        self.drains.push(Drain {
            until,
            before: self.ended(),
            reply,
        });
    }

    /// Cancels the remaining requests when the deadline of a drain has passed. When no request
    /// is left, reports the results of all drains.
    fn finish_drains(&mut self) {
        if self.drains.is_empty() {
            return;
        }
        let now = Instant::now();
        let over = |drain: &Drain| drain.until.is_some_and(|until| until <= now);
        if self.drains.iter().any(over) {
            self.aborted += self.ledger.open_accounts() as u64;
            self.cancel_all(CancelReason::Shutdown);
        }
        self.ledger.settle(self.completed);
        if self.ledger.open_accounts() + self.ledger.closing_accounts() > 0 {
            return;
        }
        let now = self.ended();
        for Drain { before, reply, .. } in std::mem::take(&mut self.drains) {
            let aborted = now.aborted - before.aborted;
            match reply {
                Some(reply) => reply.send(Drained {
                    finished: now.finished - before.finished - aborted,
                    aborted,
                }),
                None => self.closing = true,
            }
        }
    }

    /// Handles what is due now. Deadlines take effect only here.
    fn handle_deadlines(&mut self) {
        if self.scheduler.counts().pinned_blocks > 0 {
            self.scheduler.expire_pins(Instant::now());
        }
        self.expire();
        self.finish_drains();
    }

    /// Cancels the requests whose deadlines have passed.
    fn expire(&mut self) {
        let Some(first) = self.ledger.next_deadline() else {
            return;
        };
        let now = Instant::now();
        if first > now {
            return;
        }
        while let Some((key, due)) = self.ledger.overdue(now) {
            let reason = match due {
                Due::FirstToken | Due::Finish => CancelReason::Deadline,
                Due::CatchUp => CancelReason::SlowConsumer,
            };
            self.cancel(key, reason);
        }
    }

    /// Cancels a request from the engine's side. If its caller has already cancelled it, the
    /// caller's reason stands.
    fn cancel(&mut self, key: SequenceKey, reason: CancelReason) -> Option<usize> {
        if let Some(cell) = self.ledger.cell_of(key) {
            cell.cancel(reason);
        }
        self.apply_cancel(key)
    }

    fn apply(&mut self, command: Command) {
        self.idle = false;
        self.applied = true;
        match command {
            Command::Submit(submission) => {
                self.submit(*submission, None);
            }
            Command::SubmitGroup(group) => {
                let mut leader = None;
                for submission in group {
                    let key = self.submit(submission, leader);
                    leader.get_or_insert(key);
                }
            }
            Command::Cancel(id) => match self.ledger.key_of(id) {
                Some(key) => {
                    self.apply_cancel(key);
                }
                None => self.metrics.no_effect(NoEffect::AlreadyEnded),
            },
            Command::CancelRequest {
                id,
                reason,
                posted_at,
                reply,
            } => match self.ledger.key_of(id) {
                Some(key) => {
                    self.ledger.add_reply(key, ReceiptReply::Request(reply));
                    if let Some(cell) = self.ledger.cell_of(key) {
                        cell.cancel_at(reason, posted_at);
                    }
                    self.apply_cancel(key);
                }
                None => {
                    self.metrics.no_effect(NoEffect::AlreadyEnded);
                    reply.send(None);
                }
            },
            Command::Resume(id) => {
                if let Some(key) = self.ledger.key_of(id) {
                    self.scheduler.set_paused(key, false);
                    self.ledger.catch_up_due(key, None);
                }
            }
            Command::Stop {
                session,
                turn,
                stop,
                posted_at,
                reply,
            } => self.stop(session, turn, (stop, posted_at), reply),
            Command::Rewind(session, tokens) => {
                self.scheduler.rewind_session(session, tokens);
            }
            Command::Fork { from, to } => self.scheduler.fork_session(from, to),
            Command::Kept(session, reply) => {
                let _ = reply.try_send(self.scheduler.kept(session));
            }
            Command::EndSession {
                session,
                posted_at,
                reply,
            } => self.end_session(session, posted_at, reply),
            Command::ClearPrefixes => self.scheduler.clear_prefixes(),
            Command::Inspect(reply) => {
                // Publish first, so that the metrics are as recent as the answer.
                self.publish();
                // The caller may have stopped waiting; its answer is then dropped.
                let _ = reply.try_send(self.stats());
            }
            Command::InspectAsync(reply) => {
                self.publish();
                reply.send(self.stats());
            }
            Command::Find(label, reply) => reply.send(self.ledger.ids_with_label(&label)),
            Command::Snapshot(reply) => {
                self.publish();
                reply.send(snapshot::take(&self.scheduler, &self.ledger, self.stats()));
            }
            Command::AbortAll => self.cancel_all(CancelReason::AbortAll),
            Command::Drain(until, reply) => self.begin_drain(until, Some(reply)),
            Command::Shutdown(until, reply) => {
                self.shutdowns.push(reply);
                self.begin_drain(until, None);
            }
        }
    }

    /// Accepts a request. If it has a `leader`, it waits until the leader has computed their
    /// common prompt.
    fn submit(&mut self, submission: Submission, leader: Option<SequenceKey>) -> SequenceKey {
        let Submission { id, spec, account } = submission;
        self.prompt_tokens += spec.prompt.len() as u64;
        let scores = matches!(spec.task, Task::Score { .. });
        let key = self.scheduler.add_follower(id, spec, leader);
        self.ledger.open(key, id, account);
        if scores {
            // Even if there are no scores, the request must get a report.
            self.ledger.report(key, PromptReport::Scores(Vec::new()));
        }
        // The request was cancelled on its way here, so it never runs (I5).
        let cell = self.ledger.cell_of(key);
        if cell.and_then(RequestCell::cancelled) == Some(CancelReason::StreamDropped) {
            self.end_request(key, Ok(Outcome::Cancelled(CancelReason::SubmitDropped)));
        }
        self.apply_cancel(key);
        if self.closing || self.draining {
            self.aborted += u64::from(self.ledger.cell_of(key).is_some());
            self.cancel(key, CancelReason::Shutdown);
        }
        key
    }

    /// Stops the turn of a session. If the turn has already ended, there is nothing to free,
    /// and the receipt says so.
    fn stop(
        &mut self,
        session: SessionId,
        turn: Option<Arc<TurnCell>>,
        (stop, posted_at): (Stop, Instant),
        reply: Reply<Receipt>,
    ) {
        // Stop only the turn that the caller meant; another one may have begun.
        let open = self.ledger.turn_key(session).filter(|&key| {
            let open = self.ledger.turn_of(key);
            turn.as_ref()
                .zip(open)
                .is_some_and(|(meant, open)| Arc::ptr_eq(meant, &open.cell))
        });
        if let Some(turn) = turn {
            turn.stop(stop);
        }
        match open {
            Some(key) => {
                self.ledger.add_reply(key, ReceiptReply::Session(reply));
                if let Some(cell) = self.ledger.cell_of(key) {
                    cell.cancel_at(CancelReason::SessionStopped, posted_at);
                }
                self.apply_cancel(key);
            }
            None => {
                let receipt = Receipt::empty(self.completed, posted_at);
                self.ledger
                    .send_receipt_after(self.completed, receipt, reply);
            }
        }
    }

    /// Ends a session: cancels its turn and frees what it keeps.
    fn end_session(
        &mut self,
        session: SessionId,
        posted_at: Instant,
        reply: Option<Reply<Receipt>>,
    ) {
        let mut receipt = Receipt::empty(self.completed, posted_at);
        let mut fence = StepId::default();
        if let Some(key) = self.ledger.turn_key(session) {
            let sequence = self.scheduler.sequences().get(key);
            receipt.tokens_generated = sequence.map_or(0, Sequence::generated);
            fence = sequence.map_or(fence, Sequence::touched);
            // The cancelled turn first returns its blocks to the session; they are freed below
            // with the rest.
            receipt.blocks_freed = self.cancel(key, CancelReason::SessionEnded).unwrap_or(0);
        }
        let (blocks, touched) = self.scheduler.end_session(session);
        receipt.blocks_freed += blocks;
        if let Some(reply) = reply {
            self.ledger
                .send_receipt_after(fence.max(touched), receipt, reply);
        }
    }

    /// Ends a request if its cancel flag is raised, and returns the number of blocks that
    /// nobody holds any more.
    fn apply_cancel(&mut self, key: SequenceKey) -> Option<usize> {
        let reason = self.ledger.cell_of(key)?.cancelled()?;
        let outcome = match reason {
            CancelReason::StopString => Outcome::Stop,
            reason => Outcome::Cancelled(reason),
        };
        Some(self.end_request(key, Ok(outcome)))
    }

    fn cancel_all(&mut self, reason: CancelReason) {
        for key in self.ledger.open_keys() {
            self.cancel(key, reason);
        }
    }

    /// Ends a request, for any reason, and returns the number of blocks that nobody holds any
    /// more. Every request ends here.
    fn end_request(&mut self, key: SequenceKey, ending: Ending) -> usize {
        let disposition = self.decide_disposition(key, &ending);
        let Some((sequence, blocks)) = self.scheduler.close(key, disposition) else {
            return 0;
        };
        let remains = Remains {
            blocks,
            tokens_generated: sequence.generated(),
            fence: sequence.touched(),
        };
        self.ledger.close(key, ending, remains);
        blocks
    }

    /// Decides what happens to the blocks of a request that is about to end. If the request is
    /// a turn, also records for its session how the turn ended.
    fn decide_disposition(&self, key: SequenceKey, ending: &Ending) -> Fate {
        let (Some(turn), Some(sequence)) = (
            self.ledger.turn_of(key),
            self.scheduler.sequences().get(key),
        ) else {
            return Fate::Free;
        };
        let flag = self.ledger.cell_of(key).and_then(RequestCell::cancelled);
        let (end, tokens) = match (ending, flag) {
            // What a failed step has written cannot be trusted.
            (Err(_), _) => {
                turn.cell.set_thread_end(TurnEnd::Rewound);
                return Fate::Free;
            }
            (Ok(Outcome::Stop | Outcome::Length), Some(CancelReason::StopString)) => {
                let kept = sequence.prompt_tokens + turn.cell.kept_answer();
                (None, kept)
            }
            (Ok(Outcome::Stop | Outcome::Length), _) => {
                let tokens = sequence.tokens.clone();
                (Some(TurnEnd::Finished(tokens)), sequence.tokens.len())
            }
            (Ok(Outcome::Cancelled(_)), Some(CancelReason::SessionStopped))
                if turn.cell.is_stopped(Stop::Keep) =>
            {
                let tokens = sequence.tokens.clone();
                (Some(TurnEnd::Kept(tokens)), sequence.tokens.len())
            }
            (Ok(Outcome::Cancelled(_)), _) => (Some(TurnEnd::Rewound), turn.base),
        };
        if let Some(end) = end {
            turn.cell.set_thread_end(end);
        }
        let pin_until = turn.pin.map(|pin| Instant::now() + pin.min(LONGEST_PIN));
        Fate::Keep { tokens, pin_until }
    }

    /// Enqueues a step. If the launch fails, the requests of that step fail.
    fn launch(&mut self, plan: StepPlan) -> Result<(), EngineFault> {
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
    fn collect(&mut self) -> Result<(), EngineFault> {
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
        self.scheduler.written(plan);
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

    /// Ends a request whose work ends with its prompt. If it was cancelled meanwhile, it ends
    /// as cancelled.
    fn commit_end(&mut self, key: SequenceKey) {
        if self.apply_cancel(key).is_none()
            && let Commit::Finished(reason) = self.scheduler.commit_end(key)
        {
            self.end_request(key, Ok(reason.into()));
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
        self.scheduler.completed(self.completed);
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
        self.scheduler.lost(plan);
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

    /// Ends every request, when the thread is about to end.
    fn fail_everything(&mut self, cause: &EngineFault) {
        for key in self.ledger.open_keys() {
            if self.apply_cancel(key).is_some() {
                continue;
            }
            let ending = match cause {
                EngineFault::Shutdown => Ok(Outcome::Cancelled(CancelReason::Shutdown)),
                fault => Err(Box::new(fault.clone())),
            };
            self.end_request(key, ending);
        }
        while let Ok(command) = self.commands.try_recv() {
            // Dropping a submission wakes its reader, which finds the fault.
            drop(command);
        }
        self.ledger.abandon();
        self.publish();
    }

    /// Updates the metrics.
    fn publish(&mut self) {
        let now = self.stats();
        self.metrics.publish(&now, &self.published);
        self.published = now;
    }

    fn stats(&self) -> EngineStats {
        let counts = self.scheduler.counts();
        EngineStats {
            blocks: self.scheduler.cache().books(),
            block_tokens: self.scheduler.cache().block_tokens(),
            running: counts.running,
            waiting: counts.waiting,
            paused: counts.paused,
            open: self.ledger.open_accounts(),
            closing: self.ledger.closing_accounts(),
            preemptions: counts.preemptions,
            swaps: counts.swaps,
            swapped_blocks: counts.swapped_blocks,
            prefix_queries: counts.prefix_queries,
            prefix_hits: counts.prefix_hits,
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

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod property;
