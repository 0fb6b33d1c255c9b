//! Accepts connections up to a limit, and limits the time for which a client may keep the
//! server waiting.
//!
//! When a client goes away, the task of its connection ends. This drops hyper's connection, and
//! with it the handlers and the responses.

mod activity;
mod admission;
mod exchange;
mod files;
mod progress;
mod socket;
mod watched;

use crate::server::{HalfClose, ServerOptions};
use activity::{Activity, TimeoutReason};
use admission::{Admission, Place};
use axum::Router;
use exchange::ConnectionService;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use progress::{Progress, Streams};
use socket::Socket;
use std::future::{Future, pending, ready};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;

/// How long connections may take to close after every response has been written.
const CLOSING: Duration = Duration::from_secs(5);

/// Maximum size of a request's headers in bytes.
const HEADER_BYTES: usize = 64 << 10;

/// How long to wait if accepting a connection fails, usually for lack of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Maximum number of open requests per HTTP/2 connection.
const CONCURRENT_STREAMS: u32 = 128;

/// Bytes of a response that are buffered per HTTP/2 stream while the client's window is full.
const STREAM_SEND_BUFFER: usize = 64 << 10;

/// Maximum number of streams that an HTTP/2 client may reset before the server has handled
/// them. If there are more, the connection is closed ("rapid reset").
const RESET_STREAMS: usize = 20;

/// Maximum number of streams that the server may reset because of errors in a client's HTTP/2
/// frames. If there are more, the connection is closed.
const FAULTY_STREAMS: usize = 256;

/// Limits that apply to connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    header_timeout: Duration,
    keep_alive_timeout: Duration,
    write_timeout: Duration,
    half_close: HalfClose,
    connections: usize,
    per_address: usize,
}

impl Limits {
    pub fn of(options: &ServerOptions) -> Self {
        let connections = files::limit(options.max_connections);
        // Half of all connections, so that no single client can keep all others out.
        let per_address = options.max_connections_per_address;
        Self {
            header_timeout: options.header_timeout,
            keep_alive_timeout: options.keep_alive_timeout,
            write_timeout: options.write_timeout,
            half_close: options.half_close,
            connections,
            per_address: per_address.unwrap_or(connections / 2).max(1),
        }
    }
}

/// What all connections share.
struct Service {
    builder: Builder<Streams>,
    router: Router,
    limits: Limits,
    tls: Option<TlsAcceptor>,
}

/// Serves connections until `end` completes, then lets them finish their open requests.
pub(crate) async fn serve<T>(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    end: impl Future<Output = T>,
) -> T {
    let service = Arc::new(Service {
        builder: builder(&limits),
        router,
        limits,
        tls,
    });
    let admission = Arc::new(Admission::new(limits.connections, limits.per_address));
    let (stop, stopped) = watch::channel(false);
    let mut end = pin!(end);
    let ended = loop {
        let accepted = async {
            let accepted = listener.accept().await;
            if accepted.is_ok() {
                // Only after accepting, so that no connection is closed for one that never
                // comes.
                admission.room().await;
            }
            accepted
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            ended = &mut end => break ended,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = admission.admit(address.ip()) else {
            let limit = limits.per_address;
            tracing::debug!(%address, limit, "refused a connection: too many from this address");
            continue;
        };
        let socket = Socket::new(stream);
        let service = Arc::clone(&service);
        let stopped = stopped.clone();
        tokio::spawn(async move {
            let outcome = service.run(socket, &place, stopped).await;
            if let Err(error) = outcome {
                // Usually the client went away.
                tracing::debug!(error = &*error, "a connection ended");
            }
            drop(place);
        });
    };
    drop((listener, stopped));
    let _ = stop.send(true);
    // Every connection holds a receiver.
    if timeout(CLOSING, stop.closed()).await.is_err() {
        tracing::warn!("connections that did not close in time are dropped");
    }
    ended
}

fn builder(limits: &Limits) -> Builder<Streams> {
    let mut builder = Builder::new(Streams {
        write_timeout: limits.write_timeout,
    });
    builder
        .http1()
        // `Activity` limits the time for headers instead, because hyper's limit would also
        // apply to connections between two requests.
        .header_read_timeout(None)
        .half_close(limits.half_close == HalfClose::Finish)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.write_timeout)
        .keep_alive_timeout(limits.write_timeout)
        .max_concurrent_streams(CONCURRENT_STREAMS)
        .max_send_buf_size(STREAM_SEND_BUFFER)
        .max_pending_accept_reset_streams(RESET_STREAMS)
        .max_local_error_reset_streams(FAULTY_STREAMS)
        .max_header_list_size(HEADER_BYTES as u32);
    builder
}

type Outcome = Result<(), Box<dyn std::error::Error + Send + Sync>>;

impl Service {
    /// Runs one connection until it ends.
    async fn run(&self, socket: Socket, place: &Place, stop: watch::Receiver<bool>) -> Outcome {
        let mut stream = TimeoutStream::new(socket.clone());
        // Limits how long a client that does not read can hold its response.
        stream.set_write_timeout(Some(self.limits.write_timeout));
        let stream = Box::pin(stream);
        let activity = &place.activity;
        let Some(tls) = &self.tls else {
            return self.serve_http(stream, &socket, activity, stop).await;
        };
        let accepted = tokio::select! {
            biased;
            never = activity.changes() => match never {},
            accepted = timeout(self.limits.header_timeout, tls.accept(stream)) => accepted,
            () = activity.evicted() => return Err("closed to make room".into()),
        };
        self.serve_http(accepted??, &socket, activity, stop).await
    }

    /// Speaks HTTP over `stream`, whose bytes come from `socket`.
    async fn serve_http(
        &self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        socket: &Socket,
        activity: &Arc<Activity>,
        mut stop: watch::Receiver<bool>,
    ) -> Outcome {
        let limits = &self.limits;
        let (stream, mut watch) = watched::watch(stream, Arc::clone(activity), limits.half_close);
        let progress = Arc::new(Progress::new());
        let requests = ConnectionService {
            router: self.router.clone(),
            activity: Arc::clone(activity),
            progress: Arc::clone(&progress),
        };
        let connection = self
            .builder
            .serve_connection(TokioIo::new(stream), requests);
        let mut connection = pin!(connection);
        // In this order, because the other futures depend on what hyper has just done.
        let why = tokio::select! {
            biased;
            ended = connection.as_mut() => return ended,
            error = watch.closed_by_client() => return Err(error.into()),
            why = poll_when_woken(self.interrupted(socket, activity, &progress, &mut stop)) => why?,
        };
        // With HTTP/2 this tells the client; with HTTP/1 it ends keep-alive.
        connection.as_mut().graceful_shutdown();
        tokio::select! {
            biased;
            ended = connection.as_mut() => return ended,
            () = ready(()) => {}
        }
        if why == CloseReason::Room && activity.is_idle() {
            return Ok(());
        }
        activity.cancel_eviction();
        tokio::select! {
            biased;
            ended = connection.as_mut() => ended,
            error = watch.closed_by_client() => Err(error.into()),
            ended = poll_when_woken(self.finished(socket, activity, &progress)) => Ok(ended?),
        }
    }

    /// Waits until a connection must take no more requests although its client is still there.
    /// Returns an error if the connection must be closed at once.
    async fn interrupted(
        &self,
        socket: &Socket,
        activity: &Activity,
        progress: &Progress,
        stop: &mut watch::Receiver<bool>,
    ) -> io::Result<CloseReason> {
        tokio::select! {
            biased;
            error = self.broken(socket, activity, progress) => Err(error),
            () = activity.evicted() => Ok(CloseReason::Room),
            reason = activity.timed_out(&self.limits) => match reason {
                TimeoutReason::Head => Err(header_timeout()),
                TimeoutReason::Idle => Ok(CloseReason::Idle),
            },
            _ = stop.wait_for(|stop| *stop) => Ok(CloseReason::Stop),
        }
    }

    /// Waits until a connection that takes no more requests has nothing left to do.
    async fn finished(
        &self,
        socket: &Socket,
        activity: &Activity,
        progress: &Progress,
    ) -> io::Result<()> {
        tokio::select! {
            biased;
            error = self.broken(socket, activity, progress) => Err(error),
            () = activity.idle_for(CLOSING) => Ok(()),
        }
    }

    /// Waits until a connection must be closed at once, and returns why.
    async fn broken(&self, socket: &Socket, activity: &Activity, progress: &Progress) -> io::Error {
        tokio::select! {
            biased;
            never = activity.changes() => match never {},
            error = socket.error() => error,
            () = progress.stalled(self.limits.write_timeout) => write_timeout(),
        }
    }
}

/// Polls `future` only when it has woken the task itself. The task of a connection is woken for
/// every token, and most of what it waits for has nothing to do with tokens.
async fn poll_when_woken<F: Future>(future: F) -> F::Output {
    let mut one = FuturesUnordered::from_iter([future]);
    match one.next().await {
        Some(output) => output,
        None => pending().await,
    }
}

/// Why a connection takes no more requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum CloseReason {
    /// Another connection needs its place.
    Room,
    /// It was idle for the keep-alive timeout.
    Idle,
    /// The server is stopping.
    Stop,
}

fn write_timeout() -> io::Error {
    timed_out("the client did not read its response")
}

fn header_timeout() -> io::Error {
    timed_out("the head of a request did not arrive in time")
}

fn timed_out(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}
