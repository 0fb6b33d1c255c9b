//! Why a model could not be made ready to run.

use crate::device::DeviceError;
use crate::model::ModelError;
use crate::text::TextError;
use crate::weights::WeightsError;
use std::path::PathBuf;
use thiserror::Error;

/// Why an engine could not be started.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The model's files could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The files hold no model that quell can run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer or the chat template is broken.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The device cannot hold or run the model.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The model's own sampling settings make no sense.
    #[error(
        "{path}: {problem}; to leave the model's sampling settings out: --generation-config none"
    )]
    GenerationConfig {
        /// The file.
        path: PathBuf,
        /// What was found, and what was expected.
        problem: String,
    },
    /// A setting is out of range.
    #[error("{name} is {value}, but must be {expected}")]
    Config {
        /// The setting.
        name: &'static str,
        /// What was given.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// The scheduler thread could not be started.
    #[error("cannot start the scheduler thread: {0}")]
    Thread(String),
}
