//! A time limit on responses that a client does not read.
//!
//! hyper asks a response body for its next piece when it has passed the previous piece on: to
//! the socket with HTTP/1, or into the windows that the client grants with HTTP/2. So if a
//! piece has waited for too long, the client does not read, whatever else the connection does.

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

/// Number of bytes that are handed to hyper at a time. The rest stays in the response, which
/// can be dropped.
const CHUNK_BYTES: usize = 16 << 10;

/// Whether a client reads its response.
#[derive(Debug)]
pub(super) struct Progress {
    begun: Instant,
    /// When the current piece was offered, in nanoseconds after `begun`; [`NOTHING`] if no
    /// piece waits. It is written for every token, so it is an atomic and not a lock.
    offered: AtomicU64,
}

/// Sentinel: no piece waits.
const NOTHING: u64 = u64::MAX;

impl Progress {
    pub fn new() -> Self {
        Self {
            begun: Instant::now(),
            offered: AtomicU64::new(NOTHING),
        }
    }

    /// Records that a piece waits from now on.
    fn offer(&self) {
        let since = self.begun.elapsed().as_nanos();
        let since = u64::try_from(since).unwrap_or(NOTHING);
        self.offered.store(since, Ordering::Relaxed);
    }

    /// Records that no piece waits any more.
    fn taken(&self) {
        self.offered.store(NOTHING, Ordering::Relaxed);
    }

    /// Returns since when a piece has been waiting.
    fn offered(&self) -> Option<Instant> {
        let since = self.offered.load(Ordering::Relaxed);
        (since != NOTHING).then(|| self.begun + Duration::from_nanos(since))
    }

    /// Waits until a piece has been waiting for longer than `limit`.
    pub async fn stalled(&self, limit: Duration) {
        // A piece that is offered during this sleep cannot be late before the sleep ends.
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
    /// Progress of the HTTP/2 stream that the current task runs.
    static STREAM: Arc<Progress>;
}

/// Returns the progress of the HTTP/2 stream that the current task runs, if it runs one.
pub(super) fn of_stream() -> Option<Arc<Progress>> {
    STREAM.try_with(Arc::clone).ok()
}

/// Runs each stream of HTTP/2 connections as a task. Drops a stream whose client does not read
/// its response, and hyper then resets it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Streams {
    /// How long a piece of a response may wait.
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
                    tracing::debug!("an HTTP/2 client did not read its response");
                }
            }
        }));
    }
}

/// A response body that is handed out in pieces and keeps its request open.
pub(super) struct ResponseBody {
    body: Body,
    /// Rest of the last frame.
    rest: Bytes,
    progress: Arc<Progress>,
    _open: OpenRequest,
}

impl ResponseBody {
    pub fn new(body: Body, progress: Arc<Progress>, open: OpenRequest) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            progress,
            _open: open,
        }
    }

    fn offer(&mut self, mut bytes: Bytes) -> Frame<Bytes> {
        self.rest = bytes.split_off(bytes.len().min(CHUNK_BYTES));
        self.progress.offer();
        Frame::data(bytes)
    }
}

impl Drop for ResponseBody {
    fn drop(&mut self) {
        self.progress.taken();
    }
}

impl HttpBody for ResponseBody {
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
        // Set the upper bound first, because a lower bound must not exceed it.
        if let Some(upper) = body.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(body.lower().saturating_add(rest));
        hint
    }
}
