//! Decides when requests are sent: at a given rate, or as answers end.

use super::exchange::{Job, Sample, Target, exchange};
use super::prompts::Prompts;
use super::random::Random;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

/// Paths of the random number generators under one seed. `prompts` uses 1 and 2.
const ARRIVALS: u64 = 3;
const CANCELS: u64 = 4;

/// How requests follow each other.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Load {
    /// An open loop: a Poisson process with this many requests per second on average.
    Rate(f64),
    /// A closed loop: this many clients, each with one request at a time.
    Concurrency(usize),
}

/// The requests of one measurement.
#[derive(Debug)]
pub struct Work {
    pub target: Target,
    pub prompts: Prompts,
    /// Number of the measurement. Each measurement has its own prompts.
    pub point: u64,
    pub requests: u64,
    /// Fraction of the requests that are cancelled, from 0 to 1.
    pub cancel_share: f64,
    next: AtomicU64,
    sent: AtomicU64,
}

impl Work {
    pub fn new(
        target: Target,
        prompts: Prompts,
        point: u64,
        requests: u64,
        cancel_share: f64,
    ) -> Self {
        Self {
            target,
            prompts,
            point,
            requests,
            cancel_share,
            next: AtomicU64::new(0),
            sent: AtomicU64::new(0),
        }
    }

    /// Returns the number of requests sent so far.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Returns the number of the next request, if there is one.
    fn next(&self) -> Option<u64> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        (number < self.requests).then_some(number)
    }

    fn job(&self, number: u64) -> Job {
        Job {
            body: self.prompts.body(self.point, number),
            cancel_after: cancel_after(&self.prompts, self.cancel_share, self.point, number),
        }
    }

    async fn send(&self, job: Job, due: Instant) -> Sample {
        self.sent.fetch_add(1, Ordering::Relaxed);
        exchange(&self.target, job, due).await
    }
}

/// Returns the number of content events after which a request is cancelled, or `None` if it
/// is not one of those. The number is below the length of the answer, so that there is
/// something to cancel.
fn cancel_after(prompts: &Prompts, share: f64, point: u64, number: u64) -> Option<u64> {
    let mut random = Random::new(prompts.seed, &[CANCELS, point, number]);
    let chosen = random.share() < share;
    chosen.then(|| random.below(prompts.generate as u64))
}

/// Requests in progress. Dropping it stops sending further requests.
#[derive(Debug)]
pub struct Running {
    /// The result of each request. Ends after the last one.
    pub samples: UnboundedReceiver<Sample>,
    /// The clients of a closed loop, which are aborted when this is dropped.
    _clients: JoinSet<()>,
    /// Stops the open loop when it is dropped.
    _stop: Option<Sender<()>>,
}

/// Starts to send the requests, on the caller's runtime.
pub fn start(load: Load, work: &Arc<Work>) -> std::io::Result<Running> {
    let (results, samples) = unbounded_channel();
    let mut clients = JoinSet::new();
    let mut stop = None;
    match load {
        Load::Concurrency(count) => {
            for _ in 0..work.requests.min(count as u64) {
                clients.spawn(client(Arc::clone(work), results.clone()));
            }
        }
        Load::Rate(rate) => {
            let (keep, stopped) = channel();
            stop = Some(keep);
            let (work, runtime) = (Arc::clone(work), Handle::current());
            let arrivals = Arrivals::new(rate, work.prompts.seed, work.point);
            // Use a thread, because the runtime's timers have a resolution of only a
            // millisecond.
            std::thread::Builder::new()
                .name("quell-arrivals".to_owned())
                .spawn(move || send_all(&work, arrivals, &runtime, &results, &stopped))?;
        }
    }
    Ok(Running {
        samples,
        _clients: clients,
        _stop: stop,
    })
}

/// Runs one client of a closed loop.
async fn client(work: Arc<Work>, results: UnboundedSender<Sample>) {
    while let Some(number) = work.next() {
        let job = work.job(number);
        let sample = work.send(job, Instant::now()).await;
        if results.send(sample).is_err() {
            return;
        }
    }
}

/// Runs the open loop: sends each request when it is due, regardless of the others.
fn send_all(
    work: &Arc<Work>,
    arrivals: Arrivals,
    runtime: &Handle,
    results: &UnboundedSender<Sample>,
    stopped: &Receiver<()>,
) {
    let begin = Instant::now();
    for offset in arrivals {
        let Some(number) = work.next() else { return };
        let job = work.job(number);
        let due = begin + offset;
        let wait = due.saturating_duration_since(Instant::now());
        if stopped.recv_timeout(wait) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        let (work, results) = (Arc::clone(work), results.clone());
        runtime.spawn(async move {
            let sample = work.send(job, due).await;
            // The receiver is gone after Ctrl-C.
            let _ = results.send(sample);
        });
    }
}

/// The endless arrival times of a Poisson process, relative to the first arrival.
#[derive(Clone, Debug)]
pub struct Arrivals {
    rate: f64,
    random: Random,
    next: Duration,
}

impl Arrivals {
    /// Creates the arrivals of one measurement, with `rate` per second on average.
    fn new(rate: f64, seed: u64, point: u64) -> Self {
        Self {
            rate,
            random: Random::new(seed, &[ARRIVALS, point]),
            next: Duration::ZERO,
        }
    }
}

impl Iterator for Arrivals {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let arrival = self.next;
        // Exponential gaps by inversion. `share` is below 1, so the logarithm is finite.
        let gap = -(1.0 - self.random.share()).ln() / self.rate;
        self.next = arrival.checked_add(Duration::try_from_secs_f64(gap).ok()?)?;
        Some(arrival)
    }
}

#[cfg(test)]
mod tests {
    use super::super::prompts::Endpoint;
    use super::*;

    #[test]
    fn arrivals_have_the_rate_and_the_spread_of_a_poisson_process_and_a_seed_repeats_them() {
        for rate in [0.5, 40.0] {
            let times: Vec<f64> = Arrivals::new(rate, 1, 0)
                .take(100_001)
                .map(|time| time.as_secs_f64())
                .collect();
            assert_eq!(times[0], 0.0);
            let gaps: Vec<f64> = times.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let count = gaps.len() as f64;
            let mean = gaps.iter().sum::<f64>() / count;
            let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / count;
            // The standard error of the mean is 0.3 %.
            assert!((mean * rate - 1.0).abs() < 0.015, "mean {mean}");
            // The standard deviation of an exponential distribution equals its mean.
            assert!((variance.sqrt() / mean - 1.0).abs() < 0.03, "{variance}");
            // A fraction of 1/e of the gaps is longer than the mean.
            let long = gaps.iter().filter(|gap| **gap > 1.0 / rate).count();
            assert!((long as f64 / count - (-1f64).exp()).abs() < 0.01, "{long}");
        }
        let first = |seed, point| Arrivals::new(3.0, seed, point).take(50).collect::<Vec<_>>();
        assert_eq!(first(1, 0), first(1, 0));
        assert_ne!(first(1, 0), first(2, 0));
        assert_ne!(first(1, 0), first(1, 1));
    }

    #[test]
    fn the_asked_share_of_requests_is_cancelled_before_the_end_of_their_answers() {
        let prompts = Prompts {
            endpoint: Endpoint::Completions,
            model: String::new(),
            length: 1,
            shared: 0,
            generate: 10,
            vocabulary: 1000,
            seed: 5,
        };
        let cancelled = |share| {
            let each = (0..1000).filter_map(|number| cancel_after(&prompts, share, 0, number));
            each.collect::<Vec<_>>()
        };
        assert_eq!(cancelled(0.0).len(), 0);
        assert_eq!(cancelled(1.0).len(), 1000);
        let some = cancelled(0.3);
        assert!((250..350).contains(&some.len()), "{}", some.len());
        assert!(some.contains(&0) && some.contains(&9) && some.iter().all(|&point| point < 10));
    }
}
