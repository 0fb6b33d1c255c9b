//! How callers wait for the scheduler thread, which may never answer.

use crate::engine::EngineFault;
use crate::engine::event::wake;
use crate::engine::sync::{
    Arc, AtomicWaker, Mutex, Never, OnceLock, PoisonError, Receiver, Sender, TryRecvError, Weak,
    bounded, recv_or,
};
use std::task::{Context, Poll};

/// How an engine has ended, and the signal for those who wait for it.
#[derive(Clone)]
pub(crate) struct EngineEnd {
    fault: Arc<OnceLock<EngineFault>>,
    /// Closes when the scheduler thread has ended or has been given up.
    closed: Receiver<Never>,
}

impl EngineEnd {
    pub fn new(fault: Arc<OnceLock<EngineFault>>, closed: Receiver<Never>) -> Self {
        Self { fault, closed }
    }

    /// Returns what ended the engine, if it has ended.
    pub fn fault(&self) -> Option<&EngineFault> {
        self.fault.get()
    }

    /// Returns what ended an engine that is known to have ended.
    pub fn cause(&self) -> EngineFault {
        self.fault.get().cloned().unwrap_or(EngineFault::Shutdown)
    }

    /// Waits on this thread for a message or the end of the engine.
    pub fn recv<T>(&self, receiver: &Receiver<T>) -> Result<T, EngineFault> {
        recv_or(receiver, &self.closed).map_err(|_| self.cause())
    }

    /// Polls for a message or the end of the engine. `register` must leave the waker where the
    /// scheduler thread and the watchdog find it.
    pub fn poll<T>(
        &self,
        receiver: &Receiver<T>,
        register: impl FnOnce(),
    ) -> Poll<Result<T, EngineFault>> {
        let mut received = receiver.try_recv();
        if matches!(received, Err(TryRecvError::Empty)) {
            register();
            // Try again, because a message may have come before the waker was registered.
            received = receiver.try_recv();
        }
        match received {
            Ok(message) => Poll::Ready(Ok(message)),
            Err(TryRecvError::Disconnected) => Poll::Ready(Err(self.cause())),
            Err(TryRecvError::Empty) => match self.fault.get() {
                // The scheduler thread has been given up, so nothing more will be sent.
                Some(fault @ EngineFault::Stuck { .. }) => Poll::Ready(Err(fault.clone())),
                _ => Poll::Pending,
            },
        }
    }
}

/// Something that holds wakers.
pub(crate) trait Waiter: Send + Sync {
    /// Wakes everyone who waits.
    fn wake(&self);
}

impl Waiter for AtomicWaker {
    fn wake(&self) {
        wake(self.take());
    }
}

/// Everyone who may wait without blocking a thread. The watchdog wakes them.
#[derive(Default)]
pub(crate) struct Waiters {
    registry: Mutex<Registry>,
}

#[derive(Default)]
struct Registry {
    all: Vec<Weak<dyn Waiter>>,
    /// Length of the list at which the waiters that are gone are removed.
    sweep_at: usize,
}

impl Waiters {
    pub fn add(&self, waiter: Weak<dyn Waiter>) {
        // A panic cannot leave a vector of weak references half-written.
        let mut registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        if registry.all.len() >= registry.sweep_at {
            registry.all.retain(|waiter| waiter.strong_count() > 0);
            // At twice the remaining length, the work per waiter stays constant.
            registry.sweep_at = (2 * registry.all.len()).max(64);
        }
        registry.all.push(waiter);
    }

    pub fn wake_all(&self) {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let all = registry.all.clone();
        // Release the lock first: a waker is the caller's code and may submit requests.
        drop(registry);
        for waiter in all.iter().filter_map(Weak::upgrade) {
            waiter.wake();
        }
    }
}

/// The scheduler thread's end of a question that it answers later. Dropping it wakes the
/// caller.
pub(crate) struct Reply<T> {
    sender: Option<Sender<T>>,
    waker: Arc<AtomicWaker>,
}

impl<T> Reply<T> {
    pub fn send(mut self, answer: T) {
        if let Some(sender) = self.sender.take() {
            // The caller may have stopped waiting; its answer is then dropped.
            let _ = sender.try_send(answer);
        }
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        // Disconnect first, so that the woken caller sees it.
        self.sender = None;
        wake(self.waker.take());
    }
}

/// The caller's end of a question that is answered later.
pub(crate) struct Answer<T> {
    receiver: Receiver<T>,
    waker: Arc<AtomicWaker>,
    end: EngineEnd,
}

impl<T> Answer<T> {
    /// Creates the two ends of a question.
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
