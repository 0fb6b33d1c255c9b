//! Tokenizes the prompts of a request, checks their lengths, and submits them to the engine.

use super::App;
use super::error::ApiError;
use super::http::auth::Caller;
use super::http::workers::{Job, Work};
use super::openai::session_turn::SessionTurn;
use crate::engine::{
    CancelReason, EmbedRequest, Embedding, Prompt, Request, TokenStream, Truncation,
};
use futures_util::{StreamExt, TryStreamExt, stream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum number of tokens in all prompts of a request together, where a prompt counts once
/// per answer to it. Every answer keeps its prompt's tokens, so this bounds the memory of a
/// request.
const MAX_BATCH_TOKENS: usize = 4 << 20;

/// Largest number of texts of one request that are computed at a time, so that a request with many
/// texts does not fill the engine's queue.
const AT_ONCE: usize = 64;

/// How texts become tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Tokenization {
    /// Whether a text gets the special tokens that the tokenizer puts around a text.
    pub add_special: bool,
    pub length: Length,
}

/// How long a prompt may be.
#[derive(Clone, Copy, Debug)]
pub(super) enum Length {
    /// As long as the context. A text that must be longer is refused before it is tokenized.
    Context,
    /// Any length: it is truncated.
    Cut(Truncation),
    /// Any length.
    Any,
}

impl Length {
    /// Returns the length of prompts that are truncated if `truncation` is given.
    pub fn of(truncation: Option<Truncation>) -> Self {
        truncation.map_or(Self::Context, Self::Cut)
    }

    fn truncation(self) -> Option<Truncation> {
        match self {
            Self::Cut(truncation) => Some(truncation),
            Self::Context | Self::Any => None,
        }
    }
}

/// Prompts, and how to answer them.
pub(super) struct Submission {
    /// The settings of all answers. Its own prompt is ignored.
    pub request: Request,
    pub prompts: Vec<Prompt>,
    /// Number of answers to each prompt.
    pub samples: usize,
    /// Whether texts get the special tokens that the tokenizer puts around a text.
    pub add_special: bool,
    /// The session that the request is a turn of. A turn has one prompt and one answer.
    pub session: Option<SessionTurn>,
}

impl App {
    /// Submits prompts for a caller. The streams are in the order of the prompts, with all
    /// answers to a prompt together. Dropping a stream cancels its answer as after a disconnect.
    pub(super) async fn submit(
        self: &Arc<Self>,
        caller: &Caller,
        submission: Submission,
    ) -> Result<Vec<TokenStream>, ApiError> {
        let Submission {
            mut request,
            mut prompts,
            samples,
            add_special,
            session,
        } = submission;
        caller.admit(&mut request);
        let tokenization = Tokenization {
            add_special,
            length: Length::of(request.truncate_prompt),
        };
        let work = work_on(&prompts);
        let app = Arc::clone(self);
        // The limit that the client has set, if it has set one.
        let most = request.max_tokens;
        self.limit_answer(&mut request);
        let streams = if let Some(turn) = session {
            let (Some(prompt), 0, 1) = (prompts.pop(), prompts.len(), samples) else {
                let problem = "a session answers one prompt at a time, with n = 1";
                return Err(ApiError::invalid(problem).param("session_id"));
            };
            let session = self.sessions.use_own(caller, &turn.id)?;
            request.prompt = prompt;
            let submit = move |job: &Job| {
                let request = app.encode_turn(job, request, tokenization)?;
                Ok(session.turn(request, turn.prompt)?)
            };
            vec![self.workers.run(work, submit).await?]
        } else {
            if let (Some(most), Length::Context) = (most, tokenization.length) {
                for prompt in &prompts {
                    self.check_length(prompt, most)?;
                }
            }
            // Check the request and take its places before the prompts are tokenized, so that a
            // request that is refused costs nothing.
            let admission = self.engine.admit(request, prompts.len(), samples)?;
            let submit = move |job: &Job| {
                let prompts = app.encode_batch(job, prompts, tokenization, most, samples)?;
                Ok(app.engine.generate_admitted(admission, prompts)?)
            };
            self.workers.run(work, submit).await?
        };
        let owned = |stream: TokenStream| stream.when_dropped(CancelReason::Disconnect);
        Ok(streams.into_iter().map(owned).collect())
    }

    /// Embeds all inputs for a caller, some at a time, and returns the embeddings in order. If the
    /// future is dropped, the inputs in progress are cancelled as after a disconnect.
    pub(super) async fn embed_all(
        &self,
        caller: &Caller,
        inputs: Vec<Arc<[u32]>>,
        mut template: EmbedRequest,
    ) -> Result<Vec<Embedding>, ApiError> {
        caller.admit_embedding(&mut template);
        let begun = Instant::now();
        let embed = |tokens| {
            let request = EmbedRequest {
                prompt: Prompt::Tokens(tokens),
                finish_within: self.time_left(begun),
                ..template.clone()
            };
            let embedding = self.engine.embed(request);
            async move {
                let embedding = embedding?.when_dropped(CancelReason::Disconnect);
                embedding.await.map_err(ApiError::from)
            }
        };
        let all = stream::iter(inputs).map(embed);
        all.buffered(self.at_once()).try_collect().await
    }

    /// Returns the number of texts of one request that are computed at a time.
    pub(super) fn at_once(&self) -> usize {
        AT_ONCE.min(self.engine.max_open_requests())
    }

    /// Returns the time that is left to a request that has begun then, if its time is limited.
    pub(super) fn time_left(&self, begun: Instant) -> Option<Duration> {
        let left = |limit: Duration| limit.saturating_sub(begun.elapsed());
        self.options.request_timeout.map(left)
    }

    /// Tokenizes the prompt of a session's turn, unless the session does that.
    fn encode_turn(
        &self,
        job: &Job,
        mut request: Request,
        tokenization: Tokenization,
    ) -> Result<Request, ApiError> {
        if tokenization.add_special {
            // The session tokenizes the text, because it knows what comes before it.
            self.check_texts(texts(&request.prompt), tokenization.length)?;
        } else {
            request.prompt = Prompt::Tokens(self.encode(job, request.prompt, tokenization)?);
        }
        Ok(request)
    }

    /// Tokenizes the prompts of a request for `samples` answers of up to `most` tokens each.
    fn encode_batch(
        &self,
        job: &Job,
        prompts: Vec<Prompt>,
        tokenization: Tokenization,
        most: Option<usize>,
        samples: usize,
    ) -> Result<Vec<Arc<[u32]>>, ApiError> {
        let mut total = 0;
        let each = prompts.into_iter().map(|prompt| {
            let tokens = self.encode(job, prompt, tokenization)?;
            if let Some(most) = most {
                self.check_answer(tokens.len(), most)?;
            }
            total += tokens.len();
            if samples.saturating_mul(total) > MAX_BATCH_TOKENS {
                let problem = format!(
                    "the prompts have more than {MAX_BATCH_TOKENS} tokens, counted once for \
                     each of the {samples} answers to a prompt; send fewer at a time"
                );
                return Err(ApiError::invalid(problem).param("prompt"));
            }
            Ok(tokens)
        });
        each.collect()
    }

    /// Limits an answer whose request sets no limit to as many tokens as the model's own settings
    /// say, if they do. Unlike a limit that a client sets, this one may exceed the context's
    /// room, and gives way to a minimum.
    fn limit_answer(&self, request: &mut Request) {
        if request.max_tokens.is_none() {
            let limit = self.engine.sampling_defaults().max_tokens;
            request.max_tokens = limit.map(|limit| limit.max(request.limits.min_tokens));
        }
    }

    /// Returns the tokens of each prompt, in order.
    pub(super) async fn tokenize(
        self: &Arc<Self>,
        prompts: Vec<Prompt>,
        tokenization: Tokenization,
    ) -> Result<Vec<Arc<[u32]>>, ApiError> {
        let work = work_on(&prompts);
        let app = Arc::clone(self);
        let tokenize = move |job: &Job| {
            let prompts = prompts.into_iter();
            let each = prompts.map(|prompt| app.encode(job, prompt, tokenization));
            each.collect()
        };
        self.workers.run(work, tokenize).await
    }

    /// Tokenizes a prompt on this thread, unless it is too long or the client has gone. The
    /// tokens are shared from here on.
    pub(super) fn encode(
        &self,
        job: &Job,
        prompt: Prompt,
        tokenization: Tokenization,
    ) -> Result<Arc<[u32]>, ApiError> {
        let Tokenization {
            add_special,
            length,
        } = tokenization;
        job.check()?;
        self.check_texts(texts(&prompt), length)?;
        let truncation = length.truncation();
        Ok(self.engine.prompt_tokens(prompt, add_special, truncation)?)
    }

    /// Refuses a text with all these parts if it must have more tokens than the context, unless
    /// it may have any length. This needs no tokenization.
    pub(super) fn check_texts<'a>(
        &self,
        parts: impl IntoIterator<Item = &'a str> + Clone,
        length: Length,
    ) -> Result<(), ApiError> {
        let (Some(tokenizer), Length::Context) = (self.engine.tokenizer(), length) else {
            return Ok(());
        };
        let limit = self.engine.max_sequence_tokens();
        if tokenizer.min_tokens(parts.clone()) <= limit {
            return Ok(());
        }
        let bytes: usize = parts.into_iter().map(str::len).sum();
        let problem = format!(
            "the prompt has {bytes} bytes, which are more tokens than the context has: this \
             model's maximum context length is {limit} tokens"
        );
        Err(ApiError::invalid(problem)
            .param("prompt")
            .code("context_length_exceeded"))
    }

    /// Refuses an answer that the context has no room for, if the prompt is given as tokens.
    /// Texts are checked once they are tokenized.
    fn check_length(&self, prompt: &Prompt, max_tokens: usize) -> Result<(), ApiError> {
        match prompt {
            Prompt::Tokens(tokens) => self.check_answer(tokens.len(), max_tokens),
            _ => Ok(()),
        }
    }

    /// Refuses an answer of `max_tokens` tokens to a prompt of `tokens` tokens if the context
    /// has no room for both.
    fn check_answer(&self, tokens: usize, max_tokens: usize) -> Result<(), ApiError> {
        let limit = self.engine.max_sequence_tokens();
        // The engine refuses a prompt that is too long by itself.
        if tokens >= limit || max_tokens <= limit - tokens {
            return Ok(());
        }
        let problem = format!(
            "this model's maximum context length is {limit} tokens; the prompt has {tokens} \
             tokens and max_tokens is {max_tokens}, {} together",
            tokens.saturating_add(max_tokens),
        );
        Err(ApiError::invalid(problem)
            .param("max_tokens")
            .code("context_length_exceeded"))
    }
}

/// Returns the texts of a prompt that must be tokenized.
fn texts(prompt: &Prompt) -> impl Iterator<Item = &str> + Clone {
    let (text, messages) = match prompt {
        Prompt::Text(text) => (Some(text), &[][..]),
        Prompt::Tokens(_) => (None, &[][..]),
        Prompt::Chat(messages) | Prompt::Conversation { messages, .. } => (None, &messages[..]),
    };
    let contents = messages.iter().map(|message| &message.content);
    text.into_iter().chain(contents).map(String::as_str)
}

/// Returns how much there is to tokenize.
fn work_on(prompts: &[Prompt]) -> Work {
    Work::on(prompts.iter().flat_map(texts).map(str::len).sum())
}
