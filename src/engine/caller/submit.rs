//! Submits requests: each is checked, gets a place among the open requests and a stream, and is
//! then posted to the scheduler thread.

use super::handle::Engine;
use super::permit::{Permit, Places};
use super::stream::{StreamParts, TextState};
use super::turn::Turn;
use crate::engine::command::{AccountSpec, Command, Submission};
use crate::engine::event::{RequestCell, channel};
use crate::engine::sync::atomic::Ordering;
use crate::engine::sync::{Arc, Weak};
use crate::engine::thread::{RequestDeadlines, RequestRecord};
use crate::engine::{EmbedRequest, EmbeddingFuture, Prompt, Request, SubmitError, TokenStream};
use crate::sampling::{ConstraintState, ParamError, SamplingParams};
use crate::schedule::{SequenceSpec, Task};
use crate::text::StopStrings;
use std::time::{Duration, Instant};

/// A checked request with places for its answers, whose prompts are not tokenized yet. Dropping
/// it releases the places.
pub(crate) struct Admission {
    settings: Settings,
    places: Places,
    samples: usize,
}

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

/// Returns whether `salt` may be the salt of a prefix cache. An empty one would look like none,
/// but share no blocks with requests that have none.
fn is_salt(salt: &str) -> bool {
    (1..=1024).contains(&salt.len())
}

impl Engine {
    /// Submits a request and returns the stream of its answer, without waiting for the
    /// scheduler thread. The prompt is tokenized on the calling thread.
    ///
    /// Dropping the stream cancels the request.
    ///
    /// # Errors
    ///
    /// - [`SubmitError::Params`], [`SubmitError::NoTokens`] or [`SubmitError::EmptyStop`] if a
    ///   setting of the request is invalid.
    /// - [`SubmitError::EmptyPrompt`], [`SubmitError::PromptTooLong`],
    ///   [`SubmitError::InputTooLong`] or [`SubmitError::UnknownToken`] if the tokens of the
    ///   prompt are.
    /// - [`SubmitError::NoTokenizer`] or [`SubmitError::NoChatTemplate`] if the prompt or a stop
    ///   string needs what the model does not have.
    /// - [`SubmitError::Text`] if the prompt cannot be rendered or tokenized.
    /// - [`SubmitError::Overloaded`] if too many requests are open.
    /// - [`SubmitError::Draining`] or [`SubmitError::Closed`] if the engine accepts no more.
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
        let truncation = request.truncate_prompt;
        let admission = self.admit(request, prompts.len(), samples)?;
        let tokenized = prompts
            .into_iter()
            .map(|prompt| self.prompt_tokens(prompt, true, truncation))
            .collect::<Result<_, _>>()?;
        self.generate_admitted(admission, tokenized)
    }

    /// Checks a request without its prompts, and takes places for `samples` answers to each of
    /// `prompts` prompts, either all of them or none. A caller admits a request before it
    /// tokenizes the prompts, so that a refused request costs nothing.
    pub(crate) fn admit(
        &self,
        request: Request,
        prompts: usize,
        samples: usize,
    ) -> Result<Admission, SubmitError> {
        if samples == 0 {
            return Err(SubmitError::NoSamples);
        }
        let task = request.task();
        let settings = self.settings(request, task)?;
        let places = self.places(prompts, samples)?;
        Ok(Admission {
            settings,
            places,
            samples,
        })
    }

    /// Takes places for `samples` answers to each of `prompts` prompts.
    fn places(&self, prompts: usize, samples: usize) -> Result<Places, SubmitError> {
        let answers = prompts.saturating_mul(samples);
        let limit = self.shared.config.max_open_requests;
        Places::acquire(&self.shared.open, answers, limit)
    }

    /// Submits the prompts of a request that was admitted for as many. They are already
    /// truncated.
    pub(crate) fn generate_admitted(
        &self,
        admission: Admission,
        prompts: Vec<Arc<[u32]>>,
    ) -> Result<Vec<TokenStream>, SubmitError> {
        let Admission {
            settings,
            mut places,
            samples,
        } = admission;
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
        let seed = spec.params.seed;
        let mut group = Vec::with_capacity(samples);
        // `repeat_n` moves the specification into the last answer instead of cloning it.
        let each = (0..).zip(std::iter::repeat_n(spec, samples));
        for ((index, mut spec), permit) in each.zip(places) {
            if index > 0 {
                Arc::make_mut(&mut spec.params).seed = seed.wrapping_add(index);
            }
            group.push(self.open(settings, spec, None, permit));
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
            owner,
        } = request;
        let request = Request {
            max_tokens: Some(0),
            finish_within,
            priority,
            tenant,
            cache_salt,
            owner,
            ..Request::new(prompt)
        };
        let pooling = &self.shared.info.pooling;
        let task = Task::Embed(pooling.tokens);
        let (stream, submission) = self.prepare(request, task, None)?;
        self.post(Command::Submit(Box::new(submission)))?;
        Ok(EmbeddingFuture::new(stream, Arc::clone(pooling)))
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
        Ok(self.open(&settings, spec, turn, permit))
    }

    /// Checks a request, and returns its settings and its specification for the scheduler.
    fn check(
        &self,
        mut request: Request,
        task: Task,
    ) -> Result<(Settings, SequenceSpec), SubmitError> {
        let prompt = take_prompt(&mut request);
        let settings = self.settings(request, task)?;
        let prompt = self.prompt_tokens(prompt, true, settings.request.truncate_prompt)?;
        let spec = self.sequence_spec(&settings, prompt)?;
        Ok((settings, spec))
    }

    /// Checks everything but the prompt, and fills in the model's defaults.
    fn settings(&self, mut request: Request, task: Task) -> Result<Settings, SubmitError> {
        self.require_open()?;
        if self.shared.draining.load(Ordering::Acquire) {
            return Err(SubmitError::Draining);
        }
        if !self.shared.info.generates && !matches!(task, Task::Embed(_)) {
            return Err(SubmitError::NoGeneration);
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
        if let Some(salt) = request.cache_salt.as_deref().filter(|salt| !is_salt(salt)) {
            return Err(SubmitError::Params(ParamError {
                name: "cache_salt",
                value: format!("{} bytes long", salt.len()),
                expected: "from 1 to 1024 bytes long",
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
            prompt: Arc::clone(&spec.prompt),
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
            owner: request.owner,
        };
        (stream, Submission { id, spec, account })
    }

    /// Refuses an input of more tokens than a sequence may have.
    pub(crate) fn require_fits(&self, tokens: usize) -> Result<(), SubmitError> {
        let (limit, limited_by) = self.shared.limit;
        match tokens <= limit {
            true => Ok(()),
            false => Err(SubmitError::InputTooLong {
                tokens,
                limit,
                limited_by,
            }),
        }
    }

    /// Returns the scheduler's specification of a request with this tokenized prompt, or an
    /// error if the prompt is invalid.
    fn sequence_spec(
        &self,
        settings: &Settings,
        prompt: Arc<[u32]>,
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
        self.require_fits(tokens)?;
        let ids = match settings.task {
            Task::Embed(_) => vocabulary.saturating_mul(self.shared.info.segments),
            _ => vocabulary,
        };
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= ids) {
            return Err(SubmitError::UnknownToken {
                token,
                vocabulary: ids,
            });
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
pub(super) fn take_prompt(request: &mut Request) -> Prompt {
    std::mem::replace(&mut request.prompt, Prompt::Tokens(Arc::default()))
}
