//! Errors: [`ApiError`] answers a request, in the form that OpenAI's clients expect;
//! [`ServeError`] keeps a server from starting.

use crate::engine::{CancelReason, EngineFault, GenerateError, SubmitError};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use std::path::PathBuf;
use thiserror::Error;

/// An error that keeps a server from starting.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The server cannot listen on the address.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("cannot use {path} for TLS: {problem}")]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An allowed host is not a valid host.
    #[error(
        "{host:?} is not a valid host, expected a name or an address like llm.example.com, or *"
    )]
    Host {
        /// The value that was given.
        host: String,
    },
    /// An allowed origin is not a valid origin.
    #[error("{origin:?} is not a valid origin, expected one like https://example.com, or *")]
    Origin {
        /// The value that was given.
        origin: String,
    },
}

/// An error response: a status, and the error object of OpenAI's API.
#[derive(Debug)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    pub body: ErrorBody,
    /// Number of seconds after which the client should try again.
    pub retry_after: Option<u32>,
}

/// The value of `error` in `{"error": {…}}`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ErrorBody {
    pub message: String,
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The field that is wrong.
    pub param: Option<String>,
    pub code: Option<&'static str>,
}

/// The error object as it is sent.
#[derive(Serialize)]
pub(crate) struct ErrorObject<'a> {
    pub error: &'a ErrorBody,
}

impl ApiError {
    pub fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            body: ErrorBody {
                message: message.into(),
                kind,
                param: None,
                code: None,
            },
            retry_after: None,
        }
    }

    /// Status 400: the request is invalid.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// Status 403: requests from this origin, or for this host, are not allowed.
    pub fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// Status 404: what the request names does not exist.
    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// Status 503: the server cannot answer now.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable",
            message,
        )
    }

    /// Status 500: an embedding or a score is not finite.
    pub fn not_finite() -> Self {
        let problem = "the model produced hidden states that are not finite numbers";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", problem)
    }

    /// Sets the field that is wrong.
    pub fn param(mut self, name: impl Into<String>) -> Self {
        self.body.param = Some(name.into());
        self
    }

    pub fn code(mut self, code: &'static str) -> Self {
        self.body.code = Some(code);
        self
    }

    pub fn retry_after(mut self, seconds: u32) -> Self {
        self.retry_after = Some(seconds);
        self
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        let invalid = |param: &str| Self::invalid(message.clone()).param(param);
        match error {
            SubmitError::Overloaded { .. } => {
                let status = StatusCode::TOO_MANY_REQUESTS;
                Self::new(status, "rate_limit_error", message)
                    .code("overloaded")
                    .retry_after(1)
            }
            SubmitError::Draining => Self::unavailable(message).code("draining").retry_after(5),
            SubmitError::Closed(_) => Self::unavailable(message).code("engine_closed"),
            SubmitError::Conflict => {
                Self::new(StatusCode::CONFLICT, "conflict_error", message).code("session_busy")
            }
            SubmitError::PromptTooLong { .. } | SubmitError::InputTooLong { .. } => {
                invalid("prompt").code("context_length_exceeded")
            }
            SubmitError::NoEmbeddings | SubmitError::NoGeneration => invalid("model"),
            SubmitError::Params(error) => invalid(error.name),
            SubmitError::NoTokens => invalid("max_tokens"),
            SubmitError::NoSamples | SubmitError::TooManyAnswers { .. } => invalid("n"),
            SubmitError::EmptyStop { .. } => invalid("stop"),
            _ => invalid("prompt"),
        }
    }
}

impl From<EngineFault> for ApiError {
    fn from(fault: EngineFault) -> Self {
        SubmitError::Closed(fault).into()
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> Self {
        let message = error.to_string();
        match error {
            GenerateError::Cancelled(CancelReason::Deadline) => {
                Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", message).code("timeout")
            }
            GenerateError::Cancelled(_) | GenerateError::Closed(_) => Self::unavailable(message),
            GenerateError::Failed(_) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = axum::Json(ErrorObject { error: &self.body }).into_response();
        let mut response = (self.status, body).into_response();
        if let Some(seconds) = self.retry_after {
            let value = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        response
    }
}
