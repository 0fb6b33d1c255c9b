//! Identities: sessions and steps.

use serde::Serialize;
use std::fmt;

/// Identifies one accepted request, or one session, for the life of the process.
///
/// Ids are handed out by counting and never reused: a late cancel can only ever
/// name the session it was meant for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SessionId(pub(crate) u64);

impl SessionId {
    /// The id that a log or an answer named; or one of one's own, to use the scheduler
    /// without an engine.
    pub fn from_u64(id: u64) -> Self {
        Self(id)
    }

    /// The id as a number, for logs.
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "session-{}", self.0)
    }
}

/// Numbers the steps of the scheduler thread, from 1; 0 is before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct StepId(pub(crate) u64);

impl StepId {
    /// The step's number.
    pub fn as_u64(self) -> u64 {
        self.0
    }

    /// The step after this one.
    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for StepId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "step {}", self.0)
    }
}
