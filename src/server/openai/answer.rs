//! Finished answers, and what every API reports about them.

use super::sse::merge;
use crate::engine::{CancelReason, Chunk, Finish, GenerateError, Outcome, TokenStream};
use crate::sampling::{Token, TokenRun};
use crate::server::error::ApiError;
use crate::text::Tokenizer;
use futures_util::StreamExt;
use serde::Serialize;

/// A complete answer.
pub(crate) struct Answer {
    pub text: String,
    /// The answer's tokens, without a final stop token.
    pub tokens: Vec<Token>,
    /// The prompt's tokens after the first, if the request asked for them.
    pub prompt: Option<Vec<Token>>,
    pub finish: Finish,
    pub finish_reason: &'static str,
}

/// The parts of an answer that have arrived so far.
#[derive(Default)]
struct Part {
    text: String,
    tokens: Vec<Token>,
    prompt: Option<Vec<Token>>,
    finish: Option<Finish>,
}

/// Waits for all answers to a request. If one of them fails, the others are dropped.
pub(crate) async fn complete(streams: Vec<TokenStream>) -> Result<Vec<Answer>, ApiError> {
    let count = streams.len();
    let mut parts: Vec<Part> = Vec::new();
    parts.resize_with(count, Part::default);
    let ends: Vec<EndTokens> = streams.iter().map(EndTokens::of).collect();
    let mut chunks = merge(streams);
    while let Some((index, chunk)) = chunks.next().await {
        let mut chunk = chunk?;
        let part = &mut parts[index];
        part.text.push_str(&chunk.text);
        part.tokens.extend(ends[index].visible(&mut chunk));
        part.prompt = chunk.prompt_logprobs.or(part.prompt.take());
        part.finish = chunk.finish.or(part.finish);
    }
    let answers = parts.into_iter().map(|part| {
        let Part {
            text,
            tokens,
            prompt,
            finish,
        } = part;
        // A stream always ends with a finish or an error.
        let missing = || ApiError::unavailable("the answer ended without a finish reason");
        let finish = finish.ok_or_else(missing)?;
        Ok(Answer {
            text,
            tokens,
            prompt,
            finish_reason: finish_reason(finish.outcome)?,
            finish,
        })
    });
    answers.collect()
}

/// The tokens that end an answer without being part of it.
pub(crate) struct EndTokens(std::sync::Arc<[u32]>);

impl EndTokens {
    pub fn of(stream: &TokenStream) -> Self {
        Self(stream.stop_tokens())
    }

    /// Takes the tokens of a chunk, without the one that ended the answer.
    pub fn visible(&self, chunk: &mut Chunk) -> TokenRun {
        let stopped = chunk
            .finish
            .is_some_and(|finish| finish.outcome == Outcome::Stop);
        let mut tokens = std::mem::take(&mut chunk.tokens);
        if stopped && tokens.last().is_some_and(|last| self.0.contains(&last.id)) {
            tokens.pop();
        }
        tokens
    }
}

/// Returns why an answer ended. The words are OpenAI's, except for vLLM's `abort`, which means
/// that somebody ended the answer on purpose. An answer that was cancelled for any other reason
/// is an error.
pub(crate) fn finish_reason(outcome: Outcome) -> Result<&'static str, ApiError> {
    match outcome {
        Outcome::Stop => Ok("stop"),
        Outcome::Length => Ok("length"),
        Outcome::Cancelled(
            CancelReason::Explicit
            | CancelReason::AbortAll
            | CancelReason::SessionStopped
            | CancelReason::SessionEnded,
        ) => Ok("abort"),
        Outcome::Cancelled(reason) => Err(GenerateError::Cancelled(reason).into()),
    }
}

/// Number of tokens that a request used.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
}

/// How many of the prompt's tokens came from the cache.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct PromptDetails {
    pub cached_tokens: usize,
}

impl Usage {
    /// Counts an answer. Its prompt is counted only with the `first` answer to it.
    pub fn add(&mut self, finish: &Finish, first: bool) {
        self.completion_tokens += finish.generated_tokens;
        if first {
            self.prompt_tokens += finish.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += finish.cached_tokens;
        }
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// How tokens are named in log probabilities.
#[derive(Clone, Copy)]
pub(crate) struct TokenNames<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    /// Whether tokens are named by their ids, as `return_tokens_as_token_ids` asks for.
    pub as_ids: bool,
}

impl TokenNames<'_> {
    /// Returns the token's text, or its id if it has no text or ids are wanted.
    pub fn name(self, id: u32) -> String {
        match self.bytes(id) {
            Some(bytes) if !self.as_ids => String::from_utf8_lossy(bytes).into_owned(),
            _ => format!("token_id:{id}"),
        }
    }

    /// Returns the bytes that the token stands for.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokenizer?.token_bytes(id)
    }
}
