//! A client's socket, with its options and with its errors even while nothing is read or
//! written.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;

/// Number of bytes of a response that the kernel may buffer for a client that does not read. A
/// small number is enough for tokens, and what is buffered was computed in vain if the client
/// goes away.
const SEND_BUFFER: usize = 64 << 10;

/// A client's socket. It can be watched for errors while hyper owns another handle of it.
#[derive(Clone, Debug)]
pub(super) struct Socket(Arc<TcpStream>);

impl Socket {
    /// Sets the options of an accepted connection. Failures are ignored: the connection still
    /// works.
    pub fn new(stream: TcpStream) -> Self {
        // So that each token is sent at once.
        let _ = stream.set_nodelay(true);
        let options = SockRef::from(&stream);
        let _ = options.set_tcp_keepalive(&keep_alive());
        let _ = options.set_send_buffer_size(SEND_BUFFER);
        Self(Arc::new(stream))
    }

    /// Waits for an error of the connection, such as a reset by the client. The end of the
    /// client's bytes is not an error.
    pub async fn error(&self) -> io::Error {
        let taken = || match self.0.take_error() {
            Ok(Some(error)) | Err(error) => Ok(error),
            Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
        };
        let error = self.0.async_io(Interest::ERROR, taken).await;
        error.unwrap_or_else(|error| error)
    }
}

/// Returns the settings for probes of a silent peer. A client whose machine is gone is detected
/// after half a minute.
fn keep_alive() -> TcpKeepalive {
    TcpKeepalive::new()
        .with_time(Duration::from_secs(15))
        .with_interval(Duration::from_secs(5))
        .with_retries(3)
}

impl AsyncRead for Socket {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(context))?;
            match self.0.try_read_buf(buffer) {
                Ok(_) => return Poll::Ready(Ok(())),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(context))?;
            match self.0.try_write_vectored(slices) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is buffered here.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(SockRef::from(&*self.0).shutdown(std::net::Shutdown::Write))
    }
}
