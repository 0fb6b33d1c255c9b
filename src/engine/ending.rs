//! The ends of an engine: drains and shutdowns.

use super::EngineFault;
use super::sync::Never;
use super::waiting::Answer;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
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
pub struct Drained {
    /// Requests that ended in time, for whatever reason.
    pub finished: u64,
    /// Requests that the drain cancelled: at its deadline, or because they arrived after it
    /// began.
    pub aborted: u64,
}

/// A drain in progress. Await it, or call [`Draining::wait`], to learn what became of the open
/// requests.
///
/// Dropping it does not stop the drain.
pub struct Draining(pub(super) Answer<Drained>);

impl Draining {
    /// Waits on this thread until the engine has drained.
    ///
    /// # Errors
    ///
    /// Returns the fault that ended the engine before it had drained.
    pub fn wait(self) -> Result<Drained, EngineFault> {
        self.0.wait()
    }
}

impl Future for Draining {
    type Output = Result<Drained, EngineFault>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(context)
    }
}

impl std::fmt::Debug for Draining {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Draining").finish_non_exhaustive()
    }
}

/// A shutdown in progress. Await it, or call [`ShuttingDown::wait`], to wait for the end of the
/// scheduler thread.
///
/// Dropping it does not stop the shutdown.
pub struct ShuttingDown(pub(super) Answer<Never>);

impl ShuttingDown {
    /// Waits on this thread until the scheduler thread has ended, or until the watchdog has
    /// given it up.
    ///
    /// # Errors
    ///
    /// Returns the fault that broke the engine, whether before or during the shutdown.
    pub fn wait(self) -> Result<(), EngineFault> {
        ended(self.0.wait())
    }
}

/// Converts the end of a channel on which nothing is ever sent: its end is the message.
fn ended(result: Result<Never, EngineFault>) -> Result<(), EngineFault> {
    match result {
        Ok(never) => match never {},
        Err(EngineFault::Shutdown) => Ok(()),
        Err(fault) => Err(fault),
    }
}

impl Future for ShuttingDown {
    type Output = Result<(), EngineFault>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(context).map(ended)
    }
}

impl std::fmt::Debug for ShuttingDown {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ShuttingDown")
            .finish_non_exhaustive()
    }
}
