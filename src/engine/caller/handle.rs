//! [`Engine`], the handle through which callers load a model, and watch and stop its engine.

use super::pending::Pending;
use super::waiting::{Answer, Reply};
use super::wiring::{Shared, wire};
use crate::config::EngineConfig;
use crate::engine::command::Command;
use crate::engine::event::{CancelReason, Receipt};
use crate::engine::sync::atomic::Ordering;
use crate::engine::sync::{Arc, Sender, bounded, spawn};
use crate::engine::{
    Drained, EngineBuilder, EngineInfo, EngineSnapshot, EngineStats, Health, RequestQuery, Session,
    SessionOptions, Shutdown, SubmitError,
};
use crate::id::{RequestId, SessionId};
use crate::runner::{LoadError, LoadOptions, ModelFiles, Runner, RunnerInfo, build_runner, limits};
use crate::sampling::SamplingDefaults;
use crate::text::Tokenizer;
use std::path::Path;
use std::time::{Duration, Instant};

/// A handle to a running engine. Clones are cheap and refer to the same engine.
///
/// The engine runs as long as any of its handles or streams exists.
#[derive(Clone)]
pub struct Engine {
    pub(super) shared: Arc<Shared>,
    pub(super) commands: Sender<Command>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Engine")
            .field("info", &self.shared.info)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Loads a model, a `.gguf` file or a Hugging Face folder, with default settings, and
    /// starts its scheduler thread. Blocks until the model is ready.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`EngineBuilder::build`].
    pub fn load(path: impl AsRef<Path>) -> Result<Self, LoadError> {
        Self::builder(path).build()
    }

    /// Returns a builder that loads a model, a `.gguf` file or a Hugging Face folder, with
    /// settings.
    pub fn builder(path: impl AsRef<Path>) -> EngineBuilder {
        EngineBuilder::new(path.as_ref().to_owned())
    }

    /// Loads a model with settings that are at hand as a whole; [`Engine::builder`] sets them
    /// one by one.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`EngineBuilder::build`].
    pub fn load_with(
        path: impl AsRef<Path>,
        config: EngineConfig,
        options: LoadOptions,
    ) -> Result<Self, LoadError> {
        Self::from_files(ModelFiles::open(path.as_ref())?, config, options)
    }

    /// Loads a model whose files have been opened, and starts its scheduler thread. Blocks
    /// until the model is ready.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`EngineBuilder::build`].
    pub fn from_files(
        mut files: ModelFiles,
        config: EngineConfig,
        options: LoadOptions,
    ) -> Result<Self, LoadError> {
        let tokenizer = files.take_tokenizer();
        let limits = config.clone();
        Self::start(config, tokenizer, move || {
            build_runner(files, &limits, options)
        })
    }

    /// Starts an engine. Calls `make_runner` on the scheduler thread, which then owns the
    /// runner. Blocks until the runner is ready.
    ///
    /// # Errors
    ///
    /// Returns the error of `make_runner`, [`LoadError::Config`] if a setting is out of range,
    /// and [`LoadError::Thread`] if a thread cannot be started.
    fn start(
        config: EngineConfig,
        tokenizer: Option<Tokenizer>,
        make_runner: impl FnOnce() -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> + Send + 'static,
    ) -> Result<Self, LoadError> {
        limits::validate(&config)?;
        let (ready, started) = bounded(1);
        let settings = config.clone();
        let wired = wire(&config).map_err(|error| LoadError::Thread(error.to_string()))?;
        let (callers, thread) = wired;
        spawn("quell-scheduler", move || {
            let (runner, info) = match make_runner() {
                Ok((runner, info)) => (runner, info.with_settings(&settings)),
                Err(error) => {
                    let _ = ready.send(Err(error));
                    return;
                }
            };
            let fault = Arc::clone(&thread.fault);
            let thread = thread.with_runner(runner, &info, &settings);
            let _ = ready.send(Ok(info));
            thread.run(&fault);
        })
        .map_err(|error| LoadError::Thread(error.to_string()))?;
        let info = started.recv().map_err(|_| {
            LoadError::Thread("it panicked while the model was being loaded".to_owned())
        })??;
        Ok(callers.engine(config, info, tokenizer))
    }

    /// Returns the settings to use where a caller specifies none: the model's own,
    /// unless [`LoadOptions::generation_config`] excludes them. The engine does not apply them
    /// by itself; whatever creates the requests must do so, as the server does.
    /// [`Request::new`](crate::Request::new) ignores them.
    pub fn sampling_defaults(&self) -> SamplingDefaults {
        let model = self.shared.info.model.as_ref();
        model.map_or_else(SamplingDefaults::default, |model| model.sampling.clone())
    }

    /// Returns what the engine runs, on which device, and the size of its KV cache.
    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// Returns whether complete blocks of a prompt are kept for later requests.
    #[cfg(feature = "server")]
    pub(crate) fn keeps_prefixes(&self) -> bool {
        self.shared.config.prefix_cache
    }

    /// Returns the model's tokenizer, if its files contain one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.shared.tokenizer.as_ref()
    }

    /// Returns the maximum number of requests that are open at the same time.
    #[cfg(feature = "server")]
    pub(crate) fn max_open_requests(&self) -> usize {
        self.shared.config.max_open_requests
    }

    /// Returns the maximum number of tokens per sequence, prompt and answer together.
    pub fn max_sequence_tokens(&self) -> usize {
        self.shared.limit.0
    }

    /// Starts a session: a conversation that keeps its tokens, keys and values from turn to
    /// turn.
    pub fn session(&self) -> Session {
        self.session_with(SessionOptions::default())
    }

    /// Starts a session, like [`Engine::session`], with settings.
    pub fn session_with(&self, options: SessionOptions) -> Session {
        Session::new(self.clone(), options)
    }

    /// Returns an error if the engine has ended.
    pub(in crate::engine) fn require_open(&self) -> Result<(), SubmitError> {
        match self.shared.end.fault() {
            Some(fault) => Err(SubmitError::Closed(fault.clone())),
            None => Ok(()),
        }
    }

    /// Returns the number of requests that hold a permit.
    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(in crate::engine) fn permits(&self) -> usize {
        self.shared.open.load(Ordering::Acquire)
    }

    pub(super) fn next_request_id(&self) -> RequestId {
        RequestId(self.shared.next_request.fetch_add(1, Ordering::Relaxed))
    }

    pub(in crate::engine) fn next_session_id(&self) -> SessionId {
        SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// Cancels every open request. Returns without waiting for their ends.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Closed`] if the engine has closed.
    pub fn abort_all(&self) -> Result<(), SubmitError> {
        self.post(Command::AbortAll)
    }

    /// Accepts no more requests from now on ([`SubmitError::Draining`]), lets the open ones
    /// finish within `deadline`, and cancels the rest.
    ///
    /// The drain has begun when this returns. Await the result, or call [`Pending::wait`], to
    /// learn what became of the open requests.
    pub fn drain(&self, deadline: Duration) -> Pending<Drained> {
        self.shared.draining.store(true, Ordering::Release);
        let until = Instant::now().checked_add(deadline);
        self.put(|reply| Command::Drain(until, reply))
    }

    /// Ends every open request, as `how` says, and then the scheduler thread.
    ///
    /// The shutdown has begun when this returns. Streams still receive how their requests end.
    /// Await the result, or call [`Pending::wait`], to wait until the thread has ended.
    pub fn shutdown(&self, how: Shutdown) -> Pending<()> {
        let now = Instant::now();
        self.shared.draining.store(true, Ordering::Release);
        let until = match how {
            Shutdown::Abort => Some(now),
            Shutdown::Drain(deadline) => now.checked_add(deadline),
        };
        Pending::end(self.question(|reply| Command::Shutdown(until, reply)))
    }

    /// Returns the engine's health. Reads the heartbeat of the scheduler thread and never waits
    /// for the thread.
    pub fn health(&self) -> Health {
        let draining = self.shared.draining.load(Ordering::Acquire);
        self.shared.heart.health(self.shared.end.fault(), draining)
    }

    /// Returns the engine's state. Waits for the scheduler thread, at most for one step.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Closed`] if the engine has closed.
    pub fn stats(&self) -> Result<EngineStats, SubmitError> {
        self.ask(Command::Inspect)
    }

    /// Asks for the engine's state, like [`Engine::stats`], without blocking the thread. Await
    /// the result to get the answer.
    pub fn inspect(&self) -> Pending<EngineStats> {
        self.put(Command::InspectAsync)
    }

    /// Asks for a snapshot: the open requests, the owner of each KV cache block, and the
    /// requests that ended last. It costs the scheduler thread time in proportion to the number
    /// of blocks and open requests.
    pub fn snapshot(&self) -> Pending<EngineSnapshot> {
        self.put(Command::Snapshot)
    }

    /// Cancels an open request by its id, even if another caller holds its stream. The stream
    /// ends as [`Outcome::Cancelled`](crate::Outcome::Cancelled) with this reason.
    ///
    /// The cancel has been posted when this returns. The answer is the receipt, which comes
    /// when the request's blocks are free, or `None` if no request with this id is open.
    /// Cancelling the same request again has no effect.
    pub fn cancel_request(&self, id: RequestId, reason: CancelReason) -> Pending<Option<Receipt>> {
        let posted_at = Instant::now();
        self.put(|reply| Command::CancelRequest {
            id,
            reason: reason.for_caller(),
            posted_at,
            reply,
        })
    }

    /// Asks for the open requests that fit the query, in ascending order of their ids.
    pub fn find(&self, query: RequestQuery) -> Pending<Vec<RequestId>> {
        self.put(|reply| Command::Find(query, reply))
    }

    /// Posts a command whose answer can be awaited.
    pub(in crate::engine) fn put<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Pending<T> {
        Pending::reply(self.question(command))
    }

    /// Posts a command with the place for its reply, and returns the other end.
    fn question<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Answer<T> {
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // If the engine has closed, dropping the reply ends the wait.
        let _ = self.commands.send(command(reply));
        answer
    }

    /// Forgets the cached prefixes that no request holds. What sessions keep is not affected.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Closed`] if the engine has closed.
    pub fn clear_prefix_cache(&self) -> Result<(), SubmitError> {
        self.post(Command::ClearPrefixes)
    }

    /// Posts a command and waits for its answer.
    pub(in crate::engine) fn ask<T>(
        &self,
        command: impl FnOnce(Sender<T>) -> Command,
    ) -> Result<T, SubmitError> {
        let (reply, answer) = bounded(1);
        self.post(command(reply))?;
        self.shared.end.recv(&answer).map_err(SubmitError::Closed)
    }

    pub(in crate::engine) fn post(&self, command: Command) -> Result<(), SubmitError> {
        self.commands.send(command).map_err(|_| self.closed())
    }

    pub(super) fn closed(&self) -> SubmitError {
        SubmitError::Closed(self.shared.end.cause())
    }
}

/// Engines over runners that tests and benches make.
#[cfg(any(test, feature = "internals"))]
impl Engine {
    /// Starts an engine with any [`Runner`]. Calls `make_runner` on the scheduler thread, which
    /// then owns the runner. Blocks until the runner is ready.
    ///
    /// # Errors
    ///
    /// Returns the error of `make_runner`, [`LoadError::Config`] if a setting is out of range,
    /// and [`LoadError::Thread`] if a thread cannot be started.
    pub fn with_runner(
        config: EngineConfig,
        tokenizer: Option<Tokenizer>,
        make_runner: impl FnOnce() -> Result<(Box<dyn Runner>, RunnerInfo), LoadError> + Send + 'static,
    ) -> Result<Self, LoadError> {
        Self::start(config, tokenizer, make_runner)
    }
}
