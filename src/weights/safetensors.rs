//! The header of one safetensors file, checked against the file that it describes.
//!
//! Only the header is read. The tensors' bytes must follow each other without gaps up to
//! the end of the file, and no name may appear twice.

use super::directory::{RawEntry, TensorEntry};
use super::file::WeightFile;
use super::raw::RawType;
use super::source::{LFS_POINTER, refuse_lfs_pointer};
use super::{DType, WeightsError};
use ::safetensors::tensor::{Dtype as StoredDtype, TensorInfo};
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// Size in bytes of the header length, with which a file begins.
const LENGTH_BYTES: usize = 8;

/// Maximum length of a header in the format, in bytes.
const LONGEST_HEADER: u64 = 100_000_000;

/// Reads the header of `file`, which is at `path`, and returns the tensors in the order of
/// their bytes: those of floating-point numbers, and those that may be part of a quantised matrix.
///
/// # Errors
/// Returns [`WeightsError::Malformed`] for a broken header, and
/// [`WeightsError::Unsupported`] for a tensor of another type or for a Git LFS pointer. Errors of
/// reading the file are passed on.
pub(super) fn read(
    file: &WeightFile,
    path: &Path,
) -> Result<(Vec<TensorEntry>, Vec<RawEntry>), WeightsError> {
    let malformed = |problem: String| WeightsError::Malformed {
        path: path.to_owned(),
        format: "safetensors",
        problem,
    };
    let mut head = vec![0; LFS_POINTER.min(file.len())];
    file.read(0, &mut head)?;
    refuse_lfs_pointer(&head, path)?;
    let header = read_header(file, &malformed)?;
    let data_start = LENGTH_BYTES + header.len();
    let data_bytes = file.len() - data_start;
    let header = std::str::from_utf8(&header)
        .map_err(|error| malformed(format!("the header is not valid UTF-8: {error}")))?;
    let mut json = serde_json::Deserializer::from_str(header);
    let tensors = json.deserialize_map(Tensors);
    let tensors = tensors.and_then(|tensors| json.end().map(|()| tensors));
    let mut tensors =
        tensors.map_err(|error| malformed(format!("the header is not valid JSON: {error}")))?;
    tensors.sort_by(|(a_name, a), (b_name, b)| {
        let by_place = a.data_offsets.cmp(&b.data_offsets);
        by_place.then_with(|| a_name.cmp(b_name))
    });
    let (mut entries, mut raw) = (Vec::new(), Vec::new());
    let mut end_before = 0;
    for (name, info) in tensors {
        let (start, end) = info.data_offsets;
        if start != end_before || end < start {
            return Err(malformed(format!(
                "tensor {name:?} does not begin where the one before it ends, or ends before it \
                 begins"
            )));
        }
        end_before = end;
        // Old encoders store the numbers of positions, which are no weights.
        if name.ends_with("position_ids") && info.dtype == StoredDtype::I64 {
            continue;
        }
        let dtype = dtype(&name, &info, path)?;
        let shape = &info.shape;
        let elements = shape
            .iter()
            .try_fold(1usize, |all, &one| all.checked_mul(one));
        let bytes = elements.and_then(|elements| match dtype {
            Ok(dtype) => dtype.bytes_for(elements),
            Err(kind) => elements.checked_mul(kind.bytes()),
        });
        let Some(bytes) = bytes else {
            return Err(malformed(format!(
                "tensor {name:?} of shape {shape:?} has more bytes than can be addressed"
            )));
        };
        if bytes != end - start {
            return Err(malformed(format!(
                "tensor {name:?} of shape {shape:?} in {} needs {bytes} bytes but is given {}",
                type_name(dtype),
                end - start
            )));
        }
        let range = data_start
            .checked_add(start)
            .zip(data_start.checked_add(end));
        let Some((start, end)) = range else {
            return Err(malformed(format!(
                "tensor {name:?} ends beyond the addressable range"
            )));
        };
        let (shape, range) = (info.shape, start..end);
        match dtype {
            Ok(dtype) => entries.push(TensorEntry {
                name,
                dtype,
                shape,
                range,
            }),
            Err(kind) => raw.push(RawEntry {
                name,
                kind,
                shape,
                range,
            }),
        }
    }
    if end_before != data_bytes {
        return Err(malformed(format!(
            "the header describes {end_before} bytes of data, but the file has {data_bytes} after \
             the header"
        )));
    }
    Ok((entries, raw))
}

/// Reads the bytes of the header.
fn read_header(
    file: &WeightFile,
    malformed: &dyn Fn(String) -> WeightsError,
) -> Result<Vec<u8>, WeightsError> {
    let size = file.len();
    if size < LENGTH_BYTES {
        return Err(malformed(format!(
            "the file has {size} bytes, fewer than the {LENGTH_BYTES} of the header's length field"
        )));
    }
    let mut length = [0; LENGTH_BYTES];
    file.read(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > (size - LENGTH_BYTES) as u64 {
        return Err(malformed(format!(
            "the header is {length} bytes long, but the file has {size} bytes"
        )));
    }
    if length > LONGEST_HEADER {
        return Err(malformed(format!(
            "the header is {length} bytes long; at most {LONGEST_HEADER} are allowed"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read(LENGTH_BYTES, &mut header)?;
    Ok(header)
}

/// Returns the format of a tensor, or its type if it may be part of a quantised matrix.
fn dtype(
    name: &str,
    info: &TensorInfo,
    path: &Path,
) -> Result<Result<DType, RawType>, WeightsError> {
    Ok(match info.dtype {
        StoredDtype::F32 => Ok(DType::F32),
        StoredDtype::F16 => Ok(DType::F16),
        StoredDtype::BF16 => Ok(DType::BF16),
        StoredDtype::I8 => Err(RawType::I8),
        StoredDtype::U8 => Err(RawType::U8),
        StoredDtype::I32 => Err(RawType::I32),
        StoredDtype::I64 => Err(RawType::I64),
        StoredDtype::F8_E4M3 => Err(RawType::F8E4M3),
        other => return Err(unsupported(name, &format!("{other:?}"), path)),
    })
}

/// Returns the error for a tensor of this type.
pub(super) fn unsupported(name: &str, kind: &str, path: &Path) -> WeightsError {
    WeightsError::Unsupported {
        path: path.to_owned(),
        what: format!("tensor {name:?} of type {kind}"),
        expected: "supported are F32, F16 and BF16, and what quantization_config describes".into(),
    }
}

fn type_name(dtype: Result<DType, RawType>) -> String {
    match dtype {
        Ok(dtype) => dtype.to_string(),
        Err(kind) => format!("{kind:?}"),
    }
}

/// Visitor that reads the tensors of a header. Fails if a name appears twice.
struct Tensors;

impl<'de> Visitor<'de> for Tensors {
    type Value = Vec<(String, TensorInfo)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut seen = HashSet::new();
        let mut tensors = Vec::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor {name:?} appears twice")));
            }
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                tensors.push((name, map.next_value()?));
            }
        }
        Ok(tensors)
    }
}
