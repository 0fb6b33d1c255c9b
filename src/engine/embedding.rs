//! [`Engine::embed`](super::Engine::embed): a text as a vector.

use super::stream::{Cancellation, Chunk, Timing, TokenStream};
use super::sync::Arc;
use super::{CancelReason, EngineFault, GenerateError, Outcome, Prompt};
use crate::id::RequestId;
use futures_core::Stream;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

/// What to embed.
#[derive(Clone, Debug)]
pub struct EmbedRequest {
    /// What the vector stands for.
    pub prompt: Prompt,
    /// The vector must come within this time from the submission, or the request is
    /// cancelled as [`Deadline`](crate::CancelReason::Deadline).
    pub finish_within: Option<Duration>,
    /// A lower number is served first, and may take the place of a higher one; 0 is
    /// usual.
    pub priority: i32,
    /// Who it is for: of equally urgent requests, those of the tenant that was served
    /// the least start first.
    pub tenant: Option<Arc<str>>,
    /// Whom it shares the prefix cache with, as [`Request::cache_salt`](crate::Request).
    pub cache_salt: Option<Arc<str>>,
}

impl EmbedRequest {
    /// A request with default settings.
    pub fn new(prompt: impl Into<Prompt>) -> Self {
        Self {
            prompt: prompt.into(),
            finish_within: None,
            priority: 0,
            tenant: None,
            cache_salt: None,
        }
    }
}

/// A prompt as a vector.
#[derive(Clone, Debug, PartialEq)]
pub struct Embedding {
    /// The mean, over all positions of the prompt, of the model's last hidden states after
    /// the final norm. Not normalised. NaN where a hidden state was no finite number, or
    /// one beyond 32,768.
    pub values: Vec<f32>,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How long it took.
    pub timing: Timing,
}

/// An embedding on its way: a future, or [`EmbeddingFuture::wait`]. Dropping it cancels
/// the request, as dropping a [`TokenStream`] does.
#[derive(Debug)]
#[must_use = "dropping it cancels the request"]
pub struct EmbeddingFuture(TokenStream);

impl EmbeddingFuture {
    pub(super) fn new(stream: TokenStream) -> Self {
        Self(stream)
    }

    /// The request's identity, as the logs name it.
    pub fn id(&self) -> RequestId {
        self.0.id()
    }

    /// The tokens of the prompt.
    pub fn prompt_ids(&self) -> &[u32] {
        self.0.prompt_ids()
    }

    /// Cancels the request; see [`TokenStream::cancel`].
    pub fn cancel(self) -> Cancellation {
        self.0.cancel()
    }

    /// Sets the reason that dropping it gives; see [`TokenStream::when_dropped`].
    pub fn when_dropped(self, reason: CancelReason) -> Self {
        Self(self.0.when_dropped(reason))
    }

    /// Waits for the vector on this thread.
    pub fn wait(mut self) -> Result<Embedding, GenerateError> {
        loop {
            let chunk = self.0.next_blocking();
            if let Some(embedding) = self.take(chunk)? {
                return Ok(embedding);
            }
        }
    }

    #[cfg(all(test, not(any(feature = "loom", feature = "shuttle"))))]
    pub(super) fn into_stream(self) -> TokenStream {
        self.0
    }

    /// The vector, if this was the last chunk.
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
        let sum = self.0.take_sum().ok_or_else(ended)?;
        Ok(Some(Embedding {
            values: sum.mean(),
            prompt_tokens: finish.prompt_tokens,
            timing: finish.timing,
        }))
    }
}

impl Future for EmbeddingFuture {
    type Output = Result<Embedding, GenerateError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        loop {
            let chunk = std::task::ready!(Pin::new(&mut self.0).poll_next(context));
            if let Some(taken) = self.take(chunk).transpose() {
                return Poll::Ready(taken);
            }
        }
    }
}
