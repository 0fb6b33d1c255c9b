//! Finished answers, and what all APIs say of them.

use super::error::ApiError;
use super::sse::merge;
use crate::engine::{CancelReason, Chunk, Finish, GenerateError, Outcome, Token, TokenStream};
use crate::text::Tokenizer;
use futures_util::StreamExt;
use serde::Serialize;

/// An answer that is complete.
pub(crate) struct Answer {
    pub text: String,
    /// Without a final stop token.
    pub tokens: Vec<Token>,
    /// The prompt's tokens after the first, if the request asked for them.
    pub prompt: Option<Vec<Token>>,
    pub finish: Finish,
    pub finish_reason: &'static str,
}

/// What has come of an answer.
#[derive(Default)]
struct Part {
    text: String,
    tokens: Vec<Token>,
    prompt: Option<Vec<Token>>,
    finish: Option<Finish>,
}

/// Waits for all answers to a request. One that fails takes the others with it.
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
        // A stream ends with a finish or an error.
        let finish = finish.ok_or_else(|| ApiError::unavailable("the answer was cut short"))?;
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

/// Which tokens end an answer without being part of it.
pub(crate) struct EndTokens(std::sync::Arc<[u32]>);

impl EndTokens {
    pub fn of(stream: &TokenStream) -> Self {
        Self(stream.stop_tokens())
    }

    /// The token of a chunk, unless it is the one that ended the answer.
    pub fn visible(&self, chunk: &mut Chunk) -> Option<Token> {
        let stopped = chunk
            .finish
            .is_some_and(|finish| finish.outcome == Outcome::Stop);
        chunk
            .token
            .take()
            .filter(|token| !(stopped && self.0.contains(&token.id)))
    }
}

/// Why an answer ended, in OpenAI's words; `abort`, in vLLM's, when somebody ended it on
/// purpose; an error when it was cancelled for another reason.
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

/// Tokens that a request took.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptDetails,
}

/// How many of the prompt's tokens were computed before.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct PromptDetails {
    pub cached_tokens: usize,
}

impl Usage {
    /// Counts an answer; its prompt if it is the first to it.
    pub fn add(&mut self, finish: &Finish, first: bool) {
        self.completion_tokens += finish.generated_tokens;
        if first {
            self.prompt_tokens += finish.prompt_tokens;
            self.prompt_tokens_details.cached_tokens += finish.cached_tokens;
        }
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// What tokens are called in log-probabilities.
#[derive(Clone, Copy)]
pub(crate) struct TokenNames<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    /// By their ids, as the field `return_tokens_as_token_ids` asks for.
    pub as_ids: bool,
}

impl TokenNames<'_> {
    /// The token's text, or its id where it has none.
    pub fn name(self, id: u32) -> String {
        match self.bytes(id) {
            Some(bytes) if !self.as_ids => String::from_utf8_lossy(bytes).into_owned(),
            _ => format!("token_id:{id}"),
        }
    }

    /// The bytes that the token stands for.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokenizer?.token_bytes(id)
    }
}
