//! [`Engine`], the handle through which callers load a model and submit requests.

use super::pending::{Cancellation, Pending};
use super::permit::{Permit, Places};
use super::stream::{StreamParts, TextState};
use super::turn::Turn;
use super::waiting::{Answer, EngineEnd, Reply, Waiters};
use crate::cache::BlockCache;
use crate::config::EngineConfig;
use crate::engine::command::{AccountSpec, Command, Submission};
use crate::engine::event::{CancelReason, Receipt, RequestCell, channel};
use crate::engine::metrics::EngineMetrics;
use crate::engine::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::engine::sync::{Arc, OnceLock, Receiver, Sender, Weak, bounded, spawn, unbounded};
use crate::engine::thread::{RequestDeadlines, RequestRecord, SchedulerThread};
use crate::engine::watchdog::{Heartbeat, Pulse, watch};
use crate::engine::{
    Drained, EmbedRequest, EmbeddingFuture, EngineBuilder, EngineFault, EngineSnapshot,
    EngineStats, Health, Prompt, Request, Session, SessionOptions, Shutdown, SubmitError,
    TokenStream,
};
use crate::id::{RequestId, SessionId};
use crate::runner::limits;
use crate::runner::{LoadError, LoadOptions, ModelFiles, Runner, RunnerInfo};
use crate::sampling::{ConstraintState, ParamError, SamplingDefaults, SamplingParams};
use crate::schedule::{Policy, Scheduler, SequenceSpec, Task};
use crate::text::{EncodeOptions, Message, RenderOptions, StopStrings, Tokenizer};
use std::path::Path;
use std::time::{Duration, Instant};

/// A checked request without its prompt. All its answers share this.
struct Settings {
    /// The request itself, without its prompt, stop conditions and sampling parameters, which
    /// have been taken out.
    request: Request,
    task: Task,
    params: Arc<SamplingParams>,
    stop: StopStrings,
    stop_tokens: Arc<[u32]>,
}

/// The callers' side of an engine before its model is loaded.
struct CallersSide {
    commands: Sender<Command>,
    end: EngineEnd,
    waiters: Arc<Waiters>,
    heart: Arc<Heartbeat>,
    metrics: Arc<EngineMetrics>,
}

/// The scheduler thread's side of an engine before its model is loaded.
struct ThreadSide {
    inbox: Receiver<Command>,
    fault: Arc<OnceLock<EngineFault>>,
    pulse: Pulse,
    metrics: Arc<EngineMetrics>,
}

/// Creates the two sides of an engine and what connects them, and starts the watchdog.
fn wire(config: &EngineConfig) -> std::io::Result<(CallersSide, ThreadSide)> {
    let (commands, inbox) = unbounded();
    let fault = Arc::new(OnceLock::new());
    let metrics = Arc::new(EngineMetrics::new(config.metrics_label.as_deref()));
    let waiters = Arc::new(Waiters::default());
    let heart = Arc::new(Heartbeat::new(config.step_deadline));
    let (pulse, over) = watch(&heart, &fault, &waiters)?;
    let callers = CallersSide {
        commands,
        end: EngineEnd::new(Arc::clone(&fault), over),
        waiters,
        heart,
        metrics: Arc::clone(&metrics),
    };
    let thread = ThreadSide {
        inbox,
        fault,
        pulse,
        metrics,
    };
    Ok((callers, thread))
}

impl ThreadSide {
    fn with_runner(
        self,
        runner: Box<dyn Runner>,
        info: &RunnerInfo,
        config: &EngineConfig,
    ) -> SchedulerThread {
        let scheduler = scheduler(config, info);
        SchedulerThread::new(
            self.inbox,
            scheduler,
            runner,
            self.metrics,
            self.pulse,
            config,
        )
    }
}

impl CallersSide {
    fn engine(
        self,
        config: EngineConfig,
        info: RunnerInfo,
        tokenizer: Option<Tokenizer>,
    ) -> Engine {
        let cache_tokens = info.cache_blocks * info.block_tokens;
        let limit = if cache_tokens < info.context_tokens {
            (cache_tokens, "size of the KV cache")
        } else {
            (info.context_tokens, "context length of the model")
        };
        let shared = Shared {
            config,
            info,
            tokenizer: tokenizer.map(Arc::new),
            end: self.end,
            waiters: self.waiters,
            heart: self.heart,
            draining: AtomicBool::new(false),
            metrics: self.metrics,
            open: Arc::default(),
            next_request: AtomicU64::new(1),
            next_session: AtomicU64::new(1),
            limit,
        };
        Engine {
            shared: Arc::new(shared),
            commands: self.commands,
        }
    }
}

struct Shared {
    config: EngineConfig,
    info: RunnerInfo,
    tokenizer: Option<Arc<Tokenizer>>,
    end: EngineEnd,
    waiters: Arc<Waiters>,
    heart: Arc<Heartbeat>,
    /// Whether new requests are refused.
    draining: AtomicBool,
    metrics: Arc<EngineMetrics>,
    open: Arc<AtomicUsize>,
    next_request: AtomicU64,
    next_session: AtomicU64,
    /// Maximum number of tokens per sequence, and what imposes this limit.
    limit: (usize, &'static str),
}

/// A handle to a running engine. Clones are cheap and refer to the same engine.
///
/// The engine runs as long as any of its handles or streams exists.
#[derive(Clone)]
pub struct Engine {
    shared: Arc<Shared>,
    commands: Sender<Command>,
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
    /// Returns an error if the files cannot be read, if quell cannot run the model, if the
    /// device cannot hold it, or if a thread cannot be started.
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
        Self::with_runner(config, tokenizer, move || {
            files.build_runner(&limits, options)
        })
    }

    /// Starts an engine with any [`Runner`]. Calls `make_runner` on the scheduler thread, which
    /// then owns the runner. Blocks until the runner is ready.
    ///
    /// # Errors
    ///
    /// Returns the error of `make_runner`, or an error if a setting is out of range or if a
    /// thread cannot be started.
    pub fn with_runner(
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
                Ok(made) => made,
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

    /// Creates an engine whose scheduler thread is driven by a test. Also returns the cell in
    /// which the engine stores why it has ended.
    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(in crate::engine) fn by_hand(
        config: EngineConfig,
        runner: Box<dyn Runner>,
        info: RunnerInfo,
    ) -> (Self, SchedulerThread, Arc<OnceLock<EngineFault>>) {
        let (callers, thread) = wire(&config).expect("the watchdog starts");
        let fault = Arc::clone(&thread.fault);
        let thread = thread.with_runner(runner, &info, &config);
        (callers.engine(config, info, None), thread, fault)
    }

    /// Returns the sampling settings to use where a caller specifies none: the model's own,
    /// unless [`LoadOptions::generation_config`] excludes them. The engine does not apply them
    /// by itself; whatever creates the requests must do so, as the server does.
    /// [`Request::new`] ignores them.
    pub fn sampling_defaults(&self) -> SamplingDefaults {
        let model = self.shared.info.model.as_ref();
        model.map_or_else(SamplingDefaults::default, |model| model.sampling.clone())
    }

    /// Returns the model, the device and the memory plan.
    pub fn info(&self) -> &RunnerInfo {
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

    /// Converts a prompt to token ids, as [`Engine::generate`] does.
    ///
    /// # Errors
    ///
    /// Returns an error if the prompt needs a tokenizer or a chat template that the model does
    /// not have, or if it cannot be rendered or tokenized.
    pub fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, SubmitError> {
        self.tokenize_part(prompt, true)
    }

    /// Converts a prompt to token ids, like [`Engine::tokenize`], without copying ids.
    fn tokens_of(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            prompt => self.tokenize(&prompt),
        }
    }

    /// Converts a prompt to token ids, like [`Engine::tokenize`]. `first` says that nothing
    /// precedes the prompt in its sequence.
    pub(in crate::engine) fn tokenize_part(
        &self,
        prompt: &Prompt,
        first: bool,
    ) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text(text) => {
                let options = EncodeOptions {
                    add_special: first,
                    parse_special: true,
                };
                Ok(self.tokenizer_for("a text prompt")?.encode(text, options)?)
            }
            Prompt::Chat(messages) => {
                self.tokenize_conversation(messages, &RenderOptions::default())
            }
            Prompt::Conversation { messages, options } => {
                self.tokenize_conversation(messages, options)
            }
        }
    }

    fn tokenize_conversation(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<Vec<u32>, SubmitError> {
        let tokenizer = self.tokenizer_for("a conversation")?;
        let template = tokenizer
            .chat_template()
            .ok_or(SubmitError::NoChatTemplate)?;
        let text = template.render(messages, options)?;
        // The template itself writes the special tokens.
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        Ok(tokenizer.encode(&text, options)?)
    }

    fn tokenizer_for(&self, needed_for: &'static str) -> Result<&Tokenizer, SubmitError> {
        let tokenizer = self.shared.tokenizer.as_deref();
        tokenizer.ok_or(SubmitError::NoTokenizer { needed_for })
    }

    /// Submits a request and returns the stream of its answer, without waiting for the
    /// scheduler thread. The prompt is tokenized on the calling thread.
    ///
    /// Dropping the stream cancels the request.
    ///
    /// # Errors
    ///
    /// Returns an error if the request is invalid, if too many requests are open
    /// ([`SubmitError::Overloaded`]), or if the engine is being drained or has closed.
    pub fn generate(&self, request: Request) -> Result<TokenStream, SubmitError> {
        self.generate_turn(request, None)
    }

    /// Submits a request for `samples` answers to the same prompt, which is computed once. The
    /// first answer uses the seed of the request, the second one the next seed, and so on. The
    /// streams are independent of each other.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`Engine::generate_batch`].
    pub fn generate_samples(
        &self,
        request: Request,
        samples: usize,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        self.generate_batch(vec![request], samples)
    }

    /// Submits several requests with `samples` answers each. Either all requests are accepted
    /// or none is. The streams are in the order of the requests, with the streams of one
    /// request next to each other.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::Overloaded`] if there is no room for all answers now,
    /// [`SubmitError::TooManyAnswers`] if there never is, [`SubmitError::NoSamples`] if
    /// `samples` is 0, and otherwise an error in the same cases as [`Engine::generate`].
    pub fn generate_batch(
        &self,
        requests: Vec<Request>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        if samples == 0 {
            return Err(SubmitError::NoSamples);
        }
        // Check every request before taking places.
        let mut checked = Vec::with_capacity(requests.len());
        for request in requests {
            let task = request.task();
            checked.push(self.check(request, task)?);
        }
        let mut places = self.places(checked.len(), samples)?;
        let groups = checked
            .into_iter()
            .map(|(settings, spec)| self.group(&settings, spec, samples, &mut places));
        self.submit_groups(groups.collect())
    }

    /// Submits several prompts with the same settings and `samples` answers each, like
    /// [`Engine::generate_batch`]. All answers share one copy of the settings. The prompt of
    /// `request` itself is ignored.
    ///
    /// # Errors
    ///
    /// Returns an error in the same cases as [`Engine::generate_batch`].
    pub fn generate_prompts(
        &self,
        request: Request,
        prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        let places = self.places(prompts.len(), samples)?;
        let mut tokenized = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            let mut tokens = self.tokens_of(prompt)?;
            if let Some(truncation) = request.truncate_prompt {
                truncation.cut(&mut tokens);
            }
            tokenized.push(tokens);
        }
        self.generate_in(places, request, tokenized, samples)
    }

    /// Takes places for `samples` answers to each of `prompts` prompts, either all of them or
    /// none. Dropping the places releases them.
    pub(crate) fn places(&self, prompts: usize, samples: usize) -> Result<Places, SubmitError> {
        if samples == 0 {
            return Err(SubmitError::NoSamples);
        }
        let answers = prompts.saturating_mul(samples);
        let limit = self.shared.config.max_open_requests;
        Places::acquire(&self.shared.open, answers, limit)
    }

    /// Submits several prompts like [`Engine::generate_prompts`], in places that were taken
    /// before. The prompts are already truncated, and there must be a place for each answer.
    pub(crate) fn generate_in(
        &self,
        mut places: Places,
        request: Request,
        prompts: Vec<Vec<u32>>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        let task = request.task();
        let settings = self.settings(request, task)?;
        let mut specs = Vec::with_capacity(prompts.len());
        for prompt in prompts {
            specs.push(self.sequence_spec(&settings, prompt)?);
        }
        let groups = specs
            .into_iter()
            .map(|spec| self.group(&settings, spec, samples, &mut places));
        self.submit_groups(groups.collect())
    }

    /// Prepares the answers to one prompt, which differ by their seeds, without posting them.
    fn group(
        &self,
        settings: &Settings,
        spec: SequenceSpec,
        samples: usize,
        places: &mut Places,
    ) -> Vec<(TokenStream, Submission)> {
        let prompt: Arc<[u32]> = spec.prompt.as_slice().into();
        let seed = spec.params.seed;
        let mut group = Vec::with_capacity(samples);
        // `repeat_n` moves the specification into the last answer instead of cloning it.
        let each = (0..).zip(std::iter::repeat_n(spec, samples));
        for ((index, mut spec), permit) in each.zip(places) {
            if index > 0 {
                Arc::make_mut(&mut spec.params).seed = seed.wrapping_add(index);
            }
            group.push(self.open(settings, spec, Arc::clone(&prompt), None, permit));
        }
        group
    }

    /// Posts each group of requests in one command, and returns all streams in order.
    fn submit_groups(
        &self,
        groups: Vec<Vec<(TokenStream, Submission)>>,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        let mut streams = Vec::with_capacity(groups.iter().map(Vec::len).sum());
        for group in groups {
            let (of_group, submissions): (Vec<_>, Vec<_>) = group.into_iter().unzip();
            self.post(Command::SubmitGroup(submissions))?;
            streams.extend(of_group);
        }
        Ok(streams)
    }

    /// Submits a request like [`Engine::generate`], as a turn of a session if `turn` is given.
    pub(in crate::engine) fn generate_turn(
        &self,
        request: Request,
        turn: Option<Turn>,
    ) -> Result<TokenStream, SubmitError> {
        let task = request.task();
        let (stream, submission) = self.prepare(request, task, turn)?;
        self.post(Command::Submit(Box::new(submission)))?;
        Ok(stream)
    }

    /// Submits a prompt to be embedded, without waiting for the scheduler thread. The request
    /// shares steps and cache with all others. A text is tokenized as for [`Engine::generate`],
    /// including special tokens.
    ///
    /// Dropping the future cancels the request.
    ///
    /// # Errors
    ///
    /// Returns [`SubmitError::NoEmbeddings`] if the engine does not support embeddings, and
    /// otherwise an error in the same cases as [`Engine::generate`].
    pub fn embed(&self, request: EmbedRequest) -> Result<EmbeddingFuture, SubmitError> {
        if self.shared.info.embedding.is_none() {
            return Err(SubmitError::NoEmbeddings);
        }
        let EmbedRequest {
            prompt,
            finish_within,
            priority,
            tenant,
            cache_salt,
        } = request;
        let request = Request {
            max_tokens: Some(0),
            finish_within,
            priority,
            tenant,
            cache_salt,
            ..Request::new(prompt)
        };
        let (stream, submission) = self.prepare(request, Task::Embed, None)?;
        self.post(Command::Submit(Box::new(submission)))?;
        Ok(EmbeddingFuture::new(stream))
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

    fn next_request_id(&self) -> RequestId {
        RequestId(self.shared.next_request.fetch_add(1, Ordering::Relaxed))
    }

    pub(in crate::engine) fn next_session_id(&self) -> SessionId {
        SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// Checks a request, takes a place for it, and prepares its stream and its submission
    /// without posting it.
    fn prepare(
        &self,
        request: Request,
        task: Task,
        turn: Option<Turn>,
    ) -> Result<(TokenStream, Submission), SubmitError> {
        let (settings, spec) = self.check(request, task)?;
        let permit = Permit::acquire(&self.shared.open, self.shared.config.max_open_requests)?;
        let prompt = spec.prompt.as_slice().into();
        Ok(self.open(&settings, spec, prompt, turn, permit))
    }

    /// Checks a request, and returns its settings and its specification for the scheduler.
    fn check(
        &self,
        mut request: Request,
        task: Task,
    ) -> Result<(Settings, SequenceSpec), SubmitError> {
        let prompt = take_prompt(&mut request);
        let settings = self.settings(request, task)?;
        let mut prompt = self.tokens_of(prompt)?;
        if let Some(truncation) = settings.request.truncate_prompt {
            truncation.cut(&mut prompt);
        }
        let spec = self.sequence_spec(&settings, prompt)?;
        Ok((settings, spec))
    }

    /// Checks everything but the prompt, and fills in the model's defaults.
    fn settings(&self, mut request: Request, task: Task) -> Result<Settings, SubmitError> {
        self.require_open()?;
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::Draining);
        }
        request.sampling.validate(self.shared.info.vocabulary)?;
        let top = request.prompt_logprobs.unwrap_or(0);
        if top > SamplingParams::MAX_LOGPROBS {
            return Err(SubmitError::Params(ParamError {
                name: "prompt_logprobs",
                value: top.to_string(),
                expected: "at most 1024",
            }));
        }
        if request.max_tokens == Some(0) && task == Task::Generate {
            return Err(SubmitError::NoTokens);
        }
        self.check_limits(&request)?;
        if let Some(index) = request.stop.iter().position(String::is_empty) {
            return Err(SubmitError::EmptyStop { index });
        }
        if !request.stop.is_empty() {
            self.tokenizer_for("a stop string")?;
        }
        let stop = StopStrings::new(&std::mem::take(&mut request.stop));
        let mut stop_tokens = std::mem::take(&mut request.stop_token_ids);
        if !request.ignore_eos {
            stop_tokens.extend_from_slice(&self.shared.info.end_tokens);
            if let Some(tokenizer) = &self.shared.tokenizer {
                stop_tokens.extend_from_slice(tokenizer.end_tokens());
            }
        }
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        let stop_tokens: Arc<[u32]> = stop_tokens.into();
        if !request.limits.is_empty() {
            let inner = request.constraint.take();
            let ends = Arc::clone(&stop_tokens);
            let vocabulary = self.shared.info.vocabulary;
            request.constraint = Some(request.limits.constraint(inner, vocabulary, ends));
        }
        Ok(Settings {
            params: Arc::new(std::mem::take(&mut request.sampling)),
            request,
            task,
            stop,
            stop_tokens,
        })
    }

    /// Creates the stream and the submission of a request that has been checked and has its
    /// place.
    fn open(
        &self,
        settings: &Settings,
        mut spec: SequenceSpec,
        prompt: Arc<[u32]>,
        turn: Option<Turn>,
        permit: Permit,
    ) -> (TokenStream, Submission) {
        let request = &settings.request;
        spec.session = turn.as_ref().map(|turn| turn.session);
        let tokenizer = self.shared.tokenizer.clone();
        let text = tokenizer.map(|tokenizer| {
            TextState::new(&spec.prompt, tokenizer, request, settings.stop.clone())
        });
        let id = self.next_request_id();
        let cell = Arc::new(RequestCell::default());
        // There are at most as many events as tokens, so a short answer needs only a small
        // buffer.
        let tokens = spec.max_tokens.saturating_sub(spec.prompt.len()).max(1);
        let buffer = self.shared.config.stream_buffer.min(tokens);
        let (events, receiver) = channel(&cell, buffer);
        let waiter: Weak<RequestCell> = Arc::downgrade(&cell);
        self.shared.waiters.add(waiter);
        let submitted = Instant::now();
        let label = request.label.as_deref();
        let span =
            tracing::info_span!(target: "quell::request", "request", id = id.as_u64(), label);
        // A deadline that is too far away to be represented is no deadline.
        let after = |time: Option<Duration>| submitted.checked_add(time?);
        let deadlines = RequestDeadlines {
            first_token: after(request.first_token_within),
            finish: after(request.finish_within),
            catch_up: None,
        };
        let record = RequestRecord::new(span, submitted, spec.prompt.len());
        // The stream exists before the request is posted, so from here on dropping it cancels.
        let stream = TokenStream::new(StreamParts {
            id,
            cell: Arc::clone(&cell),
            receiver,
            commands: self.commands.clone(),
            end: self.shared.end.clone(),
            metrics: Arc::clone(&self.shared.metrics),
            submitted,
            text,
            prompt,
            stop_tokens: Arc::clone(&spec.stop_tokens),
            buffer,
            turn: turn.as_ref().map(|turn| Arc::clone(&turn.cell)),
        });
        let account = AccountSpec {
            cell,
            events,
            permit,
            record,
            deadlines,
            turn,
            label: request.label.clone(),
        };
        (stream, Submission { id, spec, account })
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
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        let until = Instant::now().checked_add(deadline);
        // If the engine has closed, dropping the reply ends the wait.
        let _ = self.commands.send(Command::Drain(until, reply));
        Pending::reply(answer)
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
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // If the engine has closed, dropping the reply ends the wait.
        let _ = self.commands.send(Command::Shutdown(until, reply));
        Pending::end(answer)
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

    /// Asks for the open requests with this label, in ascending order of their ids.
    pub fn find(&self, label: impl Into<Arc<str>>) -> Pending<Vec<RequestId>> {
        self.put(|reply| Command::Find(label.into(), reply))
    }

    /// Posts a command whose answer can be awaited.
    fn put<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Pending<T> {
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // If the engine has closed, dropping the reply ends the wait.
        let _ = self.commands.send(command(reply));
        Pending::reply(answer)
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

    /// Posts a session's command that is acknowledged with a receipt.
    pub(in crate::engine) fn acknowledged(
        &self,
        command: impl FnOnce(Reply<Receipt>) -> Command,
    ) -> Cancellation {
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // If the engine has closed, dropping the reply ends the wait.
        let _ = self.commands.send(command(reply));
        Pending::reply(answer)
    }

    pub(in crate::engine) fn post(&self, command: Command) -> Result<(), SubmitError> {
        self.commands.send(command).map_err(|_| self.closed())
    }

    fn closed(&self) -> SubmitError {
        SubmitError::Closed(self.shared.end.cause())
    }

    /// Returns the scheduler's specification of a request with this tokenized prompt, or an
    /// error if the prompt is invalid.
    fn sequence_spec(
        &self,
        settings: &Settings,
        prompt: Vec<u32>,
    ) -> Result<SequenceSpec, SubmitError> {
        let request = &settings.request;
        let vocabulary = self.shared.info.vocabulary;
        if prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        let (limit, limited_by) = self.shared.limit;
        let tokens = prompt.len();
        if request.max_tokens != Some(0) && tokens >= limit {
            return Err(SubmitError::PromptTooLong {
                tokens,
                limit,
                limited_by,
            });
        }
        if tokens > limit {
            return Err(SubmitError::InputTooLong {
                tokens,
                limit,
                limited_by,
            });
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocabulary) {
            return Err(SubmitError::UnknownToken { token, vocabulary });
        }
        let answer = request.max_tokens.unwrap_or(limit);
        let constraint = request.constraint.clone();
        Ok(SequenceSpec {
            max_tokens: limit.min(prompt.len().saturating_add(answer)),
            prompt,
            task: settings.task,
            params: Arc::clone(&settings.params),
            stop_tokens: Arc::clone(&settings.stop_tokens),
            priority: request.priority,
            tenant: request.tenant.clone(),
            salt: request.cache_salt.clone(),
            session: None,
            constraint: constraint.map(|constraint| ConstraintState::new(constraint, vocabulary)),
        })
    }

    /// Returns an error if no answer can comply with the request's token limits.
    fn check_limits(&self, request: &Request) -> Result<(), SubmitError> {
        let vocabulary = self.shared.info.vocabulary;
        let limits = &request.limits;
        let wrong = |name, value: String, expected| {
            let error = ParamError {
                name,
                value,
                expected,
            };
            Err(SubmitError::Params(error))
        };
        if request
            .max_tokens
            .is_some_and(|most| limits.min_tokens > most)
        {
            let least = limits.min_tokens.to_string();
            return wrong("min_tokens", least, "at most max_tokens");
        }
        let allowed = limits.allowed.as_deref().unwrap_or(&[0]);
        if allowed.is_empty() {
            let expected = "a list with at least one token";
            return wrong("allowed_token_ids", "[]".to_owned(), expected);
        }
        if let Some(token) = allowed.iter().find(|&&token| token as usize >= vocabulary) {
            let expected = "made of tokens of the vocabulary";
            return wrong("allowed_token_ids", format!("[{token}]"), expected);
        }
        Ok(())
    }
}

/// Takes the prompt out of a request.
fn take_prompt(request: &mut Request) -> Prompt {
    std::mem::replace(&mut request.prompt, Prompt::Tokens(Vec::new()))
}

/// Creates the scheduler for a runner of this size.
fn scheduler(config: &EngineConfig, info: &RunnerInfo) -> Scheduler {
    let cache = BlockCache::new(info.cache_blocks, info.block_tokens, config.prefix_cache);
    let policy = Policy {
        max_batch_tokens: config.max_batch_tokens,
        max_sequences: config.max_sequences,
        max_pinned_blocks: info.cache_blocks * usize::from(config.pinned_percent) / 100,
        preemption: config.preemption,
        swap_blocks: info.swap.map_or(0, |swap| swap.blocks),
        swap_seconds_per_block: info.swap.map_or(0.0, |swap| swap.seconds_per_block),
    };
    Scheduler::new(policy, cache)
}
