//! Errors that prevent a model from being loaded.

use crate::device::DeviceError;
use crate::model::ModelError;
use crate::text::TextError;
use crate::weights::WeightsError;
use std::path::PathBuf;
use thiserror::Error;

/// Error that prevents an engine from starting.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The model's files could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The files hold no model that quell can run.
    #[error(transparent)]
    Model(ModelError),
    /// The tokenizer or the chat template is invalid.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The device cannot hold or run the model.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A layer of the model attends to no tokens, so that the KV cache cannot be laid out.
    #[error("the attention window of layer {layer} is 0 tokens; expected at least 1")]
    EmptyWindow {
        /// Index of the layer.
        layer: usize,
    },
    /// The model's own sampling settings are invalid.
    #[error(
        "{path}: {problem}; use --generation-config none to ignore the model's sampling settings"
    )]
    GenerationConfig {
        /// The file with the settings.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// The model's files ask for embeddings or scores that quell does not compute.
    #[error("{path}: {problem}")]
    Pooling {
        /// The file with the setting.
        path: PathBuf,
        /// What was found and what was expected.
        problem: String,
    },
    /// A setting is out of range.
    #[error("{name} is {value}, but must be {expected}")]
    Config {
        /// Name of the setting.
        name: &'static str,
        /// The value that was given.
        value: String,
        /// The values that are accepted.
        expected: String,
    },
    /// The device has too little memory for the model under the settings.
    #[error(
        "{device} has {usable} MiB of memory to use, but the model needs {needed} MiB ({parts}); \
         {remedy}"
    )]
    Memory {
        /// Name of the device, for example `cuda:0`.
        device: String,
        /// Memory that the model needs, in MiB.
        needed: usize,
        /// Memory that it may use, in MiB.
        usable: usize,
        /// What the memory is needed for, with sizes in MiB.
        parts: String,
        /// Settings that would fit, if there are any.
        remedy: String,
    },
    /// The scheduler thread could not be started.
    #[error("cannot start the scheduler thread: {0}")]
    Thread(String),
}

impl From<ModelError> for LoadError {
    /// Keeps [`LoadError::Model`] for what the model's settings and tensors cause.
    fn from(error: ModelError) -> Self {
        match error {
            ModelError::Device(error) => Self::Device(error),
            ModelError::Weights(error) => Self::Weights(error),
            error => Self::Model(error),
        }
    }
}
