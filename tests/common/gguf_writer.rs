//! Writes GGUF files for tests: valid ones, and invalid ones on request.

use quell::internals::weights::gguf::{Array, Value};
use quell::internals::weights::{DType, Gguf, WeightSource};
use std::path::PathBuf;
use tempfile::TempDir;

/// A GGUF file under construction.
#[derive(Clone, Debug)]
pub struct GgufWriter {
    version: u32,
    alignment: usize,
    metadata: Vec<(String, Value)>,
    tensors: Vec<Tensor>,
}

/// A tensor to be written. The public fields can be set to values that no valid file has.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    /// Dimensions, innermost first, as the file stores them.
    pub dimensions: Vec<u64>,
    /// ggml's number for the type.
    pub kind: u32,
    pub data: Vec<u8>,
    /// The offset that the directory states, if it must differ from the true one.
    pub offset: Option<u64>,
}

impl Tensor {
    /// Creates a tensor whose `shape` is given outermost first.
    pub fn new(name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) -> Self {
        Self {
            name: name.to_owned(),
            dimensions: shape.iter().rev().map(|&size| size as u64).collect(),
            kind: type_number(dtype),
            data,
            offset: None,
        }
    }
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self {
            version: 3,
            alignment: 32,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

impl GgufWriter {
    pub fn new() -> Self {
        Self::default()
    }

    /// Copies a file, without the metadata whose keys `keeps` does not accept.
    pub fn copy(file: &Gguf, keeps: impl Fn(&str) -> bool) -> Self {
        Self::copy_renamed(file, keeps, str::to_owned)
    }

    /// Like [`GgufWriter::copy`], with the names that `renamed` gives to tensors.
    pub fn copy_renamed(
        file: &Gguf,
        keeps: impl Fn(&str) -> bool,
        renamed: impl Fn(&str) -> String,
    ) -> Self {
        let kept = file.metadata_keys().filter(|key| keeps(key));
        let copied = kept.fold(Self::new(), |copy, key| {
            copy.metadata(key, file.metadata(key).unwrap().clone())
        });
        file.names().into_iter().fold(copied, |copy, name| {
            let tensor = file.tensor(name).unwrap();
            let data = file.read(&tensor).unwrap().into_owned();
            copy.tensor(&renamed(name), tensor.dtype, tensor.shape, data)
        })
    }

    /// Writes the file to a folder of its own.
    pub fn written(&self) -> (TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        std::fs::write(&path, self.build()).unwrap();
        (folder, path)
    }

    pub fn version(mut self, version: u32) -> Self {
        self.version = version;
        self
    }

    /// Aligns the data to `alignment` bytes and records this in the metadata.
    pub fn alignment(mut self, alignment: u32) -> Self {
        self.alignment = alignment as usize;
        self.metadata("general.alignment", Value::U32(alignment))
    }

    pub fn metadata(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_owned(), value));
        self
    }

    pub fn string(self, key: &str, value: &str) -> Self {
        self.metadata(key, Value::String(value.to_owned()))
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.metadata(key, Value::U32(value))
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.metadata(key, Value::F32(value))
    }

    /// Adds a tensor whose `shape` is given outermost first.
    pub fn tensor(self, name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) -> Self {
        self.raw_tensor(Tensor::new(name, dtype, shape, data))
    }

    /// Adds a float32 tensor whose `shape` is given outermost first.
    pub fn f32_tensor(self, name: &str, shape: &[usize], weights: &[f32]) -> Self {
        let data = weights.iter().flat_map(|weight| weight.to_le_bytes());
        self.tensor(name, DType::F32, shape, data.collect())
    }

    pub fn raw_tensor(mut self, tensor: Tensor) -> Self {
        self.tensors.push(tensor);
        self
    }

    /// Returns the file's bytes.
    pub fn build(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            string(&mut file, key);
            file.extend(value_type(value).to_le_bytes());
            write_value(&mut file, value);
        }
        let mut data = Vec::new();
        for tensor in &self.tensors {
            pad(&mut data, self.alignment);
            string(&mut file, &tensor.name);
            file.extend((tensor.dimensions.len() as u32).to_le_bytes());
            for dimension in &tensor.dimensions {
                file.extend(dimension.to_le_bytes());
            }
            file.extend(tensor.kind.to_le_bytes());
            let offset = tensor.offset.unwrap_or(data.len() as u64);
            file.extend(offset.to_le_bytes());
            data.extend(&tensor.data);
        }
        pad(&mut file, self.alignment);
        file.extend(data);
        file
    }
}

/// Returns ggml's number for a type.
pub fn type_number(dtype: DType) -> u32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 30,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q5_0 => 6,
        DType::Q5_1 => 7,
        DType::Q8_0 => 8,
        DType::Q2K => 10,
        DType::Q3K => 11,
        DType::Q4K => 12,
        DType::Q5K => 13,
        DType::Q6K => 14,
        DType::Iq4Nl => 20,
        DType::Iq4Xs => 23,
        DType::Tq1_0 => 34,
        DType::Tq2_0 => 35,
        DType::Mxfp4 => 39,
    }
}

fn pad(bytes: &mut Vec<u8>, alignment: usize) {
    bytes.resize(bytes.len().next_multiple_of(alignment), 0);
}

fn string(file: &mut Vec<u8>, text: &str) {
    file.extend((text.len() as u64).to_le_bytes());
    file.extend(text.as_bytes());
}

fn value_type(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => 8,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

fn write_value(file: &mut Vec<u8>, value: &Value) {
    match value {
        Value::U8(value) => file.push(*value),
        Value::I8(value) => file.extend(value.to_le_bytes()),
        Value::U16(value) => file.extend(value.to_le_bytes()),
        Value::I16(value) => file.extend(value.to_le_bytes()),
        Value::U32(value) => file.extend(value.to_le_bytes()),
        Value::I32(value) => file.extend(value.to_le_bytes()),
        Value::U64(value) => file.extend(value.to_le_bytes()),
        Value::I64(value) => file.extend(value.to_le_bytes()),
        Value::F32(value) => file.extend(value.to_le_bytes()),
        Value::F64(value) => file.extend(value.to_le_bytes()),
        Value::Bool(value) => file.push(u8::from(*value)),
        Value::String(value) => string(file, value),
        Value::Array(array) => write_array(file, array),
    }
}

fn write_array(file: &mut Vec<u8>, array: &Array) {
    fn each<T: Clone>(file: &mut Vec<u8>, values: &[T], value: fn(T) -> Value) {
        let kind = values
            .first()
            .cloned()
            .map_or(0, |first| value_type(&value(first)));
        file.extend(kind.to_le_bytes());
        file.extend((values.len() as u64).to_le_bytes());
        for item in values {
            write_value(file, &value(item.clone()));
        }
    }
    match array {
        Array::U8(values) => each(file, values, Value::U8),
        Array::I8(values) => each(file, values, Value::I8),
        Array::U16(values) => each(file, values, Value::U16),
        Array::I16(values) => each(file, values, Value::I16),
        Array::U32(values) => each(file, values, Value::U32),
        Array::I32(values) => each(file, values, Value::I32),
        Array::U64(values) => each(file, values, Value::U64),
        Array::I64(values) => each(file, values, Value::I64),
        Array::F32(values) => each(file, values, Value::F32),
        Array::F64(values) => each(file, values, Value::F64),
        Array::Bool(values) => each(file, values, Value::Bool),
        Array::String(values) => each(file, values, Value::String),
    }
}
