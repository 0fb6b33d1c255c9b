//! The scheduler thread: one loop that owns everything.

use super::command::{Command, Submission};
use super::deadlines::Due;
use super::event::{CancelReason, PromptReport, Receipt, RequestCell, Terminal, Token};
use super::ledger::{Ledger, ReceiptReply, Remains};
use super::metrics::{EngineMetrics, Noop, Phase, cleanup_failed};
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
    Commit, Fate, FinishReason, PlanItem, Report, Scheduler, Sequence, SequenceKey, StepPlan, Task,
};
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// A pin for longer is one for this long.
const LONGEST_PIN: Duration = Duration::from_secs(100 * 365 * 86_400);

/// What the scheduler thread owns.
pub(super) struct SchedulerThread {
    scheduler: Scheduler,
    ledger: Ledger,
    runner: Box<dyn Runner>,
    /// Steps in flight at most.
    depth: usize,
    /// Launched and not collected, oldest first.
    in_flight: VecDeque<StepPlan>,
    /// When the oldest step in flight had the device to itself.
    step_began: Instant,
    /// Rows collected since then, and how many of them were prompts.
    rows: usize,
    prompt_rows: usize,
    completed: StepId,
    audit: bool,
    closing: bool,
    /// How long a reader may keep its request paused.
    slow_consumer_deadline: Option<Duration>,
    /// Nothing to do until a command arrives or a deadline passes.
    idle: bool,
    /// A command was applied since the last plan.
    applied: bool,
    tokens_generated: u64,
    prompt_tokens: u64,
    metrics: Arc<EngineMetrics>,
    /// What the metrics show.
    published: EngineStats,
    /// Kept for its memory.
    paused: Vec<(SequenceKey, bool)>,
    /// Plans whose steps are over, for their memory.
    spare_plans: Vec<StepPlan>,
    /// Those who wait for the open sessions to end.
    drains: Vec<Drain>,
    /// New sessions come too late.
    draining: bool,
    /// Sessions that drains have cancelled.
    aborted: u64,
    // These go last, in this order: who learns of their end finds all the rest gone.
    commands: Receiver<Command>,
    /// Tell by their end that the thread has ended.
    shutdowns: Vec<Reply<Never>>,
    pulse: Pulse,
}

/// Someone who waits for the open sessions to end.
struct Drain {
    /// When those that are left are cancelled.
    until: Option<Instant>,
    /// How many had ended, and how many of them by a drain, when it began.
    before: Drained,
    /// Who is told; nobody at a shutdown, which goes on from here.
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
            // Feedback reaches back one step, not two.
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

    /// Runs until nobody can post a command any more, a shutdown, or a fault. A
    /// panic is a fault: every waiter learns of it, and the engine closes.
    pub fn run(mut self, fault: &Arc<OnceLock<EngineFault>>) {
        let outcome = catch_unwind(AssertUnwindSafe(|| self.serve()));
        let cause = match outcome {
            Ok(Ok(())) => EngineFault::Shutdown,
            Ok(Err(cause)) => cause,
            Err(panic) => EngineFault::Panic(panic_message(&*panic)),
        };
        self.close(&cause, fault);
        // Dropping the receiver refuses later commands and drops those in the
        // queue; a dropped submission wakes its reader.
    }

    /// What comes after the last turn: every session ends, and learns the cause.
    fn close(&mut self, cause: &EngineFault, fault: &OnceLock<EngineFault>) {
        if !matches!(cause, EngineFault::Shutdown) {
            tracing::error!(%cause, "the engine has failed and closes");
        }
        // Before any waiter wakes, so that it finds the reason.
        let _ = fault.set(cause.clone());
        // A call that panicked is over, too.
        let _ = self.pulse.returned();
        // The runner may be what broke: nothing below touches it.
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
        while self.turn()?.is_continue() {}
        Ok(())
    }

    /// One turn of the loop, in full. The last one, without a fault, is after a
    /// shutdown, or when nobody is left who could post a command.
    fn turn(&mut self) -> Result<ControlFlow<()>, EngineFault> {
        if self.drain_commands() {
            return Ok(ControlFlow::Break(()));
        }
        self.pass_time();
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
        // A collected step may have made room, and a command may have come while it was
        // collected: then plan once more before sleeping.
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

    /// Applies every command that has been posted; waits for one when idle: when
    /// nothing can be planned and nothing is in flight, only a command or a deadline
    /// changes that. `true` when nobody is left who could post.
    fn drain_commands(&mut self) -> bool {
        // Not more than are there now: whoever posts without end does not stop the rest.
        let mut rest = self.commands.len();
        loop {
            match self.commands.try_recv() {
                Ok(command) => {
                    self.apply(command);
                    if rest <= 1 {
                        // Here too: the queue may never be found empty.
                        self.ledger.settle(self.completed);
                        return false;
                    }
                    rest -= 1;
                }
                Err(TryRecvError::Disconnected) => {
                    // What is in flight is collected, so that every receipt goes out.
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

    /// Waits for a command, at most until the next deadline.
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

    /// Sessions that have ended, and those that drains have cancelled.
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

    /// Cancels what is left when the time of a drain is over, and tells those who wait
    /// when nothing is left.
    fn attend_drains(&mut self) {
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

    /// Does what is due by now. The one place where time decides something.
    fn pass_time(&mut self) {
        if self.scheduler.counts().pinned_blocks > 0 {
            self.scheduler.expire_pins(Instant::now());
        }
        self.expire();
        self.attend_drains();
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
                Due::Reader => CancelReason::SlowConsumer,
            };
            self.cancel(key, reason);
        }
    }

    /// Cancels a session from this side. A caller's cancel that came first keeps its
    /// reason.
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
                None => self.metrics.noop(Noop::AlreadyEnded),
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
                    self.metrics.noop(Noop::AlreadyEnded);
                    reply.send(None);
                }
            },
            Command::Resume(id) => {
                if let Some(key) = self.ledger.key_of(id) {
                    self.scheduler.set_paused(key, false);
                    self.ledger.reader_due(key, None);
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
                // The metrics say no less than the answer.
                self.publish();
                // The asker may be gone; that is its affair.
                let _ = reply.try_send(self.stats());
            }
            Command::InspectLater(reply) => {
                self.publish();
                reply.send(self.stats());
            }
            Command::Find(label, reply) => reply.send(self.ledger.labelled(&label)),
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

    /// Takes a request in, behind the one that computes its prompt, if there is one.
    fn submit(&mut self, submission: Submission, leader: Option<SequenceKey>) -> SequenceKey {
        let Submission { id, spec, account } = submission;
        self.prompt_tokens += spec.prompt.len() as u64;
        let scores = matches!(spec.task, Task::Score { .. });
        let key = self.scheduler.add_follower(id, spec, leader);
        self.ledger.open(key, id, account);
        if scores {
            // Also if there will be nothing in it.
            self.ledger.report(key, PromptReport::Scores(Vec::new()));
        }
        // Cancelled on the way here: it never runs (I5).
        let cell = self.ledger.cell_of(key);
        if cell.and_then(RequestCell::cancelled) == Some(CancelReason::StreamDropped) {
            self.end(key, Terminal::Cancelled(CancelReason::SubmitDropped));
        }
        self.apply_cancel(key);
        if self.closing || self.draining {
            self.aborted += u64::from(self.ledger.cell_of(key).is_some());
            self.cancel(key, CancelReason::Shutdown);
        }
        key
    }

    /// Stops the turn of a session. Without one there is nothing to free, and the
    /// receipt says so.
    fn stop(
        &mut self,
        session: SessionId,
        turn: Option<Arc<TurnCell>>,
        (stop, posted_at): (Stop, Instant),
        reply: Reply<Receipt>,
    ) {
        // No other turn than the one that was meant.
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
                let receipt = Receipt::of_nothing(self.completed, posted_at);
                self.ledger.close_session(self.completed, receipt, reply);
            }
        }
    }

    /// Ends a session: its turn, and what it keeps.
    fn end_session(
        &mut self,
        session: SessionId,
        posted_at: Instant,
        reply: Option<Reply<Receipt>>,
    ) {
        let mut receipt = Receipt::of_nothing(self.completed, posted_at);
        let mut fence = StepId::default();
        if let Some(key) = self.ledger.turn_key(session) {
            let sequence = self.scheduler.sequences().get(key);
            receipt.tokens_generated = sequence.map_or(0, Sequence::generated);
            fence = sequence.map_or(fence, Sequence::touched);
            // It goes back to the session first, and from there with the rest.
            receipt.blocks_freed = self.cancel(key, CancelReason::SessionEnded).unwrap_or(0);
        }
        let (blocks, touched) = self.scheduler.end_session(session);
        receipt.blocks_freed += blocks;
        if let Some(reply) = reply {
            self.ledger
                .close_session(fence.max(touched), receipt, reply);
        }
    }

    /// Ends a session if its cancel flag is up, and gives the number of blocks that
    /// nobody holds any more.
    fn apply_cancel(&mut self, key: SequenceKey) -> Option<usize> {
        let reason = self.ledger.cell_of(key)?.cancelled()?;
        let terminal = match reason {
            CancelReason::StopString => Terminal::Finished(FinishReason::Stop),
            reason => Terminal::Cancelled(reason),
        };
        Some(self.end(key, terminal))
    }

    fn cancel_all(&mut self, reason: CancelReason) {
        for key in self.ledger.open_keys() {
            self.cancel(key, reason);
        }
    }

    /// The one door out for a session, whatever the reason.
    fn end(&mut self, key: SequenceKey, terminal: Terminal) -> usize {
        let fate = self.fate(key, &terminal);
        let Some((sequence, blocks)) = self.scheduler.close(key, fate) else {
            return 0;
        };
        let remains = Remains {
            blocks,
            tokens_generated: sequence.generated(),
            fence: sequence.touched(),
        };
        self.ledger.close(key, terminal, remains);
        blocks
    }

    /// What becomes of the blocks of a session that is about to end; tells its
    /// session what is left of the turn.
    fn fate(&self, key: SequenceKey, terminal: &Terminal) -> Fate {
        let (Some(turn), Some(sequence)) = (
            self.ledger.turn_of(key),
            self.scheduler.sequences().get(key),
        ) else {
            return Fate::Free;
        };
        let flag = self.ledger.cell_of(key).and_then(RequestCell::cancelled);
        let (end, tokens) = match (terminal, flag) {
            // What a failed step has written is worth nothing.
            (Terminal::Failed(_), _) => {
                turn.cell.ended_by_thread(TurnEnd::Rewound);
                return Fate::Free;
            }
            (Terminal::Finished(_), Some(CancelReason::StopString)) => {
                let kept = sequence.prompt_tokens + turn.cell.kept_answer();
                (None, kept)
            }
            (Terminal::Finished(_), _) => {
                let tokens = sequence.tokens.clone();
                (Some(TurnEnd::Finished(tokens)), sequence.tokens.len())
            }
            (Terminal::Cancelled(_), Some(CancelReason::SessionStopped))
                if turn.cell.is_stopped(Stop::Keep) =>
            {
                let tokens = sequence.tokens.clone();
                (Some(TurnEnd::Kept(tokens)), sequence.tokens.len())
            }
            (Terminal::Cancelled(_), _) => (Some(TurnEnd::Rewound), turn.base),
        };
        if let Some(end) = end {
            turn.cell.ended_by_thread(end);
        }
        let pin_until = turn.pin.map(|pin| Instant::now() + pin.min(LONGEST_PIN));
        Fate::Keep { tokens, pin_until }
    }

    /// Enqueues a step. A failed launch fails the sessions of that step.
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
        self.pulse.calls(plan.step);
        let launched = self.runner.launch(&plan, self.scheduler.sequences());
        self.pulse.returned()?;
        self.metrics.phase(Phase::Launch, from);
        match launched {
            Ok(()) => {
                self.in_flight.push_back(plan);
                // Their rows are in the step, which gives them nothing.
                for (key, error) in unmasked {
                    if self.apply_cancel(key).is_none() {
                        let fault = EngineFault::Constraint(error);
                        self.end(key, Terminal::Failed(Box::new(fault)));
                    }
                }
                Ok(())
            }
            Err(error) => {
                self.fail_step(&plan, &error);
                // Feedback refers to the step before, which this one no longer is.
                while !self.in_flight.is_empty() {
                    self.collect()?;
                }
                self.step_completed(self.completed);
                self.closes_engine(error)
            }
        }
    }

    /// Finds out which tokens the constrained sequences of a step may choose. Gives those
    /// whose constraints cannot say.
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

    /// Notes whose prompts the step begins or goes on with.
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

    /// Overwrites what was freed: whoever still reads it shows it by its tokens.
    fn poison_freed(&mut self) -> Result<(), EngineFault> {
        let freed = self.scheduler.take_freed();
        if freed.is_empty() {
            return Ok(());
        }
        self.pulse.calls(self.scheduler.launched());
        let poisoned = self.runner.poison(&freed);
        self.pulse.returned()?;
        poisoned.map_err(EngineFault::Device)
    }

    /// Waits for the oldest step and commits it.
    fn collect(&mut self) -> Result<(), EngineFault> {
        let from = Instant::now();
        let step = self
            .in_flight
            .front()
            .map_or(self.completed, |plan| plan.step);
        self.pulse.calls(step);
        let outcome = self.runner.collect();
        self.pulse.returned()?;
        self.metrics.phase(Phase::Collect, from);
        let Some(plan) = self.in_flight.pop_front() else {
            return Ok(());
        };
        let from = Instant::now();
        self.observe(&plan, from);
        // What was cancelled while the step ran gets no token from it.
        for _ in 0..self.commands.len() {
            match self.commands.try_recv() {
                Ok(command) => self.apply(command),
                Err(_) => break,
            }
        }
        self.pass_time();
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

    /// Gives what a step has computed to those whose rows were in it.
    fn commit_step(&mut self, plan: &StepPlan, mut output: StepOutput) {
        self.end_not_finite(plan, &output.samples);
        // Before any other item ends: its complete blocks are worth keeping.
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

    /// Ends the sequences whose logits are not finite, before their blocks are published.
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
                self.end(item.key, Terminal::Failed(Box::new(fault)));
            }
        }
    }

    /// Ends a sequence that ends with its prompt, unless it is cancelled.
    fn commit_end(&mut self, key: SequenceKey) {
        if self.apply_cancel(key).is_none()
            && let Commit::Finished(reason) = self.scheduler.commit_end(key)
        {
            self.end(key, Terminal::Finished(reason));
        }
    }

    fn commit(&mut self, key: SequenceKey, token: Token) {
        // The flag is read again here: a cancel posted since wins over the token.
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
                self.end(key, Terminal::Failed(Box::new(fault)));
            }
            Commit::Finished(reason) => {
                self.tokens_generated += 1;
                self.ledger.token(key, token);
                self.end(key, Terminal::Finished(reason));
            }
        }
    }

    /// Learns how fast prompts are computed. A step without results may not have been
    /// waited for: its rows count with the next one that has some.
    fn observe(&mut self, plan: &StepPlan, now: Instant) {
        let prompts = plan.items.iter().filter(|item| item.count > 1);
        self.prompt_rows += prompts.map(|item| item.count).sum::<usize>();
        self.rows += plan.rows();
        if plan.sample_count() == 0 && plan.sums().next().is_none() {
            return;
        }
        let took = now.saturating_duration_since(self.step_began);
        // Decoding takes longer a token, and says nothing of computing anew.
        if 2 * self.prompt_rows > self.rows {
            self.scheduler.observe_step(self.rows, took.as_secs_f64());
        }
        (self.rows, self.prompt_rows, self.step_began) = (0, 0, now);
    }

    /// Steps up to `step` have completed. When none is in flight, so have all that
    /// were planned, a failed launch included.
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
            self.ledger.reader_due(key, due);
        }
        self.paused = changes;
    }

    fn fail_step(&mut self, plan: &StepPlan, error: &DeviceError) {
        tracing::error!(%error, step = %plan.step, requests = plan.items.len(), "a step failed");
        self.scheduler.lost(plan);
        for item in &plan.items {
            // Who was cancelled before stays cancelled.
            if self.apply_cancel(item.key).is_none() {
                let fault = EngineFault::Device(error.clone());
                self.end(item.key, Terminal::Failed(Box::new(fault)));
            }
        }
    }

    /// Whether a device error ends the engine, not only the step's sessions.
    fn closes_engine(&self, error: DeviceError) -> Result<(), EngineFault> {
        match error {
            DeviceError::Lost { .. } => Err(EngineFault::Device(error)),
            _ => Ok(()),
        }
    }

    /// Ends every session; used when the thread is about to end.
    fn fail_everything(&mut self, cause: &EngineFault) {
        for key in self.ledger.open_keys() {
            if self.apply_cancel(key).is_some() {
                continue;
            }
            let terminal = match cause {
                EngineFault::Shutdown => Terminal::Cancelled(CancelReason::Shutdown),
                fault => Terminal::Failed(Box::new(fault.clone())),
            };
            self.end(key, terminal);
        }
        while let Ok(command) = self.commands.try_recv() {
            // A submission's reader wakes and finds the fault.
            drop(command);
        }
        self.ledger.abandon();
        self.publish();
    }

    /// Sets the gauges from the books.
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

/// Fails unless a step has given all that was wanted of it.
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
            "{} samples and {} sums for a step of {} and {}",
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
