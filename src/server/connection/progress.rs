//! A time limit on answers that a client does not take.
//!
//! hyper asks an answer's body for its next piece once the piece before has been passed
//! on: to the socket with HTTP/1, within the windows that the client grants with HTTP/2.
//! So an answer whose piece has lain there for too long has a client that does not read,
//! whatever the connection does otherwise.

use axum::body::Body;
use axum::body::{Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use hyper::rt::Executor;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

use super::activity::OpenRequest;

/// Bytes that are handed to hyper at a time. The rest stays in the answer, which can be
/// dropped.
const PIECE: usize = 16 << 10;

/// Whether an answer's client takes what is offered to it.
#[derive(Debug)]
pub(super) struct Progress {
    begun: Instant,
    /// When the piece was offered that waits to be taken, in nanoseconds after `begun`;
    /// [`NOTHING`] if none waits. Written for every token, so it is no lock.
    offered: AtomicU64,
}

/// No piece waits to be taken.
const NOTHING: u64 = u64::MAX;

impl Progress {
    pub fn new() -> Self {
        Self {
            begun: Instant::now(),
            offered: AtomicU64::new(NOTHING),
        }
    }

    /// A piece waits to be taken from now on.
    fn offer(&self) {
        let since = self.begun.elapsed().as_nanos();
        let since = u64::try_from(since).unwrap_or(NOTHING);
        self.offered.store(since, Ordering::Relaxed);
    }

    /// No piece waits any more.
    fn taken(&self) {
        self.offered.store(NOTHING, Ordering::Relaxed);
    }

    /// Since when a piece waits to be taken.
    fn offered(&self) -> Option<Instant> {
        let since = self.offered.load(Ordering::Relaxed);
        (since != NOTHING).then(|| self.begun + Duration::from_nanos(since))
    }

    /// Waits until a piece has waited for longer than `limit`.
    pub async fn stalled(&self, limit: Duration) {
        // A piece that is offered while this sleeps is late only after it.
        let mut next = Instant::now() + limit;
        loop {
            sleep_until(next).await;
            let now = Instant::now();
            next = self.offered().unwrap_or(now) + limit;
            if next <= now {
                return;
            }
        }
    }
}

tokio::task_local! {
    /// Progress of the HTTP/2 stream whose task this is.
    static STREAM: Arc<Progress>;
}

/// The progress of the stream that the current task belongs to, if it is one of HTTP/2.
pub(super) fn of_stream() -> Option<Arc<Progress>> {
    STREAM.try_with(Arc::clone).ok()
}

/// Runs the streams of HTTP/2 connections, each as a task, and drops one that its client
/// does not read: hyper then resets it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Streams {
    /// How long a piece of an answer may wait to be taken.
    pub write_timeout: Duration,
}

impl<F: Future + Send + 'static> Executor<F> for Streams {
    fn execute(&self, stream: F) {
        let limit = self.write_timeout;
        let progress = Arc::new(Progress::new());
        tokio::spawn(STREAM.scope(Arc::clone(&progress), async move {
            tokio::select! {
                biased;
                _ = stream => {}
                () = progress.stalled(limit) => {
                    tracing::debug!("a client of HTTP/2 did not take its answer");
                }
            }
        }));
    }
}

/// An answer's body, in pieces, which keeps its request open.
pub(super) struct Answer {
    body: Body,
    /// What is left of the last frame.
    rest: Bytes,
    progress: Arc<Progress>,
    _open: OpenRequest,
}

impl Answer {
    pub fn new(body: Body, progress: Arc<Progress>, open: OpenRequest) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            progress,
            _open: open,
        }
    }

    fn offer(&mut self, mut bytes: Bytes) -> Frame<Bytes> {
        self.rest = bytes.split_off(bytes.len().min(PIECE));
        self.progress.offer();
        Frame::data(bytes)
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.progress.taken();
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        this.progress.taken();
        if !this.rest.is_empty() {
            let rest = std::mem::take(&mut this.rest);
            return Poll::Ready(Some(Ok(this.offer(rest))));
        }
        let frame = std::task::ready!(Pin::new(&mut this.body).poll_frame(context));
        Poll::Ready(frame.map(|frame| {
            frame.map(|frame| match frame.into_data() {
                Ok(bytes) => this.offer(bytes),
                Err(other) => other,
            })
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let rest = self.rest.len() as u64;
        let body = self.body.size_hint();
        let mut hint = SizeHint::new();
        // The upper bound first: a lower bound must not exceed it.
        if let Some(upper) = body.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(body.lower().saturating_add(rest));
        hint
    }
}
