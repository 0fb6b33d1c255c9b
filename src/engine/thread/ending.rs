//! How requests end: the function that ends every request, and the cancels, deadlines and
//! drains that call it.

use super::SchedulerThread;
use super::deadlines::Due;
use super::ledger::Remains;
use crate::engine::caller::turn::{Stop, TurnEnd};
use crate::engine::caller::waiting::Reply;
use crate::engine::event::{CancelReason, Ending, Outcome, RequestCell};
use crate::engine::sync::atomic::Ordering;
use crate::engine::{Drained, EngineFault};
use crate::schedule::{BlockDisposition, SequenceKey};
use std::time::{Duration, Instant};

/// Maximum duration of a pin; longer pins are shortened to it.
const LONGEST_PIN: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A drain in progress: it waits until no request is open.
pub(super) struct Drain {
    /// When the remaining requests are cancelled.
    pub(super) until: Option<Instant>,
    /// The totals when the drain began. They are subtracted from those at its end.
    before: Drained,
    /// Where the result is sent. `None` for a shutdown, which then ends the thread.
    reply: Option<Reply<Drained>>,
}

impl SchedulerThread {
    /// Returns when [`SchedulerThread::handle_deadlines`] has something to do next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let drains = self.drains.iter().filter_map(|drain| drain.until);
        let due = [
            self.ledger.next_deadline(),
            self.scheduler.next_pin_expiry(),
        ];
        due.into_iter().flatten().chain(drains).min()
    }

    /// Handles what is due now. Deadlines take effect only here.
    pub(super) fn handle_deadlines(&mut self) {
        if self.scheduler.next_pin_expiry().is_some() {
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
    pub(super) fn cancel(&mut self, key: SequenceKey, reason: CancelReason) -> Option<usize> {
        if let Some(cell) = self.ledger.cell_of(key) {
            cell.cancel(reason);
        }
        self.apply_cancel(key)
    }

    pub(super) fn cancel_all(&mut self, reason: CancelReason) {
        for key in self.ledger.open_keys() {
            self.cancel(key, reason);
        }
    }

    /// Ends a request if its cancel flag is raised, and returns the number of blocks that
    /// nobody holds any more.
    pub(super) fn apply_cancel(&mut self, key: SequenceKey) -> Option<usize> {
        let reason = self.ledger.cell_of(key)?.cancelled()?;
        let outcome = match reason {
            CancelReason::StopString => Outcome::Stop,
            reason => Outcome::Cancelled(reason),
        };
        Some(self.end_request(key, Ok(outcome)))
    }

    /// Ends a request, for any reason, and returns the number of blocks that nobody holds any
    /// more. Every request ends here.
    pub(super) fn end_request(&mut self, key: SequenceKey, ending: Ending) -> usize {
        let disposition = self.decide_disposition(key, &ending);
        let released = self.scheduler.cache().released_states();
        let Some((sequence, blocks)) = self.scheduler.close(key, disposition) else {
            return 0;
        };
        let states = self.scheduler.cache().released_states() - released;
        let generated = sequence.generated();
        let kept = self
            .kept_tokens(key)
            .map_or(generated, |kept| kept.min(generated));
        let remains = Remains {
            blocks,
            states: states as usize,
            tokens_generated: kept,
            tokens_discarded: generated - kept,
            fence: sequence.last_step(),
        };
        self.ledger.close(key, ending, remains);
        blocks
    }

    /// Returns how many tokens of its answer a request keeps if its reader has found a stop
    /// string.
    fn kept_tokens(&self, key: SequenceKey) -> Option<usize> {
        let cell = self.ledger.cell_of(key)?;
        let stopped = cell.cancelled() == Some(CancelReason::StopString);
        stopped.then(|| cell.kept_tokens.load(Ordering::Acquire))
    }

    /// Decides what happens to the blocks of a request that is about to end. If the request is
    /// a turn, also records for its session how the turn ended.
    fn decide_disposition(&self, key: SequenceKey, ending: &Ending) -> BlockDisposition {
        let (Some(turn), Some(sequence)) = (
            self.ledger.turn_of(key),
            self.scheduler.sequences().get(key),
        ) else {
            return BlockDisposition::Release;
        };
        let flag = self.ledger.cell_of(key).and_then(RequestCell::cancelled);
        let (end, tokens) = match (ending, flag) {
            // What a failed step has written cannot be trusted.
            (Err(_), _) => {
                turn.cell.set_thread_end(TurnEnd::Rewound);
                return BlockDisposition::Release;
            }
            (Ok(Outcome::Stop | Outcome::Length), Some(CancelReason::StopString)) => {
                let kept = self.kept_tokens(key).unwrap_or_default();
                (None, sequence.prompt_tokens + kept)
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
        BlockDisposition::Retain { tokens, pin_until }
    }

    /// Ends every request, when the thread is about to end.
    pub(super) fn fail_everything(&mut self, cause: &EngineFault) {
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

    pub(super) fn begin_drain(&mut self, until: Option<Instant>, reply: Option<Reply<Drained>>) {
        self.draining = true;
        self.drains.push(Drain {
            until,
            before: self.ended(),
            reply,
        });
    }

    /// Cancels the remaining requests when the deadline of a drain has passed. When no request
    /// is left, reports the results of all drains.
    pub(super) fn finish_drains(&mut self) {
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

    /// Returns how many requests have ended so far, here including those in `aborted`, and how
    /// many of them drains have cancelled.
    fn ended(&self) -> Drained {
        let outcomes = self.ledger.outcomes();
        Drained {
            finished: outcomes.accepted - self.ledger.open_accounts() as u64,
            aborted: self.aborted,
        }
    }
}
