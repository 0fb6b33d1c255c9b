//! The few threads on which large bodies are parsed, long texts become tokens, and
//! grammars are compiled.
//!
//! The runtime's own threads must never be busy for long: every connection waits for
//! them. What may take long is done here instead, by no more threads than leave the
//! scheduler its processors. How much may wait is bounded, too: there is one budget for
//! all work that waits or is being done, and what exceeds it is refused.

use super::error::ApiError;
use axum::http::StatusCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tokio::sync::Semaphore;

/// Work that may wait or be done at a time, in bytes of bodies.
const BUDGET: usize = 256 << 20;

/// What a piece of work counts for at least.
const LEAST_COST: usize = 256 << 10;

/// What it counts for to compile a grammar.
pub(crate) const GRAMMAR_COST: usize = 4 << 20;

/// Work on bodies and texts that have no more bytes than this is done where it comes up:
/// it takes less than handing it over would gain.
pub(crate) const SHORT: usize = 16 << 10;

/// The threads, and the work that waits for them.
#[derive(Debug)]
pub(crate) struct Workers {
    threads: Arc<Semaphore>,
    /// The cost of all work that waits or is being done.
    cost: Arc<AtomicUsize>,
}

impl Default for Workers {
    /// As many threads as half of the processors, and one at least.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self::new((processors / 2).max(1))
    }
}

/// Work's place in the budget, given back when it is dropped.
struct Place {
    all: Arc<AtomicUsize>,
    cost: usize,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.all.fetch_sub(self.cost, Ordering::AcqRel);
    }
}

/// Tells work in progress whether anybody still waits for it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job(Arc<AtomicBool>);

impl Job {
    /// To be called between the steps of long work.
    ///
    /// # Errors
    /// When the client has gone; nobody reads the error.
    pub fn check(&self) -> Result<(), ApiError> {
        match self.0.load(Ordering::Acquire) {
            true => Err(ApiError::unavailable("the client has gone")),
            false => Ok(()),
        }
    }
}

/// Dropped together with the future of whoever waits.
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

    /// Takes a place in the budget. One piece of work is always accepted, however large.
    fn place(&self, cost: usize) -> Result<Place, ApiError> {
        let taken = (self.cost).fetch_update(Ordering::AcqRel, Ordering::Acquire, |all| {
            all.checked_add(cost)
                .filter(|&sum| all == 0 || sum <= BUDGET)
        });
        if taken.is_err() {
            let status = StatusCode::TOO_MANY_REQUESTS;
            let problem = "as much work waits to be prepared as is accepted; try again later";
            return Err(ApiError::new(status, "rate_limit_error", problem)
                .code("overloaded")
                .retry_after(1));
        }
        Ok(Place {
            all: Arc::clone(&self.cost),
            cost,
        })
    }

    /// Does `work` that costs as much as so many bytes on one of the threads. When the
    /// future is dropped, work that has not begun never does, and work that has learns of
    /// it by its [`Job`].
    ///
    /// # Errors
    /// The error of `work`; 429 when too much waits already.
    pub async fn run<T: Send + 'static>(
        &self,
        cost: usize,
        work: impl FnOnce(&Job) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let place = self.place(cost.max(LEAST_COST))?;
        let stopped = || ApiError::unavailable("the server is being stopped");
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let thread = thread.map_err(|_| stopped())?;
        let job = Job::default();
        let _waiting = Waiting(job.clone());
        let done = tokio::task::spawn_blocking(move || {
            // The place is given back first: who gets the thread finds it free.
            let _held = (place, thread);
            work(&job)
        });
        match done.await {
            Ok(result) => result,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(stopped()),
            },
        }
    }

    /// Does `work` on `bytes` bytes: here if they are few, else as [`Workers::run`].
    pub async fn run_if_long<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce(&Job) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= SHORT {
            return work(&Job::default());
        }
        self.run(bytes, work).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use tokio::sync::oneshot;

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
                    workers.run(0, work).await
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
            // Alone it is accepted, however large.
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
                    workers.run(2 * BUDGET, work).await
                })
            };
            has_begun.await.unwrap();
            let refused = workers.run(1, |_| Ok(())).await.unwrap_err();
            assert_eq!(refused.status, StatusCode::TOO_MANY_REQUESTS);
            assert_eq!(refused.retry_after, Some(1));
            drop(release);
            first.await.unwrap().unwrap();
            // The place is given back before the result is there.
            workers.run(1, |_| Ok(())).await.unwrap();
        });
    }

    #[test]
    fn work_whose_client_has_gone_is_not_begun_or_learns_of_it() {
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
                    workers.run(0, work).await
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
                    workers.run(0, work).await
                })
            };
            is_queued.await.unwrap();
            for task in [waiting, running] {
                task.abort();
                assert!(task.await.unwrap_err().is_cancelled());
            }
            drop(leave);
            assert!(seen.await.unwrap(), "it is told that nobody waits");
            // Comes after all that was waiting.
            workers.run(0, |_| Ok(())).await.unwrap();
            assert!(!ran.load(Ordering::SeqCst));
            assert_eq!(workers.cost.load(Ordering::SeqCst), 0);
        });
    }
}
