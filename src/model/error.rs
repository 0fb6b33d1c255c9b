//! Errors in the files of a model.

use crate::device::DeviceError;
use crate::weights::WeightsError;
use thiserror::Error;

/// Reason why quell cannot run the model that the files hold.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The architecture is not supported.
    #[error("architecture '{found}' is not supported; supported are {supported}")]
    UnknownArchitecture {
        /// Its name in the file.
        found: String,
        /// The supported architectures, separated by commas.
        supported: String,
    },
    /// A setting of the model is missing.
    #[error("the model's {key} is missing")]
    MissingSetting {
        /// Its name in the file.
        key: String,
    },
    /// A setting of the model is not valid, or asks for something that quell does not support.
    #[error("the model's {key} is {value}, but must be {expected}")]
    BadSetting {
        /// Its name in the file.
        key: String,
        /// The value that was found.
        value: String,
        /// The values that are accepted.
        expected: String,
    },
    /// A tensor is missing.
    #[error("tensor '{name}' is missing")]
    MissingTensor {
        /// Its name in the file.
        name: String,
    },
    /// The output projection is missing, and the model does not tie it to the embedding.
    #[error(
        "tensor '{name}', the output projection, is missing, and the model does not say that \
         it is the embedding (tie_word_embeddings)"
    )]
    MissingHead {
        /// Its name in the file.
        name: String,
    },
    /// The file holds a tensor of the text model that quell does not use, so its results would be
    /// wrong.
    #[error(
        "tensor '{name}' is not part of {architecture} as quell computes it: without it, the \
         results would be wrong{hint}"
    )]
    UnusedTensor {
        /// Its name in the file.
        name: String,
        /// The architecture.
        architecture: &'static str,
        /// Explanation in parentheses, with a leading space, or empty if the name suggests none.
        hint: &'static str,
    },
    /// The shape of a tensor differs from the one that the settings require.
    #[error("tensor '{name}' has shape {found:?}, but must have {expected:?}")]
    WrongShape {
        /// Its name in the file.
        name: String,
        /// Its shape, outermost dimension first.
        found: Vec<usize>,
        /// The shape that the settings require.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a format that is not supported for it.
    #[error("tensor '{name}' is stored as {found}, but must be {expected}")]
    WrongFormat {
        /// Its name in the file.
        name: String,
        /// Its format.
        found: String,
        /// The formats that are accepted.
        expected: &'static str,
    },
    /// The weights could not be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The device could not load the model.
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
