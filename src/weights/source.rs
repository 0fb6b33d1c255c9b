//! What a model file offers to the model builder: named tensors.

use super::DType;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// One stored tensor, or a part of one: what the file says of it. [`WeightSource::read`]
/// gives its weights.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// The tensor's name in the file.
    pub name: &'a str,
    /// How its numbers are stored.
    pub dtype: DType,
    /// Its dimensions, outermost first: a weight matrix is `[outputs, inputs]`.
    pub shape: &'a [usize],
    /// Which of the tensor's bytes these are: exactly as many as `dtype` and `shape` need,
    /// row after row, little-endian.
    pub bytes: Range<usize>,
}

impl<'a> TensorView<'a> {
    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Entry `index` of the outermost dimension (an expert of a stacked tensor).
    /// `None` when there is no such entry.
    pub fn slice(&self, index: usize) -> Option<TensorView<'a>> {
        let (&count, inner) = self.shape.split_first()?;
        if index >= count {
            return None;
        }
        let bytes = self.bytes.len() / count;
        let start = self.bytes.start + index * bytes;
        Some(TensorView {
            name: self.name,
            dtype: self.dtype,
            shape: inner,
            bytes: start..start + bytes,
        })
    }
}

/// A set of named tensors: a GGUF file or a Hugging Face folder.
pub trait WeightSource: Send + Sync {
    /// The tensor called `name`, if there is one.
    fn tensor(&self, name: &str) -> Option<TensorView<'_>>;

    /// The names of all tensors, in the file's order.
    fn names(&self) -> Vec<&str>;

    /// Reads the bytes of a tensor of this source, all of whose weights are finite.
    ///
    /// # Errors
    /// [`WeightsError::NotFinite`] for a NaN or an infinity,
    /// [`WeightsError::Shortened`] and [`WeightsError::Io`] when the file cannot be read.
    fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, WeightsError>;

    /// How many weights there are, and in which formats.
    fn count(&self) -> ParameterCount {
        let mut count = ParameterCount::default();
        let names = self.names().into_iter();
        for tensor in names.filter_map(|name| self.tensor(name)) {
            let elements = tensor.elements();
            let of_format = count.by_format.entry(tensor.dtype).or_default();
            *of_format = of_format.saturating_add(elements);
            count.total = count.total.saturating_add(elements);
            count.bytes += tensor.bytes.len();
        }
        count
    }

    /// Number of weights in all tensors together.
    fn parameters(&self) -> u64 {
        self.count().total as u64
    }

    /// The format that most weights are stored in, to show as the model's
    /// quantisation. `None` when there are no weights.
    fn dominant_dtype(&self) -> Option<DType> {
        self.count().main_format()
    }
}

/// How many weights a model has, and in which formats.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParameterCount {
    /// All weights.
    pub total: usize,
    /// Weights by format.
    pub by_format: BTreeMap<DType, usize>,
    /// Their bytes in the file.
    pub bytes: usize,
}

impl ParameterCount {
    /// Whether any weights are stored in a block format.
    pub fn is_quantised(&self) -> bool {
        self.by_format.keys().any(|format| !format.is_float())
    }

    /// The format that most weights are stored in. `None` when there are none.
    pub fn main_format(&self) -> Option<DType> {
        let most = self.by_format.iter().max_by_key(|(_, count)| **count);
        most.filter(|(_, count)| **count > 0)
            .map(|(format, _)| *format)
    }
}

/// Why a model file could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// The file could not be opened or read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The file's bytes are not what its format prescribes.
    #[error("{path} is not a valid {format} file: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// `GGUF`, `safetensors`, `config.json`, …
        format: &'static str,
        /// What was found and what was expected, with the offset where known.
        problem: String,
    },
    /// The file is valid, but uses something that quell does not read.
    #[error("{path}: {what} is not supported; {expected}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// What the file uses.
        what: String,
        /// What would have been accepted.
        expected: String,
    },
    /// The file became shorter while it was read: somebody else writes to it.
    #[error("{path} became shorter while it was read: it had {expected} bytes and has {found} now")]
    Shortened {
        /// The file.
        path: PathBuf,
        /// Its size in bytes when it was opened.
        expected: u64,
        /// Its size in bytes now.
        found: u64,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{path}: tensor {tensor:?} is not finite: weight {index} or its scale is NaN or infinite"
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The weight's index in the tensor, row after row; for a block format, that of the
        /// block's first weight.
        index: usize,
    },
    /// A file that the model needs is not there.
    #[error("{path} is missing: {reason}")]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// Who needs it.
        reason: String,
    },
}

/// Bytes at a file's beginning that show whether it is such a pointer.
pub(super) const LFS_POINTER: usize = 64;

/// Whether `bytes` are what Git leaves in a file's place until Git LFS has fetched it.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}

/// Refuses a file that is only a pointer to what was stored with Git LFS.
pub(super) fn refuse_lfs_pointer(bytes: &[u8], path: &Path) -> Result<(), WeightsError> {
    if !is_lfs_pointer(bytes) {
        return Ok(());
    }
    Err(WeightsError::Unsupported {
        path: path.to_owned(),
        what: "a Git LFS pointer in place of the file".into(),
        expected: "fetch the file itself with `git lfs pull`".into(),
    })
}
