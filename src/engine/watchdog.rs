//! The heartbeat of the scheduler thread, and the thread that watches it.
//!
//! A device call that never returns cannot be interrupted. Instead, the watchdog gives up the
//! scheduler thread: it sets the engine's fault and wakes every waiter. If the call returns
//! after all, the scheduler thread finds that it was given up, cleans up and ends. One atomic
//! decides which of the two came first.
//!
//! A process that is stopped (SIGSTOP, a paused container, a suspended machine) is not stuck,
//! although the clock continues. The watchdog looks often, and time by which it overslept does
//! not count against the scheduler thread: see [`AwakeTime`].

use super::EngineFault;
use super::caller::waiting::Waiters;
use super::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use super::sync::{
    Arc, Never, OnceLock, Receiver, RecvTimeoutError, Sender, TrySendError, bounded, spawn,
};
use crate::id::StepId;
use std::time::{Duration, Instant};

/// No device call is running.
const NO_CALL: u64 = 0;
/// The watchdog has given up the running call.
const GIVEN_UP: u64 = u64::MAX;
/// Shortest and longest deadline. With a shorter one, the watchdog would be a busy loop; with a
/// longer one, times could overflow.
const DEADLINES: (Duration, Duration) =
    (Duration::from_millis(1), Duration::from_secs(365 * 86_400));
/// Number of looks per deadline. A long deadline gets more: one per `LONGEST_NAP`.
const LOOKS_PER_DEADLINE: u32 = 16;
/// Maximum time between two looks at a busy thread. The length of a pause of the process may be
/// underestimated by this much.
const LONGEST_NAP: Duration = Duration::from_secs(1);
/// The watchdog will not look until it is woken.
const NEVER: u64 = u64::MAX;

/// Signs of life of the scheduler thread, which any thread can read without waiting.
pub(crate) struct Heartbeat {
    start: Instant,
    deadline: Option<Duration>,
    /// The last sign of life, in nanoseconds since `start`.
    beat: AtomicU64,
    /// The step of the latest device call.
    step: AtomicU64,
    /// When the running device call began, in nanoseconds since `start`; or `NO_CALL` or
    /// `GIVEN_UP`.
    call: AtomicU64,
    /// Whether the thread waits for commands.
    idle: AtomicBool,
    /// Whether the watchdog sleeps until the thread is busy again.
    asleep: AtomicBool,
    /// When the watchdog will look next. Time after that does not count, because nobody
    /// watched.
    due: AtomicU64,
    /// Time after the sign of life at `slept_since` that does not count, because the watchdog
    /// overslept.
    slept: AtomicU64,
    slept_since: AtomicU64,
}

impl Heartbeat {
    /// Creates the heartbeat of a thread that starts now, each of whose device calls may take
    /// `deadline`.
    pub fn new(deadline: Option<Duration>) -> Self {
        Self {
            start: Instant::now(),
            deadline: deadline.map(|time| time.clamp(DEADLINES.0, DEADLINES.1)),
            beat: AtomicU64::new(0),
            step: AtomicU64::new(0),
            call: AtomicU64::new(NO_CALL),
            idle: AtomicBool::new(true),
            asleep: AtomicBool::new(false),
            due: AtomicU64::new(NEVER),
            slept: AtomicU64::new(0),
            slept_since: AtomicU64::new(0),
        }
    }

    /// Returns the current time in nanoseconds since `start`, at least 1. It overflows after
    /// centuries.
    fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64 + 1
    }

    fn step(&self) -> StepId {
        StepId(self.step.load(Ordering::Relaxed))
    }

    /// Returns when the running device call began, for [`Self::give_up`].
    fn running_call(&self) -> Option<u64> {
        match self.call.load(Ordering::Acquire) {
            NO_CALL | GIVEN_UP => None,
            since => Some(since),
        }
    }

    /// Returns the last sign of life: the start of the running device call, or the last beat.
    fn last_sign_of_life(&self) -> u64 {
        let beat = self.beat.load(Ordering::Acquire);
        self.running_call().unwrap_or(beat)
    }

    /// Returns how much of the time from the sign of life `since` until `now` the process was
    /// awake, as far as the watchdog has observed. Returns zero while the watchdog is not
    /// watching.
    fn awake(&self, since: u64, now: u64) -> Duration {
        let due = self.due.load(Ordering::Acquire);
        if due == NEVER {
            return Duration::ZERO;
        }
        let slept = match self.slept_since.load(Ordering::Acquire) {
            noted if noted == since => self.slept.load(Ordering::Acquire),
            _ => 0,
        };
        Duration::from_nanos(now.min(due).saturating_sub(since).saturating_sub(slept))
    }

    /// Gives up the call that began at `since`. Returns `false` if it has returned.
    fn give_up(&self, since: u64) -> bool {
        self.call
            .compare_exchange(since, GIVEN_UP, Ordering::AcqRel, Ordering::Acquire)
            .is_ok()
    }

    /// Returns the engine's health, given its fault.
    pub fn health(&self, fault: Option<&EngineFault>, draining: bool) -> Health {
        self.health_at(self.now(), fault, draining)
    }

    fn health_at(&self, now: u64, fault: Option<&EngineFault>, draining: bool) -> Health {
        let call = self.running_call();
        let idle = self.idle.load(Ordering::SeqCst);
        let beat = self.beat.load(Ordering::Relaxed);
        // The thread is in a device call, or in something else that does not return, such as a
        // waker that blocks.
        let life = (call.is_some() || !idle).then(|| self.last_sign_of_life());
        let late = |waited: &Duration| self.deadline.is_some_and(|deadline| *waited > deadline);
        let stuck = life.map(|life| self.awake(life, now)).filter(late);
        // If there was a sign of life meanwhile, the values read above are not of one moment.
        let stuck = stuck.filter(|_| life == Some(self.last_sign_of_life()));
        let since_then = |then: u64| Duration::from_nanos(now.saturating_sub(then));
        let status = match (fault, stuck) {
            (Some(EngineFault::Stuck { step, waited }), _) => HealthStatus::Stuck {
                step: *step,
                waited: *waited,
            },
            (Some(fault), _) => HealthStatus::Closed(fault.clone()),
            // If it is a device call, the watchdog is about to give it up.
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
            since_beat: since_then(beat),
            step: self.step(),
            device_call: call.map(since_then),
        }
    }
}

/// Whether an engine works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum HealthStatus {
    /// The engine works.
    Healthy,
    /// A step takes longer than
    /// [`EngineConfig::step_deadline`](crate::EngineConfig::step_deadline).
    Stuck {
        /// The step.
        step: StepId,
        /// How long the step has taken so far, or had taken when it was given up.
        waited: Duration,
    },
    /// The engine has ended.
    Closed(EngineFault),
}

/// The health of an engine at one moment, read from the heartbeat of its scheduler thread.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Health {
    /// Whether the engine works.
    pub status: HealthStatus,
    /// Whether the engine has nothing to do.
    pub idle: bool,
    /// Whether the engine accepts no more requests; see
    /// [`Engine::drain`](crate::Engine::drain).
    pub draining: bool,
    /// Time since the last sign of life of the scheduler thread. It is harmless that this grows
    /// while the thread is idle or the process is stopped.
    pub since_beat: Duration,
    /// The step of the latest device call.
    pub step: StepId,
    /// How long the current device call has been running; `None` if there is none.
    pub device_call: Option<Duration>,
}

impl Health {
    /// Returns whether the engine works, as a health check reports it.
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
    /// Without a watchdog, dropping this tells callers that the thread has ended.
    _alive: Option<Sender<Never>>,
}

impl Pulse {
    /// Records that the thread now waits for commands.
    pub fn idle(&mut self) {
        self.heart.beat.store(self.heart.now(), Ordering::Relaxed);
        self.heart.idle.store(true, Ordering::SeqCst);
    }

    /// Records that the thread is now busy, and wakes the watchdog if it sleeps.
    pub fn busy(&mut self) {
        self.heart.beat.store(self.heart.now(), Ordering::Relaxed);
        self.heart.idle.store(false, Ordering::SeqCst);
        // This is rare, because the watchdog falls asleep only after an idle period.
        if let (Some(watchdog), true) = (&self.watchdog, self.heart.asleep.load(Ordering::SeqCst)) {
            match watchdog.try_send(()) {
                Ok(()) | Err(TrySendError::Full(())) => {}
                Err(TrySendError::Disconnected(())) => {
                    tracing::error!("the watchdog ended before its engine");
                }
            }
        }
    }

    /// Records that a device call of `step` begins.
    pub fn begin_call(&mut self, step: StepId) {
        self.since = self.heart.now();
        self.heart.beat.store(self.since, Ordering::Relaxed);
        self.heart.step.store(step.as_u64(), Ordering::Relaxed);
        self.heart.call.store(self.since, Ordering::Release);
    }

    /// Records that the device call has returned. Returns an error if it was given up
    /// meanwhile.
    pub fn end_call(&mut self) -> Result<(), EngineFault> {
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

/// Watches a heartbeat on its own thread.
struct Watchdog {
    heart: Arc<Heartbeat>,
    deadline: Duration,
    nudges: Receiver<()>,
    fault: Arc<OnceLock<EngineFault>>,
    alive: Sender<Never>,
    waiters: Arc<Waiters>,
}

/// Starts the watchdog, if there is a deadline. Returns the scheduler thread's end of the
/// heartbeat, and a channel that closes when that thread has ended or was given up.
pub(super) fn watch(
    heart: &Arc<Heartbeat>,
    fault: &Arc<OnceLock<EngineFault>>,
    waiters: &Arc<Waiters>,
) -> std::io::Result<(Pulse, Receiver<Never>)> {
    let (alive, closed) = bounded(0);
    let mut pulse = Pulse {
        heart: Arc::clone(heart),
        watchdog: None,
        since: NO_CALL,
        _alive: None,
    };
    match heart.deadline {
        None => pulse._alive = Some(alive),
        Some(deadline) => {
            let (nudge, nudges) = bounded(1);
            pulse.watchdog = Some(nudge);
            let watchdog = Watchdog {
                heart: Arc::clone(heart),
                deadline,
                nudges,
                fault: Arc::clone(fault),
                alive,
                waiters: Arc::clone(waiters),
            };
            spawn("quell-watchdog", move || watchdog.run())?;
        }
    }
    Ok((pulse, closed))
}

/// Tracks the time during which the process was not stopped.
///
/// Before each nap, the watchdog records when the nap will end. If it wakes later, either the
/// process was stopped meanwhile, or the machine is so busy that the delay says nothing.
struct AwakeTime<'a> {
    heart: &'a Heartbeat,
    nap: u64,
}

impl<'a> AwakeTime<'a> {
    fn of(heart: &'a Heartbeat, deadline: Duration) -> Self {
        let nap = (deadline / LOOKS_PER_DEADLINE).clamp(DEADLINES.0, LONGEST_NAP);
        Self {
            heart,
            nap: nap.as_nanos() as u64,
        }
    }

    /// Records a look of the watchdog at `now`, and that the next one follows after a nap.
    /// Returns the last sign of life.
    fn observe(&self, now: u64) -> u64 {
        let heart = self.heart;
        let life = heart.last_sign_of_life();
        let noted = heart.slept_since.load(Ordering::Relaxed) == life;
        let before = match noted {
            true => heart.slept.load(Ordering::Relaxed),
            false => 0,
        };
        let due = match heart.due.load(Ordering::Relaxed) {
            // The watchdog was woken, just now as far as it can know.
            NEVER => 0,
            due => due,
        };
        let overslept = now.saturating_sub(due.max(life));
        // In this order, a concurrent reader counts too much time as slept, never too little.
        heart.slept.store(before + overslept, Ordering::Release);
        heart.slept_since.store(life, Ordering::Release);
        heart.due.store(now + self.nap, Ordering::Release);
        life
    }

    fn nap(&self) -> Duration {
        Duration::from_nanos(self.nap)
    }

    /// Records that the watchdog will not look until it is woken.
    fn rest(&self) {
        self.heart.due.store(NEVER, Ordering::Release);
    }
}

impl Watchdog {
    /// Looks at the heartbeat several times per deadline, but not while the engine is idle.
    /// Returns when the scheduler thread ends, or after giving it up.
    fn run(self) {
        let heart = Arc::clone(&self.heart);
        let awake = AwakeTime::of(&heart, self.deadline);
        loop {
            let now = heart.now();
            let since = awake.observe(now);
            let waited = heart.awake(since, now);
            // Only a call can be given up. If another call is running by now, this one has
            // returned.
            if waited >= self.deadline && heart.give_up(since) {
                return self.give_up(waited);
            }
            let ended = if self.may_sleep() {
                awake.rest();
                let nudged = self.nudges.recv();
                self.heart.asleep.store(false, Ordering::SeqCst);
                nudged.is_err()
            } else {
                let looked = self.nudges.recv_deadline(Instant::now() + awake.nap());
                looked == Err(RecvTimeoutError::Disconnected)
            };
            if ended {
                return;
            }
        }
    }

    /// Returns whether the engine is idle. If so, the scheduler thread wakes the watchdog
    /// later.
    fn may_sleep(&self) -> bool {
        self.heart.asleep.store(true, Ordering::SeqCst);
        // Read `idle` after the store: if the thread became busy before the store, `idle` shows
        // it; if it becomes busy after the store, it sees `asleep`.
        let idle = self.heart.idle.load(Ordering::SeqCst);
        if !idle {
            self.heart.asleep.store(false, Ordering::SeqCst);
        }
        idle
    }

    fn give_up(self, waited: Duration) {
        let step = self.heart.step();
        tracing::error!(%step, ?waited, "the device is stuck; closing the engine");
        // Set the fault before waking anyone who waits, so that they find the reason.
        let _ = self.fault.set(EngineFault::Stuck { step, waited });
        drop(self.alive);
        self.waiters.wake_all();
    }
}

#[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
mod tests {
    use super::*;

    const DEADLINE: Duration = Duration::from_secs(120);
    const SECOND: u64 = 1_000_000_000;

    /// Returns the heartbeat of a thread in a device call that began at second 10.
    fn calling() -> Heartbeat {
        let heart = Heartbeat::new(Some(DEADLINE));
        heart.idle.store(false, Ordering::SeqCst);
        heart.beat.store(10 * SECOND, Ordering::Relaxed);
        heart.call.store(10 * SECOND, Ordering::Relaxed);
        heart
    }

    /// Lets the watchdog look once per second, from second `from` until before `to`. Returns
    /// how long the call had been running at the last look.
    fn watched(heart: &Heartbeat, from: u64, to: u64) -> Duration {
        let awake = AwakeTime::of(heart, DEADLINE);
        let mut waited = Duration::ZERO;
        for second in from..to {
            let since = awake.observe(second * SECOND);
            waited = heart.awake(since, second * SECOND);
        }
        waited
    }

    fn healthy(heart: &Heartbeat, second: u64) -> bool {
        heart.health_at(second * SECOND, None, false).is_healthy()
    }

    #[test]
    fn a_call_that_is_watched_for_the_whole_deadline_is_stuck() {
        let heart = calling();
        assert_eq!(watched(&heart, 10, 130), DEADLINE - LONGEST_NAP);
        assert!(healthy(&heart, 130));
        assert!(watched(&heart, 130, 132) > DEADLINE);
        assert!(!healthy(&heart, 132));
    }

    #[test]
    fn a_pause_of_the_process_is_not_held_against_the_call() {
        let heart = calling();
        watched(&heart, 10, 13);
        // The process is stopped from second 13 to 138. Its health is read before the watchdog
        // looks again.
        assert!(healthy(&heart, 138));
        assert!(watched(&heart, 138, 139) <= Duration::from_secs(4));
        assert!(healthy(&heart, 139));
        // It is stopped again, for a day.
        let next = 139 + 86_400;
        assert!(healthy(&heart, next));
        assert!(watched(&heart, next, next + 1) <= Duration::from_secs(6));
        // A call that is really stuck is still found, after being watched for the whole
        // deadline.
        assert!(watched(&heart, next + 1, next + 110) < DEADLINE);
        assert!(watched(&heart, next + 110, next + 130) >= DEADLINE);
        assert!(!healthy(&heart, next + 130));
    }

    #[test]
    fn a_pause_before_a_call_does_not_count_for_it() {
        let heart = calling();
        watched(&heart, 10, 12);
        // The process is stopped until second 200, and a new call begins before the watchdog
        // looks.
        heart.beat.store(200 * SECOND, Ordering::Relaxed);
        heart.call.store(200 * SECOND, Ordering::Relaxed);
        assert!(healthy(&heart, 201));
        assert!(watched(&heart, 201, 319) < DEADLINE);
        assert!(watched(&heart, 319, 323) >= DEADLINE);
    }

    #[test]
    fn a_pause_between_waking_the_watchdog_and_its_first_look_does_not_count() {
        let heart = calling();
        assert!(healthy(&heart, 500));
        assert_eq!(watched(&heart, 500, 501), Duration::ZERO);
        assert!(healthy(&heart, 501));
        assert!(watched(&heart, 501, 621) >= DEADLINE);
    }

    /// Silence between two calls, such as in a waker that blocks, is judged in the same way.
    #[test]
    fn a_pause_of_the_process_outside_of_calls_does_not_make_it_unhealthy() {
        let heart = calling();
        heart.call.store(NO_CALL, Ordering::Relaxed);
        watched(&heart, 10, 13);
        assert!(healthy(&heart, 138));
        watched(&heart, 138, 270);
        assert!(!healthy(&heart, 270));
    }
}
