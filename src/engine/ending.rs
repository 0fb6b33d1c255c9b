//! How an engine comes to its end: drained, or shut down.

use super::EngineFault;
use super::sync::Never;
use super::waiting::Answer;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// What becomes of open requests at a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shutdown {
    /// They may finish within this time; the rest is cancelled.
    Drain(Duration),
    /// They are cancelled.
    Abort,
}

/// What became of the requests that were open when an engine was drained.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// They ended in time, one way or another.
    pub finished: u64,
    /// They were cancelled: at the deadline, or because they came too late.
    pub aborted: u64,
}

/// A drain in progress; await it, or [`Draining::wait`], for what became of the open
/// requests. Dropping it changes nothing: the engine is drained either way.
pub struct Draining(pub(super) Answer<Drained>);

impl Draining {
    /// Waits on this thread. The error is what broke the engine meanwhile.
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

/// A shutdown in progress; await it, or [`ShuttingDown::wait`], for the end of the
/// scheduler thread. Dropping it changes nothing: the engine ends either way.
pub struct ShuttingDown(pub(super) Answer<Never>);

impl ShuttingDown {
    /// Waits on this thread. The error is what broke the engine, before or meanwhile;
    /// a stuck scheduler thread is not waited for.
    pub fn wait(self) -> Result<(), EngineFault> {
        ended(self.0.wait())
    }
}

/// Nothing is ever sent: the end of the channel is the message.
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
