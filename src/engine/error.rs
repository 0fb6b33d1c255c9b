//! What can go wrong at submit and while generating.

use super::CancelReason;
use crate::cache::Imbalance;
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
        /// The limit on prompt and answer together.
        limit: usize,
        /// `context length of the model`, or `size of the key-value cache`.
        limited_by: &'static str,
    },
    /// A prompt that is not continued is too long itself.
    #[error(
        "this model's maximum context length is {limit} tokens (the {limited_by}); the input has \
         {tokens} tokens, but must have at most {limit}"
    )]
    InputTooLong {
        /// Tokens of the input.
        tokens: usize,
        /// The most that there may be.
        limit: usize,
        /// `context length of the model`, or `size of the key-value cache`.
        limited_by: &'static str,
    },
    /// A token id of the prompt is not in the vocabulary.
    #[error("token {token} of the prompt is outside the vocabulary of {vocabulary} tokens")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocabulary: usize,
    },
    /// A sampling parameter is out of range.
    #[error(transparent)]
    Params(#[from] ParamError),
    /// `max_tokens` is 0.
    #[error("max_tokens is 0, but must be at least 1 without prompt_logprobs")]
    NoTokens,
    /// No answer was asked for.
    #[error("samples is 0, but must be at least 1")]
    NoSamples,
    /// The runner computes no embeddings.
    #[error("this engine computes no embeddings: its runner has no hidden states")]
    NoEmbeddings,
    /// A stop string is empty.
    #[error("stop string {index} is empty, but must have at least one character")]
    EmptyStop {
        /// Which one.
        index: usize,
    },
    /// The model has no tokenizer, and the request needs one.
    #[error("the model has no tokenizer files, which {needed_for} needs; give token ids instead")]
    NoTokenizer {
        /// What needs it.
        needed_for: &'static str,
    },
    /// The model has no chat template, and the prompt is a conversation.
    #[error("the model has no chat template; give the prompt as text instead")]
    NoChatTemplate,
    /// The prompt could not be turned into tokens.
    #[error(transparent)]
    Text(#[from] TextError),
    /// Too many requests are open.
    #[error("{open} requests are open, and this engine accepts {limit} at once; try again later")]
    Overloaded {
        /// How many are open.
        open: usize,
        /// [`EngineConfig::max_open_requests`](crate::EngineConfig).
        limit: usize,
    },
    /// More answers are asked for at once than may ever be open.
    #[error("{count} answers are asked for at once, but this engine accepts {limit}")]
    TooManyAnswers {
        /// Answers that are asked for.
        count: usize,
        /// [`EngineConfig::max_open_requests`](crate::EngineConfig).
        limit: usize,
    },
    /// The session is already generating.
    #[error("the session is already generating; one turn at a time")]
    Conflict,
    /// The engine finishes what it has, and takes no more.
    #[error("the engine is being drained and takes no more requests")]
    Draining,
    /// The engine has closed.
    #[error("the engine has closed: {0}")]
    Closed(EngineFault),
}

/// Why generation ended without an answer.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// A step that this request was part of failed.
    #[error("generation failed: {0}")]
    Failed(EngineFault),
    /// The request was cancelled before it had finished.
    #[error("generation was cancelled: {}", .0.as_str())]
    Cancelled(CancelReason),
    /// The engine has closed.
    #[error("the engine has closed: {0}")]
    Closed(EngineFault),
}

/// What broke on the scheduler thread.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum EngineFault {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The request's constraint could not say how the answer may go on. It ends this
    /// request only.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// The model has computed logits that are NaN or infinite. It ends this request only.
    #[error(
        "the model's logits after {tokens} tokens are NaN or infinite: its weights are broken, \
         or its activations overflow"
    )]
    NotFinite {
        /// Tokens of the request, prompt and answer, that they were computed from.
        tokens: usize,
    },
    /// The cache's books did not balance.
    #[error(transparent)]
    Books(#[from] Imbalance),
    /// The scheduler thread panicked: a bug in quell.
    #[error("the scheduler thread panicked: {0}")]
    Panic(String),
    /// A step takes longer than [`EngineConfig::step_deadline`](crate::EngineConfig).
    #[error("{step} has not completed after {waited:?}: the device is stuck")]
    Stuck {
        /// The step.
        step: StepId,
        /// How long it had taken when it was given up.
        waited: Duration,
    },
    /// The engine was shut down.
    #[error("it was shut down")]
    Shutdown,
}
