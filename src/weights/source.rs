//! Named tensors, which a model file offers to the model builder.

use super::DType;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Description of a stored tensor or of a part of one. [`WeightSource::read`] reads its
/// weights.
#[derive(Clone, Debug)]
pub struct TensorView<'a> {
    /// Name of the tensor in the file.
    pub name: &'a str,
    /// Storage format of the numbers.
    pub dtype: DType,
    /// Dimensions, outermost first. A weight matrix is `[outputs, inputs]`.
    pub shape: &'a [usize],
    /// Byte range within the tensor. It has exactly the length that `dtype` and `shape`
    /// need. The data is row after row, little-endian.
    pub bytes: Range<usize>,
}

impl<'a> TensorView<'a> {
    /// Returns the number of weights.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns entry `index` of the outermost dimension, such as an expert of a stacked
    /// tensor. `None` if there is no such entry.
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
    /// Returns the tensor called `name`, if there is one.
    fn tensor(&self, name: &str) -> Option<TensorView<'_>>;

    /// Returns the names of all tensors, in the file's order, and then those of quantised matrices
    /// that are made of several tensors.
    fn names(&self) -> Vec<&str>;

    /// Reads the bytes of a tensor of this source. All of its weights are finite.
    ///
    /// # Errors
    /// Returns [`WeightsError::NotFinite`] if a weight is NaN or infinite, and
    /// [`WeightsError::Shortened`] or [`WeightsError::Io`] if the bytes cannot be read.
    fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, WeightsError>;

    /// Counts the weights, in total and by format.
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
}

/// Number of weights in a model, in total and by format.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParameterCount {
    /// Number of all weights.
    pub total: usize,
    /// Number of weights by format.
    pub by_format: BTreeMap<DType, usize>,
    /// Size of the weights in bytes, as they are read.
    pub bytes: usize,
}

impl ParameterCount {
    /// Returns whether any weights are stored in a block format.
    pub fn is_quantised(&self) -> bool {
        self.by_format.keys().any(|format| !format.is_float())
    }

    /// Returns the format that most weights are stored in, or `None` if there are no
    /// weights.
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
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The contents of the file do not follow its format.
    #[error("{path} is not a valid {format} file: {problem}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Name of the format: `GGUF`, `safetensors`, `config.json`, …
        format: &'static str,
        /// What was found and what was expected, with the offset if it is known.
        problem: String,
    },
    /// The file is valid, but uses something that quell does not read.
    #[error("{path}: {what} is not supported; {expected}")]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The unsupported feature that the file uses.
        what: String,
        /// What is supported instead.
        expected: String,
    },
    /// The file became shorter after it was opened, because something else wrote to it.
    #[error("{path} became shorter while it was read: it had {expected} bytes and now has {found}")]
    Shortened {
        /// The file.
        path: PathBuf,
        /// Size in bytes when the file was opened.
        expected: u64,
        /// Size in bytes now.
        found: u64,
    },
    /// A weight is NaN or infinite.
    #[error(
        "{path}: tensor {tensor:?} is not finite: weight {index} or its scale is NaN or infinite"
    )]
    NotFinite {
        /// The file.
        path: PathBuf,
        /// Name of the tensor.
        tensor: String,
        /// Index of the weight in the tensor, row after row. In a block format, the index
        /// of the first weight of the block.
        index: usize,
    },
    /// A file that the model needs does not exist.
    #[error("{path} is missing: {reason}")]
    MissingFile {
        /// The file.
        path: PathBuf,
        /// Why the file is needed.
        reason: String,
    },
}

/// Number of bytes at the beginning of a file that suffice to recognise a Git LFS pointer.
pub(super) const LFS_POINTER: usize = 64;

/// Returns whether `bytes` begin a Git LFS pointer, which stands in for a file until Git
/// LFS has fetched it.
pub(crate) fn is_lfs_pointer(bytes: &[u8]) -> bool {
    bytes.starts_with(b"version https://git-lfs.github.com/spec/")
}

/// Fails if a file is only a Git LFS pointer.
pub(super) fn refuse_lfs_pointer(bytes: &[u8], path: &Path) -> Result<(), WeightsError> {
    if !is_lfs_pointer(bytes) {
        return Ok(());
    }
    Err(WeightsError::Unsupported {
        path: path.to_owned(),
        what: "a Git LFS pointer instead of the file".into(),
        expected: "fetch the file itself with `git lfs pull`".into(),
    })
}
