//! Why a subcommand failed, and the program's exit code.

use crate::{GenerateError, LoadError, ModelFiles, SubmitError, TextError};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Why a subcommand failed.
#[derive(Debug, Error)]
pub enum CliError {
    /// The command line or the settings are invalid.
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Submit(#[from] SubmitError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error(transparent)]
    Text(#[from] TextError),
    /// A chat was asked of a model without a chat template.
    #[error("the model has no chat template, which a chat requires; use `quell generate` instead")]
    NoTemplate,
    /// The engine closed during an answer in a chat.
    #[error("the engine has closed: {0}")]
    Closed(crate::EngineFault),
    /// The user's input cannot be read.
    #[error("cannot read the input: {0}")]
    Input(std::io::Error),
    /// The async runtime cannot be started or cannot listen for Ctrl-C.
    #[error("cannot wait for Ctrl-C: {0}")]
    Runtime(std::io::Error),
    /// The measurement of a server failed or is not valid.
    #[error(transparent)]
    Measurement(Box<dyn std::error::Error + Send + Sync>),
    #[error("interrupted")]
    Interrupted,
    #[cfg(feature = "server")]
    #[error(transparent)]
    Serve(#[from] crate::server::ServeError),
    #[cfg(feature = "server")]
    #[error(transparent)]
    Metrics(#[from] crate::server::MetricsError),
    #[cfg(feature = "hub")]
    #[error(transparent)]
    Hub(#[from] super::hub::HubError),
    #[error("cannot read {path}: {source}")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a list of messages: {problem}")]
    Messages { path: PathBuf, problem: String },
    #[cfg(feature = "grammar")]
    #[error("{path} is not valid JSON: {problem}")]
    Schema { path: PathBuf, problem: String },
    #[cfg(feature = "grammar")]
    #[error(transparent)]
    Grammar(#[from] crate::GrammarError),
    #[error("{path} is not a valid config.json: {problem}")]
    Config { path: PathBuf, problem: String },
    #[error(
        "{model} has no tokenizer files, which text input and output require{}",
        instead.map(of_other_tokenizer).unwrap_or_default()
    )]
    NoTokenizer {
        model: String,
        /// Name of a tokenizer file that quell does not read, if there is one.
        instead: Option<&'static str>,
    },
    /// The engine failed while the server was running.
    #[cfg(feature = "server")]
    #[error("the engine has failed: {0}")]
    Engine(crate::EngineFault),
    /// The engine did not stop in time after the server was told to stop.
    #[cfg(feature = "server")]
    #[error("the engine did not stop within {0:?}; open requests were cut off")]
    Stopping(std::time::Duration),
    #[cfg(feature = "server")]
    #[error("the thread that loads the model panicked")]
    Loading,
    #[error("cannot write the output: {0}")]
    Output(#[from] std::io::Error),
}

/// Tells how to convert a tokenizer file that quell does not read.
fn of_other_tokenizer(file: &str) -> String {
    format!(
        ": {file} exists, but must be converted to tokenizer.json (transformers' \
         AutoTokenizer writes it with save_pretrained)"
    )
}

impl CliError {
    /// Returns the error for `model`, whose files at `path` include no tokenizer.
    pub fn no_tokenizer(model: &str, path: &Path) -> Self {
        Self::NoTokenizer {
            model: model.to_owned(),
            instead: ModelFiles::unsupported_tokenizer(path),
        }
    }

    /// Returns 2 for invalid arguments, 130 after Ctrl-C, and 1 for any other failure.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Submit(SubmitError::Params(_) | SubmitError::NoTokens) => 2,
            Self::Submit(SubmitError::EmptyStop { .. }) => 2,
            Self::Load(LoadError::Config { .. }) => 2,
            Self::Interrupted => 130,
            _ => 1,
        }
    }
}
