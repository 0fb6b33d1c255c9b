//! What a connection is doing, and how long it may go on doing it.
//!
//! The requests and their responses, the socket's bytes and the list of connections all report
//! to or read from the connection's [`Activity`]. The task of the connection enforces the time
//! limits.

use super::Limits;
use atomic_waker::AtomicWaker;
use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep, sleep_until};

/// The HTTP version that a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protocol {
    /// HTTP/1.0 or HTTP/1.1, with one request at a time.
    Http1,
    /// HTTP/2, with many requests at a time.
    Http2,
}

/// Why a connection without an open request must be closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimeoutReason {
    /// The client did not send the whole head of a request in time.
    Head,
    /// The client sent nothing for the keep-alive timeout.
    Idle,
}

/// State of one connection, shared by everything that works on it.
#[derive(Debug)]
pub(super) struct Activity {
    state: Mutex<State>,
    /// Wakes the connection's task, which waits for changes of the state.
    changed: AtomicWaker,
    /// Wakes the accept loop when this connection may be closed to make room.
    idle: Arc<Notify>,
}

#[derive(Debug)]
struct State {
    protocol: Option<Protocol>,
    /// Number of requests whose response has not been completely handed to hyper.
    requests: usize,
    /// Whether the body of the last request is still arriving. With HTTP/1 this is the only
    /// open request. With HTTP/2 the value is not used.
    uploading: bool,
    /// Whether there was a request.
    used: bool,
    /// When the client connected or its last request ended.
    since: Instant,
    /// When the first byte of a request's head arrived while no request was open.
    head_since: Option<Instant>,
    /// Whether the socket has taken everything that was written.
    flushed: bool,
    /// Whether the connection was chosen to make room for another one.
    evicted: bool,
}

impl State {
    fn is_idle(&self) -> bool {
        self.requests == 0 && self.flushed
    }
}

impl Activity {
    /// Creates the state of a client that has just connected. `idle` is notified whenever the
    /// connection becomes idle.
    pub fn new(idle: Arc<Notify>) -> Self {
        Self {
            state: Mutex::new(State {
                protocol: None,
                requests: 0,
                uploading: false,
                used: false,
                since: Instant::now(),
                head_since: None,
                flushed: true,
                evicted: false,
            }),
            changed: AtomicWaker::new(),
            idle,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records which protocol the client speaks.
    pub fn speaks(&self, protocol: Protocol) {
        self.state().protocol = Some(protocol);
        self.changed.wake();
    }

    /// Records bytes that hyper has read from the client.
    pub fn received(&self, bytes: &[u8]) {
        let mut state = self.state();
        // Empty lines before a request are ignored (RFC 9112, section 2.2).
        let begins = bytes.iter().any(|byte| !matches!(byte, b'\r' | b'\n'));
        let head = state.requests == 0 && state.protocol != Some(Protocol::Http2);
        if begins && head && state.head_since.is_none() {
            state.head_since = Some(Instant::now());
            drop(state);
            self.changed.wake();
        }
    }

    /// Records whether the socket has taken everything that was written to it.
    pub fn flushed(&self, flushed: bool) {
        let mut state = self.state();
        state.flushed = flushed;
        if state.is_idle() {
            self.idle.notify_one();
        }
    }

    /// Records the head of a request. The request is open until the returned value is dropped.
    pub fn request(self: &Arc<Self>) -> OpenRequest {
        let mut state = self.state();
        state.requests += 1;
        state.used = true;
        state.head_since = None;
        drop(state);
        self.changed.wake();
        OpenRequest(Arc::clone(self))
    }

    /// Records whether the body of the last request is still arriving.
    pub fn uploading(&self, uploading: bool) {
        self.state().uploading = uploading;
    }

    /// Returns whether an HTTP/1 client has sent its whole request and waits for the response.
    /// Whatever it sends now is not part of that request.
    pub fn awaits_response(&self) -> bool {
        let state = self.state();
        state.protocol == Some(Protocol::Http1) && state.requests > 0 && !state.uploading
    }

    /// Returns whether no request is open and everything that was written has been taken.
    pub fn is_idle(&self) -> bool {
        self.state().is_idle()
    }

    /// Returns since when the connection has been idle; `None` if it is not idle or will be
    /// closed already.
    pub fn idle_since(&self) -> Option<Instant> {
        let state = self.state();
        (state.is_idle() && !state.evicted).then_some(state.since)
    }

    /// Returns whether the connection must make room for another one.
    pub fn is_evicted(&self) -> bool {
        self.state().evicted
    }

    /// Asks the connection's task to close the connection if it is still idle. Returns whether
    /// it was.
    pub fn evict(&self) -> bool {
        let mut state = self.state();
        let idle = state.is_idle() && !state.evicted;
        if idle {
            state.evicted = true;
            self.changed.wake();
        }
        idle
    }

    /// Takes an eviction back, because a request came first.
    pub fn cancel_eviction(&self) {
        self.state().evicted = false;
        // Another connection must be closed instead.
        self.idle.notify_one();
    }

    /// Never completes, but wakes the caller after every change. Must be polled before the
    /// other waiting methods, which rely on it.
    pub async fn changes(&self) -> Infallible {
        poll_fn(|context| {
            self.changed.register(context.waker());
            Poll::Pending
        })
        .await
    }

    /// Waits until the connection must make room for another one. Must be polled together with
    /// [`Activity::changes`].
    pub async fn evicted(&self) {
        poll_fn(|_| match self.state().evicted {
            true => Poll::Ready(()),
            false => Poll::Pending,
        })
        .await;
    }

    /// Returns when the connection will be closed and why, unless something happens before;
    /// `None` while a request is open.
    fn deadline(&self, limits: &Limits) -> Option<(Instant, TimeoutReason)> {
        let state = self.state();
        if state.requests > 0 {
            return None;
        }
        if let Some(since) = state.head_since.filter(|_| state.used) {
            return Some((since + limits.header_timeout, TimeoutReason::Head));
        }
        if !state.used && state.protocol != Some(Protocol::Http2) {
            return Some((state.since + limits.header_timeout, TimeoutReason::Head));
        }
        Some((state.since + limits.keep_alive_timeout, TimeoutReason::Idle))
    }

    /// Waits until a client without an open request has taken too long. Must be polled together
    /// with [`Activity::changes`], and after hyper, so that it sees what hyper has just read.
    pub async fn timed_out(&self, limits: &Limits) -> TimeoutReason {
        let mut clock = pin!(sleep_until(Instant::now() + FAR));
        poll_fn(|context| self.poll_timed_out(limits, clock.as_mut(), context)).await
    }

    /// Waits until no request has been open for `time`, counted from this call at the earliest.
    pub async fn idle_for(&self, time: Duration) {
        let begun = Instant::now();
        let mut clock = pin!(sleep_until(begun + FAR));
        poll_fn(|context| {
            let state = self.state();
            if state.requests > 0 {
                return Poll::Pending;
            }
            let deadline = state.since.max(begun) + time;
            drop(state);
            if clock.deadline() != deadline {
                clock.as_mut().reset(deadline);
            }
            clock.as_mut().poll(context)
        })
        .await;
    }

    fn poll_timed_out(
        &self,
        limits: &Limits,
        mut clock: Pin<&mut Sleep>,
        context: &mut Context<'_>,
    ) -> Poll<TimeoutReason> {
        let Some((deadline, reason)) = self.deadline(limits) else {
            return Poll::Pending;
        };
        if clock.deadline() != deadline {
            clock.as_mut().reset(deadline);
        }
        clock.poll(context).map(|()| reason)
    }
}

/// Longer than any connection lives, but within what timers can represent.
const FAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// A request that stays open until this value is dropped.
#[derive(Debug)]
pub(super) struct OpenRequest(Arc<Activity>);

impl Drop for OpenRequest {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.requests = state.requests.saturating_sub(1);
        state.since = Instant::now();
        if state.is_idle() {
            self.0.idle.notify_one();
        }
        drop(state);
        self.0.changed.wake();
    }
}
