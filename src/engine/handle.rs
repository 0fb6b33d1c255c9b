//! [`Engine`]: the handle that callers clone, submit through, and load with.

use super::command::{AccountSpec, Command, Submission};
use super::deadlines::RequestDeadlines;
use super::event::{CancelReason, Receipt, RequestCell, channel};
use super::metrics::EngineMetrics;
use super::permit::{Permit, Places};
use super::record::RequestRecord;
use super::stream::{Cancellation, StreamParts, TextState};
use super::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use super::sync::{Arc, OnceLock, Receiver, Sender, Weak, bounded, spawn, unbounded};
use super::thread::SchedulerThread;
use super::turn::Turn;
use super::waiting::{Answer, Asked, EngineEnd, Reply, Waiters};
use super::watchdog::{Heartbeat, Pulse, watch};
use super::{
    Draining, EmbedRequest, EmbeddingFuture, EngineFault, EngineSnapshot, EngineStats, Health,
    Session, SessionOptions, Shutdown, ShuttingDown, SubmitError, TokenStream,
};
use crate::cache::BlockCache;
use crate::config::EngineConfig;
use crate::id::{RequestId, SessionId};
use crate::runner::limits;
use crate::runner::{LoadError, LoadOptions, ModelFiles, Runner, RunnerInfo};
use crate::sampling::{
    Constraint, ConstraintState, ParamError, SamplingDefaults, SamplingParams, TokenLimits,
};
use crate::schedule::{Policy, Scheduler, SequenceSpec, Task};
use crate::text::{EncodeOptions, Message, RenderOptions, StopStrings, Tokenizer};
use std::path::Path;
use std::time::{Duration, Instant};

/// What to continue.
#[derive(Clone, Debug)]
pub enum Prompt {
    /// Raw text; the names of special tokens in it mean these tokens.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's own chat template.
    Chat(Vec<Message>),
    /// The same, with what else the template is given: tools and variables.
    Conversation {
        /// The conversation.
        messages: Vec<Message>,
        /// What the template is given besides.
        options: RenderOptions,
    },
}

/// Which part of a prompt is kept; all of a shorter one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Truncation {
    /// So many tokens from its beginning.
    First(usize),
    /// So many tokens from its end.
    Last(usize),
}

impl Truncation {
    /// Cuts a prompt.
    pub fn cut(self, prompt: &mut Vec<u32>) {
        match self {
            Self::First(tokens) => prompt.truncate(tokens),
            Self::Last(tokens) => drop(prompt.drain(..prompt.len().saturating_sub(tokens))),
        }
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(tokens: Vec<u32>) -> Self {
        Self::Tokens(tokens)
    }
}

impl From<Vec<Message>> for Prompt {
    fn from(messages: Vec<Message>) -> Self {
        Self::Chat(messages)
    }
}

/// What to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// What to continue.
    pub prompt: Prompt,
    /// At most this many new tokens; up to the context limit if `None`. None at all, 0, if
    /// [`Request::prompt_logprobs`] are all that is wanted.
    pub max_tokens: Option<usize>,
    /// What to keep of the prompt; all of it if `None`.
    pub truncate_prompt: Option<Truncation>,
    /// Asks for the log-probability of each token of the prompt after the first, under the
    /// unmodified logits, with so many of the likeliest tokens in its place
    /// ([`Chunk::prompt_logprobs`](crate::Chunk::prompt_logprobs)). The whole prompt is
    /// computed then, also what the cache holds, and no more than `max_sequences` tokens of
    /// it a step.
    pub prompt_logprobs: Option<u32>,
    /// How to choose tokens.
    pub sampling: SamplingParams,
    /// Strings that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer beside the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Go on past the model's end-of-sequence tokens.
    pub ignore_eos: bool,
    /// Special tokens are part of the answer's text, save the one that ends it: the
    /// marks around tool calls and reasoning are such tokens in some models.
    pub keep_special: bool,
    /// The stop string, or the stop token, that ends the answer is part of its text.
    pub include_stop: bool,
    /// Which tokens may come, and how many must.
    pub limits: TokenLimits,
    /// The first token must come within this time from the submission, or the request
    /// is cancelled as [`Deadline`](crate::CancelReason::Deadline).
    pub first_token_within: Option<Duration>,
    /// The same for the end of the answer.
    pub finish_within: Option<Duration>,
    /// A lower number is served first, and may take the place of a higher one; 0 is
    /// usual.
    pub priority: i32,
    /// Who it is for: of equally urgent requests, those of the tenant that was served
    /// the least start first.
    pub tenant: Option<Arc<str>>,
    /// Requests with different salts never share blocks of the prefix cache, so that
    /// neither the time to the first token nor the count of cached tokens tells one of
    /// them what another one has sent. `None` is a salt of its own.
    pub cache_salt: Option<Arc<str>>,
    /// Which tokens the answer may be made of, such as a [`Grammar`] compiled for this
    /// engine's tokenizer. An answer that is complete by it ends as a normal stop.
    ///
    /// [`Grammar`]: crate::text::Grammar
    pub constraint: Option<Box<dyn Constraint>>,
    /// What the caller knows it by: its span and [`Engine::snapshot`] show it, and
    /// [`Engine::find`] looks for it. Requests may have the same.
    pub label: Option<Arc<str>>,
}

impl Request {
    /// A request with default settings: sampling at temperature 1, up to the
    /// context limit.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            max_tokens: None,
            truncate_prompt: None,
            prompt_logprobs: None,
            sampling: SamplingParams::default(),
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            keep_special: false,
            include_stop: false,
            limits: TokenLimits::default(),
            first_token_within: None,
            finish_within: None,
            priority: 0,
            tenant: None,
            cache_salt: None,
            constraint: None,
            label: None,
        }
    }

    /// Sets the limit on new tokens.
    pub fn max_tokens(mut self, tokens: usize) -> Self {
        self.max_tokens = Some(tokens);
        self
    }

    /// Asks for the log-probabilities of the prompt, with so many of the likeliest tokens
    /// in the place of each.
    pub fn prompt_logprobs(mut self, top: u32) -> Self {
        self.prompt_logprobs = Some(top);
        self
    }

    /// What is wanted of its sequence.
    fn task(&self) -> Task {
        let score = |top| Task::Score { top };
        self.prompt_logprobs.map_or(Task::Generate, score)
    }

    /// Sets how to choose tokens.
    pub fn sampling(mut self, sampling: SamplingParams) -> Self {
        self.sampling = sampling;
        self
    }

    /// Sets the deadline of the first token, from the submission on.
    pub fn first_token_within(mut self, time: Duration) -> Self {
        self.first_token_within = Some(time);
        self
    }

    /// Sets the deadline of the whole answer, from the submission on.
    pub fn finish_within(mut self, time: Duration) -> Self {
        self.finish_within = Some(time);
        self
    }

    /// Sets how urgent it is: a lower number is served first.
    pub fn priority(mut self, priority: i32) -> Self {
        self.priority = priority;
        self
    }

    /// Sets who it is for.
    pub fn tenant(mut self, tenant: impl Into<Arc<str>>) -> Self {
        self.tenant = Some(tenant.into());
        self
    }

    /// Sets whom it shares the prefix cache with.
    pub fn cache_salt(mut self, salt: impl Into<Arc<str>>) -> Self {
        self.cache_salt = Some(salt.into());
        self
    }

    /// Sets what holds the answer to a form.
    pub fn constraint(mut self, constraint: impl Into<Box<dyn Constraint>>) -> Self {
        self.constraint = Some(constraint.into());
        self
    }

    /// Sets which tokens may come, and how many must.
    pub fn limits(mut self, limits: TokenLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets what the caller knows it by.
    pub fn label(mut self, label: impl Into<Arc<str>>) -> Self {
        self.label = Some(label.into());
        self
    }

    /// Chooses the likeliest token at each step.
    pub fn greedy(mut self) -> Self {
        self.sampling.temperature = 0.0;
        self
    }
}

/// A request that was checked, without its prompt: what all its answers share.
struct Settings {
    /// What is left of it: its prompt, its stops and its way of sampling are taken out.
    request: Request,
    task: Task,
    params: Arc<SamplingParams>,
    stop: StopStrings,
    stop_tokens: Arc<[u32]>,
}

/// The callers' side of an engine that has no model yet.
struct CallersSide {
    commands: Sender<Command>,
    end: EngineEnd,
    waiters: Arc<Waiters>,
    heart: Arc<Heartbeat>,
    metrics: Arc<EngineMetrics>,
}

/// The scheduler thread's side of the same.
struct ThreadSide {
    inbox: Receiver<Command>,
    fault: Arc<OnceLock<EngineFault>>,
    pulse: Pulse,
    metrics: Arc<EngineMetrics>,
}

/// Makes what the two sides of an engine reach each other through.
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
            (cache_tokens, "size of the key-value cache")
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
    /// No more requests are taken.
    draining: AtomicBool,
    metrics: Arc<EngineMetrics>,
    open: Arc<AtomicUsize>,
    next_request: AtomicU64,
    next_session: AtomicU64,
    /// Tokens of the longest sequence, and what limits it.
    limit: (usize, &'static str),
}

/// A running engine. Clone it freely; all clones are the same engine.
///
/// The engine runs as long as a handle or a stream of it exists.
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
    /// Loads a model, a `.gguf` file or a Hugging Face folder, and starts its
    /// scheduler thread. Blocks until the model is ready.
    pub fn load(
        path: impl AsRef<Path>,
        config: EngineConfig,
        options: LoadOptions,
    ) -> Result<Self, LoadError> {
        Self::from_files(ModelFiles::open(path.as_ref())?, config, options)
    }

    /// Loads a model whose files are open, and starts its engine.
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

    /// Starts an engine over any [`Runner`]. `make_runner` is called on the
    /// scheduler thread, which owns the runner from then on.
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
            LoadError::Thread("it panicked while the model was loaded".to_owned())
        })??;
        Ok(callers.engine(config, info, tokenizer))
    }

    /// An engine and its scheduler thread, which a test turns itself; and where that
    /// says how it has ended.
    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn by_hand(
        config: EngineConfig,
        runner: Box<dyn Runner>,
        info: RunnerInfo,
    ) -> (Self, SchedulerThread, Arc<OnceLock<EngineFault>>) {
        let (callers, thread) = wire(&config).expect("the watchdog starts");
        let fault = Arc::clone(&thread.fault);
        let thread = thread.with_runner(runner, &info, &config);
        (callers.engine(config, info, None), thread, fault)
    }

    /// How to sample where a request does not say: the model's own settings, unless
    /// [`LoadOptions::generation_config`] leaves them out. They are applied by whoever makes
    /// requests, such as the server; [`Request::new`] does not know of them.
    pub fn sampling_defaults(&self) -> SamplingDefaults {
        let model = self.shared.info.model.as_ref();
        model.map_or_else(SamplingDefaults::default, |model| model.sampling.clone())
    }

    /// The model, the device and the memory plan.
    pub fn info(&self) -> &RunnerInfo {
        &self.shared.info
    }

    /// Whether complete blocks of a prompt are kept for later requests.
    #[cfg(feature = "server")]
    pub(crate) fn keeps_prefixes(&self) -> bool {
        self.shared.config.prefix_cache
    }

    /// The model's tokenizer, if its files have one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.shared.tokenizer.as_ref()
    }

    /// Tokens of the longest sequence that this engine accepts, prompt and answer.
    pub fn max_sequence_tokens(&self) -> usize {
        self.shared.limit.0
    }

    /// A conversation whose tokens, keys and values carry over from turn to turn.
    pub fn session(&self) -> Session {
        self.session_with(SessionOptions::default())
    }

    /// As [`Engine::session`], with settings.
    pub fn session_with(&self, options: SessionOptions) -> Session {
        Session::new(self.clone(), options)
    }

    /// Turns a prompt into token ids, as [`Engine::generate`] does.
    pub fn tokenize(&self, prompt: &Prompt) -> Result<Vec<u32>, SubmitError> {
        self.tokenize_part(prompt, true)
    }

    /// As [`Engine::tokenize`], for a prompt that is no longer needed.
    fn tokens_of(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens),
            prompt => self.tokenize(&prompt),
        }
    }

    /// As [`Engine::tokenize`]; `first` when nothing comes before the prompt.
    pub(super) fn tokenize_part(
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
        // The template writes the special tokens itself.
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

    /// Submits a request: one synchronous enqueue, no waiting. Dropping the stream
    /// cancels.
    pub fn generate(&self, request: Request) -> Result<TokenStream, SubmitError> {
        self.generate_turn(request, None)
    }

    /// As [`Engine::generate`], for `samples` answers to the same prompt, which is
    /// computed once. The answers differ by their seeds: that of the request, the next
    /// one, and so on. Each stream stands for itself.
    pub fn generate_samples(
        &self,
        request: Request,
        samples: usize,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        self.generate_batch(vec![request], samples)
    }

    /// As [`Engine::generate_samples`], for several requests: all are accepted, or none
    /// is, with [`SubmitError::Overloaded`] if there is not a place for every answer now,
    /// and [`SubmitError::TooManyAnswers`] if there never is. The streams of a request
    /// follow each other, in the order of the requests.
    pub fn generate_batch(
        &self,
        requests: Vec<Request>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        if samples == 0 {
            return Err(SubmitError::NoSamples);
        }
        // What is wrong with any is found before a place is taken.
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

    /// As [`Engine::generate_batch`], for prompts that are continued with the same
    /// settings, of which all answers share one copy. What `request` itself has as its
    /// prompt does not matter.
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

    /// Takes the places of `samples` answers to each of so many prompts, all or none of
    /// them. They are given back when they are dropped.
    pub(crate) fn places(&self, prompts: usize, samples: usize) -> Result<Places, SubmitError> {
        if samples == 0 {
            return Err(SubmitError::NoSamples);
        }
        let answers = prompts.saturating_mul(samples);
        let limit = self.shared.config.max_open_requests;
        Places::acquire(&self.shared.open, answers, limit)
    }

    /// As [`Engine::generate_prompts`], in places that were taken for as many answers, for
    /// prompts that are cut already.
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

    /// The answers to one prompt, which differ by their seeds; not posted yet.
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
        // The last one gets the specification itself.
        let each = (0..).zip(std::iter::repeat_n(spec, samples));
        for ((index, mut spec), permit) in each.zip(places) {
            if index > 0 {
                Arc::make_mut(&mut spec.params).seed = seed.wrapping_add(index);
            }
            group.push(self.open(settings, spec, Arc::clone(&prompt), None, permit));
        }
        group
    }

    /// Posts the requests of each group together; gives all streams in their order.
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

    /// As [`Engine::generate`], for a turn of a session, if it is one.
    pub(super) fn generate_turn(
        &self,
        request: Request,
        turn: Option<Turn>,
    ) -> Result<TokenStream, SubmitError> {
        let task = request.task();
        let (stream, submission) = self.prepare(request, task, turn)?;
        self.post(Command::Submit(Box::new(submission)))?;
        Ok(stream)
    }

    /// Submits a prompt to be embedded, as [`Engine::generate`] submits one to be
    /// continued: it shares the steps and the cache with the others, and dropping the
    /// future cancels. A text is tokenized as a prompt is, special tokens included.
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

    /// Refuses if the engine has ended.
    pub(super) fn require_open(&self) -> Result<(), SubmitError> {
        match self.shared.end.fault() {
            Some(fault) => Err(SubmitError::Closed(fault.clone())),
            None => Ok(()),
        }
    }

    /// Requests that hold a place among the open ones.
    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn permits(&self) -> usize {
        self.shared.open.load(Ordering::Acquire)
    }

    fn next_request_id(&self) -> RequestId {
        RequestId(self.shared.next_request.fetch_add(1, Ordering::Relaxed))
    }

    pub(super) fn next_session_id(&self) -> SessionId {
        SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// A stream and the request that it is to be the answer to, not posted yet.
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

    /// What is asked, and what the scheduler is to know of it, unless something is wrong.
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

    /// Checks everything but the prompt, and completes it with the model's defaults.
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

    /// The two ends of a request that was checked and has its place.
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
        // No more events come than tokens: a short answer needs no full buffer.
        let tokens = spec.max_tokens.saturating_sub(spec.prompt.len()).max(1);
        let buffer = self.shared.config.stream_buffer.min(tokens);
        let (events, receiver) = channel(&cell, buffer);
        let waiter: Weak<RequestCell> = Arc::downgrade(&cell);
        self.shared.waiters.add(waiter);
        let submitted = Instant::now();
        let label = request.label.as_deref();
        let span =
            tracing::info_span!(target: "quell::request", "request", id = id.as_u64(), label);
        // Beyond the end of time means without a deadline.
        let after = |time: Option<Duration>| submitted.checked_add(time?);
        let deadlines = RequestDeadlines {
            first_token: after(request.first_token_within),
            finish: after(request.finish_within),
            reader: None,
        };
        let record = RequestRecord::new(span, submitted, spec.prompt.len());
        // The guard exists before the request does: dropping it from here on cancels.
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

    /// Cancels every open request.
    pub fn abort_all(&self) -> Result<(), SubmitError> {
        self.post(Command::AbortAll)
    }

    /// Takes no more requests from now on ([`SubmitError::Draining`]), lets the open
    /// ones finish within `deadline`, and cancels the rest. Posted before this
    /// returns; the future, or [`Draining::wait`], tells what became of them.
    pub fn drain(&self, deadline: Duration) -> Draining {
        self.shared.draining.store(true, Ordering::Release);
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        let until = Instant::now().checked_add(deadline);
        // A closed engine has drained; the reply, dropped, says so.
        let _ = self.commands.send(Command::Drain(until, reply));
        Draining(answer)
    }

    /// Ends every open request, at once or after a while, and then the scheduler
    /// thread. Posted before this returns; streams end with their terminal, and the
    /// future, or [`ShuttingDown::wait`], is done when the thread has ended.
    pub fn shutdown(&self, how: Shutdown) -> ShuttingDown {
        let now = Instant::now();
        self.shared.draining.store(true, Ordering::Release);
        let until = match how {
            Shutdown::Abort => Some(now),
            Shutdown::Drain(deadline) => now.checked_add(deadline),
        };
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // A closed engine is shut down already.
        let _ = self.commands.send(Command::Shutdown(until, reply));
        ShuttingDown(answer)
    }

    /// Whether the engine works, read off the heartbeat of its scheduler thread, which
    /// is never waited for.
    pub fn health(&self) -> Health {
        let draining = self.shared.draining.load(Ordering::Acquire);
        self.shared.heart.health(self.shared.end.fault(), draining)
    }

    /// The engine's state; waits for the scheduler thread, at most for one step.
    pub fn stats(&self) -> Result<EngineStats, SubmitError> {
        self.ask(Command::Inspect)
    }

    /// As [`Engine::stats`], for async callers: it waits for nobody before it is awaited.
    pub fn inspect(&self) -> Asked<EngineStats> {
        self.put(Command::InspectLater)
    }

    /// Who is open, whose each block of the key-value cache is, and who ended last.
    /// Costs the scheduler thread time in the number of blocks and open requests, and
    /// nothing when nobody asks.
    pub fn snapshot(&self) -> Asked<EngineSnapshot> {
        self.put(Command::Snapshot)
    }

    /// Cancels an open request by its id, whoever holds its stream, which ends as
    /// [`Outcome::Cancelled`](crate::Outcome::Cancelled) with this reason. Posted before
    /// this returns; the answer is the receipt of its end when its blocks are free, or
    /// `None` when no request with this id is open: it has ended, or there never was one.
    /// A second cancel changes nothing.
    pub fn cancel_request(&self, id: RequestId, reason: CancelReason) -> Asked<Option<Receipt>> {
        let posted_at = Instant::now();
        self.put(|reply| Command::CancelRequest {
            id,
            reason: reason.of_a_caller(),
            posted_at,
            reply,
        })
    }

    /// The open requests with this label, in the order of their ids.
    pub fn find(&self, label: impl Into<Arc<str>>) -> Asked<Vec<RequestId>> {
        self.put(|reply| Command::Find(label.into(), reply))
    }

    /// Posts a question whose answer can be awaited.
    fn put<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Asked<T> {
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // A closed engine answers nothing; the reply, dropped, says so.
        let _ = self.commands.send(command(reply));
        Asked::new(answer)
    }

    /// Forgets the prefixes that no request holds; what sessions keep stays.
    pub fn clear_prefix_cache(&self) -> Result<(), SubmitError> {
        self.post(Command::ClearPrefixes)
    }

    /// Posts a question and waits for its answer.
    pub(super) fn ask<T>(
        &self,
        command: impl FnOnce(Sender<T>) -> Command,
    ) -> Result<T, SubmitError> {
        let (reply, answer) = bounded(1);
        self.post(command(reply))?;
        self.shared.end.recv(&answer).map_err(SubmitError::Closed)
    }

    /// Posts a command that is acknowledged with a receipt.
    pub(super) fn acknowledged(
        &self,
        command: impl FnOnce(Reply<Receipt>) -> Command,
    ) -> Cancellation {
        let (reply, answer) = Answer::channel(&self.shared.end, &self.shared.waiters);
        // A closed engine keeps nothing; the reply, dropped, says so.
        let _ = self.commands.send(command(reply));
        Cancellation::of_session(answer)
    }

    pub(super) fn post(&self, command: Command) -> Result<(), SubmitError> {
        self.commands.send(command).map_err(|_| self.closed())
    }

    fn closed(&self) -> SubmitError {
        SubmitError::Closed(self.shared.end.cause())
    }

    /// What the scheduler is to know of a request whose prompt is `prompt`, unless
    /// something is wrong with that.
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

    /// Refuses limits on tokens that nothing can be held to.
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

/// The scheduler for what a runner has.
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
