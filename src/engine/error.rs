//! The errors of submitting requests and of generating answers.

use super::CancelReason;
use crate::cache::AccountingError;
use crate::device::DeviceError;
use crate::id::StepId;
use crate::sampling::{ConstraintError, ParamError};
use crate::text::TextError;
use std::time::Duration;
use thiserror::Error;

/// Why a request was not accepted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SubmitError {
    /// The prompt has no tokens.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,
    /// The prompt leaves no room for an answer.
    #[error(
        "this model's maximum context length is {limit} tokens (the {limited_by}); the prompt has \
         {tokens} tokens, but must have fewer than {limit}"
    )]
    PromptTooLong {
        /// Tokens of the prompt.
        tokens: usize,
        /// Maximum number of tokens of prompt and answer together.
        limit: usize,
        /// `context length of the model` or `size of the KV cache`.
        limited_by: &'static str,
    },
    /// An input that is only scored or embedded is too long.
    #[error(
        "this model's maximum context length is {limit} tokens (the {limited_by}); the input has \
         {tokens} tokens, but must have at most {limit}"
    )]
    InputTooLong {
        /// Tokens of the input.
        tokens: usize,
        /// Maximum number of tokens of the input.
        limit: usize,
        /// `context length of the model` or `size of the KV cache`.
        limited_by: &'static str,
    },
    /// A token id in the prompt is not in the vocabulary.
    #[error("token {token} of the prompt is outside the vocabulary of {vocabulary} tokens")]
    UnknownToken {
        /// The token id.
        token: u32,
        /// Number of tokens in the vocabulary.
        vocabulary: usize,
    },
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Params(#[from] ParamError),
    /// `max_tokens` is 0, but log probabilities of the prompt were not requested.
    #[error("max_tokens is 0, but must be at least 1 without prompt_logprobs")]
    NoTokens,
    /// The number of answers to generate is 0.
    #[error("samples is 0, but must be at least 1")]
    NoSamples,
    /// The model provides no hidden states.
    #[error("this engine does not support embeddings: its model provides no hidden states")]
    NoEmbeddings,
    /// The model only computes embeddings or scores.
    #[error("this engine generates no tokens: its model only computes embeddings or scores")]
    NoGeneration,
    /// A stop string is empty.
    #[error("stop string {index} is empty, but must have at least one character")]
    EmptyStop {
        /// Index of the stop string in the request.
        index: usize,
    },
    /// The request needs a tokenizer, but the model has none.
    #[error("the model has no tokenizer files, which {needed_for} needs; give token ids instead")]
    NoTokenizer {
        /// The part of the request that needs it.
        needed_for: &'static str,
    },
    /// The prompt is a conversation, but the model has no chat template.
    #[error("the model has no chat template; give the prompt as text instead")]
    NoChatTemplate,
    /// The prompt could not be converted to tokens.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Too many requests are open at the moment.
    #[error("{open} requests are open, and this engine accepts {limit} at once; try again later")]
    Overloaded {
        /// Number of open requests.
        open: usize,
        /// Value of
        /// [`EngineConfig::max_open_requests`](crate::EngineConfig::max_open_requests).
        limit: usize,
    },
    /// The request asks for more answers at once than may ever be open.
    #[error("{count} answers are requested at once, but this engine accepts at most {limit}")]
    TooManyAnswers {
        /// Number of requested answers.
        count: usize,
        /// Value of
        /// [`EngineConfig::max_open_requests`](crate::EngineConfig::max_open_requests).
        limit: usize,
    },
    /// A turn of the session is still generating.
    #[error("the session is already generating; one turn at a time")]
    Conflict,
    /// The engine finishes its open requests and accepts no more.
    #[error("the engine is being drained and accepts no more requests")]
    Draining,
    /// The engine has closed.
    #[error("the engine has closed: {0}")]
    Closed(EngineFault),
}

/// Why a request ended without a complete answer.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The request failed: in a step, by its constraint, or together with the engine.
    #[error("generation failed: {0}")]
    Failed(EngineFault),
    /// The request was cancelled before its answer was complete.
    #[error("generation was cancelled: {}", .0.as_str())]
    Cancelled(CancelReason),
    /// The engine has closed.
    #[error("the engine has closed: {0}")]
    Closed(#[from] EngineFault),
}

/// What went wrong on the scheduler thread.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum EngineFault {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The request's constraint could not decide which tokens may follow. This ends only the
    /// request.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// The model computed logits that are NaN or infinite. This ends only the request.
    #[error(
        "the model's logits after {tokens} tokens are NaN or infinite: its weights are broken, \
         or its activations overflow"
    )]
    NotFinite {
        /// Number of tokens, prompt and answer, that the logits were computed from.
        tokens: usize,
    },
    /// The block accounting was inconsistent.
    #[error(transparent)]
    Accounting(#[from] AccountingError),
    /// The scheduler thread panicked, which is a bug in quell.
    #[error("the scheduler thread panicked: {0}")]
    Panic(String),
    /// A step took longer than
    /// [`EngineConfig::step_deadline`](crate::EngineConfig::step_deadline).
    #[error("{step} has not completed after {waited:?}: the device is stuck")]
    Stuck {
        /// The step.
        step: StepId,
        /// How long the step had taken when it was given up.
        waited: Duration,
    },
    /// The engine was shut down.
    #[error("it was shut down")]
    Shutdown,
}
