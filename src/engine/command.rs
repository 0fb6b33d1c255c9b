//! The commands: the only way into the scheduler thread.

use super::deadlines::RequestDeadlines;
use super::event::{EventSender, SessionCell};
use super::permit::Permit;
use super::record::RequestRecord;
use super::stats::EngineStats;
use super::sync::{Arc, Sender};
use crate::id::SessionId;
use crate::schedule::SequenceSpec;

/// What callers post to the scheduler thread; per session in the order posted (I7).
pub(crate) enum Command {
    /// A new request.
    Submit(Box<Submission>),
    /// Look at the session's cancel flag: the flag is the truth, this only wakes.
    Cancel(SessionId),
    /// The session's reader has made room.
    Resume(SessionId),
    /// Report the state; answered at once.
    Inspect(Sender<EngineStats>),
    /// Cancel every session.
    AbortAll,
    /// Cancel every session, then end the thread.
    Shutdown,
}

/// A request on its way to the scheduler thread.
pub(crate) struct Submission {
    pub id: SessionId,
    pub spec: SequenceSpec,
    pub account: AccountSpec,
}

/// The scheduler thread's side of a new session.
pub(crate) struct AccountSpec {
    pub cell: Arc<SessionCell>,
    pub events: EventSender,
    pub permit: Permit,
    pub record: RequestRecord,
    pub deadlines: RequestDeadlines,
}
