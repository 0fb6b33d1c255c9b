//! The threads that compute: one barrier an operation, no allocation, no queue.
//!
//! An operation is a number of items; whoever is free claims the next few. The
//! calling thread takes part and never waits for a worker that has not begun:
//! when the items are claimed it *closes* the job, and then waits only for those
//! that joined. A worker that sleeps, or that the operating system has set aside,
//! therefore delays nothing.
//!
//! Workers spin for a moment after a job, because the next one usually follows
//! within microseconds, and then sleep.

use crate::device::DeviceError;
use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker looks for the next job before it sleeps.
const SPIN: Duration = Duration::from_micros(150);

/// In [`Shared::state`]: the job may be joined.
const OPEN: u64 = 1 << 31;
/// In [`Shared::state`]: how many workers are in the job.
const JOINED: u64 = OPEN - 1;
/// In [`Shared::state`]: one job further.
const NEXT: u64 = 1 << 32;

/// What an operation does to some of its items.
type Job<'a> = &'a (dyn Fn(Range<usize>) + Sync);

/// Several threads that work on one operation at a time.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    /// `job number · NEXT | OPEN? | workers in the job`.
    state: AtomicU64,
    /// The open job. Written only while no job is open and none is joined.
    job: UnsafeCell<Option<Job<'static>>>,
    /// First item that nobody has claimed.
    next: AtomicUsize,
    items: AtomicUsize,
    grain: AtomicUsize,
    panicked: AtomicBool,
    message: Mutex<String>,
    stop: AtomicBool,
    /// Workers asleep or about to be.
    sleepers: AtomicUsize,
    wake: (Mutex<()>, Condvar),
    /// Whether the caller sleeps until the last worker leaves.
    caller_sleeps: AtomicBool,
    left: (Mutex<()>, Condvar),
}

// SAFETY: `job` is the only field that is not `Sync`; its protocol is in its doc:
// writes happen before the `OPEN` bit is set and after the last worker has left.
unsafe impl Sync for Shared {}
// SAFETY: the job is a reference to something `Sync`.
unsafe impl Send for Shared {}

impl Workers {
    /// `threads` of them, the caller included; 0 counts as 1.
    pub(crate) fn new(threads: usize) -> Result<Self, DeviceError> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            items: AtomicUsize::new(0),
            grain: AtomicUsize::new(1),
            panicked: AtomicBool::new(false),
            message: Mutex::new(String::new()),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            wake: Default::default(),
            caller_sleeps: AtomicBool::new(false),
            left: Default::default(),
        });
        // From here on dropping `workers` stops the threads that did start.
        let mut workers = Self {
            shared,
            threads: Vec::new(),
        };
        for index in 1..threads {
            let shared = Arc::clone(&workers.shared);
            let spawned = std::thread::Builder::new()
                .name(format!("quell-cpu-{index}"))
                .spawn(move || shared.work());
            workers
                .threads
                .push(spawned.map_err(|error| DeviceError::Unavailable {
                    device: "cpu".to_owned(),
                    reason: format!("thread {index} of {threads} could not be started: {error}"),
                })?);
        }
        Ok(workers)
    }

    /// How many threads compute, the caller included.
    pub(crate) fn count(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `job` with ranges of at most `grain` items until `0..items` is
    /// covered, on all threads, and returns when all calls have. A panic in `job`
    /// becomes `Failed { operation }`.
    ///
    /// `&mut self`: one job at a time, and `job` cannot start another.
    pub(crate) fn run(
        &mut self,
        operation: &'static str,
        items: usize,
        grain: usize,
        job: impl Fn(Range<usize>) + Sync,
    ) -> Result<(), DeviceError> {
        let grain = grain.max(1);
        let alone = self.threads.is_empty() || items <= grain;
        let outcome = if alone {
            catch_unwind(AssertUnwindSafe(|| {
                let mut start = 0;
                while start < items {
                    let end = items.min(start + grain);
                    job(start..end);
                    start = end;
                }
            }))
            .map_err(|panic| describe(&*panic))
        } else {
            self.run_together(items, grain, &job)
        };
        outcome.map_err(|reason| DeviceError::Failed {
            device: "cpu",
            operation,
            reason,
        })
    }

    fn run_together(&mut self, items: usize, grain: usize, job: Job<'_>) -> Result<(), String> {
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. Workers use the reference only while
        // joined, and this function returns after the last has left. `job` is
        // written while no job is open: the previous call closed its own.
        unsafe {
            *shared.job.get() = Some(std::mem::transmute::<Job<'_>, Job<'static>>(job));
        }
        shared.next.store(0, Ordering::Relaxed);
        shared.items.store(items, Ordering::Relaxed);
        shared.grain.store(grain, Ordering::Relaxed);
        shared.panicked.store(false, Ordering::Relaxed);
        let state = shared.state.load(Ordering::Relaxed);
        shared
            .state
            .store(state.wrapping_add(NEXT) | OPEN, Ordering::SeqCst);
        if shared.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&shared.wake.0));
            shared.wake.1.notify_all();
        }
        shared.claim(job);
        let joined = shared.state.fetch_and(!OPEN, Ordering::SeqCst) & JOINED;
        if joined > 0 {
            shared.wait_until_left();
        }
        if shared.panicked.load(Ordering::Acquire) {
            return Err(lock(&shared.message).clone());
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(lock(&self.shared.wake.0));
        self.shared.wake.1.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches the panics of its jobs, so it has nothing to report.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// A worker's life.
    fn work(&self) {
        let mut done = 0;
        while let Some(job) = self.wait_for_job(&mut done) {
            self.claim(job);
            let before = self.state.fetch_sub(1, Ordering::SeqCst);
            let last = before & JOINED == 1 && before & OPEN == 0;
            if last && self.caller_sleeps.load(Ordering::SeqCst) {
                drop(lock(&self.left.0));
                self.left.1.notify_all();
            }
        }
    }

    /// Joins the next job after number `done`; `None` when it is time to stop.
    fn wait_for_job(&self, done: &mut u64) -> Option<Job<'static>> {
        let mut idle = Idle::new();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(job) = self.try_join(done) {
                return Some(job);
            }
            if idle.spin(SPIN) {
                continue;
            }
            // Sleep. The count goes up before the state is looked at again, and the
            // caller opens a job before it looks at the count: one of the two sees
            // the other.
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let mut guard = lock(&self.wake.0);
            while !self.stop.load(Ordering::SeqCst) && !self.joinable(*done) {
                guard = self
                    .wake
                    .1
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            drop(guard);
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            idle = Idle::new();
        }
    }

    fn joinable(&self, done: u64) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        state & OPEN != 0 && state / NEXT != done
    }

    fn try_join(&self, done: &mut u64) -> Option<Job<'static>> {
        let state = self.state.load(Ordering::Acquire);
        if state & OPEN == 0 || state / NEXT == *done {
            return None;
        }
        let joined =
            self.state
                .compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::Relaxed);
        joined.ok()?;
        *done = state / NEXT;
        // SAFETY: joined while open, so the caller wrote the job before and will not
        // write it again until this worker has left.
        unsafe { *self.job.get() }
    }

    /// Works on items until all are claimed.
    fn claim(&self, job: Job<'_>) {
        let items = self.items.load(Ordering::Relaxed);
        let grain = self.grain.load(Ordering::Relaxed);
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let start = self.next.fetch_add(grain, Ordering::Relaxed);
                if start >= items {
                    return;
                }
                job(start..items.min(start + grain));
            }
        }));
        if let Err(panic) = outcome {
            *lock(&self.message) = describe(&*panic);
            self.panicked.store(true, Ordering::Release);
            // Nobody needs the rest.
            self.next.fetch_max(items, Ordering::Relaxed);
        }
    }

    /// Waits until every worker that joined the closed job has left it.
    fn wait_until_left(&self) {
        let mut idle = Idle::new();
        while self.state.load(Ordering::Acquire) & JOINED != 0 {
            if idle.spin(SPIN) {
                continue;
            }
            let mut guard = lock(&self.left.0);
            self.caller_sleeps.store(true, Ordering::SeqCst);
            while self.state.load(Ordering::SeqCst) & JOINED != 0 {
                guard = self
                    .left
                    .1
                    .wait(guard)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            self.caller_sleeps.store(false, Ordering::SeqCst);
            drop(guard);
        }
    }
}

/// Counts how long somebody has been idle, reading the clock now and then.
struct Idle {
    turns: u32,
    since: Option<Instant>,
}

impl Idle {
    fn new() -> Self {
        Self {
            turns: 0,
            since: None,
        }
    }

    /// One short pause; `false` once the limit has passed.
    fn spin(&mut self, limit: Duration) -> bool {
        std::hint::spin_loop();
        self.turns = self.turns.wrapping_add(1);
        if !self.turns.is_multiple_of(64) {
            return true;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() < limit
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn describe(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!(
        "a worker panicked: {}",
        text.as_deref().unwrap_or("no message")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_worked_on_exactly_once() {
        for threads in [0, 1, 2, 3, 5] {
            let mut workers = Workers::new(threads).unwrap();
            for round in 0..500 {
                let items = round % 37;
                let seen: Vec<_> = (0..items).map(|_| AtomicUsize::new(0)).collect();
                workers
                    .run("a test", items, 1 + round % 4, |range| {
                        for item in range {
                            seen[item].fetch_add(1, Ordering::Relaxed);
                        }
                    })
                    .unwrap();
                assert!(seen.iter().all(|count| count.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_workers_go_on() {
        for threads in [1, 3] {
            let mut workers = Workers::new(threads).unwrap();
            let error = workers.run("a test", 100, 1, |range| {
                assert!(!range.contains(&42), "item 42 is bad");
            });
            let Err(DeviceError::Failed {
                operation, reason, ..
            }) = error
            else {
                panic!("{error:?}");
            };
            assert_eq!(operation, "a test");
            assert!(reason.contains("item 42 is bad"), "{reason}");
            workers.run("a test", 100, 1, |_| {}).unwrap();
        }
    }

    #[test]
    fn sleeping_workers_delay_nothing_and_wake_for_the_next_job() {
        let mut workers = Workers::new(3).unwrap();
        // Every worker has slept once it is counted; jobs run before and after.
        workers.run("a test", 8, 1, |_| {}).unwrap();
        while workers.shared.sleepers.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        let total = AtomicUsize::new(0);
        workers
            .run("a test", 1000, 1, |range| {
                total.fetch_add(range.len(), Ordering::Relaxed);
            })
            .unwrap();
        assert_eq!(total.load(Ordering::Relaxed), 1000);
    }
}
