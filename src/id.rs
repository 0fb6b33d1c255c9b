//! Identifiers of requests, sessions and steps.

use serde::Serialize;
use std::fmt;

/// Identifies one accepted request: one prompt and its answer.
///
/// Each engine hands out ids in ascending order and never reuses one, so a late cancel cannot
/// hit a newer request. A turn of a session is a request and has a `RequestId` of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct RequestId(pub(crate) u64);

impl RequestId {
    /// Makes an id from a number: one read from a log or an answer, or an arbitrary one when
    /// the scheduler is used without an engine.
    pub fn from_u64(id: u64) -> Self {
        Self(id)
    }

    /// Returns the id as a number, for logs.
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "request {}", self.0)
    }
}

/// Identifies one session: a conversation that keeps its KV cache between its turns.
///
/// Each engine hands out ids in ascending order and never reuses one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SessionId(pub(crate) u64);

impl SessionId {
    /// Makes an id from a number: one read from a log or an answer, or an arbitrary one when
    /// the scheduler is used without an engine.
    pub fn from_u64(id: u64) -> Self {
        Self(id)
    }

    /// Returns the id as a number, for logs.
    pub fn as_u64(self) -> u64 {
        self.0
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "session {}", self.0)
    }
}

/// Number of a step of the scheduler thread. The first step is 1; 0 means that none has run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct StepId(pub(crate) u64);

impl StepId {
    /// Returns the step's number.
    pub fn as_u64(self) -> u64 {
        self.0
    }

    /// Returns the id of the step after this one.
    pub(crate) fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for StepId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "step {}", self.0)
    }
}
