//! What each command of callers does.

use super::SchedulerThread;
use super::ledger::ReceiptReply;
use crate::engine::caller::turn::{Stop, TurnCell};
use crate::engine::caller::waiting::Reply;
use crate::engine::command::{Command, Submission};
use crate::engine::event::{CancelReason, Outcome, PromptReport, Receipt, RequestCell};
use crate::engine::metrics::NoEffect;
use crate::engine::sync::Arc;
use crate::id::{SessionId, StepId};
use crate::schedule::{Sequence, SequenceKey, Task};
use std::time::Instant;

impl SchedulerThread {
    pub(super) fn apply(&mut self, command: Command) {
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
                    // A request that was cancelled before it arrived computes nothing.
                    let sequences = self.scheduler.sequences();
                    leader = leader
                        .filter(|leader| sequences.contains_key(*leader))
                        .or(Some(key));
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
            Command::Retained(session, reply) => {
                let _ = reply.try_send(self.scheduler.retained(session));
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
            Command::Find(query, reply) => reply.send(self.ledger.find(&query)),
            Command::Snapshot(reply) => {
                self.publish();
                reply.send(self.snapshot());
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
        // If the request was cancelled on its way here, it never runs (I5).
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
        let released = self.scheduler.cache().released_states();
        if let Some(key) = self.ledger.turn_key(session) {
            let sequence = self.scheduler.sequences().get(key);
            receipt.tokens_generated = sequence.map_or(0, Sequence::generated);
            fence = sequence.map_or(fence, Sequence::last_step);
            // The cancelled turn first returns its blocks to the session; they are freed below
            // with the rest.
            receipt.blocks_freed = self.cancel(key, CancelReason::SessionEnded).unwrap_or(0);
        }
        let (blocks, touched) = self.scheduler.end_session(session);
        receipt.blocks_freed += blocks;
        let states = self.scheduler.cache().released_states() - released;
        receipt.states_freed = states as usize;
        if let Some(reply) = reply {
            self.ledger
                .send_receipt_after(fence.max(touched), receipt, reply);
        }
    }
}
