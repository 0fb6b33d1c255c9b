//! [`Pending`]: the answer to a posted command, for callers who await it or wait for it.

use super::waiting::{Answer, EngineEnd};
use crate::engine::EngineFault;
use crate::engine::event::{Receipt, RequestCell};
use crate::engine::sync::{Arc, Never, Receiver};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// The answer to a command that has been posted to the scheduler thread.
///
/// Await it in any async runtime, or call [`Pending::wait`] on a plain thread. The command has
/// already been posted, so dropping the answer does not undo it.
///
/// # Errors
///
/// Resolves to the fault that ended the engine before it could answer.
#[must_use = "the command has been posted; await its answer, or drop it explicitly"]
pub struct Pending<T>(Source<T>);

/// The answer to a cancel, which comes when the request's blocks are free.
pub type Cancellation = Pending<Receipt>;

/// Where the answer comes from.
enum Source<T> {
    /// The reply to a command.
    Reply(Answer<T>),
    /// A request's own channel, which carries its receipt.
    Receipt {
        cell: Arc<RequestCell>,
        receipt: Receiver<T>,
        end: EngineEnd,
    },
    /// The end of the scheduler thread, which closes a channel on which nothing is sent. The
    /// function makes the answer.
    End(Answer<Never>, fn() -> T),
}

impl<T> Pending<T> {
    pub(in crate::engine) fn reply(answer: Answer<T>) -> Self {
        Self(Source::Reply(answer))
    }

    pub(in crate::engine) fn receipt(
        cell: Arc<RequestCell>,
        receipt: Receiver<T>,
        end: EngineEnd,
    ) -> Self {
        Self(Source::Receipt { cell, receipt, end })
    }

    /// Waits on this thread for the answer.
    ///
    /// # Errors
    ///
    /// Returns the fault that ended the engine before it could answer.
    pub fn wait(self) -> Result<T, EngineFault> {
        match self.0 {
            Source::Reply(answer) => answer.wait(),
            Source::Receipt { receipt, end, .. } => end.recv(&receipt),
            Source::End(answer, make) => ended(answer.wait(), make),
        }
    }
}

impl Pending<()> {
    pub(in crate::engine) fn end(answer: Answer<Never>) -> Self {
        Self(Source::End(answer, || ()))
    }
}

/// Converts the end of a channel on which nothing is sent.
fn ended<T>(result: Result<Never, EngineFault>, make: fn() -> T) -> Result<T, EngineFault> {
    match result {
        Ok(never) => match never {},
        Err(EngineFault::Shutdown) => Ok(make()),
        Err(fault) => Err(fault),
    }
}

impl<T> Future for Pending<T> {
    type Output = Result<T, EngineFault>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match &self.0 {
            Source::Reply(answer) => answer.poll(context),
            Source::Receipt { cell, receipt, end } => {
                end.poll(receipt, || cell.register_receipt(context.waker()))
            }
            Source::End(answer, make) => answer.poll(context).map(|result| ended(result, *make)),
        }
    }
}

impl<T> std::fmt::Debug for Pending<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Pending").finish_non_exhaustive()
    }
}
