//! Requests for embeddings, submitted with [`Engine::embed`](crate::Engine::embed).

use super::answer::{Chunk, Timing};
use super::pending::Cancellation;
use super::stream::TokenStream;
use crate::engine::sync::Arc;
use crate::engine::{CancelReason, EngineFault, GenerateError, Outcome, Prompt};
use crate::id::RequestId;
use crate::runner::Pooling;
use futures_core::Stream;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// A request to embed a prompt.
///
/// Create it with [`EmbedRequest::new`]: fields are added in minor releases.
#[derive(Clone, Debug)]
pub struct EmbedRequest {
    /// The prompt to embed.
    pub prompt: Prompt,
    /// Maximum time from the submission to the embedding. After it, the request is cancelled as
    /// [`Deadline`](crate::CancelReason::Deadline).
    pub finish_within: Option<Duration>,
    /// Priority of the request. Lower numbers are served first and may preempt requests with
    /// higher ones; the default is 0.
    pub priority: i32,
    /// Tenant that the request belongs to. Among requests of equal priority, those of the
    /// tenant that has been served least start first.
    pub tenant: Option<Arc<str>>,
    /// Salt of the prefix cache, as in [`Request::cache_salt`](crate::Request::cache_salt).
    pub cache_salt: Option<Arc<str>>,
    /// Owner of the request, as in [`Request::owner`](crate::Request::owner).
    pub owner: Option<u64>,
}

impl EmbedRequest {
    /// Creates a request with default settings.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            finish_within: None,
            priority: 0,
            tenant: None,
            cache_salt: None,
            owner: None,
        }
    }
}

/// The embedding of a prompt.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Embedding {
    /// What [`EngineInfo::pooling`](crate::EngineInfo::pooling) makes of the model's last hidden
    /// states, after the final norm: the scores of a classifier, or a vector. By default, it is
    /// their mean over all positions of the prompt, not normalised. A value is NaN if a hidden state
    /// was not finite or exceeded 32,768 in magnitude.
    pub values: Vec<f32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How long the request took.
    pub timing: Timing,
}

/// An embedding that is being computed. Await it, or call [`EmbeddingFuture::wait`].
///
/// Dropping it cancels the request, like dropping a [`TokenStream`].
#[derive(Debug)]
#[must_use = "dropping it cancels the request"]
pub struct EmbeddingFuture {
    stream: TokenStream,
    pooling: Arc<Pooling>,
}

impl EmbeddingFuture {
    pub(in crate::engine) fn new(stream: TokenStream, pooling: Arc<Pooling>) -> Self {
        Self { stream, pooling }
    }

    /// Returns the request's id, which also appears in the logs.
    pub fn id(&self) -> RequestId {
        self.stream.id()
    }

    /// Returns the tokens of the prompt.
    pub fn prompt_ids(&self) -> &[u32] {
        self.stream.prompt_ids()
    }

    /// Cancels the request; see [`TokenStream::cancel`].
    pub fn cancel(self) -> Cancellation {
        self.stream.cancel()
    }

    /// Sets the reason to report if the future is dropped; see [`TokenStream::when_dropped`].
    pub fn when_dropped(self, reason: CancelReason) -> Self {
        Self {
            stream: self.stream.when_dropped(reason),
            ..self
        }
    }

    /// Waits on this thread for the embedding.
    ///
    /// # Errors
    ///
    /// Returns [`GenerateError::Failed`] if the request failed, alone or together with the
    /// engine, [`GenerateError::Cancelled`] if it was cancelled, and [`GenerateError::Closed`] if
    /// the engine closed before the embedding was computed.
    pub fn wait(mut self) -> Result<Embedding, GenerateError> {
        loop {
            let chunk = self.stream.next_blocking();
            if let Some(embedding) = self.take(chunk)? {
                return Ok(embedding);
            }
        }
    }

    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(in crate::engine) fn into_stream(self) -> TokenStream {
        self.stream
    }

    /// Returns the embedding if this was the last chunk.
    fn take(
        &mut self,
        chunk: Option<Result<Chunk, GenerateError>>,
    ) -> Result<Option<Embedding>, GenerateError> {
        let ended = || GenerateError::Closed(EngineFault::Shutdown);
        let Some(finish) = chunk.ok_or_else(ended)??.finish else {
            return Ok(None);
        };
        if let Outcome::Cancelled(reason) = finish.outcome {
            return Err(GenerateError::Cancelled(reason));
        }
        // A prompt has at least one token, so its sum has a mean.
        let mean = self.stream.take_sum().and_then(|sum| sum.mean());
        Ok(Some(Embedding {
            values: self.pooling.finish(mean.ok_or_else(ended)?),
            prompt_tokens: finish.prompt_tokens,
            timing: finish.timing,
        }))
    }
}

impl Future for EmbeddingFuture {
    type Output = Result<Embedding, GenerateError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let chunk = std::task::ready!(Pin::new(&mut self.stream).poll_next(context));
            if let Some(taken) = self.take(chunk).transpose() {
                return Poll::Ready(taken);
            }
        }
    }
}
