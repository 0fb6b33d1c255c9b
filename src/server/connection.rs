//! Connections: accepted up to a limit, with a time for everything that a client may
//! keep the server waiting for.

use super::ServerOptions;
use super::first_bytes::FirstBytes;
use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::{SockRef, TcpKeepalive};
use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;
use tokio_rustls::TlsAcceptor;

/// How long connections may take to close once every answer has been written.
const CLOSING: Duration = Duration::from_secs(5);

/// Bytes of a request's headers at most.
const HEADER_BYTES: usize = 64 << 10;

/// How long to wait when no connection can be accepted: no file descriptors are left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What connections are held to.
#[derive(Clone, Copy)]
pub(super) struct Limits {
    header_timeout: Duration,
    write_timeout: Duration,
    connections: usize,
}

impl Limits {
    pub fn of(options: &ServerOptions) -> Self {
        Self {
            header_timeout: options.header_timeout,
            write_timeout: options.write_timeout,
            connections: options.max_connections.clamp(1, Semaphore::MAX_PERMITS),
        }
    }
}

/// Serves connections until `end` is done, then lets them finish what they are at.
pub(super) async fn serve<T>(
    listener: TcpListener,
    tls: Option<TlsAcceptor>,
    router: Router,
    limits: Limits,
    end: impl Future<Output = T>,
) -> T {
    let permits = Arc::new(Semaphore::new(limits.connections));
    let graceful = GracefulShutdown::new();
    let builder = Arc::new(builder(limits));
    let mut end = pin!(end);
    let ended = loop {
        let accepted = async {
            // Never closed.
            let permit = Arc::clone(&permits).acquire_owned().await.ok();
            (permit, listener.accept().await)
        };
        let (permit, accepted) = tokio::select! {
            accepted = accepted => accepted,
            ended = &mut end => break ended,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        let builder = Arc::clone(&builder);
        let watcher = graceful.watcher();
        let tls = tls.clone();
        tokio::spawn(async move {
            let stream = prepared(stream, limits.write_timeout);
            let ended = match tls {
                None => {
                    let stream = FirstBytes::within(limits.header_timeout, stream);
                    let connection = builder.serve_connection(TokioIo::new(stream), service);
                    watcher.watch(connection.into_owned()).await
                }
                Some(tls) => match timeout(limits.header_timeout, tls.accept(stream)).await {
                    Ok(Ok(stream)) => {
                        let stream = FirstBytes::within(limits.header_timeout, stream);
                        let connection = builder.serve_connection(TokioIo::new(stream), service);
                        watcher.watch(connection.into_owned()).await
                    }
                    Ok(Err(error)) => Err(error.into()),
                    Err(late) => Err(late.into()),
                },
            };
            if let Err(error) = ended {
                // Mostly clients that went away.
                tracing::debug!(error = &*error, "a connection ended");
            }
            drop(permit);
        });
    };
    drop(listener);
    if tokio::time::timeout(CLOSING, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::warn!("connections that did not close in time are cut");
    }
    ended
}

/// A client that answers nothing any more is noticed after half a minute.
fn keep_alive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5))
        .with_retries(3)
}

fn builder(limits: Limits) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(HEADER_BYTES);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(limits.write_timeout)
        .keep_alive_timeout(limits.write_timeout)
        .max_header_list_size(HEADER_BYTES as u32);
    builder
}

/// The stream, with its time limit on writing: a client that stops reading holds its
/// answer for so long, and then it is cut off.
fn prepared(
    stream: TcpStream,
    write_timeout: Duration,
) -> std::pin::Pin<Box<TimeoutStream<TcpStream>>> {
    // Tokens are to leave at once, and a client whose machine is gone is to be noticed
    // while it waits for its answer. A stream without these works, too.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(&stream).set_tcp_keepalive(&keep_alive());
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(write_timeout));
    Box::pin(stream)
}
