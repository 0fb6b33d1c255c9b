//! One safetensors file: its header, checked against the file it describes.
//!
//! The `safetensors` crate parses the header and checks that the tensors' bytes
//! follow each other without gaps to the end of the file. It lets a repeated name
//! overwrite the first and says little about what is wrong where; that is checked
//! here.

use super::directory::TensorEntry;
use super::source::refuse_lfs_pointer;
use super::{DType, WeightsError};
use ::safetensors::tensor::{Dtype as StoredDtype, TensorInfo};
use ::safetensors::{SafeTensorError, SafeTensors};
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};
use std::collections::HashSet;
use std::fmt;
use std::path::Path;

/// Bytes of the length that a file begins with.
const LENGTH_BYTES: usize = 8;

/// Reads the header of the file at `path`, whose contents are `bytes`. The
/// tensors come in the order of their bytes.
///
/// # Errors
/// [`WeightsError::Malformed`], and [`WeightsError::Unsupported`] for a tensor
/// that is not F32, F16 or BF16.
pub(super) fn read(bytes: &[u8], path: &Path) -> Result<Vec<TensorEntry>, WeightsError> {
    let malformed = |problem: String| WeightsError::Malformed {
        path: path.to_owned(),
        format: "safetensors",
        problem,
    };
    refuse_lfs_pointer(bytes, path)?;
    let (header_bytes, header) =
        SafeTensors::read_metadata(bytes).map_err(|error| malformed(explain(error, bytes)))?;
    let data_start = LENGTH_BYTES + header_bytes;
    check_names(&bytes[LENGTH_BYTES..data_start]).map_err(|error| malformed(error.to_string()))?;

    let mut entries = Vec::new();
    for (name, info) in header.tensors() {
        let dtype = dtype(&name, info, path)?;
        let range = tensor_range(dtype, info, data_start, bytes.len()).ok_or_else(|| {
            malformed(format!(
                "tensor {name:?} of shape {:?} in {dtype} does not fit its bytes {:?} of {}",
                info.shape,
                info.data_offsets,
                bytes.len() - data_start
            ))
        })?;
        entries.push(TensorEntry {
            name,
            dtype,
            shape: info.shape.clone(),
            range,
        });
    }
    entries.sort_by(|a, b| {
        let key = |entry: &TensorEntry| (entry.range.start, entry.range.end);
        key(a).cmp(&key(b)).then_with(|| a.name.cmp(&b.name))
    });
    Ok(entries)
}

/// The crate's errors, with what was found where it does not say.
fn explain(error: SafeTensorError, bytes: &[u8]) -> String {
    let header = bytes
        .first_chunk()
        .map_or(0, |length| u64::from_le_bytes(*length));
    match error {
        SafeTensorError::HeaderTooSmall => format!(
            "the file has {} bytes, fewer than the {LENGTH_BYTES} of the header's length",
            bytes.len()
        ),
        SafeTensorError::HeaderTooLarge => {
            format!("the header is {header} bytes long; at most 100000000 are allowed")
        }
        SafeTensorError::InvalidHeaderLength => format!(
            "the header is {header} bytes long, but the file has {} bytes",
            bytes.len()
        ),
        SafeTensorError::MetadataIncompleteBuffer => format!(
            "the header describes more or fewer bytes than the {} of the file",
            bytes.len()
        ),
        SafeTensorError::InvalidOffset(name) => format!(
            "tensor {name:?} does not begin where the one before it ends, or ends before it begins"
        ),
        SafeTensorError::TensorInvalidInfo => {
            "a tensor's shape does not fit the bytes it is given".into()
        }
        SafeTensorError::ValidationOverflow => {
            "a tensor has more bytes than can be addressed".into()
        }
        other => other.to_string(),
    }
}

fn dtype(name: &str, info: &TensorInfo, path: &Path) -> Result<DType, WeightsError> {
    match info.dtype {
        StoredDtype::F32 => Ok(DType::F32),
        StoredDtype::F16 => Ok(DType::F16),
        StoredDtype::BF16 => Ok(DType::BF16),
        other => Err(WeightsError::Unsupported {
            path: path.to_owned(),
            what: format!("tensor {name:?} of type {other:?}"),
            expected: "supported are F32, F16 and BF16".into(),
        }),
    }
}

/// The tensor's bytes in a file of `file_bytes`, or `None` when its shape and its
/// offsets do not agree or lead out of the file.
fn tensor_range(
    dtype: DType,
    info: &TensorInfo,
    data_start: usize,
    file_bytes: usize,
) -> Option<std::ops::Range<usize>> {
    let (start, end) = info.data_offsets;
    let elements = info
        .shape
        .iter()
        .try_fold(1usize, |product, &dimension| product.checked_mul(dimension))?;
    let fits = dtype.bytes_for(elements)? == end.checked_sub(start)?;
    let (start, end) = (data_start.checked_add(start)?, data_start.checked_add(end)?);
    (fits && end <= file_bytes).then_some(start..end)
}

/// Fails when a name appears twice in the header.
fn check_names(header: &[u8]) -> Result<(), serde_json::Error> {
    struct Names;

    impl<'de> Visitor<'de> for Names {
        type Value = ();

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an object of tensors")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
            let mut seen = HashSet::new();
            while let Some(name) = map.next_key::<String>()? {
                map.next_value::<IgnoredAny>()?;
                if let Some(name) = seen.replace(name) {
                    return Err(A::Error::custom(format!("tensor {name:?} appears twice")));
                }
            }
            Ok(())
        }
    }

    serde_json::Deserializer::from_slice(header).deserialize_map(Names)
}
