//! The tensors of one or more open files, found by name: what GGUF files and
//! Hugging Face folders have in common.

use super::map::MappedFile;
use super::{DType, TensorView};
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The bytes of a model file.
#[derive(Debug)]
pub(super) enum Contents {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

impl Contents {
    pub(super) fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file.bytes(),
            Self::Owned(bytes) => bytes,
        }
    }
}

/// Where a tensor lies in its file.
#[derive(Debug)]
pub(super) struct TensorEntry {
    pub(super) name: String,
    pub(super) dtype: DType,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// The tensor's bytes: inside the file, as many as `dtype` and `shape` need.
    pub(super) range: Range<usize>,
}

/// Open files and the tensors in them.
#[derive(Debug, Default)]
pub(super) struct Directory {
    parts: Vec<Part>,
    tensors: Vec<Tensor>,
    /// Position in `tensors` by name.
    by_name: HashMap<String, usize>,
}

#[derive(Debug)]
struct Part {
    path: PathBuf,
    contents: Contents,
}

#[derive(Debug)]
struct Tensor {
    /// Position in `parts`.
    part: usize,
    entry: TensorEntry,
}

/// A tensor of the file being added that an earlier one has, too.
#[derive(Debug)]
pub(super) struct Repeated {
    pub(super) name: String,
    /// The earlier file.
    pub(super) first: PathBuf,
}

impl Directory {
    /// Adds a file and its tensors.
    ///
    /// # Errors
    /// When one of the names is taken; the directory is then of no further use.
    pub(super) fn add(
        &mut self,
        path: &Path,
        contents: Contents,
        entries: Vec<TensorEntry>,
    ) -> Result<(), Repeated> {
        let part = self.parts.len();
        self.parts.push(Part {
            path: path.to_owned(),
            contents,
        });
        for entry in entries {
            let name = entry.name.clone();
            if let Some(&first) = self.by_name.get(&name) {
                let first = self.parts[self.tensors[first].part].path.clone();
                return Err(Repeated { name, first });
            }
            self.by_name.insert(name, self.tensors.len());
            self.tensors.push(Tensor { part, entry });
        }
        Ok(())
    }

    /// Number of tensors.
    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Size in bytes of all files together.
    pub(super) fn file_bytes(&self) -> u64 {
        let parts = self.parts.iter();
        parts.map(|part| part.contents.bytes().len() as u64).sum()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let Tensor { part, entry } = self.tensors.get(*self.by_name.get(name)?)?;
        let bytes = self.parts.get(*part)?.contents.bytes();
        Some(TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: bytes.get(entry.range.clone())?,
        })
    }

    pub(super) fn names(&self) -> Vec<&str> {
        let tensors = self.tensors.iter();
        tensors.map(|tensor| tensor.entry.name.as_str()).collect()
    }

    pub(super) fn release(&self, name: &str) {
        let Some(&index) = self.by_name.get(name) else {
            return;
        };
        let Tensor { part, entry } = &self.tensors[index];
        if let Contents::Mapped(file) = &self.parts[*part].contents {
            file.release(entry.range.clone());
        }
    }
}
