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

use super::map::MappedFile;
use super::{TensorView, WeightSource, WeightsError};
use header::{Header, TensorEntry};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// An open GGUF file: its metadata, and its tensors in place.
#[derive(Debug)]
pub struct Gguf {
    version: u32,
    metadata: BTreeMap<String, Value>,
    /// The file, or all parts of a split one in order; never empty.
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
enum Contents {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

impl Contents {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file.bytes(),
            Self::Owned(bytes) => bytes,
        }
    }
}

#[derive(Debug)]
struct Tensor {
    /// Position in `parts`.
    part: usize,
    entry: TensorEntry,
}

impl Gguf {
    /// Maps and checks the file at `path`. The first part of a split file
    /// (`…-00001-of-0000N.gguf`) opens all parts. The files must not be changed
    /// while they are open; see [`MappedFile`].
    ///
    /// # Errors
    /// [`WeightsError::Io`] when a file cannot be read,
    /// [`WeightsError::MissingFile`] when a part is not there,
    /// [`WeightsError::Unsupported`] for a version, byte order or tensor type that
    /// quell does not read, [`WeightsError::Malformed`] for anything else.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut file = Self::from_contents(path, Contents::Mapped(MappedFile::open(path)?))?;
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
        let header = Header::read(contents.bytes()).map_err(|problem| problem.at(path))?;
        let mut file = Self {
            version: header.version,
            metadata: header.metadata,
            parts: Vec::new(),
            tensors: Vec::new(),
            by_name: HashMap::new(),
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
        let part = self.parts.len();
        for entry in entries {
            let index = self.tensors.len();
            if let Some(first) = self.by_name.insert(entry.name.clone(), index) {
                let first = &self.parts[self.tensors[first].part].path;
                return Err(Problem::malformed(format!(
                    "tensor {:?} is also in {}",
                    entry.name,
                    first.display()
                ))
                .at(path));
            }
            self.tensors.push(Tensor { part, entry });
        }
        self.parts.push(Part {
            path: path.to_owned(),
            contents,
        });
        Ok(())
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
        self.parts.first().map_or(Path::new(""), |part| &part.path)
    }

    /// Size in bytes, all parts together.
    pub fn file_bytes(&self) -> u64 {
        let sizes = self.parts.iter();
        sizes.map(|part| part.contents.bytes().len() as u64).sum()
    }

    /// The usual name of the recipe that the file was quantised by, such as
    /// `Q4_K_M`, from metadata `general.file_type`. `None` when the file does not
    /// say, or names a recipe unknown to quell.
    pub fn file_type(&self) -> Option<&'static str> {
        types::file_type(self.metadata("general.file_type")?.as_u64()?)
    }

    fn view<'a>(&'a self, tensor: &'a Tensor) -> Option<TensorView<'a>> {
        let entry = &tensor.entry;
        let bytes = self.parts.get(tensor.part)?.contents.bytes();
        Some(TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            data: bytes.get(entry.range.clone())?,
        })
    }
}

impl WeightSource for Gguf {
    fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        self.view(self.tensors.get(*self.by_name.get(name)?)?)
    }

    fn names(&self) -> Vec<&str> {
        let tensors = self.tensors.iter();
        tensors.map(|tensor| tensor.entry.name.as_str()).collect()
    }

    fn release(&self, name: &str) {
        let Some(tensor) = self.by_name.get(name).map(|&index| &self.tensors[index]) else {
            return;
        };
        if let Contents::Mapped(file) = &self.parts[tensor.part].contents {
            file.release(tensor.entry.range.clone());
        }
    }
}

/// What is wrong with a file, before it is known which file it is.
#[derive(Debug)]
enum Problem {
    Malformed(String),
    Unsupported { what: String, expected: String },
}

impl Problem {
    fn malformed(problem: String) -> Self {
        Self::Malformed(problem)
    }

    fn at(self, path: &Path) -> WeightsError {
        let path = path.to_owned();
        match self {
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
