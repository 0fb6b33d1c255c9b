//! The ends of an engine: drains and shutdowns.

use std::time::Duration;

/// What happens to open requests when the engine shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// They may finish within this time; the rest are cancelled.
    Drain(Duration),
    /// They are cancelled at once.
    Abort,
}

/// What became of the requests that were open during a drain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Drained {
    /// Requests that ended in time, for whatever reason.
    pub finished: u64,
    /// Requests that the drain cancelled: at its deadline, or because they arrived after it
    /// began.
    pub aborted: u64,
}
