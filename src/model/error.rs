//! What can be wrong with a model whose files were read.

use crate::device::DeviceError;
use crate::weights::WeightsError;
use thiserror::Error;

/// Why the files hold no model that quell can run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The architecture is not one that quell knows.
    #[error("architecture '{found}' is not supported; supported are {supported}")]
    UnknownArchitecture {
        /// As the file names it.
        found: String,
        /// The ones that quell knows.
        supported: String,
    },
    /// A setting of the model is missing.
    #[error("the model's {key} is missing")]
    MissingSetting {
        /// Its name in the file.
        key: String,
    },
    /// A setting of the model makes no sense, or asks for something that quell
    /// does not do.
    #[error("the model's {key} is {value}, but must be {expected}")]
    BadSetting {
        /// Its name in the file.
        key: String,
        /// What was found.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// A tensor is missing.
    #[error("tensor '{name}' is missing")]
    MissingTensor {
        /// Its name in the file.
        name: String,
    },
    /// The output projection is missing, and it is not the embedding.
    #[error(
        "tensor '{name}', the output projection, is missing, and the model does not say that \
         it is the embedding (tie_word_embeddings)"
    )]
    MissingHead {
        /// Its name in the file.
        name: String,
    },
    /// A tensor of the text model has no use: the results would not be what the checkpoint
    /// means.
    #[error(
        "tensor '{name}' is not part of {architecture} as quell computes it: without it, the \
         results would be wrong{hint}"
    )]
    UnusedTensor {
        /// Its name in the file.
        name: String,
        /// The architecture.
        architecture: &'static str,
        /// What may have made it, if the name tells; with what leads to it.
        hint: &'static str,
    },
    /// A tensor has another shape than the settings prescribe.
    #[error("tensor '{name}' has shape {found:?}, but must have {expected:?}")]
    WrongShape {
        /// Its name in the file.
        name: String,
        /// Its shape, outermost dimension first.
        found: Vec<usize>,
        /// What the settings prescribe.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a format that it cannot have.
    #[error("tensor '{name}' is stored as {found}, but must be {expected}")]
    WrongFormat {
        /// Its name in the file.
        name: String,
        /// Its format.
        found: String,
        /// What is accepted.
        expected: &'static str,
    },
    /// The weights could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device could not take it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl ModelError {
    pub(super) fn setting(
        key: impl Into<String>,
        value: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        Self::BadSetting {
            key: key.into(),
            value: value.to_string(),
            expected: expected.into(),
        }
    }
}
