//! The commands: the only way into the scheduler thread.

use super::deadlines::RequestDeadlines;
use super::event::CancelReason;
use super::event::Receipt;
use super::event::{EventSender, RequestCell};
use super::permit::Permit;
use super::record::RequestRecord;
use super::stats::EngineStats;
use super::sync::{Arc, Never, Sender};
use super::turn::{Stop, Turn, TurnCell};
use super::waiting::Reply;
use super::{Drained, EngineSnapshot};
use crate::id::{RequestId, SessionId};
use crate::schedule::{Kept, SequenceSpec};
use std::time::Instant;

/// What callers post to the scheduler thread; per session in the order posted (I7).
pub(crate) enum Command {
    /// A new request.
    Submit(Box<Submission>),
    /// New requests with the same prompt: the first computes it for all.
    SubmitGroup(Vec<Submission>),
    /// Look at the session's cancel flag: the flag is the truth, this only wakes.
    Cancel(RequestId),
    /// Cancel an open request by its id; no receipt if there is none.
    CancelRequest {
        id: RequestId,
        reason: CancelReason,
        posted_at: Instant,
        reply: Reply<Option<Receipt>>,
    },
    /// The session's reader has made room.
    Resume(RequestId),
    /// Stop the turn of a session.
    Stop {
        session: SessionId,
        turn: Option<Arc<TurnCell>>,
        stop: Stop,
        posted_at: Instant,
        reply: Reply<Receipt>,
    },
    /// Give back what a session keeps beyond its first tokens.
    Rewind(SessionId, usize),
    /// Let a new session keep what another one keeps.
    Fork { from: SessionId, to: SessionId },
    /// Report what a session keeps.
    Kept(SessionId, Sender<Kept>),
    /// End a session, and its turn.
    EndSession {
        session: SessionId,
        posted_at: Instant,
        reply: Option<Reply<Receipt>>,
    },
    /// Forget the prefixes that nobody holds.
    ClearPrefixes,
    /// Report the state; answered at once.
    Inspect(Sender<EngineStats>),
    /// The same, for someone who waits without a thread.
    InspectLater(Reply<EngineStats>),
    /// Report the open requests with this label.
    Find(Arc<str>, Reply<Vec<RequestId>>),
    /// Report who is open, and whose each block is.
    Snapshot(Reply<EngineSnapshot>),
    /// Cancel every session.
    AbortAll,
    /// Let open sessions finish until then, take no more, cancel the rest.
    Drain(Option<Instant>, Reply<Drained>),
    /// The same, then end the thread. The reply tells by its end.
    Shutdown(Option<Instant>, Reply<Never>),
}

/// A request on its way to the scheduler thread.
pub(crate) struct Submission {
    pub id: RequestId,
    pub spec: SequenceSpec,
    pub account: AccountSpec,
}

/// The scheduler thread's side of a new session.
pub(crate) struct AccountSpec {
    pub cell: Arc<RequestCell>,
    pub events: EventSender,
    pub permit: Permit,
    pub record: RequestRecord,
    pub deadlines: RequestDeadlines,
    /// Whose turn it is; none for a request on its own.
    pub turn: Option<Turn>,
    /// What its caller knows it by.
    pub label: Option<Arc<str>>,
}
