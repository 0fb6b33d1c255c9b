//! GGUF files, the format of llama.cpp: versions 2 and 3, little-endian, whole or
//! split into parts.
//!
//! Nothing in a file is trusted: each length is compared with what is left of the
//! file before it is used, so a broken file gives an error that names what is
//! wrong, never a panic or an allocation larger than a small multiple of the file.
//!
//! The format is described in ggml's `docs/gguf.md`.

mod header;
mod reader;
mod split;
mod types;
mod value;

pub use value::{Array, Value};

use super::directory::{Contents, Directory, Repeated, TensorEntry};
use super::file::WeightFile;
use super::source::{LFS_POINTER, refuse_lfs_pointer};
use super::{TensorView, WeightSource, WeightsError};
use header::Header;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// An open GGUF file: its metadata, and its tensors in place.
#[derive(Debug)]
pub struct Gguf {
    /// The file, or the first part of a split one.
    path: PathBuf,
    version: u32,
    metadata: BTreeMap<String, Value>,
    directory: Directory,
}

impl Gguf {
    /// Opens and checks the file at `path`. The first part of a split file
    /// (`…-00001-of-0000N.gguf`) opens all parts. The files must not be changed
    /// while they are open.
    ///
    /// # Errors
    /// [`WeightsError::Io`] when a file cannot be read,
    /// [`WeightsError::MissingFile`] when a part is not there,
    /// [`WeightsError::Unsupported`] for a version, byte order or tensor type that
    /// quell does not read, [`WeightsError::Malformed`] for anything else.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut file = Self::from_contents(path, Contents::File(WeightFile::open(path)?))?;
        file.open_other_parts()?;
        Ok(file)
    }

    /// Checks a file that is already in memory; `path` is what messages call it.
    ///
    /// # Errors
    /// As [`Gguf::open`]; a part of a split file is [`WeightsError::Unsupported`].
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
            version: header.version,
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

    /// The format's version: 2 or 3.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// The value of metadata `key`.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// All metadata keys, in alphabetical order.
    pub fn metadata_keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// Where the file is: the first part of a split one.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in bytes, all parts together.
    pub fn file_bytes(&self) -> u64 {
        self.directory.file_bytes()
    }

    /// The usual name of the recipe that the file was quantised by, such as
    /// `Q4_K_M`, from metadata `general.file_type`. `None` when the file does not
    /// say, or names a recipe unknown to quell.
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

/// What is wrong with a file, before it is known which file it is.
#[derive(Debug)]
enum Problem {
    Malformed(String),
    Unsupported {
        what: String,
        expected: String,
    },
    /// The part of the file that was read is too short: so many bytes of it are needed.
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
