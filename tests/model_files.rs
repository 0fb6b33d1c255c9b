//! What model files hold is read as it was written.

mod common;

use common::gguf_writer::GgufWriter;
use common::quantize::quantize;
use quell::weights::gguf::{Array, Value};
use quell::weights::quant::dequantize;
use quell::weights::{DType, Gguf, ModelFolder, WeightSource, WeightsError};
use serde_json::json;
use std::path::Path;

fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|index| index as f32 / 16.0 - 2.0).collect()
}

fn open(writer: &GgufWriter) -> Gguf {
    Gguf::from_bytes(writer.build(), Path::new("test.gguf")).unwrap()
}

/// A tensor's bytes.
fn bytes(source: &dyn WeightSource, name: &str) -> Vec<u8> {
    let tensor = source.tensor(name).unwrap();
    source.read(&tensor).unwrap().into_owned()
}

#[test]
fn metadata_of_every_type_comes_back() {
    let values = [
        Value::U8(200),
        Value::I8(-100),
        Value::U16(60_000),
        Value::I16(-30_000),
        Value::U32(u32::MAX),
        Value::I32(i32::MIN),
        Value::U64(u64::MAX),
        Value::I64(i64::MIN),
        Value::F32(1.5),
        Value::F64(-2.5),
        Value::Bool(true),
        Value::String("héllo\0".into()),
        Value::Array(Array::U8(vec![1, 2])),
        Value::Array(Array::I8(vec![-1])),
        Value::Array(Array::U16(vec![3])),
        Value::Array(Array::I16(vec![-3])),
        Value::Array(Array::U32(vec![4])),
        Value::Array(Array::I32(vec![-4])),
        Value::Array(Array::U64(vec![5])),
        Value::Array(Array::I64(vec![-5])),
        Value::Array(Array::F32(vec![0.25])),
        Value::Array(Array::F64(vec![0.125])),
        Value::Array(Array::Bool(vec![true, false])),
        Value::Array(Array::String(vec!["a".into(), String::new()])),
    ];
    for version in [2, 3] {
        let mut writer = GgufWriter::new().version(version);
        for (index, value) in values.iter().enumerate() {
            writer = writer.metadata(&format!("key.{index}"), value.clone());
        }
        let file = open(&writer);
        assert_eq!(file.version(), version);
        assert_eq!(file.metadata_keys().count(), values.len());
        for (index, value) in values.iter().enumerate() {
            assert_eq!(file.metadata(&format!("key.{index}")), Some(value));
        }
        assert_eq!(file.metadata("absent"), None);
    }
}

#[test]
fn shapes_are_outermost_first_and_rows_follow_each_other() {
    let weights = ramp(6 * 32);
    for alignment in [8, 32, 64] {
        let file = open(
            &GgufWriter::new()
                .alignment(alignment)
                .f32_tensor("first", &[1], &[7.0])
                .f32_tensor("stack", &[2, 3, 32], &weights),
        );
        assert_eq!(file.names(), ["first", "stack"]);
        let stack = file.tensor("stack").unwrap();
        assert_eq!(stack.shape, [2, 3, 32]);
        let second = stack.slice(1).unwrap().slice(2).unwrap();
        assert_eq!(second.shape, [32]);
        let mut row = [0.0; 32];
        dequantize(second.dtype, &file.read(&second).unwrap(), &mut row);
        assert_eq!(row, weights[5 * 32..]);
        assert!(file.tensor("third").is_none());
    }
}

#[test]
fn quantised_weights_stay_within_half_a_step() {
    let weights = ramp(4 * 32);
    for (dtype, step) in [
        (DType::F32, 0.0),
        (DType::F16, 0.001),
        (DType::BF16, 0.02),
        (DType::Q8_0, 6.0 / 127.0),
        (DType::Q4_0, 6.0 / 7.0),
        (DType::Q4_1, 2.0 / 15.0),
    ] {
        let data = quantize(dtype, &weights);
        let file = open(&GgufWriter::new().tensor("w", dtype, &[4, 32], data));
        let tensor = file.tensor("w").unwrap();
        assert_eq!(tensor.dtype, dtype);
        let mut found = vec![0.0; weights.len()];
        dequantize(dtype, &file.read(&tensor).unwrap(), &mut found);
        for (found, expected) in found.iter().zip(&weights) {
            assert!(
                (found - expected).abs() <= step / 2.0 + 0.005,
                "{dtype}: {found} {expected}"
            );
        }
    }
}

#[test]
fn a_file_sums_up_its_weights() {
    let matrix = quantize(DType::Q8_0, &ramp(2 * 32));
    let writer = GgufWriter::new()
        .u32("general.file_type", 7)
        .f32_tensor("norm", &[32], &[1.0; 32])
        .tensor("matrix", DType::Q8_0, &[2, 32], matrix);
    let file = open(&writer);
    assert_eq!(file.parameters(), 96);
    assert_eq!(file.dominant_dtype(), Some(DType::Q8_0));
    assert_eq!(file.file_type(), Some("Q8_0"));
    assert_eq!(file.file_bytes(), writer.build().len() as u64);
    let empty = open(&GgufWriter::new());
    assert_eq!((empty.parameters(), empty.dominant_dtype()), (0, None));
}

fn part(number: u16, count: u16, tensor: &str) -> GgufWriter {
    GgufWriter::new()
        .metadata("split.no", Value::U16(number))
        .metadata("split.count", Value::U16(count))
        .metadata("split.tensors.count", Value::I32(i32::from(count)))
        .f32_tensor(tensor, &[1], &[f32::from(number)])
}

#[test]
fn a_split_file_opens_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let path = |number| folder.path().join(format!("m-{number:05}-of-00003.gguf"));
    let first = part(0, 3, "a").string("general.name", "whole");
    std::fs::write(path(1), first.build()).unwrap();
    std::fs::write(path(2), part(1, 3, "b").build()).unwrap();
    let error = Gguf::open(&path(1)).unwrap_err();
    assert!(
        matches!(&error, WeightsError::MissingFile { path: missing, .. } if *missing == path(3))
    );

    std::fs::write(path(3), part(2, 3, "c").build()).unwrap();
    let file = Gguf::open(&path(1)).unwrap();
    assert_eq!(file.names(), ["a", "b", "c"]);
    assert_eq!(bytes(&file, "c"), 2f32.to_le_bytes());
    assert_eq!(
        file.metadata("general.name").unwrap().as_str(),
        Some("whole")
    );

    assert!(matches!(
        Gguf::open(&path(2)),
        Err(WeightsError::Unsupported { .. })
    ));
    std::fs::write(path(3), part(1, 3, "c").build()).unwrap();
    let error = Gguf::open(&path(1)).unwrap_err().to_string();
    assert!(error.contains("split.no"), "{error}");
    std::fs::write(path(3), part(2, 3, "a").build()).unwrap();
    let error = Gguf::open(&path(1)).unwrap_err().to_string();
    assert!(error.contains("tensor \"a\" is also in"), "{error}");
    std::fs::write(
        path(3),
        part(2, 3, "c").f32_tensor("d", &[1], &[0.0]).build(),
    )
    .unwrap();
    let error = Gguf::open(&path(1)).unwrap_err().to_string();
    assert!(error.contains("split.tensors.count"), "{error}");
}

fn safetensors(tensors: &[(&str, &[f32])]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, weights) in tensors {
        let start = data.len();
        data.extend(weights.iter().flat_map(|weight| weight.to_le_bytes()));
        let offsets = [start, data.len()];
        let entry = json!({"dtype": "F32", "shape": [weights.len()], "data_offsets": offsets});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    file
}

#[test]
fn a_folder_of_shards_opens_as_one() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, contents: &[u8]| {
        std::fs::write(folder.path().join(name), contents).unwrap();
    };
    write("config.json", b"{\"model_type\": \"llama\"}");
    // Both shards hold "b"; the index says which one counts.
    write(
        "1.safetensors",
        &safetensors(&[("b", &[9.0]), ("a", &[1.0, 2.0])]),
    );
    write("2.safetensors", &safetensors(&[("b", &[3.0])]));
    let index = json!({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}});
    write("model.safetensors.index.json", index.to_string().as_bytes());
    let model = ModelFolder::open(folder.path()).unwrap();
    assert_eq!(model.names(), ["a", "b"]);
    assert_eq!(bytes(&model, "b"), 3f32.to_le_bytes());
    assert_eq!(model.config()["model_type"], "llama");
    assert_eq!(model.path(), folder.path());
    assert_eq!(
        (model.parameters(), model.dominant_dtype()),
        (3, Some(DType::F32))
    );

    // A single file wins over an index.
    write("model.safetensors", &safetensors(&[("c", &[4.0])]));
    let model = ModelFolder::open(folder.path()).unwrap();
    assert_eq!(model.names(), ["c"]);
}
