//! GGUF files, the format of llama.cpp: versions 2 and 3, little-endian, whole or split
//! into parts.
//!
//! No part of a file is trusted. Each length is compared with the rest of the file before
//! it is used, so a broken file gives an error that names the problem. It never causes a
//! panic, or an allocation larger than a small multiple of the file.
//!
//! The format is described in ggml's `docs/gguf.md`.

mod header;
mod reader;
mod split;
mod types;
mod value;

#[cfg(any(test, feature = "internals"))]
pub use value::Array;
pub use value::Value;

use super::directory::{Contents, Directory, Repeated, TensorEntry};
use super::file::WeightFile;
use super::source::{LFS_POINTER, refuse_lfs_pointer};
use super::{TensorView, WeightSource, WeightsError};
use header::Header;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An open GGUF file: its metadata and the location of its tensors.
#[derive(Debug)]
pub struct Gguf {
    /// Path of the file, or of the first part of a split file.
    path: PathBuf,
    metadata: BTreeMap<String, Value>,
    directory: Directory,
}

impl Gguf {
    /// Opens and checks the file at `path`. For the first part of a split file
    /// (`…-00001-of-0000N.gguf`), opens all parts. The files must not be changed while they
    /// are open.
    ///
    /// # Errors
    /// Returns [`WeightsError::Io`] or [`WeightsError::Shortened`] if a file cannot be
    /// read, [`WeightsError::MissingFile`] if a part is absent,
    /// [`WeightsError::Unsupported`] for something that quell does not read, such as a
    /// version, byte order or tensor type, and [`WeightsError::Malformed`] for anything
    /// else.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut file = Self::from_contents(path, Contents::File(WeightFile::open(path)?))?;
        file.open_other_parts()?;
        Ok(file)
    }

    /// Checks a file that is already in memory. Error messages call it `path`.
    ///
    /// # Errors
    /// Returns the same errors as [`Gguf::open`], and [`WeightsError::Unsupported`] for a
    /// part of a split file.
    #[cfg(any(test, feature = "internals"))]
    pub fn from_bytes(bytes: Vec<u8>, path: &Path) -> Result<Self, WeightsError> {
        let file = Self::from_contents(path, Contents::Owned(bytes))?;
        file.refuse_parts()?;
        Ok(file)
    }

    fn from_contents(path: &Path, contents: Contents) -> Result<Self, WeightsError> {
        refuse_lfs_pointer(&contents.head(LFS_POINTER.min(contents.len()))?, path)?;
        let header = Header::of(&contents, path)?;
        let mut file = Self {
            path: path.to_owned(),
            metadata: header.metadata,
            directory: Directory::default(),
        };
        file.add_part(path, contents, header.tensors)?;
        Ok(file)
    }

    fn add_part(
        &mut self,
        path: &Path,
        contents: Contents,
        entries: Vec<TensorEntry>,
    ) -> Result<(), WeightsError> {
        let added = self.directory.add(path, contents, entries);
        added.map_err(|Repeated { name, first }| {
            let first = first.display();
            Problem::malformed(format!("tensor {name:?} is also in {first}")).at(path)
        })
    }

    /// Returns the value of metadata `key`, if the file has it.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Returns all metadata keys in alphabetical order.
    #[cfg(any(test, feature = "internals"))]
    pub fn metadata_keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Returns the path of the file, or of the first part of a split file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the size of all parts together, in bytes.
    #[cfg(any(test, feature = "internals"))]
    pub fn file_bytes(&self) -> u64 {
        self.directory.file_bytes()
    }

    /// Returns the usual name of the file's quantisation recipe, such as `Q4_K_M`, from
    /// metadata `general.file_type`. `None` if the file does not state one or quell does
    /// not know it.
    pub fn file_type(&self) -> Option<&'static str> {
        types::file_type(self.metadata("general.file_type")?.as_u64()?)
    }
}

impl WeightSource for Gguf {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.directory.tensor(name)
    }

    fn names(&self) -> Vec<&str> {
        self.directory.names()
    }

    fn read(&self, tensor: &TensorView<'_>) -> Result<Cow<'_, [u8]>, WeightsError> {
        self.directory.read(tensor)
    }
}

/// A problem with a file, before the file's path is known.
#[derive(Debug)]
enum Problem {
    Malformed(String),
    Unsupported {
        what: String,
        expected: String,
    },
    /// Too little of the file was read: `needed` bytes from its beginning are required.
    Short {
        needed: usize,
    },
}

impl Problem {
    fn malformed(problem: String) -> Self {
        Self::Malformed(problem)
    }

    fn at(self, path: &Path) -> WeightsError {
        let path = path.to_owned();
        match self {
            Self::Short { needed } => {
                Self::malformed(format!("it ends before byte {needed}")).at(&path)
            }
            Self::Malformed(problem) => WeightsError::Malformed {
                path,
                format: "GGUF",
                problem,
            },
            Self::Unsupported { what, expected } => WeightsError::Unsupported {
                path,
                what,
                expected,
            },
        }
    }
}
