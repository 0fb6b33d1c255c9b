//! The header of one GGUF file: its metadata and its tensor directory, both checked against
//! the file that they describe.

use super::Problem;
use super::reader::Reader;
use super::types::tensor_type;
use super::value::Value;
use crate::weights::directory::{Contents, TensorEntry};
use crate::weights::{DType, WeightsError};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// Alignment of the tensor data if the file has no `general.alignment`.
const DEFAULT_ALIGNMENT: u64 = 32;
const MOST_DIMENSIONS: u32 = 4;

/// Bytes that are read first. Most headers are shorter.
const FIRST_READ: usize = 8 << 20;
/// Maximum length of a header in bytes, about thirty times that of the longest real ones.
const LONGEST_HEADER: usize = 1 << 30;

/// The contents of a GGUF header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: BTreeMap<String, Value>,
    /// The tensors in the file's order. No two names are equal and no two ranges overlap.
    pub(super) tensors: Vec<TensorEntry>,
}

impl Header {
    /// Reads the header of a file.
    pub(super) fn of(contents: &Contents, path: &Path) -> Result<Self, WeightsError> {
        let size = contents.len();
        let mut read = FIRST_READ.min(size);
        loop {
            match Self::read(&contents.head(read)?, size) {
                Err(Problem::Short { needed }) if needed > LONGEST_HEADER => {
                    let problem = format!(
                        "its header is longer than {needed} bytes; at most {LONGEST_HEADER} are read"
                    );
                    return Err(Problem::malformed(problem).at(path));
                }
                Err(Problem::Short { needed }) => read = needed.max(4 * read).min(size),
                outcome => return outcome.map_err(|problem| problem.at(path)),
            }
        }
    }

    /// Reads the header of a file of `size` bytes that begins with `bytes`.
    fn read(bytes: &[u8], size: usize) -> Result<Self, Problem> {
        let mut reader = Reader::new(bytes, size);
        check_magic(&mut reader)?;
        require_version(&mut reader)?;
        let tensor_count = reader.count(SMALLEST_TENSOR, "the tensor count")?;
        let metadata_count = reader.count(SMALLEST_METADATA, "the metadata count")?;
        let metadata = read_metadata(&mut reader, metadata_count)?;
        let alignment = alignment(&metadata)?;
        let infos = read_tensor_infos(&mut reader, tensor_count)?;
        let data_start = align_up(reader.position() as u64, alignment)
            .ok_or_else(|| Problem::malformed("the start of the tensor data overflows".into()))?;
        let data = Data {
            start: data_start,
            end: size as u64,
            alignment,
        };
        let tensors = infos
            .into_iter()
            .map(|info| data.place(info))
            .collect::<Result<Vec<_>, _>>()?;
        check_no_overlap(&tensors)?;
        Ok(Self { metadata, tensors })
    }
}

/// Minimum size of a tensor entry in bytes: an empty name, the number of dimensions, one
/// dimension, the type and the offset.
const SMALLEST_TENSOR: usize = 8 + 4 + 8 + 4 + 8;
/// Minimum size of a metadata entry in bytes: an empty key, the type and one byte of value.
const SMALLEST_METADATA: usize = 8 + 4 + 1;

fn check_magic(reader: &mut Reader<'_>) -> Result<(), Problem> {
    let magic = reader.take(4, "the magic number")?;
    if magic == b"GGUF" {
        return Ok(());
    }
    Err(Problem::malformed(format!(
        "it begins with {:?}, not \"GGUF\"",
        magic.escape_ascii().to_string()
    )))
}

fn require_version(reader: &mut Reader<'_>) -> Result<(), Problem> {
    let version: u32 = reader.number("the version")?;
    match version {
        2 | 3 => Ok(()),
        _ if matches!(version.swap_bytes(), 1..=3) => Err(Problem::Unsupported {
            what: format!("a big-endian GGUF file (version {})", version.swap_bytes()),
            expected: "expected a little-endian file of version 2 or 3".into(),
        }),
        _ => Err(Problem::Unsupported {
            what: format!("GGUF version {version}"),
            expected: "expected version 2 or 3".into(),
        }),
    }
}

fn read_metadata(
    reader: &mut Reader<'_>,
    count: usize,
) -> Result<BTreeMap<String, Value>, Problem> {
    let mut metadata = BTreeMap::new();
    for index in 0..count {
        let key = reader.name(&format!("metadata key {index}"))?;
        let value = reader.value(key)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(Problem::malformed(format!(
                "metadata {key:?} appears twice"
            )));
        }
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, Problem> {
    let Some(value) = metadata.get("general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() => Ok(alignment),
        Some(alignment) => Err(Problem::malformed(format!(
            "metadata \"general.alignment\" is {alignment}; it must be a power of two"
        ))),
        None => Err(Problem::malformed(format!(
            "metadata \"general.alignment\" is of type {}; it must be an integer",
            value.type_name()
        ))),
    }
}

/// A tensor entry as stored. Its offset has not been checked yet.
struct TensorInfo {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: u64,
    offset: u64,
}

fn read_tensor_infos(reader: &mut Reader<'_>, count: usize) -> Result<Vec<TensorInfo>, Problem> {
    let mut names = HashSet::new();
    let mut infos = Vec::new();
    for index in 0..count {
        let name = reader.name(&format!("the name of tensor {index}"))?;
        if !names.insert(name) {
            return Err(Problem::malformed(format!("tensor {name:?} appears twice")));
        }
        infos.push(read_tensor_info(reader, name)?);
    }
    Ok(infos)
}

fn read_tensor_info(reader: &mut Reader<'_>, name: &str) -> Result<TensorInfo, Problem> {
    let what = format!("tensor {name:?}");
    let dimensions: u32 = reader.number(&what)?;
    if !(1..=MOST_DIMENSIONS).contains(&dimensions) {
        return Err(Problem::malformed(format!(
            "{what} has {dimensions} dimensions; a tensor must have 1 to {MOST_DIMENSIONS}"
        )));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        let dimension: u64 = reader.number(&what)?;
        match usize::try_from(dimension) {
            Ok(dimension) if dimension > 0 => shape.push(dimension),
            _ => {
                return Err(Problem::malformed(format!(
                    "{what} has a dimension of {dimension}; it must be positive and fit a \
                     machine word"
                )));
            }
        }
    }
    // The file stores the innermost dimension first.
    let row = shape[0];
    shape.reverse();
    let dtype = read_dtype(reader, &what)?;
    let bytes = tensor_bytes(dtype, row, &shape).ok_or_else(|| {
        if row.is_multiple_of(dtype.block_elements()) {
            Problem::malformed(format!(
                "{what} of shape {shape:?} has more bytes than can be addressed"
            ))
        } else {
            Problem::malformed(format!(
                "{what} has rows of {row} weights; {dtype} needs a multiple of {}",
                dtype.block_elements()
            ))
        }
    })?;
    let offset = reader.number(&what)?;
    Ok(TensorInfo {
        name: name.to_owned(),
        dtype,
        shape,
        bytes,
        offset,
    })
}

fn read_dtype(reader: &mut Reader<'_>, what: &str) -> Result<DType, Problem> {
    let number: u32 = reader.number(what)?;
    let kind = match tensor_type(number) {
        Some(Ok(dtype)) => return Ok(dtype),
        Some(Err(name)) => format!("type {name} ({number})"),
        None => format!("type {number}"),
    };
    let readable: Vec<_> = DType::ALL.iter().map(|dtype| dtype.name()).collect();
    Err(Problem::Unsupported {
        what: format!("{what}: {kind}"),
        expected: format!("supported are {}", readable.join(", ")),
    })
}

/// Returns the size of a tensor in bytes. `None` if a row is not a whole number of blocks,
/// or if the number of weights or bytes overflows.
fn tensor_bytes(dtype: DType, row: usize, shape: &[usize]) -> Option<u64> {
    if !row.is_multiple_of(dtype.block_elements()) {
        return None;
    }
    let elements = shape
        .iter()
        .try_fold(1usize, |product, &dimension| product.checked_mul(dimension))?;
    dtype.bytes_for(elements).map(|bytes| bytes as u64)
}

fn align_up(offset: u64, alignment: u64) -> Option<u64> {
    Some(offset.checked_add(alignment - 1)? & !(alignment - 1))
}

/// The part of the file that holds the tensor data.
struct Data {
    start: u64,
    end: u64,
    alignment: u64,
}

impl Data {
    /// Checks a tensor's offset and turns it into a range of the file.
    fn place(&self, info: TensorInfo) -> Result<TensorEntry, Problem> {
        let TensorInfo {
            name,
            dtype,
            shape,
            bytes,
            offset,
        } = info;
        if !offset.is_multiple_of(self.alignment) {
            return Err(Problem::malformed(format!(
                "tensor {name:?} is at offset {offset}, which is not a multiple of the alignment {}",
                self.alignment
            )));
        }
        let start = self.start.checked_add(offset);
        let end = start.and_then(|start| start.checked_add(bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= self.end)) else {
            return Err(Problem::malformed(format!(
                "tensor {name:?} of {bytes} bytes at offset {offset} of the tensor data, which \
                 begins at {}, ends beyond the file's {} bytes",
                self.start, self.end
            )));
        };
        Ok(TensorEntry {
            name,
            dtype,
            shape,
            // Both fit in `usize`: they are at most the size of the file.
            range: start as usize..end as usize,
        })
    }
}

fn check_no_overlap(tensors: &[TensorEntry]) -> Result<(), Problem> {
    let mut by_start: Vec<&TensorEntry> = tensors.iter().collect();
    by_start.sort_by_key(|tensor| tensor.range.start);
    for pair in by_start.windows(2) {
        if pair[0].range.end > pair[1].range.start {
            return Err(Problem::malformed(format!(
                "tensors {:?} (bytes {:?}) and {:?} (bytes {:?}) overlap",
                pair[0].name, pair[0].range, pair[1].name, pair[1].range
            )));
        }
    }
    Ok(())
}
