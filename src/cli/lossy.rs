//! A log writer that never blocks its callers.
//!
//! Lines go through a bounded queue to a thread that writes them. If the output is not
//! read, for example because a log collector has stopped, the queue fills up. Further lines
//! are then dropped and counted.

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::Builder;
use std::time::{Duration, Instant};

/// Maximum number of lines in the queue.
const MAX_LINES: usize = 8192;
/// Maximum number of bytes in the queue.
const MAX_BYTES: usize = 4 << 20;

/// Name of the counter of dropped lines.
pub const DROPPED: &str = "quell_log_lines_dropped_total";

enum Message {
    Line(Vec<u8>),
    /// Asks the thread to use the sender once all earlier lines have been written.
    Flush(Sender<()>),
}

#[derive(Default)]
struct Shared {
    queued_bytes: AtomicUsize,
    dropped: AtomicU64,
    counter: OnceLock<metrics::Counter>,
}

impl Shared {
    fn drop_line(&self) {
        self.dropped.fetch_add(1, Ordering::Relaxed);
        if let Some(counter) = self.counter.get() {
            counter.increment(1);
        }
    }
}

/// Writer that queues each write as one line. Clones share the queue.
#[derive(Clone)]
pub struct Lossy {
    messages: Sender<Message>,
    shared: Arc<Shared>,
}

impl Lossy {
    /// Starts the thread that writes to `out`. After lines were dropped, it calls `report`
    /// with their number once there is room again.
    pub fn start(
        out: impl Write + Send + 'static,
        report: impl Fn(u64) + Send + 'static,
    ) -> io::Result<Self> {
        let (messages, queue) = bounded(MAX_LINES);
        let shared = Arc::<Shared>::default();
        let writer = QueueWriter {
            queue,
            shared: Arc::clone(&shared),
            out,
            reported: 0,
        };
        Builder::new()
            .name("quell-log".to_owned())
            .spawn(move || writer.run(report))?;
        Ok(Self { messages, shared })
    }

    /// Counts dropped lines in the metrics recorder that is installed now.
    pub fn count(&self) {
        let counter = self.shared.counter.get_or_init(|| {
            let what = "Log lines dropped because the log was not read";
            metrics::describe_counter!(DROPPED, what);
            metrics::counter!(DROPPED)
        });
        counter.absolute(self.dropped());
    }

    /// Returns the number of lines dropped so far.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// Waits until the lines that are queued now have been written, but at most for
    /// `bound`. Returns whether they were written.
    pub fn flush(&self, bound: Duration) -> bool {
        let until = Instant::now() + bound;
        let (done, is_done) = bounded(1);
        let asked = self.messages.send_deadline(Message::Flush(done), until);
        asked.is_ok() && is_done.recv_deadline(until).is_ok()
    }
}

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let queued = self
            .shared
            .queued_bytes
            .fetch_add(line.len(), Ordering::Relaxed);
        let fits = queued.saturating_add(line.len()) <= MAX_BYTES;
        let sent = match fits {
            true => self.messages.try_send(Message::Line(line.to_vec())),
            false => Err(TrySendError::Full(Message::Line(Vec::new()))),
        };
        if sent.is_err() {
            self.shared
                .queued_bytes
                .fetch_sub(line.len(), Ordering::Relaxed);
            self.shared.drop_line();
        }
        // A dropped line is no error for the code that logs.
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The writing thread's end of the queue.
struct QueueWriter<W> {
    queue: Receiver<Message>,
    shared: Arc<Shared>,
    out: W,
    /// Number of dropped lines that were reported.
    reported: u64,
}

impl<W: Write> QueueWriter<W> {
    fn run(mut self, report: impl Fn(u64)) {
        while let Ok(message) = self.queue.recv() {
            match message {
                Message::Line(line) => {
                    let written = self.out.write_all(&line);
                    self.shared
                        .queued_bytes
                        .fetch_sub(line.len(), Ordering::Relaxed);
                    if written.is_err() {
                        // Do not report it: the report would be lost too.
                        self.shared.drop_line();
                        self.reported = self.shared.dropped.load(Ordering::Relaxed);
                    }
                }
                Message::Flush(done) => {
                    let _ = self.out.flush();
                    let _ = done.try_send(());
                }
            }
            let dropped = self.shared.dropped.load(Ordering::Relaxed);
            // Wait until there is room for the report and for some lines after it.
            if dropped > self.reported && self.queue.len() <= MAX_LINES / 2 {
                report(dropped - self.reported);
                self.reported = dropped;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Mutex, mpsc};

    /// Waits for a permit before each write, until the sender of permits is dropped.
    struct Gated {
        permits: mpsc::Receiver<()>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Gated {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.permits.recv();
            self.written.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A log, and what a test needs to block it and to observe it.
    struct Bench {
        log: Lossy,
        permit: mpsc::Sender<()>,
        reports: mpsc::Receiver<u64>,
        written: Arc<Mutex<Vec<u8>>>,
    }

    fn gated() -> Bench {
        let (permit, permits) = mpsc::channel();
        let (report, reports) = mpsc::channel();
        let written = Arc::<Mutex<Vec<u8>>>::default();
        let out = Gated {
            permits,
            written: Arc::clone(&written),
        };
        let report = move |lost| {
            let _ = report.send(lost);
        };
        Bench {
            log: Lossy::start(out, report).unwrap(),
            permit,
            reports,
            written,
        }
    }

    #[test]
    fn lines_that_nobody_reads_are_dropped_counted_and_reported() {
        let Bench {
            mut log,
            permit,
            reports,
            written,
        } = gated();
        let lines = 3 * MAX_LINES;
        for line in 0..lines {
            log.write_all(format!("{line}\n").as_bytes()).unwrap();
        }
        let dropped = log.dropped();
        let queued = lines - dropped as usize;
        // The thread may have taken one line out of the queue.
        assert!((MAX_LINES..=MAX_LINES + 1).contains(&queued), "{queued}");
        assert!(!log.flush(Duration::from_millis(1)), "nothing is written");
        drop(permit);
        assert!(log.flush(Duration::from_secs(600)));
        assert_eq!(reports.recv().unwrap(), log.dropped());
        assert!(written.lock().unwrap().starts_with(b"0\n1\n2\n"));
        log.write_all(b"the end\n").unwrap();
        assert!(log.flush(Duration::from_secs(600)));
        assert!(written.lock().unwrap().ends_with(b"the end\n"));
        assert!(reports.try_recv().is_err(), "they are reported once");
    }

    #[test]
    fn long_lines_respect_the_byte_limit() {
        let Bench {
            mut log,
            permit,
            written,
            ..
        } = gated();
        let line = [b'x'; MAX_BYTES / 4];
        for _ in 0..16 {
            log.write_all(&line).unwrap();
        }
        assert_eq!(log.dropped(), 12);
        drop(permit);
        assert!(log.flush(Duration::from_secs(600)));
        assert_eq!(written.lock().unwrap().len(), MAX_BYTES);
    }

    #[test]
    fn an_output_that_fails_loses_lines_and_nothing_else() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut log = Lossy::start(Closed, |lost| panic!("{lost} reported")).unwrap();
        log.write_all(b"one\n").unwrap();
        log.write_all(b"two\n").unwrap();
        assert!(log.flush(Duration::from_secs(600)));
        assert_eq!(log.dropped(), 2);
    }
}
