//! Worker threads of the CPU device: one barrier per operation, no allocation, no queue.
//!
//! An operation consists of a number of items, and each free thread claims the next few. The
//! calling thread takes part and never waits for a worker that has not joined yet: once all
//! items are claimed, it *closes* the job and waits only for the workers that joined it. A
//! worker that is asleep, or that the operating system has descheduled, therefore delays
//! nothing.
//!
//! After a job, workers spin for a short time, because the next job usually follows within
//! microseconds, and then sleep.
//!
//! Several engines may share a process. Engines that are in the middle of a step share the
//! processors evenly, and workers beyond an engine's share sleep. Each of many busy engines
//! thus has its own thread, and a single busy engine has all of its threads. Engines that are
//! bound to processors take no part in this, because binding them has already divided the
//! machine.

use crate::device::DeviceError;
use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long an idle worker spins before it sleeps.
const SPIN: Duration = Duration::from_micros(150);

/// Processors that this process may use, read before any thread is bound.
static PROCESSORS: LazyLock<Vec<usize>> = LazyLock::new(|| {
    let known = core_affinity::get_core_ids().unwrap_or_default();
    known.into_iter().map(|core| core.id).collect()
});

/// Number of threads of this process that may compute at the same time, and the number of
/// engines that share them.
struct Budget {
    threads: usize,
    /// Number of engines in the middle of a step.
    engines: AtomicUsize,
}

/// Budget of all engines that are not bound to processors.
static PROCESS: LazyLock<Arc<Budget>> = LazyLock::new(|| {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    Arc::new(Budget::new(threads))
});

/// Returns the number of threads of this process that can compute at the same time.
pub(crate) fn parallelism() -> usize {
    PROCESS.threads
}

impl Budget {
    fn new(threads: usize) -> Self {
        Self {
            threads,
            engines: AtomicUsize::new(0),
        }
    }

    /// Returns how many of its `threads` threads an engine may use now. If it has more threads
    /// than there are processors, that is assumed to be deliberate, and the share is computed
    /// from `threads`.
    fn share(&self, threads: usize) -> usize {
        // Written only twice per step, so reading it is cheap.
        let engines = self.engines.load(Ordering::Relaxed).max(1);
        (self.threads.max(threads) / engines).max(1)
    }
}

/// Flag in [`Shared::state`]: the job may be joined.
const OPEN: u64 = 1 << 31;
/// Mask in [`Shared::state`]: number of workers in the job.
const JOINED: u64 = OPEN - 1;
/// Increment in [`Shared::state`] from one job to the next.
const NEXT: u64 = 1 << 32;

/// Function that computes a range of an operation's items.
type Job<'a> = &'a (dyn Fn(Range<usize>) + Sync);

/// Threads that work together on one operation at a time.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Core to bind the calling thread to; `None` once it is bound, or if it must not be bound.
    bind_caller: Option<usize>,
    /// Whether the calling thread is in the middle of a step.
    in_step: bool,
}

struct Shared {
    /// `None` for an engine that does not share the processors.
    budget: Option<Arc<Budget>>,
    /// Number of threads of this engine, including the caller.
    threads: usize,
    /// `job number · NEXT | OPEN? | workers in the job`.
    state: AtomicU64,
    /// The open job. It is written only while no job is open and no worker is in a job.
    job: UnsafeCell<Option<Job<'static>>>,
    /// First unclaimed item.
    next: AtomicUsize,
    items: AtomicUsize,
    grain: AtomicUsize,
    panicked: AtomicBool,
    message: Mutex<String>,
    stop: AtomicBool,
    /// Whether each worker is asleep or about to sleep. The first entry is worker 1.
    asleep: Box<[AtomicBool]>,
    /// Whether the caller is asleep until the last worker leaves.
    caller_sleeps: AtomicBool,
    left: (Mutex<()>, Condvar),
}

// SAFETY: `job` is the only field that is not `Sync`. As its doc says, it is written only
// before the `OPEN` bit is set and after the last worker has left.
unsafe impl Sync for Shared {}
// SAFETY: the job is a reference to a `Sync` function.
unsafe impl Send for Shared {}

impl Workers {
    /// Starts workers so that `threads` threads compute, including the caller; 0 counts as 1.
    /// If `cores` is not empty, each thread is bound to one of them, the caller when it first
    /// runs an operation.
    pub(crate) fn new(threads: usize, cores: &[usize]) -> Result<Self, DeviceError> {
        check_cores(cores)?;
        let budget = cores.is_empty().then(|| Arc::clone(&PROCESS));
        Self::with_budget(budget, threads, cores)
    }

    fn with_budget(
        budget: Option<Arc<Budget>>,
        threads: usize,
        cores: &[usize],
    ) -> Result<Self, DeviceError> {
        let asleep = (1..threads).map(|_| AtomicBool::new(false));
        let shared = Arc::new(Shared {
            budget,
            threads,
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            items: AtomicUsize::new(0),
            grain: AtomicUsize::new(1),
            panicked: AtomicBool::new(false),
            message: Mutex::new(String::new()),
            stop: AtomicBool::new(false),
            asleep: asleep.collect(),
            caller_sleeps: AtomicBool::new(false),
            left: Default::default(),
        });
        // From here on, dropping `workers` stops the threads that have been started.
        let mut workers = Self {
            shared,
            threads: Vec::new(),
            bind_caller: cores.first().copied(),
            in_step: false,
        };
        for index in 1..threads {
            let shared = Arc::clone(&workers.shared);
            let core = (!cores.is_empty()).then(|| cores[index % cores.len()]);
            let spawned = std::thread::Builder::new()
                .name(format!("quell-cpu-{index}"))
                .spawn(move || {
                    core.into_iter().for_each(bind);
                    shared.work(index);
                });
            workers
                .threads
                .push(spawned.map_err(|error| DeviceError::Unavailable {
                    device: "cpu".to_owned(),
                    reason: format!("thread {index} of {threads} could not be started: {error}"),
                })?);
        }
        Ok(workers)
    }

    /// Starts a step: this engine counts as busy until the step ends.
    pub(crate) fn begin_step(&mut self) {
        let Some(budget) = &self.shared.budget else {
            return;
        };
        if !std::mem::replace(&mut self.in_step, true) {
            budget.engines.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Ends the step, if one was started.
    pub(crate) fn end_step(&mut self) {
        let Some(budget) = &self.shared.budget else {
            return;
        };
        if std::mem::take(&mut self.in_step) {
            budget.engines.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of threads that compute, including the caller.
    pub(crate) fn count(&self) -> usize {
        self.threads.len() + 1
    }

    /// Calls `job` on all threads with ranges of at most `grain` items until they cover
    /// `0..items`, and returns when all calls have returned. A panic in `job` becomes
    /// [`DeviceError::Failed`].
    ///
    /// Takes `&mut self` so that only one job runs at a time and `job` cannot start another.
    pub(crate) fn run(
        &mut self,
        operation: &'static str,
        items: usize,
        grain: usize,
        job: impl Fn(Range<usize>) + Sync,
    ) -> Result<(), DeviceError> {
        self.bind_caller.take().into_iter().for_each(bind);
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
        // SAFETY: only the lifetime changes. Workers use the reference only while they are in
        // the job, and this function returns after the last of them has left. `job` is written
        // while no job is open, because the previous call closed its own.
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
        let share = shared.share();
        for (worker, asleep) in self.threads.iter().zip(&shared.asleep).take(share - 1) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
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
        self.end_step();
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A worker catches the panics of its jobs, so `join` has nothing to report.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Returns how many threads of this engine may compute now, including the caller.
    fn share(&self) -> usize {
        let budget = self.budget.as_ref();
        budget.map_or(self.threads.max(1), |budget| budget.share(self.threads))
    }

    /// Returns whether thread `index` is within the engine's share. The caller is thread 0.
    fn may_join(&self, index: usize) -> bool {
        index < self.share()
    }

    /// Main loop of worker thread `index`.
    fn work(&self, index: usize) {
        let mut done = 0;
        while let Some(job) = self.wait_for_job(index, &mut done) {
            self.claim(job);
            let before = self.state.fetch_sub(1, Ordering::SeqCst);
            let last = before & JOINED == 1 && before & OPEN == 0;
            if last && self.caller_sleeps.load(Ordering::SeqCst) {
                drop(lock(&self.left.0));
                self.left.1.notify_all();
            }
        }
    }

    /// Waits for a job other than number `done` and joins it. Returns `None` if the thread must
    /// stop.
    fn wait_for_job(&self, index: usize, done: &mut u64) -> Option<Job<'static>> {
        let mut idle = Idle::new();
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(job) = self.try_join(index, done) {
                return Some(job);
            }
            // A thread beyond the share must not spin: it would only slow down other engines.
            if self.may_join(index) && idle.spin(SPIN) {
                continue;
            }
            // Sleep. This thread sets its flag before it checks the state again, and the caller
            // opens a job before it checks the flag. At least one of the two sees the other's
            // write, so no wake-up is lost.
            let asleep = &self.asleep[index - 1];
            asleep.store(true, Ordering::SeqCst);
            while !self.stop.load(Ordering::SeqCst) && !self.joinable(index, *done) {
                std::thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
            idle = Idle::new();
        }
    }

    fn joinable(&self, index: usize, done: u64) -> bool {
        let state = self.state.load(Ordering::SeqCst);
        state & OPEN != 0 && state / NEXT != done && self.may_join(index)
    }

    fn try_join(&self, index: usize, done: &mut u64) -> Option<Job<'static>> {
        let state = self.state.load(Ordering::Acquire);
        if state & OPEN == 0 || state / NEXT == *done || !self.may_join(index) {
            return None;
        }
        let joined =
            self.state
                .compare_exchange(state, state + 1, Ordering::SeqCst, Ordering::Relaxed);
        joined.ok()?;
        *done = state / NEXT;
        // SAFETY: this worker joined the job while it was open. The caller had therefore
        // written the job, and does not write it again until this worker has left.
        unsafe { *self.job.get() }
    }

    /// Claims and computes items until all are claimed.
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
            // The operation has failed, so the remaining items are not needed.
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

/// Measures how long a thread has been idle, reading the clock only now and then.
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

    /// Pauses briefly. Returns `false` once `limit` has passed.
    fn spin(&mut self, limit: Duration) -> bool {
        std::hint::spin_loop();
        self.turns = self.turns.wrapping_add(1);
        if !self.turns.is_multiple_of(64) {
            return true;
        }
        self.since.get_or_insert_with(Instant::now).elapsed() < limit
    }
}

/// Checks that the process may use each of these processors.
fn check_cores(cores: &[usize]) -> Result<(), DeviceError> {
    let known = &*PROCESSORS;
    match cores.iter().find(|core| !known.contains(core)) {
        Some(core) => Err(DeviceError::Unavailable {
            device: "cpu".to_owned(),
            reason: format!(
                "core {core} is not available to this process, which may use {known:?}"
            ),
        }),
        None => Ok(()),
    }
}

/// Binds the current thread to a processor.
fn bind(core: usize) {
    if !core_affinity::set_for_current(core_affinity::CoreId { id: core }) {
        tracing::warn!(core, "cannot bind a thread to its core");
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
            let mut workers = Workers::new(threads, &[]).unwrap();
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
            let mut workers = Workers::new(threads, &[]).unwrap();
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

    fn with_budget(threads: usize, budget: &Arc<Budget>) -> Workers {
        Workers::with_budget(Some(Arc::clone(budget)), threads, &[]).unwrap()
    }

    #[test]
    fn busy_engines_share_the_processors_and_a_single_one_uses_all() {
        let budget = Arc::new(Budget::new(2));
        let (mut workers, mut others) = (with_budget(2, &budget), with_budget(2, &budget));
        let here = std::thread::current().id();
        workers.begin_step();
        others.begin_step();
        let strangers = AtomicUsize::new(0);
        workers
            .run("a test", 10_000, 1, |_| {
                let stranger = std::thread::current().id() != here;
                strangers.fetch_add(usize::from(stranger), Ordering::Relaxed);
            })
            .unwrap();
        assert_eq!(strangers.load(Ordering::Relaxed), 0);
        // A dropped engine no longer takes a share.
        drop(others);
        // The job lasts until the worker has joined it.
        let joined = AtomicBool::new(false);
        workers
            .run("a test", 2, 1, |_| {
                joined.fetch_or(std::thread::current().id() != here, Ordering::SeqCst);
                while !joined.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            })
            .unwrap();
        workers.end_step();
        assert_eq!(budget.engines.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn threads_are_bound_to_the_given_cores_and_unknown_cores_are_rejected() {
        let allowed = || core_affinity::get_core_ids().unwrap();
        let last = allowed().last().unwrap().id;
        let before: Vec<_> = allowed().iter().map(|core| core.id).collect();
        // Runs in a separate thread, because the calling thread is bound when it first
        // computes, and not before.
        let seen = std::thread::spawn(move || {
            let mut workers = Workers::new(2, &[last]).unwrap();
            assert_eq!(
                allowed().iter().map(|core| core.id).collect::<Vec<_>>(),
                before
            );
            let seen = Mutex::new(Vec::new());
            workers
                .run("a test", 100, 1, |_| lock(&seen).push(allowed()))
                .unwrap();
            seen.into_inner().unwrap()
        });
        for cores in seen.join().unwrap() {
            assert_eq!(cores.iter().map(|core| core.id).collect::<Vec<_>>(), [last]);
        }
        let error = Workers::new(1, &[1 << 20]).err().unwrap().to_string();
        assert!(error.contains("core 1048576"), "{error}");
    }

    #[test]
    fn sleeping_workers_delay_nothing_and_wake_for_the_next_job() {
        let mut workers = Workers::new(3, &[]).unwrap();
        // Wait until every worker has gone to sleep, so that the next job must wake them.
        workers.run("a test", 8, 1, |_| {}).unwrap();
        let asleep = |worker: &AtomicBool| worker.load(Ordering::SeqCst);
        while !workers.shared.asleep.iter().all(asleep) {
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
