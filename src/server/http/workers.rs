//! The worker threads that parse large bodies, render and tokenize long texts, and compile
//! grammars.
//!
//! The runtime's own threads must never be busy for long, because every connection waits for
//! them. [`Workers::run`], the one place that decides this, therefore does long work on worker
//! threads, few enough to leave processors for the scheduler thread, and short work in place.
//! The amount of work is bounded as well: waiting and running work share one budget, and work
//! that exceeds it is refused. The engine itself tokenizes on its caller's thread, so handlers
//! call it through [`Workers::run`], or with prompts that are tokens already.

use crate::server::error::ApiError;
use axum::http::StatusCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::Semaphore;

/// Limit on the work that waits or runs at a time, in bytes of bodies. Work takes up to four
/// times as much memory.
const BUDGET: usize = 256 << 20;

/// Minimum cost of a piece of work on a worker thread. It bounds the number of pieces that wait
/// to a thousand.
const LEAST_COST: usize = 256 << 10;

/// Cost of compiling a grammar, which may take long however short its source is.
const GRAMMAR_COST: usize = 4 << 20;

/// Length in bytes up to which bodies and texts are processed in place, because handing them
/// over would cost more than it gains.
const SHORT: usize = 16 << 10;

/// How much there is to do.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Work {
    bytes: usize,
    compiles: bool,
}

impl Work {
    /// Work on a body or on texts of this many bytes.
    pub fn on(bytes: usize) -> Self {
        Self {
            bytes,
            compiles: false,
        }
    }

    /// Adds the compilation of a grammar, if `compiles`.
    pub fn and_grammar(self, compiles: bool) -> Self {
        Self { compiles, ..self }
    }

    fn is_long(self) -> bool {
        self.compiles || self.bytes > SHORT
    }

    fn cost(self) -> usize {
        let grammar = if self.compiles { GRAMMAR_COST } else { 0 };
        self.bytes.saturating_add(grammar).max(LEAST_COST)
    }
}

/// The worker threads, and the work that waits for them.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Arc<Semaphore>,
    /// Total cost of the work that waits or runs.
    cost: Arc<AtomicUsize>,
}

impl Default for Workers {
    /// Uses half as many threads as there are processors, and at least one.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new((processors / 2).max(1))
    }
}

/// A share of the budget, which is returned when this is dropped.
struct Place {
    all: Arc<AtomicUsize>,
    cost: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.fetch_sub(self.cost, Ordering::AcqRel);
    }
}

/// Tells running work whether anybody still waits for its result.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job(Arc<AtomicBool>);

impl Job {
    /// Checks whether to go on; long work calls this between its steps.
    ///
    /// # Errors
    /// Returns an error if the client has gone; nobody sees it.
    pub fn check(&self) -> Result<(), ApiError> {
        match self.0.load(Ordering::Acquire) {
            true => Err(ApiError::unavailable("the client has disconnected")),
            false => Ok(()),
        }
    }
}

/// Dropped together with the future that waits for the result, and then tells the job that
/// nobody waits.
struct Waiting(Job);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Release);
    }
}

impl Workers {
    pub fn new(threads: usize) -> Self {
        Self {
            threads: Arc::new(Semaphore::new(threads)),
            cost: Arc::default(),
        }
    }

    /// Reserves a share of the budget. If no other work waits or runs, any cost is accepted.
    fn place(&self, cost: usize) -> Result<Place, ApiError> {
        let taken = (self.cost).fetch_update(Ordering::AcqRel, Ordering::Acquire, |all| {
            all.checked_add(cost)
                .filter(|&sum| all == 0 || sum <= BUDGET)
        });
        if taken.is_err() {
            let status = StatusCode::TOO_MANY_REQUESTS;
            let problem = "too many requests are waiting to be prepared; try again later";
            return Err(ApiError::new(status, "rate_limit_error", problem)
                .code("overloaded")
                .retry_after(1));
        }
        Ok(Place {
            all: Arc::clone(&self.cost),
            cost,
        })
    }

    /// Does short work in place, and long work on one of the threads. If the future is dropped,
    /// work that has not begun is never run, and work in progress is told through its [`Job`].
    ///
    /// # Errors
    /// Returns the error of `task`, or status 429 if the budget is exhausted.
    pub async fn run<T: Send + 'static>(
        &self,
        work: Work,
        task: impl FnOnce(&Job) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if !work.is_long() {
            return task(&Job::default());
        }
        let place = self.place(work.cost())?;
        let stopped = || ApiError::unavailable("the server is shutting down");
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let thread = thread.map_err(|_| stopped())?;
        let job = Job::default();
        let _waiting = Waiting(job.clone());
        let done = tokio::task::spawn_blocking(move || {
            // Fields are dropped in order: the budget is returned before the thread is free for
            // the next job.
            let _held = (place, thread);
            task(&job)
        });
        match done.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(stopped()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::sync::oneshot;

    const LONG: Work = Work {
        bytes: SHORT + 1,
        compiles: false,
    };

    #[test]
    fn only_long_work_leaves_the_thread() {
        let workers = Workers::new(1);
        runtime().block_on(async {
            let own = std::thread::current().id();
            for (work, moves) in [
                (Work::on(0), false),
                (Work::on(SHORT), false),
                (LONG, true),
                (Work::on(0).and_grammar(true), true),
                (Work::on(0).and_grammar(false), false),
            ] {
                let thread = workers.run(work, |_| Ok(std::thread::current().id()));
                assert_eq!(thread.await.unwrap() != own, moves, "{work:?}");
            }
        });
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap()
    }

    #[test]
    fn no_more_is_done_at_a_time_than_there_are_threads() {
        let workers = Arc::new(Workers::new(2));
        let (busy, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        runtime().block_on(async {
            let each = (0..32).map(|_| {
                let (workers, busy, most) = (workers.clone(), busy.clone(), most.clone());
                tokio::spawn(async move {
                    let work = move |_: &Job| {
                        let now = busy.fetch_add(1, Ordering::SeqCst) + 1;
                        most.fetch_max(now, Ordering::SeqCst);
                        std::thread::yield_now();
                        busy.fetch_sub(1, Ordering::SeqCst);
                        Ok(())
                    };
                    workers.run(LONG, work).await
                })
            });
            for task in each.collect::<Vec<_>>() {
                task.await.unwrap().unwrap();
            }
        });
        assert!((1..=2).contains(&most.load(Ordering::SeqCst)));
        assert_eq!(workers.cost.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn what_exceeds_the_budget_is_refused_until_there_is_room() {
        let workers = Arc::new(Workers::new(1));
        runtime().block_on(async {
            // The only piece of work is accepted, whatever its cost.
            let (release, held) = mpsc::channel::<()>();
            let (begun, has_begun) = oneshot::channel();
            let first = {
                let workers = workers.clone();
                tokio::spawn(async move {
                    let work = move |_: &Job| {
                        let _ = begun.send(());
                        let _ = held.recv();
                        Ok(())
                    };
                    workers.run(Work::on(2 * BUDGET), work).await
                })
            };
            has_begun.await.unwrap();
            let refused = workers.run(LONG, |_| Ok(())).await.unwrap_err();
            assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(refused.retry_after, Some(1));
            drop(release);
            first.await.unwrap().unwrap();
            // The budget is returned before the result arrives.
            workers.run(LONG, |_| Ok(())).await.unwrap();
        });
    }

    #[test]
    fn work_of_a_disconnected_client_is_skipped_or_notified() {
        let workers = Arc::new(Workers::new(1));
        runtime().block_on(async {
            let (begun, has_begun) = oneshot::channel();
            let (leave, left) = mpsc::channel::<()>();
            let (told, seen) = oneshot::channel();
            let running = {
                let workers = workers.clone();
                tokio::spawn(async move {
                    let work = move |job: &Job| {
                        assert!(job.check().is_ok());
                        let _ = begun.send(());
                        let _ = left.recv();
                        let _ = told.send(job.check().is_err());
                        Ok(())
                    };
                    workers.run(LONG, work).await
                })
            };
            has_begun.await.unwrap();
            let ran = Arc::new(AtomicBool::new(false));
            let (queued, is_queued) = oneshot::channel();
            let waiting = {
                let (workers, ran) = (workers.clone(), ran.clone());
                tokio::spawn(async move {
                    let work = move |_: &Job| {
                        ran.store(true, Ordering::SeqCst);
                        Ok(())
                    };
                    let _ = queued.send(());
                    workers.run(LONG, work).await
                })
            };
            is_queued.await.unwrap();
            for task in [waiting, running] {
                task.abort();
                assert!(task.await.unwrap_err().is_cancelled());
            }
            drop(leave);
            assert!(seen.await.unwrap(), "it is told that nobody waits");
            // This runs after all work that was waiting.
            workers.run(LONG, |_| Ok(())).await.unwrap();
            assert!(!ran.load(Ordering::SeqCst));
            assert_eq!(workers.cost.load(Ordering::SeqCst), 0);
        });
    }
}
