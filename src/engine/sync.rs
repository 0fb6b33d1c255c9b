//! The threads, atomics, channels and locks of `engine/`. All of the engine takes them from
//! here.
//!
//! A normal build uses the plain types. With the features `loom` and `shuttle`, the types of a
//! model checker replace them, and the checker decides at each operation which thread runs
//! next. What the checkers lack is in `checked.rs`. Time stands still under a checker, so
//! deadlines never pass.

#[cfg(all(feature = "loom", feature = "shuttle"))]
compile_error!("the features `loom` and `shuttle` exclude each other");

#[cfg(any(feature = "loom", feature = "shuttle"))]
#[allow(dead_code, reason = "a build may not use the whole set")]
mod checked;

#[cfg(not(any(feature = "loom", feature = "shuttle")))]
mod plain {
    pub use atomic_waker::AtomicWaker;
    pub use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
    pub use std::sync::{Mutex, MutexGuard, OnceLock, atomic};
    pub use std::thread::{Builder, JoinHandle};

    use super::{Never, RecvError};

    pub(super) fn recv_or<T>(
        receiver: &Receiver<T>,
        closed: &Receiver<Never>,
    ) -> Result<T, RecvError> {
        crossbeam_channel::select! {
            recv(receiver) -> message => message,
            // A message that was sent before the close must still be received.
            recv(closed) -> _ => receiver.try_recv().map_err(|_| RecvError),
        }
    }
}

#[cfg(any(feature = "loom", feature = "shuttle"))]
use checked as types;
#[cfg(not(any(feature = "loom", feature = "shuttle")))]
use plain as types;

#[allow(unused_imports, reason = "a build may not use the whole set")]
pub use crossbeam_channel::{RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError};
// Reference counts are not part of the engine's protocol, so `Arc` is always the plain type.
// Values shared with `schedule` and `text` thus have the same type everywhere.
pub use std::sync::{Arc, PoisonError, Weak};
pub use types::{
    AtomicWaker, JoinHandle, Mutex, MutexGuard, OnceLock, Receiver, Sender, atomic, bounded,
    unbounded,
};

/// The message type of a channel that is only ever closed.
#[derive(Debug)]
pub enum Never {}

/// Starts a named thread.
pub fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    types::Builder::new().name(name.to_owned()).spawn(body)
}

/// Waits for a message, or until `closed` has no sender left. A message that is already there
/// is received even then.
#[allow(dead_code, reason = "for waiting on a thread that may be stuck")]
pub fn recv_or<T>(receiver: &Receiver<T>, closed: &Receiver<Never>) -> Result<T, RecvError> {
    types::recv_or(receiver, closed)
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    #[test]
    fn a_message_wins_over_the_close() {
        let (sender, receiver) = bounded(1);
        let (alive, closed) = bounded(0);
        sender.send(1).unwrap();
        drop(alive);
        // `select!` chooses at random among the ready channels.
        for _ in 0..100 {
            assert_eq!(recv_or(&receiver, &closed), Ok(1));
            sender.send(1).unwrap();
        }
    }

    #[test]
    fn a_close_ends_the_wait_for_a_message() {
        let (sender, receiver) = bounded::<u8>(1);
        let (alive, closed) = bounded(0);
        let waiter = spawn("waiter", move || {
            assert_eq!(recv_or(&receiver, &closed), Err(RecvError));
        });
        drop(alive);
        waiter.unwrap().join().unwrap();
        drop(sender);
    }
}
