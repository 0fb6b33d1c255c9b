//! Errors of finding and downloading a model on a hub.

use super::files::{PREFIX, WEIGHTS};
use thiserror::Error;

/// Why a model could not be fetched from a hub.
#[derive(Debug, Error)]
pub enum HubError {
    /// The name is malformed.
    #[error(
        "'{PREFIX}{name}' is not a valid model name: {problem}; expected {PREFIX}ORG/NAME or \
         {PREFIX}ORG/NAME/FILE.gguf, with @REVISION after NAME to pin one"
    )]
    Malformed {
        /// The part of the name after `hf:`.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The hub knows no such repository, revision or file.
    #[error("{endpoint} has no {what} (404); check the spelling")]
    NotFound {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
    },
    /// The hub requires authentication or consent.
    #[error(
        "{endpoint} refuses {what} ({status}): it does not exist, is private or requires \
         consent; accept its terms there and set HF_TOKEN"
    )]
    Refused {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// The HTTP status.
        status: u16,
    },
    /// The hub answered with another error.
    #[error("{endpoint} answered the request for {what} with status {status}; try again later")]
    Status {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// The HTTP status.
        status: u16,
    },
    /// The hub could not be reached.
    #[error(
        "cannot reach {endpoint} for {what}: {source}; check the network, set HF_ENDPOINT to a \
         mirror, or give the path of a model that is already here"
    )]
    Network {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// What went wrong.
        source: Box<ureq::Error>,
    },
    /// The transfer of a file was interrupted, or the file could not be written.
    #[error("the download of {what} was interrupted: {source}; the next attempt resumes it")]
    Transfer {
        /// The file, repository and revision.
        what: What,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The hub's answer is invalid.
    #[error("{endpoint} sent an invalid answer about {what}: {problem}")]
    Answer {
        /// The hub.
        endpoint: String,
        /// The file, repository and revision.
        what: What,
        /// What is wrong with it.
        problem: String,
    },
    /// A file does not have the size that the hub announced.
    #[error("{what} has {found} bytes, expected {expected}; it was discarded, try again")]
    Size {
        /// The file, repository and revision.
        what: What,
        /// Number of bytes that arrived.
        found: u64,
        /// Number of bytes that the hub announced.
        expected: u64,
    },
    /// Another process is downloading the same file.
    #[error("another process is downloading {what}; try again when it is done")]
    Locked {
        /// The file, repository and revision.
        what: What,
    },
    /// The repository has no weights that a folder can be loaded from.
    #[error("{what} has no {WEIGHTS}{}", gguf_hint(.gguf))]
    NoWeights {
        /// The repository and revision.
        what: What,
        /// The repository's GGUF files.
        gguf: Vec<String>,
    },
    /// There is no folder for the cache.
    #[error("there is no home folder to keep downloads in; set HF_HOME to a folder")]
    NoHome,
}

impl HubError {
    /// Returns whether the hub could not be reached.
    pub fn is_network(&self) -> bool {
        matches!(self, Self::Network { .. })
    }
}

fn gguf_hint(files: &[String]) -> String {
    match files.first() {
        None => ", from which quell loads a model".to_owned(),
        Some(file) => {
            format!(
                ", but {} GGUF files; name one of them, such as {file}",
                files.len()
            )
        }
    }
}

/// A file or a whole repository, as error messages name it.
#[derive(Clone, Debug)]
pub struct What {
    /// The file; the whole repository if `None`.
    pub file: Option<String>,
    /// The repository, as `ORG/NAME`.
    pub repository: String,
    /// The branch, tag or commit.
    pub revision: String,
}

impl std::fmt::Display for What {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(file) = &self.file {
            write!(formatter, "file '{file}' in ")?;
        }
        write!(
            formatter,
            "repository '{}' at revision '{}'",
            self.repository, self.revision
        )
    }
}
