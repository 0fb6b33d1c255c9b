//! A client's byte stream, watched for its end while a request is being answered.
//!
//! hyper stops reading once any byte of a next request is in its buffer. Without the watch, a
//! client that sends a stray line after its request and goes away would be answered to the end.
//! So the connection's task goes on reading while a request is being answered. It keeps a
//! bounded number of bytes for hyper and drops the rest; such a connection carries no further
//! request.

use super::activity::{Activity, Protocol};
use crate::server::HalfClose;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The first bytes from an HTTP/2 client (RFC 9113, section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Maximum number of bytes that are kept for hyper while it does not read. There are rarely
/// any, because clients should not pipeline requests that change something (RFC 9112, section
/// 9.3.2).
const MAX_READ_AHEAD: usize = 64 << 10;

/// Number of bytes per read.
const READ_BYTES: usize = 4 << 10;

/// Maximum number of reads before other tasks get their turn.
const MAX_READS: usize = 16;

/// The stream as hyper sees it.
pub(super) struct Watched<S>(Arc<Mutex<Shared<S>>>);

/// The same stream as the connection's task sees it.
pub(super) struct Watch<S> {
    shared: Arc<Mutex<Shared<S>>>,
    half_close: HalfClose,
}

/// State of both halves. Only one task uses them, so the lock is never contended.
struct Shared<S> {
    stream: S,
    activity: Arc<Activity>,
    /// Number of bytes of the HTTP/2 preface seen so far; `None` once the protocol is known.
    preface: Option<usize>,
    /// Bytes that were read ahead for hyper.
    ahead: Vec<u8>,
    /// Whether bytes were dropped. hyper then sees the end of the stream after `ahead`.
    overflowed: bool,
    /// Whether hyper itself waits for the next byte, and so will notice the end.
    hyper_reads: bool,
    /// Whether the socket has taken everything that was written to it.
    flushed: bool,
}

/// Splits a stream into the half that hyper uses and the half that watches it.
pub(super) fn watch<S>(
    stream: S,
    activity: Arc<Activity>,
    half_close: HalfClose,
) -> (Watched<S>, Watch<S>) {
    let shared = Arc::new(Mutex::new(Shared {
        stream,
        activity,
        preface: Some(0),
        ahead: Vec::new(),
        overflowed: false,
        hyper_reads: false,
        flushed: true,
    }));
    let watch = Watch {
        shared: Arc::clone(&shared),
        half_close,
    };
    (Watched(shared), watch)
}

fn lock<S>(shared: &Mutex<Shared<S>>) -> MutexGuard<'_, Shared<S>> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<S> Shared<S> {
    /// Inspects bytes that hyper is about to see.
    fn look_at(&mut self, bytes: &[u8]) {
        if let Some(mut matched) = self.preface {
            for byte in bytes {
                if matched < PREFACE.len() && PREFACE.get(matched) != Some(byte) {
                    self.activity.speaks(Protocol::Http1);
                    self.preface = None;
                    break;
                }
                matched += 1;
            }
            if self.preface.is_some() {
                self.preface = Some(matched);
            }
            if self.preface.is_some() && matched >= PREFACE.len() {
                self.activity.speaks(Protocol::Http2);
                self.preface = None;
            }
        }
        self.activity.received(bytes);
    }
}

impl<S: AsyncRead + Unpin> Watch<S> {
    /// Waits until the client has closed its sending side while it waits for a response, unless
    /// it may do so ([`HalfClose::Finish`]).
    ///
    /// Must be polled after hyper, which determines whether a response is due. With HTTP/2,
    /// hyper reads at all times and notices the end itself.
    pub async fn closed_by_client(&mut self) -> io::Error {
        poll_fn(|context| self.poll_closed_by_client(context)).await
    }

    fn poll_closed_by_client(&mut self, context: &mut Context<'_>) -> Poll<io::Error> {
        if self.half_close == HalfClose::Finish {
            // Only an error ends such a connection, and `Socket::error` reports it.
            return Poll::Pending;
        }
        let mut shared = lock(&self.shared);
        let shared = &mut *shared;
        if std::mem::take(&mut shared.hyper_reads) {
            // hyper has just been polled, by this task, and found nothing to read.
            return Poll::Pending;
        }
        let mut piece = [MaybeUninit::uninit(); READ_BYTES];
        for _ in 0..MAX_READS {
            if !shared.activity.awaits_response() {
                return Poll::Pending;
            }
            let mut read = ReadBuf::uninit(&mut piece);
            match Pin::new(&mut shared.stream).poll_read(context, &mut read) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Ready(Ok(())) => {}
            }
            let read = read.filled();
            if read.is_empty() {
                return Poll::Ready(io::ErrorKind::ConnectionAborted.into());
            }
            if !shared.overflowed {
                let kept = read
                    .len()
                    .min(MAX_READ_AHEAD.saturating_sub(shared.ahead.len()));
                shared.ahead.extend_from_slice(&read[..kept]);
                shared.overflowed = kept < read.len();
            }
        }
        // There may be more to read.
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut shared = lock(&self.0);
        let shared = &mut *shared;
        let before = buffer.filled().len();
        let read = if !shared.ahead.is_empty() {
            let taken = shared.ahead.len().min(buffer.remaining());
            buffer.put_slice(&shared.ahead[..taken]);
            shared.ahead.drain(..taken);
            if shared.ahead.is_empty() {
                // Free the memory, because the connection may stay idle for long.
                shared.ahead = Vec::new();
            }
            Poll::Ready(Ok(()))
        } else if shared.overflowed {
            return Poll::Ready(Ok(()));
        } else {
            Pin::new(&mut shared.stream).poll_read(context, buffer)
        };
        shared.hyper_reads = read.is_pending();
        let bytes = buffer.filled().get(before..).unwrap_or_default();
        if !bytes.is_empty() {
            shared.look_at(bytes);
        }
        read
    }
}

impl<S> Shared<S> {
    /// Records whether the client keeps its response waiting.
    fn written<T>(&mut self, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if self.flushed != written.is_ready() {
            self.flushed = written.is_ready();
            self.activity.flushed(self.flushed);
        }
        written
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut shared = lock(&self.0);
        let written = Pin::new(&mut shared.stream).poll_write(context, bytes);
        shared.written(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut shared = lock(&self.0);
        let written = Pin::new(&mut shared.stream).poll_write_vectored(context, slices);
        shared.written(written)
    }

    fn is_write_vectored(&self) -> bool {
        lock(&self.0).stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = lock(&self.0);
        let flushed = Pin::new(&mut shared.stream).poll_flush(context);
        shared.written(flushed)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut shared = lock(&self.0);
        Pin::new(&mut shared.stream).poll_shutdown(context)
    }
}
