//! How callers wait for the scheduler thread, which may never answer.

use super::EngineFault;
use super::event::wake;
use super::sync::{
    Arc, AtomicWaker, Mutex, Never, OnceLock, PoisonError, Receiver, Sender, TryRecvError, Weak,
    bounded, recv_or,
};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

/// How an engine has ended, and word of it for those who wait.
#[derive(Clone)]
pub(crate) struct EngineEnd {
    fault: Arc<OnceLock<EngineFault>>,
    /// Closes when the scheduler thread has ended or has been given up.
    over: Receiver<Never>,
}

impl EngineEnd {
    pub fn new(fault: Arc<OnceLock<EngineFault>>, over: Receiver<Never>) -> Self {
        Self { fault, over }
    }

    /// What ended the engine, if it has ended.
    pub fn fault(&self) -> Option<&EngineFault> {
        self.fault.get()
    }

    /// What ended the engine, which has ended.
    pub fn cause(&self) -> EngineFault {
        self.fault.get().cloned().unwrap_or(EngineFault::Shutdown)
    }

    /// Waits on this thread.
    pub fn recv<T>(&self, receiver: &Receiver<T>) -> Result<T, EngineFault> {
        recv_or(receiver, &self.over).map_err(|_| self.cause())
    }

    /// Polls; `register` leaves the waker where the scheduler thread and the watchdog
    /// find it.
    pub fn poll<T>(
        &self,
        receiver: &Receiver<T>,
        register: impl FnOnce(),
    ) -> Poll<Result<T, EngineFault>> {
        let mut received = receiver.try_recv();
        if matches!(received, Err(TryRecvError::Empty)) {
            register();
            // Once more: it may have come before the waker was there.
            received = receiver.try_recv();
        }
        match received {
            Ok(message) => Poll::Ready(Ok(message)),
            Err(TryRecvError::Disconnected) => Poll::Ready(Err(self.cause())),
            Err(TryRecvError::Empty) => match self.fault.get() {
                // Nobody is left who would send anything.
                Some(fault @ EngineFault::Stuck { .. }) => Poll::Ready(Err(fault.clone())),
                _ => Poll::Pending,
            },
        }
    }
}

/// Something that a waker was left with.
pub(crate) trait Waiter: Send + Sync {
    /// Wakes whoever waits.
    fn wake(&self);
}

impl Waiter for AtomicWaker {
    fn wake(&self) {
        wake(self.take());
    }
}

/// All who may wait without a thread of their own, for the watchdog.
#[derive(Default)]
pub(crate) struct Waiters {
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    all: Vec<Weak<dyn Waiter>>,
    /// How many there may be before those that are gone are looked for.
    sweep_at: usize,
}

impl Waiters {
    pub fn add(&self, waiter: Weak<dyn Waiter>) {
        // A vector of weak references is never half-written.
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        if registry.all.len() >= registry.sweep_at {
            registry.all.retain(|waiter| waiter.strong_count() > 0);
            // Twice what is left: the work a waiter stays the same.
            registry.sweep_at = (2 * registry.all.len()).max(64);
        }
        registry.all.push(waiter);
    }

    pub fn wake_all(&self) {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let all = registry.all.clone();
        // A waker is the caller's code, and may well submit.
        drop(registry);
        for waiter in all.iter().filter_map(Weak::upgrade) {
            waiter.wake();
        }
    }
}

/// The scheduler thread's end of a question that is answered later. Dropping it
/// wakes the one who waits.
pub(crate) struct Reply<T> {
    sender: Option<Sender<T>>,
    waker: Arc<AtomicWaker>,
}

impl<T> Reply<T> {
    pub fn send(mut self, answer: T) {
        if let Some(sender) = self.sender.take() {
            // The asker may be gone; that is its affair.
            let _ = sender.try_send(answer);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        // Disconnect first, so that whoever wakes sees it.
        self.sender = None;
        wake(self.waker.take());
    }
}

/// The caller's end of such a question.
pub(crate) struct Answer<T> {
    receiver: Receiver<T>,
    waker: Arc<AtomicWaker>,
    end: EngineEnd,
}

impl<T> Answer<T> {
    /// A question and its answer.
    pub fn channel(end: &EngineEnd, waiters: &Waiters) -> (Reply<T>, Self) {
        let (sender, receiver) = bounded(1);
        let waker = Arc::new(AtomicWaker::default());
        let waiter: Weak<AtomicWaker> = Arc::downgrade(&waker);
        waiters.add(waiter);
        let reply = Reply {
            sender: Some(sender),
            waker: Arc::clone(&waker),
        };
        let answer = Self {
            receiver,
            waker,
            end: end.clone(),
        };
        (reply, answer)
    }

    pub fn wait(&self) -> Result<T, EngineFault> {
        self.end.recv(&self.receiver)
    }

    pub fn poll(&self, context: &mut Context<'_>) -> Poll<Result<T, EngineFault>> {
        let register = || self.waker.register(context.waker());
        self.end.poll(&self.receiver, register)
    }
}

/// A question that was posted to the scheduler thread; await it, or [`Asked::wait`], for
/// the answer, which comes within a step. Dropping it changes nothing.
pub struct Asked<T>(Answer<T>);

impl<T> Asked<T> {
    pub(super) fn new(answer: Answer<T>) -> Self {
        Self(answer)
    }

    /// Waits on this thread. The error is how the engine ended before it could answer.
    pub fn wait(self) -> Result<T, EngineFault> {
        self.0.wait()
    }
}

impl<T> Future for Asked<T> {
    type Output = Result<T, EngineFault>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(context)
    }
}

impl<T> std::fmt::Debug for Asked<T> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Asked").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiters_that_are_gone_do_not_accumulate() {
        let waiters = Waiters::default();
        let kept = Arc::new(AtomicWaker::default());
        let waiter: Weak<AtomicWaker> = Arc::downgrade(&kept);
        waiters.add(waiter);
        for _ in 0..10_000 {
            let gone: Weak<AtomicWaker> = Arc::downgrade(&Arc::new(AtomicWaker::default()));
            waiters.add(gone);
        }
        let registry = waiters.registry.lock().unwrap();
        assert!(registry.all.len() <= 64);
        let alive = registry.all.iter().filter_map(Weak::upgrade);
        assert_eq!(alive.count(), 1);
    }
}
