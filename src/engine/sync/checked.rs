//! The types of the model checkers, and what they lack, built on their locks and condition
//! variables: a channel, a cell that is written once, and a waker.

use super::{
    Never, RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError,
    atomic::{AtomicBool, Ordering},
};
use std::collections::VecDeque;
use std::sync::{Arc, PoisonError};
use std::task::Waker;
use std::time::Instant;

#[cfg(feature = "loom")]
pub use loom::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread::JoinHandle,
};
#[cfg(all(feature = "shuttle", not(feature = "loom")))]
pub use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread::{Builder, JoinHandle},
};

/// Starts threads of the checker, with stacks larger than loom's, which are too small for an
/// engine.
#[cfg(feature = "loom")]
pub struct Builder(loom::thread::Builder);

#[cfg(feature = "loom")]
impl Builder {
    pub fn new() -> Self {
        Self(loom::thread::Builder::new().stack_size(1 << 15))
    }

    pub fn name(self, name: String) -> Self {
        Self(self.0.name(name))
    }

    pub fn spawn<F: FnOnce() + Send + 'static>(self, body: F) -> std::io::Result<JoinHandle<()>> {
        self.0.spawn(body)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(PoisonError::into_inner)
}

/// A cell that is written once. The plain cell holds the value; the flag shows the checker the
/// order of accesses.
#[derive(Debug)]
pub struct OnceLock<T> {
    value: std::sync::OnceLock<T>,
    is_set: AtomicBool,
}

impl<T> Default for OnceLock<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T> OnceLock<T> {
    pub fn new() -> Self {
        Self {
            value: std::sync::OnceLock::new(),
            is_set: AtomicBool::new(false),
        }
    }

    pub fn get(&self) -> Option<&T> {
        let is_set = self.is_set.load(Ordering::Acquire);
        is_set.then(|| self.value.get()).flatten()
    }

    pub fn set(&self, value: T) -> Result<(), T> {
        let outcome = self.value.set(value);
        // Set the flag even if another thread has won: after `set`, `get` must find the
        // winner's value.
        self.is_set.store(true, Ordering::Release);
        outcome
    }
}

/// The last registered waker, behind a lock. `atomic_waker` does the same without one.
#[derive(Debug, Default)]
pub struct AtomicWaker(Mutex<Option<Waker>>);

impl AtomicWaker {
    pub fn register(&self, waker: &Waker) {
        *lock(&self.0) = Some(waker.clone());
    }

    pub fn take(&self) -> Option<Waker> {
        lock(&self.0).take()
    }
}

/// A signal that several channels raise when they change.
#[derive(Default)]
struct Signal {
    raised: Mutex<bool>,
    changed: Condvar,
}

impl Signal {
    fn raise(&self) {
        *lock(&self.raised) = true;
        self.changed.notify_all();
    }

    /// Waits until the signal is raised, and lowers it.
    fn wait(&self) {
        let mut raised = lock(&self.raised);
        while !*raised {
            raised = wait(&self.changed, raised);
        }
        *raised = false;
    }
}

struct State<T> {
    queue: VecDeque<T>,
    senders: usize,
    receivers: usize,
    /// Threads that wait for this channel and another one.
    watchers: Vec<Arc<Signal>>,
}

struct Channel<T> {
    state: Mutex<State<T>>,
    /// Notified when there is a message, when there is room for one, or when one side is gone.
    changed: Condvar,
    capacity: usize,
}

impl<T> Channel<T> {
    fn changed(&self, state: MutexGuard<'_, State<T>>) {
        let watchers = state.watchers.clone();
        drop(state);
        self.changed.notify_all();
        for watcher in watchers {
            watcher.raise();
        }
    }
}

/// The sending end of a channel.
pub struct Sender<T>(Arc<Channel<T>>);

/// The receiving end of a channel.
pub struct Receiver<T>(Arc<Channel<T>>);

/// Creates a channel without a limit.
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    bounded(usize::MAX)
}

/// Creates a channel for at most `capacity` messages.
pub fn bounded<T>(capacity: usize) -> (Sender<T>, Receiver<T>) {
    let state = State {
        queue: VecDeque::new(),
        senders: 1,
        receivers: 1,
        watchers: Vec::new(),
    };
    let channel = Arc::new(Channel {
        state: Mutex::new(state),
        changed: Condvar::new(),
        capacity,
    });
    (Sender(Arc::clone(&channel)), Receiver(channel))
}

impl<T> Sender<T> {
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        let mut state = lock(&self.0.state);
        while state.receivers > 0 && state.queue.len() >= self.0.capacity {
            state = wait(&self.0.changed, state);
        }
        if state.receivers == 0 {
            return Err(SendError(message));
        }
        state.queue.push_back(message);
        self.0.changed(state);
        Ok(())
    }

    pub fn try_send(&self, message: T) -> Result<(), TrySendError<T>> {
        let mut state = lock(&self.0.state);
        if state.receivers == 0 {
            return Err(TrySendError::Disconnected(message));
        }
        if state.queue.len() >= self.0.capacity {
            return Err(TrySendError::Full(message));
        }
        state.queue.push_back(message);
        self.0.changed(state);
        Ok(())
    }

    pub fn len(&self) -> usize {
        lock(&self.0.state).queue.len()
    }
}

impl<T> Receiver<T> {
    pub fn recv(&self) -> Result<T, RecvError> {
        let mut state = lock(&self.0.state);
        loop {
            if let Some(message) = state.queue.pop_front() {
                self.0.changed(state);
                return Ok(message);
            }
            if state.senders == 0 {
                return Err(RecvError);
            }
            state = wait(&self.0.changed, state);
        }
    }

    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        let mut state = lock(&self.0.state);
        if let Some(message) = state.queue.pop_front() {
            self.0.changed(state);
            return Ok(message);
        }
        if state.senders == 0 {
            return Err(TryRecvError::Disconnected);
        }
        Err(TryRecvError::Empty)
    }

    /// Waits like [`Receiver::recv`], because the deadline never passes.
    pub fn recv_deadline(&self, _: Instant) -> Result<T, RecvTimeoutError> {
        self.recv().map_err(|_| RecvTimeoutError::Disconnected)
    }

    pub fn len(&self) -> usize {
        lock(&self.0.state).queue.len()
    }

    fn watch(&self, signal: &Arc<Signal>) {
        lock(&self.0.state).watchers.push(Arc::clone(signal));
    }

    fn unwatch(&self, signal: &Arc<Signal>) {
        let mut state = lock(&self.0.state);
        state.watchers.retain(|other| !Arc::ptr_eq(other, signal));
    }
}

pub fn recv_or<T>(receiver: &Receiver<T>, closed: &Receiver<Never>) -> Result<T, RecvError> {
    let signal = Arc::default();
    receiver.watch(&signal);
    closed.watch(&signal);
    let received = loop {
        // Check for the close first, so that messages sent before it are still received.
        let is_closed = matches!(closed.try_recv(), Err(TryRecvError::Disconnected));
        match receiver.try_recv() {
            Ok(message) => break Ok(message),
            Err(TryRecvError::Empty) if !is_closed => signal.wait(),
            Err(_) => break Err(RecvError),
        }
    };
    receiver.unwatch(&signal);
    closed.unwatch(&signal);
    received
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        lock(&self.0.state).senders += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        lock(&self.0.state).receivers += 1;
        Self(Arc::clone(&self.0))
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.senders -= 1;
        if state.senders == 0 {
            self.0.changed(state);
        }
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        state.receivers -= 1;
        if state.receivers == 0 {
            // Drop the messages with the last receiver, but outside of the lock: their own drop
            // may use channels.
            let unread = std::mem::take(&mut state.queue);
            self.0.changed(state);
            drop(unread);
        }
    }
}

impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Sender")
    }
}

impl<T> std::fmt::Debug for Receiver<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Receiver")
    }
}
