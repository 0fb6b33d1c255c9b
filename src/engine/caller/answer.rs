//! What a [`TokenStream`](super::stream::TokenStream) delivers: chunks, and the complete answer
//! that they add up to.

use crate::engine::event::Outcome;
use crate::engine::{EngineFault, GenerateError};
use crate::sampling::{Token, TokenRun};
use std::time::Duration;

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Chunk {
    /// Text that became complete with this chunk: whole characters, and no part of a special
    /// token or a stop string unless the request asks for them. Empty if the model has no
    /// tokenizer.
    pub text: String,
    /// The tokens that this chunk delivers: usually one, and none in a chunk that only brings
    /// the end. A step may generate several tokens at once.
    pub tokens: TokenRun,
    /// The prompt's tokens after the first, with their log probabilities, if the request asked
    /// for them ([`Request::prompt_logprobs`](crate::Request::prompt_logprobs)). They come with
    /// the first token, or with the end if no token is generated.
    pub prompt_logprobs: Option<Vec<Token>>,
    /// How the request ended; present in the last chunk only.
    pub finish: Option<Finish>,
    /// Where in `text` the text of each token but the last ends.
    pub(super) splits: Vec<usize>,
}

impl Chunk {
    /// Returns the text by token: a part for each token, with the text that became complete
    /// with that token, or the whole text if the chunk has at most one token.
    pub fn texts(&self) -> impl Iterator<Item = &str> {
        let ends = self.splits.iter().copied().chain([self.text.len()]);
        ends.scan(0, |begin, end| {
            let text = self.text.get(*begin..end);
            *begin = end;
            text
        })
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Finish {
    /// The reason.
    pub outcome: Outcome,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Number of those tokens that were not computed because the cache held their keys and
    /// values.
    pub cached_tokens: usize,
    /// Tokens generated, including a final stop token.
    pub generated_tokens: usize,
    /// How long the request took.
    pub timing: Timing,
}

/// How long a request took, measured from its submission.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Timing {
    /// Time to the first token, if there was one.
    pub first_token: Option<Duration>,
    /// Time to the end.
    pub total: Duration,
}

impl Timing {
    /// Returns the number of tokens per second after the first token, or `None` for fewer than
    /// two tokens.
    pub fn decode_rate(&self, generated_tokens: usize) -> Option<f64> {
        let seconds = (self.total.checked_sub(self.first_token?)?).as_secs_f64();
        (generated_tokens > 1 && seconds > 0.0).then(|| (generated_tokens - 1) as f64 / seconds)
    }
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Generation {
    /// Tokens of the prompt.
    pub prompt_ids: Vec<u32>,
    /// Text of the answer; `None` if the model has no tokenizer.
    pub text: Option<String>,
    /// Tokens of the answer, including a final stop token.
    pub tokens: Vec<Token>,
    /// The prompt's tokens after the first, if the request asked for their log probabilities.
    pub prompt_logprobs: Option<Vec<Token>>,
    /// How the request ended.
    pub finish: Finish,
}

/// Collects the chunks of a stream into a [`Generation`].
pub(super) struct Collector {
    prompt_ids: Vec<u32>,
    text: Option<String>,
    tokens: Vec<Token>,
    prompt_logprobs: Option<Vec<Token>>,
}

impl Collector {
    pub fn new(prompt_ids: &[u32], has_text: bool) -> Self {
        Self {
            prompt_ids: prompt_ids.to_vec(),
            text: has_text.then(String::new),
            tokens: Vec::new(),
            prompt_logprobs: None,
        }
    }

    /// Adds a chunk. Returns the whole answer after the last one.
    pub fn add(
        &mut self,
        chunk: Option<Result<Chunk, GenerateError>>,
    ) -> Result<Option<Generation>, GenerateError> {
        let Some(chunk) = chunk.transpose()? else {
            return Err(GenerateError::Closed(EngineFault::Shutdown));
        };
        if let Some(text) = &mut self.text {
            text.push_str(&chunk.text);
        }
        self.tokens.extend(chunk.tokens);
        self.prompt_logprobs = chunk.prompt_logprobs.or(self.prompt_logprobs.take());
        let Some(finish) = chunk.finish else {
            return Ok(None);
        };
        if let Outcome::Cancelled(reason) = finish.outcome {
            return Err(GenerateError::Cancelled(reason));
        }
        Ok(Some(Generation {
            prompt_ids: std::mem::take(&mut self.prompt_ids),
            text: self.text.take(),
            tokens: std::mem::take(&mut self.tokens),
            prompt_logprobs: self.prompt_logprobs.take(),
            finish,
        }))
    }
}
