//! The signals that tell `quell serve` to stop: SIGTERM, SIGINT (Ctrl-C) and SIGHUP.
//!
//! A thread with its own runtime listens for them from the start of the process to its end,
//! so no signal is lost between two waits, and none is delayed by a busy runtime.

use std::io;
use tokio::sync::{mpsc, oneshot};

/// Signals that have arrived and were not taken yet, in order.
pub struct Signals(mpsc::UnboundedReceiver<&'static str>);

impl Signals {
    /// Starts to listen.
    ///
    /// # Errors
    /// Returns an error if the system does not let the process listen.
    pub fn listen() -> io::Result<Self> {
        let (came, signals) = mpsc::unbounded_channel();
        let (ready, listening) = oneshot::channel();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()?;
        let listen = async move {
            let mut streams = match Streams::open() {
                Ok(streams) => streams,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            while came.send(streams.next().await).is_ok() {}
        };
        std::thread::Builder::new()
            .name("quell-signals".to_owned())
            .spawn(move || runtime.block_on(listen))?;
        let ended = |_| io::Error::other("the thread that listens to signals has ended");
        listening.blocking_recv().map_err(ended)??;
        Ok(Self(signals))
    }

    /// Waits for the next signal and returns its name.
    pub async fn next(&mut self) -> &'static str {
        match self.0.recv().await {
            Some(name) => name,
            // Not reached: the thread lives as long as the process.
            None => std::future::pending().await,
        }
    }
}

#[cfg(unix)]
struct Streams {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    /// None if the process was started to outlive its terminal.
    hangup: Option<tokio::signal::unix::Signal>,
}

#[cfg(unix)]
impl Streams {
    fn open() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        let hangup = (!ignores_hangup()).then(|| signal(SignalKind::hangup()));
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: hangup.transpose()?,
        })
    }

    async fn next(&mut self) -> &'static str {
        let hangup = async {
            match &mut self.hangup {
                Some(hangup) => hangup.recv().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = hangup => "SIGHUP",
        }
    }
}

/// Returns whether the process was started with SIGHUP ignored, as `nohup` does. Always
/// false on systems without Linux's `/proc`.
#[cfg(unix)]
fn ignores_hangup() -> bool {
    const HANGUP: u64 = 1;
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status
        .lines()
        .find_map(|line| line.strip_prefix("SigIgn:"))
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & HANGUP != 0)
}

#[cfg(not(unix))]
struct Streams;

#[cfg(not(unix))]
impl Streams {
    fn open() -> io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        match tokio::signal::ctrl_c().await {
            Ok(()) => "Ctrl-C",
            Err(_) => std::future::pending().await,
        }
    }
}
