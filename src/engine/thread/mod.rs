//! The scheduler thread: one loop that owns the device, the sequences and the KV cache.
//!
//! The loop itself is here. `commands.rs` applies what callers post, `step.rs` runs the device,
//! and `ending.rs` ends requests; each request has an account in `ledger.rs`.

mod commands;
mod deadlines;
mod ending;
mod inspect;
mod ledger;
mod record;
mod step;

pub(super) use deadlines::RequestDeadlines;
pub(super) use record::RequestRecord;

use super::EngineFault;
use super::caller::waiting::Reply;
use super::command::Command;
use super::metrics::{EngineMetrics, cleanup_failed};
use super::stats::EngineStats;
use super::sync::{Arc, Never, OnceLock, Receiver, RecvTimeoutError, TryRecvError};
use super::watchdog::Pulse;
use crate::config::EngineConfig;
use crate::id::StepId;
use crate::runner::Runner;
use crate::schedule::{Scheduler, SequenceKey, StepPlan};
use ending::Drain;
use ledger::Ledger;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

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
    /// Tokens collected since `step_began`, and the number of them that belong to prompts.
    measured_tokens: usize,
    measured_prompt_tokens: usize,
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
            measured_tokens: 0,
            measured_prompt_tokens: 0,
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

    /// Applies the commands that have been posted. When idle, waits for one: if nothing can be
    /// planned and nothing is in flight, only a command or the passing of time changes that.
    /// Returns `true` when no caller is left that could post a command.
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
                    let ends = self.in_flight.is_empty();
                    if ends {
                        // Those who wait for a drain need no handle on the engine.
                        self.finish_drains();
                    }
                    return ends;
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

    /// Waits for a command, but not beyond the next time at which something is due.
    fn wait(&mut self) -> Result<Command, RecvTimeoutError> {
        let due = self.next_due();
        self.pulse.idle();
        let command = match due {
            Some(deadline) => self.commands.recv_deadline(deadline),
            None => self.commands.recv().map_err(RecvTimeoutError::from),
        };
        self.pulse.busy();
        command
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
