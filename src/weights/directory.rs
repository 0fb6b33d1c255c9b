//! The tensors of one or more open files, by name. GGUF files and Hugging Face folders
//! share this code.

use super::file::WeightFile;
use super::raw::{RawTensor, RawType};
use super::{DType, TensorView, WeightsError, quant};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Bytes that a thread reads before it checks them. They are then still in its cache.
const CHUNK: usize = 1 << 20;

/// Maximum number of threads that read one tensor.
const MOST_THREADS: usize = 8;

/// The contents of a model file, on disk or in memory.
#[derive(Debug)]
pub(super) enum Contents {
    File(WeightFile),
    #[cfg(any(test, feature = "internals"))]
    Owned(Vec<u8>),
}

impl Contents {
    /// Returns the number of bytes.
    pub(super) fn len(&self) -> usize {
        match self {
            Self::File(file) => file.len(),
            #[cfg(any(test, feature = "internals"))]
            Self::Owned(bytes) => bytes.len(),
        }
    }

    /// Returns the first `count` bytes. `count` must not exceed [`Contents::len`].
    pub(super) fn head(&self, count: usize) -> Result<Cow<'_, [u8]>, WeightsError> {
        match self {
            Self::File(file) => {
                let mut bytes = vec![0; count];
                file.read(0, &mut bytes)?;
                Ok(Cow::Owned(bytes))
            }
            #[cfg(any(test, feature = "internals"))]
            Self::Owned(bytes) => Ok(Cow::Borrowed(&bytes[..count])),
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
    /// Byte range in the file. It lies inside the file and has the length that `dtype` and
    /// `shape` need.
    pub(super) range: Range<usize>,
}

/// Open files and the tensors in them.
#[derive(Debug, Default)]
pub(super) struct Directory {
    parts: Vec<Part>,
    tensors: Vec<Tensor>,
    /// Position in `tensors` by name.
    by_name: HashMap<String, usize>,
    /// Tensors whose numbers are only part of a quantised matrix, by name.
    raw: BTreeMap<String, (usize, RawEntry)>,
}

/// Where a tensor lies in its file whose numbers are only part of a quantised matrix.
#[derive(Debug)]
pub(super) struct RawEntry {
    pub(super) name: String,
    pub(super) kind: RawType,
    /// Outermost dimension first.
    pub(super) shape: Vec<usize>,
    /// Byte range in the file, as in a [`TensorEntry`].
    pub(super) range: Range<usize>,
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

/// A tensor name that an earlier file already uses.
#[derive(Debug)]
pub(super) struct Repeated {
    pub(super) name: String,
    /// The file that has the name first.
    pub(super) first: PathBuf,
}

impl Directory {
    /// Adds a file and its tensors.
    ///
    /// # Errors
    /// Returns [`Repeated`] if one of the names is taken. The directory must not be used
    /// after that.
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

    /// Adds tensors of the file that was added last.
    ///
    /// # Errors
    /// Returns the same error as [`Directory::add`].
    pub(super) fn add_raw(&mut self, entries: Vec<RawEntry>) -> Result<(), Repeated> {
        let part = self.parts.len() - 1;
        for entry in entries {
            let name = entry.name.clone();
            let other = self
                .by_name
                .get(&name)
                .map(|&index| self.tensors[index].part);
            if let Some(first) = other.or(self.raw.get(&name).map(|(part, _)| *part)) {
                let first = self.parts[first].path.clone();
                return Err(Repeated { name, first });
            }
            self.raw.insert(name, (part, entry));
        }
        Ok(())
    }

    /// Returns the names of the tensors that are only part of a quantised matrix.
    pub(super) fn raw_names(&self) -> impl Iterator<Item = &str> {
        self.raw.keys().map(String::as_str)
    }

    /// Returns the tensor called `name`, if it is only part of a quantised matrix.
    pub(super) fn raw(&self, name: &str) -> Option<RawTensor<'_>> {
        let (_, entry) = self.raw.get(name)?;
        Some(RawTensor {
            kind: entry.kind,
            shape: &entry.shape,
        })
    }

    /// Returns the path of the file that has this tensor, or of the first file.
    pub(super) fn path_of(&self, name: &str) -> PathBuf {
        let plain = self
            .by_name
            .get(name)
            .map(|&index| self.tensors[index].part);
        let part = plain.or(self.raw.get(name).map(|(part, _)| *part));
        let part = self.parts.get(part.unwrap_or(0));
        part.map_or_else(PathBuf::new, |part| part.path.clone())
    }

    /// Reads some bytes of a tensor that is only part of a quantised matrix.
    pub(super) fn read_raw(
        &self,
        name: &str,
        bytes: Range<usize>,
    ) -> Result<Vec<u8>, WeightsError> {
        let place = self.raw.get(name).and_then(|(part, entry)| {
            let start = entry.range.start.checked_add(bytes.start)?;
            let end = entry.range.start.checked_add(bytes.end)?;
            (start <= end && end <= entry.range.end).then_some((&self.parts[*part], start..end))
        });
        let Some((part, range)) = place else {
            return Err(self.no_tensor(name, &bytes));
        };
        match &part.contents {
            #[cfg(any(test, feature = "internals"))]
            Contents::Owned(bytes) => Ok(bytes[range].to_vec()),
            Contents::File(file) => {
                let mut data = vec![0; range.len()];
                in_chunks(&mut data, 1, &|first, chunk| {
                    file.read(range.start + first, chunk)
                })?;
                Ok(data)
            }
        }
    }

    fn no_tensor(&self, name: &str, bytes: &Range<usize>) -> WeightsError {
        let what = format!("no tensor {name:?} with bytes {bytes:?}");
        WeightsError::Io {
            path: self.path_of(name),
            source: std::io::Error::new(std::io::ErrorKind::NotFound, what),
        }
    }

    /// Returns the number of tensors.
    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Returns the size of all files together, in bytes.
    #[cfg(any(test, feature = "internals"))]
    pub(super) fn file_bytes(&self) -> u64 {
        let parts = self.parts.iter();
        parts.map(|part| part.contents.len() as u64).sum()
    }

    pub(super) fn tensor(&self, name: &str) -> Option<TensorView<'_>> {
        let Tensor { entry, .. } = self.tensors.get(*self.by_name.get(name)?)?;
        Some(TensorView {
            name: &entry.name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: 0..entry.range.len(),
        })
    }

    pub(super) fn names(&self) -> Vec<&str> {
        let tensors = self.tensors.iter();
        tensors.map(|tensor| tensor.entry.name.as_str()).collect()
    }

    /// Reads the bytes of a tensor; see [`WeightSource::read`](super::WeightSource::read).
    pub(super) fn read(&self, view: &TensorView<'_>) -> Result<Cow<'_, [u8]>, WeightsError> {
        let tensor = self
            .by_name
            .get(view.name)
            .map(|&index| &self.tensors[index]);
        let place = tensor.and_then(|Tensor { part, entry }| {
            let start = entry.range.start.checked_add(view.bytes.start)?;
            let end = entry.range.start.checked_add(view.bytes.end)?;
            (start <= end && end <= entry.range.end).then_some((&self.parts[*part], start..end))
        });
        let Some((part, range)) = place else {
            return Err(self.no_tensor(view.name, &view.bytes));
        };
        let not_finite = |first: usize, index: usize| WeightsError::NotFinite {
            path: part.path.clone(),
            tensor: view.name.to_owned(),
            index: elements(view.dtype, view.bytes.start + first) + index,
        };
        match &part.contents {
            #[cfg(any(test, feature = "internals"))]
            Contents::Owned(bytes) => {
                let data = &bytes[range];
                match quant::first_not_finite(view.dtype, data) {
                    Some(index) => Err(not_finite(0, index)),
                    None => Ok(Cow::Borrowed(data)),
                }
            }
            Contents::File(file) => {
                let mut data = vec![0; range.len()];
                in_chunks(&mut data, view.dtype.block_bytes(), &|first, chunk| {
                    file.read(range.start + first, chunk)?;
                    match quant::first_not_finite(view.dtype, chunk) {
                        Some(index) => Err(not_finite(first, index)),
                        None => Ok(()),
                    }
                })?;
                Ok(Cow::Owned(data))
            }
        }
    }
}

/// Returns the number of weights in the first `bytes` bytes of a tensor.
fn elements(dtype: DType, bytes: usize) -> usize {
    bytes / dtype.block_bytes() * dtype.block_elements()
}

pub(super) type Fill<'a> = dyn Fn(usize, &mut [u8]) -> Result<(), WeightsError> + Sync + 'a;

/// Calls `fill` for each chunk of `data` with the chunk's offset. Chunks are whole blocks
/// of `block` bytes. Several threads share the work if there are enough chunks.
pub(super) fn in_chunks(
    data: &mut [u8],
    block: usize,
    fill: &Fill<'_>,
) -> Result<(), WeightsError> {
    let chunk = CHUNK.next_multiple_of(block);
    let in_turn = |start: usize, share: &mut [u8]| {
        let chunks = share.chunks_mut(chunk).enumerate();
        let mut filled = chunks.map(|(index, part)| fill(start + index * chunk, part));
        filled.try_for_each(|outcome| outcome)
    };
    let chunks = data.len().div_ceil(chunk);
    let most = MOST_THREADS.min(chunks / 2);
    // Asking the system for its processors takes longer than reading a small tensor.
    let processors = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if most < 2 { 1 } else { most.min(processors()) };
    if threads < 2 {
        return in_turn(0, data);
    }
    let share = chunks.div_ceil(threads) * chunk;
    std::thread::scope(|scope| {
        let mut shares = data.chunks_mut(share).enumerate();
        let own = shares.next();
        let others: Vec<_> = shares
            .map(|(index, part)| scope.spawn(move || in_turn(index * share, part)))
            .collect();
        let mut outcome = own.map_or(Ok(()), |(_, part)| in_turn(0, part));
        for thread in others {
            let theirs = thread.join();
            let theirs = theirs.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and(theirs);
        }
        outcome
    })
}
