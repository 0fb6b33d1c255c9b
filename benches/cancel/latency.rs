//! Latency of a cancel: from posting it until the reader sees the end, and until the blocks are
//! free.

use super::device::{Device, Failure, endless};
use super::random::Random;
use super::report::{Latencies, Report, Times};
use futures_util::Stream;
use quell::{Cancellation, Engine, EngineConfig, EngineStats, TokenStream};
use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

/// State of the live requests, and with them of the scheduler thread.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// All requests hold blocks and are paused; the thread sleeps when a cancel arrives.
    Asleep,
    /// Like `Asleep`, but cancels follow each other without a pause, so the thread hardly ever
    /// becomes idle.
    Awake,
    /// As many requests as the engine runs at a time decode; the rest wait.
    Decoding,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            Self::Asleep => "asleep",
            Self::Awake => "awake",
            Self::Decoding => "decoding",
        }
    }
}

/// One row of the table.
struct Case {
    state: State,
    live: usize,
    cancels: usize,
    /// Number of cancels posted before the first receipt is awaited.
    at_once: usize,
    /// Mean time between two cancels.
    apart: Duration,
}

/// Measures a device. `cancels` overrides the usual number of cancels per case.
pub fn run(device: &Device, cancels: Option<usize>, report: &mut Report) -> Result<(), Failure> {
    report.latencies(device.name());
    let null = *device == Device::Null;
    let states: &[State] = match device {
        Device::Null => &[State::Asleep, State::Awake, State::Decoding],
        _ => &[State::Decoding],
    };
    for &state in states {
        for live in [1, 256, 10_000] {
            let case = Case {
                state,
                live,
                cancels: cancels.unwrap_or(if null { 5000 } else { 200 }),
                // Steps take long on a real device: with one cancel per step, a case would take
                // minutes.
                at_once: if null { 1 } else { live.min(16) },
                apart: match state {
                    State::Asleep => Duration::from_millis(1),
                    State::Awake => Duration::ZERO,
                    State::Decoding if null => Duration::ZERO,
                    State::Decoding => Duration::from_millis(5),
                },
            };
            report.add(measure(device, &case)?);
        }
    }
    Ok(())
}

fn measure(device: &Device, case: &Case) -> Result<Latencies, Failure> {
    let mut live = Live::start(device, case)?;
    let (mut terminal, mut freed) = (Vec::new(), Vec::new());
    let (begin, before) = (Instant::now(), live.engine.stats()?);
    while freed.len() < case.cancels {
        let mut posted = Vec::new();
        for _ in 0..case.at_once {
            let wait = case.apart.mul_f64(live.random.share() * 2.0);
            if !wait.is_zero() {
                std::thread::sleep(wait);
            }
            posted.extend(live.cancel());
        }
        for (noted, cancellation) in posted {
            let receipt = cancellation.wait()?;
            // A reader woken before the cancel was posted was woken by a token, not by the end.
            let woken = noted
                .woken()
                .and_then(|at| at.checked_duration_since(receipt.posted_at));
            terminal.extend(woken);
            freed.push(receipt.freed_at - receipt.posted_at);
        }
        live.refill()?;
    }
    let elapsed = begin.elapsed();
    let steps = live.engine.stats()?.steps.as_u64() - before.steps.as_u64();
    Ok(Latencies {
        device: device.name(),
        state: case.state.name(),
        live: case.live,
        step: (case.state == State::Decoding).then(|| elapsed.div_f64(steps.max(1) as f64)),
        terminal: Times::new(terminal),
        freed: Times::new(freed),
    })
}

/// The live requests of one case.
struct Live {
    engine: Engine,
    state: State,
    /// Streams by order of arrival, which is also the order in which they are served.
    streams: BTreeMap<usize, TokenStream>,
    count: usize,
    submitted: usize,
    random: Random,
}

impl Live {
    fn start(device: &Device, case: &Case) -> Result<Self, Failure> {
        let config = match case.state {
            State::Decoding => EngineConfig::default(),
            // All requests hold blocks, and their buffers soon fill with tokens.
            State::Asleep | State::Awake => EngineConfig {
                max_sequences: case.live,
                max_batch_tokens: Some(4096),
                stream_buffer: 8,
                ..EngineConfig::default()
            },
        };
        let mut live = Self {
            engine: device.engine(case.live, config)?,
            state: case.state,
            streams: BTreeMap::new(),
            count: case.live,
            submitted: 0,
            random: Random(1),
        };
        live.refill()?;
        Ok(live)
    }

    /// Submits the missing requests and waits until all are in the state under test.
    fn refill(&mut self) -> Result<(), Failure> {
        while self.streams.len() < self.count {
            self.submitted += 1;
            let request = endless(&self.engine, self.submitted);
            let stream = self.engine.generate(request)?;
            self.streams.insert(self.submitted, stream);
            if self.submitted.is_multiple_of(64) {
                self.read();
            }
        }
        let count = self.count;
        let ready = |stats: &EngineStats| match self.state {
            State::Decoding => stats.open == count && stats.running > 0,
            State::Asleep | State::Awake => stats.paused == count,
        };
        while !ready(&self.engine.stats()?) {}
        self.read();
        Ok(())
    }

    /// Reads the pending tokens of the decoding requests, so that none of them is paused.
    fn read(&mut self) {
        if self.state == State::Decoding {
            let served = EngineConfig::default().max_sequences + 16;
            for stream in self.streams.values_mut().take(served) {
                drain(stream, Waker::noop());
            }
        }
    }

    /// Cancels a random request. Returns `None` if it had already ended.
    fn cancel(&mut self) -> Option<(Arc<WakeTime>, Cancellation)> {
        let first = *self.streams.first_key_value()?.0;
        let from = first + self.random.below(self.submitted - first + 1);
        let index = *self.streams.range(from..).next()?.0;
        let mut stream = self.streams.remove(&index)?;
        let noted = Arc::new(WakeTime::new());
        let waker = Waker::from(Arc::clone(&noted));
        drain(&mut stream, &waker).then(|| (noted, stream.cancel()))
    }
}

/// Reads until the stream is empty and the waker is registered. Returns `false` if the request
/// has ended.
fn drain(stream: &mut TokenStream, waker: &Waker) -> bool {
    let mut context = Context::from_waker(waker);
    loop {
        match Pin::new(&mut *stream).poll_next(&mut context) {
            Poll::Pending => return true,
            Poll::Ready(Some(Ok(chunk))) if chunk.finish.is_none() => {}
            Poll::Ready(_) => return false,
        }
    }
}

/// A waker that records when it was woken.
struct WakeTime {
    made: Instant,
    /// Nanoseconds from `made` until it was woken; 0 if it never was.
    woken: AtomicU64,
}

impl WakeTime {
    fn new() -> Self {
        Self {
            made: Instant::now(),
            woken: AtomicU64::new(0),
        }
    }

    fn woken(&self) -> Option<Instant> {
        let nanoseconds = self.woken.load(Ordering::Acquire);
        (nanoseconds > 0).then(|| self.made + Duration::from_nanos(nanoseconds))
    }
}

impl Wake for WakeTime {
    fn wake(self: Arc<Self>) {
        let nanoseconds = self.made.elapsed().as_nanos() as u64;
        self.woken.store(nanoseconds.max(1), Ordering::Release);
    }
}
