//! The heartbeat of the scheduler thread, and the thread that watches it.
//!
//! A device call that never returns cannot be interrupted. The watchdog gives the
//! scheduler thread up instead: it sets the engine's fault and wakes every waiter.
//! Should the call return after all, the scheduler thread finds that it was given
//! up, clears up and ends. Which of the two came first is decided by one atomic.

use super::EngineFault;
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{
    Arc, Never, OnceLock, Receiver, RecvTimeoutError, Sender, TrySendError, bounded, spawn,
};
use super::waiting::Waiters;
use crate::id::StepId;
use std::time::{Duration, Instant};

/// No device call is running.
const NO_CALL: u64 = 0;
/// The watchdog has given the running call up.
const GIVEN_UP: u64 = u64::MAX;
/// Below this, the watchdog would be a busy loop; beyond that, time overflows.
const DEADLINES: (Duration, Duration) =
    (Duration::from_millis(1), Duration::from_secs(365 * 86_400));

/// Signs of life of the scheduler thread, which anyone may read without waiting.
pub(crate) struct Heartbeat {
    start: Instant,
    deadline: Option<Duration>,
    /// The last sign of life, in nanoseconds since `start`.
    beat: AtomicU64,
    /// The step of the latest device call.
    step: AtomicU64,
    /// Since when a device call is running, likewise; or one of the constants.
    call: AtomicU64,
    /// The thread waits for commands.
    idle: AtomicBool,
    /// The watchdog sleeps until the thread is busy again.
    asleep: AtomicBool,
}

impl Heartbeat {
    /// Of a thread that starts now, and whose device calls may take `deadline`.
    pub fn new(deadline: Option<Duration>) -> Self {
        Self {
            start: Instant::now(),
            deadline: deadline.map(|time| time.clamp(DEADLINES.0, DEADLINES.1)),
            beat: AtomicU64::new(0),
            step: AtomicU64::new(0),
            call: AtomicU64::new(NO_CALL),
            idle: AtomicBool::new(true),
            asleep: AtomicBool::new(false),
        }
    }

    /// Now, in nanoseconds; at least 1, and enough for centuries.
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64 + 1
    }

    fn step(&self) -> StepId {
        StepId(self.step.load(Ordering::Relaxed))
    }

    /// How long the running device call has taken; its start, for [`Self::give_up`].
    fn running_call(&self) -> Option<(u64, Duration)> {
        match self.call.load(Ordering::Acquire) {
            NO_CALL | GIVEN_UP => None,
            since => {
                let waited = self.now().saturating_sub(since);
                Some((since, Duration::from_nanos(waited)))
            }
        }
    }

    /// Gives up the call that began at `since`; `false` if it has returned.
    fn give_up(&self, since: u64) -> bool {
        self.call
            .compare_exchange(since, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// The engine's health, given its fault.
    pub fn health(&self, fault: Option<&EngineFault>, draining: bool) -> Health {
        let call = self.running_call().map(|(_, waited)| waited);
        let idle = self.idle.load(Ordering::SeqCst);
        let silent = self.now().saturating_sub(self.beat.load(Ordering::Relaxed));
        let since_beat = Duration::from_nanos(silent);
        // In a device call, or in something else that does not come back, such as a
        // waker that blocks.
        let silent = (!idle).then_some(since_beat);
        let late = |waited: &Duration| self.deadline.is_some_and(|deadline| *waited > deadline);
        let stuck = call.or(silent).filter(late);
        let status = match (fault, stuck) {
            (Some(EngineFault::Stuck { step, waited }), _) => HealthStatus::Stuck {
                step: *step,
                waited: *waited,
            },
            (Some(fault), _) => HealthStatus::Closed(fault.clone()),
            // The watchdog is about to say so, if it is a device call.
            (None, Some(waited)) => HealthStatus::Stuck {
                step: self.step(),
                waited,
            },
            (None, None) => HealthStatus::Healthy,
        };
        Health {
            status,
            idle,
            draining,
            since_beat,
            step: self.step(),
            device_call: call,
        }
    }
}

/// Whether an engine works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum HealthStatus {
    /// It does.
    Healthy,
    /// A step takes longer than [`EngineConfig::step_deadline`](crate::EngineConfig).
    Stuck {
        /// The step.
        step: StepId,
        /// How long it had taken when it was given up.
        waited: Duration,
    },
    /// It has ended.
    Closed(EngineFault),
}

/// The health of an engine at one moment, read off the heartbeat of its scheduler
/// thread.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Health {
    /// Whether it works.
    pub status: HealthStatus,
    /// Whether it has nothing to do.
    pub idle: bool,
    /// Whether it takes no more requests, see [`Engine::drain`](crate::Engine::drain).
    pub draining: bool,
    /// How long ago the scheduler thread showed a sign of life. Grows without harm
    /// while it is idle.
    pub since_beat: Duration,
    /// The step that the device was called for last.
    pub step: StepId,
    /// For how long a call to the device has been running; `None` when none is.
    pub device_call: Option<Duration>,
}

impl Health {
    /// Whether the engine works: the colour of a health check.
    pub fn is_healthy(&self) -> bool {
        matches!(self.status, HealthStatus::Healthy)
    }
}

/// The scheduler thread's end of the heartbeat.
pub(super) struct Pulse {
    heart: Arc<Heartbeat>,
    /// Wakes the watchdog, and ends it when dropped.
    watchdog: Option<Sender<()>>,
    since: u64,
    /// Without a watchdog: tells by its end that the thread has ended.
    _over: Option<Sender<Never>>,
}

impl Pulse {
    /// The thread waits for commands from here on.
    pub fn idle(&mut self) {
        self.heart.beat.store(self.heart.now(), Ordering::Relaxed);
        self.heart.idle.store(true, Ordering::SeqCst);
    }

    /// The thread works from here on.
    pub fn busy(&mut self) {
        self.heart.beat.store(self.heart.now(), Ordering::Relaxed);
        self.heart.idle.store(false, Ordering::SeqCst);
        // Rare: the watchdog falls asleep only after a time of idleness.
        if let (Some(watchdog), true) = (&self.watchdog, self.heart.asleep.load(Ordering::SeqCst)) {
            match watchdog.try_send(()) {
                Ok(()) | Err(TrySendError::Full(())) => {}
                Err(TrySendError::Disconnected(())) => {
                    tracing::error!("the watchdog has ended before its engine");
                }
            }
        }
    }

    /// A device call of `step` begins.
    pub fn calls(&mut self, step: StepId) {
        self.since = self.heart.now();
        self.heart.beat.store(self.since, Ordering::Relaxed);
        self.heart.step.store(step.as_u64(), Ordering::Relaxed);
        self.heart.call.store(self.since, Ordering::Release);
    }

    /// The device call has returned. An error when it was given up meanwhile.
    pub fn returned(&mut self) -> Result<(), EngineFault> {
        let now = self.heart.now();
        self.heart.beat.store(now, Ordering::Relaxed);
        if self.heart.call.swap(NO_CALL, Ordering::AcqRel) == GIVEN_UP {
            return Err(EngineFault::Stuck {
                step: self.heart.step(),
                waited: Duration::from_nanos(now.saturating_sub(self.since)),
            });
        }
        Ok(())
    }
}

/// Watches a heartbeat on a thread of its own.
struct Watchdog {
    heart: Arc<Heartbeat>,
    deadline: Duration,
    nudges: Receiver<()>,
    fault: Arc<OnceLock<EngineFault>>,
    over: Sender<Never>,
    waiters: Arc<Waiters>,
}

/// Starts watching, if there is a deadline. Gives the scheduler thread's end, and a
/// channel that closes when that thread has ended or was given up.
pub(super) fn watch(
    heart: &Arc<Heartbeat>,
    fault: &Arc<OnceLock<EngineFault>>,
    waiters: &Arc<Waiters>,
) -> std::io::Result<(Pulse, Receiver<Never>)> {
    let (over, is_over) = bounded(0);
    let mut pulse = Pulse {
        heart: Arc::clone(heart),
        watchdog: None,
        since: NO_CALL,
        _over: None,
    };
    match heart.deadline {
        None => pulse._over = Some(over),
        Some(deadline) => {
            let (nudge, nudges) = bounded(1);
            pulse.watchdog = Some(nudge);
            let watchdog = Watchdog {
                heart: Arc::clone(heart),
                deadline,
                nudges,
                fault: Arc::clone(fault),
                over,
                waiters: Arc::clone(waiters),
            };
            spawn("quell-watchdog", move || watchdog.run())?;
        }
    }
    Ok((pulse, is_over))
}

impl Watchdog {
    /// Looks at the heartbeat about once a deadline, and not at all while the engine
    /// is idle. Ends with the scheduler thread, or when it has given it up.
    fn run(self) {
        loop {
            let wait = match self.heart.running_call() {
                Some((since, waited)) if waited >= self.deadline => {
                    if self.heart.give_up(since) {
                        return self.give_up(waited);
                    }
                    continue; // it has just returned
                }
                Some((_, waited)) => self.deadline - waited,
                None => self.deadline,
            };
            let ended = if self.falls_asleep() {
                let nudged = self.nudges.recv();
                self.heart.asleep.store(false, Ordering::SeqCst);
                nudged.is_err()
            } else {
                let looked = self.nudges.recv_deadline(Instant::now() + wait);
                looked == Err(RecvTimeoutError::Disconnected)
            };
            if ended {
                return;
            }
        }
    }

    /// Whether the engine is idle; then the scheduler thread wakes the watchdog.
    fn falls_asleep(&self) -> bool {
        self.heart.asleep.store(true, Ordering::SeqCst);
        // Read after the store: whoever became busy before it is seen here, and
        // whoever becomes so after it sees the store.
        let idle = self.heart.idle.load(Ordering::SeqCst);
        if !idle {
            self.heart.asleep.store(false, Ordering::SeqCst);
        }
        idle
    }

    fn give_up(self, waited: Duration) {
        let step = self.heart.step();
        tracing::error!(%step, ?waited, "the device is stuck; the engine closes");
        // Before any waiter wakes, so that it finds the reason.
        let _ = self.fault.set(EngineFault::Stuck { step, waited });
        drop(self.over);
        self.waiters.wake_all();
    }
}
