//! The commands, which are the only way into the scheduler thread.

use super::caller::permit::Permit;
use super::caller::turn::{Stop, Turn, TurnCell};
use super::caller::waiting::Reply;
use super::event::CancelReason;
use super::event::Receipt;
use super::event::{EventSender, RequestCell};
use super::stats::EngineStats;
use super::sync::{Arc, Never, Sender};
use super::thread::{RequestDeadlines, RequestRecord};
use super::{Drained, EngineSnapshot, RequestQuery};
use crate::id::{RequestId, SessionId};
use crate::schedule::{RetainedCache, SequenceSpec};
use std::time::Instant;

/// A message from callers to the scheduler thread. Commands are applied in the order in which
/// they were posted, in particular those of one session (I7).
pub(crate) enum Command {
    /// A new request.
    Submit(Box<Submission>),
    /// New requests with the same prompt. The first one computes it for all of them.
    SubmitGroup(Vec<Submission>),
    /// Check a request's cancel flag. The command alone cancels nothing; the flag decides.
    Cancel(RequestId),
    /// Cancel an open request by its id. The reply is `None` if no such request is open.
    CancelRequest {
        id: RequestId,
        reason: CancelReason,
        posted_at: Instant,
        reply: Reply<Option<Receipt>>,
    },
    /// The reader of a paused request has made room.
    Resume(RequestId),
    /// Stop the turn of a session.
    Stop {
        session: SessionId,
        turn: Option<Arc<TurnCell>>,
        stop: Stop,
        posted_at: Instant,
        reply: Reply<Receipt>,
    },
    /// Give back what a session keeps beyond this number of tokens.
    Rewind(SessionId, usize),
    /// Let a new session keep what another session keeps.
    Fork { from: SessionId, to: SessionId },
    /// Report what a session keeps.
    Retained(SessionId, Sender<RetainedCache>),
    /// End a session and its turn.
    EndSession {
        session: SessionId,
        posted_at: Instant,
        reply: Option<Reply<Receipt>>,
    },
    /// Forget the cached prefixes that nobody holds.
    ClearPrefixes,
    /// Report the engine's state to a caller that blocks its thread.
    Inspect(Sender<EngineStats>),
    /// Report the engine's state to a caller that may wait asynchronously.
    InspectAsync(Reply<EngineStats>),
    /// Report the open requests that fit the query.
    Find(RequestQuery, Reply<Vec<RequestId>>),
    /// Report the open requests, the sessions and the owner of each block.
    Snapshot(Reply<EngineSnapshot>),
    /// Cancel every request.
    AbortAll,
    /// Accept no more requests, let the open ones finish until the deadline, and cancel the
    /// rest.
    Drain(Option<Instant>, Reply<Drained>),
    /// Drain the engine, then end the thread. The reply is dropped when the thread has ended.
    Shutdown(Option<Instant>, Reply<Never>),
}

/// A request on its way to the scheduler thread.
pub(crate) struct Submission {
    pub id: RequestId,
    pub spec: SequenceSpec,
    pub account: AccountSpec,
}

/// The scheduler thread's side of a new request.
pub(crate) struct AccountSpec {
    pub cell: Arc<RequestCell>,
    pub events: EventSender,
    pub permit: Permit,
    pub record: RequestRecord,
    pub deadlines: RequestDeadlines,
    /// The session turn that this request is; `None` for a request outside of sessions.
    pub turn: Option<Turn>,
    /// Label that the caller chose for the request.
    pub label: Option<Arc<str>>,
    /// Owner of the request, if the caller named one.
    pub owner: Option<u64>,
}
