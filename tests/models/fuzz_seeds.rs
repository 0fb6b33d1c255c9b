//! The seed inputs of the fuzz targets are valid files.

use common::gguf_writer::GgufWriter;
use common::quantize::quantize;
use quell::internals::weights::gguf::{Array, Value};
use quell::internals::weights::{DType, Gguf, ModelFolder};
use std::path::PathBuf;

fn seeds(target: &str) -> PathBuf {
    common::root().join("fuzz/seeds").join(target)
}

/// Builds the files in `fuzz/seeds/gguf`.
fn gguf_seeds() -> Vec<(&'static str, GgufWriter)> {
    let strings = Value::Array(Array::String(vec!["<s>".into(), "a".into()]));
    let metadata = GgufWriter::new()
        .string("general.architecture", "llama")
        .u32("llama.block_count", 1)
        .f32("llama.rope.freq_base", 10_000.0)
        .metadata("tokenizer.ggml.tokens", strings)
        .metadata("scores", Value::Array(Array::F32(vec![0.0, -1.0])))
        .metadata("types", Value::Array(Array::I32(vec![3, 1])))
        .metadata("flags", Value::Array(Array::Bool(vec![true, false])))
        .metadata("split.count", Value::U16(1));
    let weights: Vec<f32> = (0..64u8).map(f32::from).collect();
    let blocks = DType::ALL
        .into_iter()
        .fold(GgufWriter::new(), |writer, dtype| {
            let elements = dtype.block_elements();
            writer.tensor(
                dtype.name(),
                dtype,
                &[1, elements],
                vec![3; dtype.block_bytes()],
            )
        });
    vec![
        ("metadata.gguf", metadata.clone()),
        (
            "model.gguf",
            metadata
                .alignment(8)
                .tensor(
                    "matrix",
                    DType::Q4_1,
                    &[2, 32],
                    quantize(DType::Q4_1, &weights),
                )
                .f32_tensor("norm", &[4], &[1.0; 4]),
        ),
        ("blocks.gguf", blocks),
        (
            "version2.gguf",
            GgufWriter::new()
                .version(2)
                .f32_tensor("w", &[1, 1, 1, 1], &[1.0]),
        ),
    ]
}

/// Builds the file in `fuzz/seeds/safetensors`.
fn safetensors_seed() -> Vec<u8> {
    let header = concat!(
        r#"{"__metadata__":{"format":"pt"},"#,
        r#""a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"#,
        r#""b":{"dtype":"BF16","shape":[4],"data_offsets":[8,16]}}"#
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + 16, 1);
    file
}

#[test]
fn every_seed_is_valid_and_up_to_date() {
    if std::env::var_os("QUELL_WRITE_SEEDS").is_some() {
        write_the_seeds();
    }
    for (name, writer) in gguf_seeds() {
        Gguf::open(&seeds("gguf").join(name)).unwrap();
        let is_current = std::fs::read(seeds("gguf").join(name)).unwrap() == writer.build();
        assert!(is_current, "{name} is out of date: set QUELL_WRITE_SEEDS");
    }
    let folder = tempfile::tempdir().unwrap();
    let seed = seeds("safetensors").join("model.safetensors");
    std::fs::copy(&seed, folder.path().join("model.safetensors")).unwrap();
    std::fs::write(folder.path().join("config.json"), "{}").unwrap();
    ModelFolder::open(folder.path()).unwrap();
    assert_eq!(std::fs::read(seed).unwrap(), safetensors_seed());
}

/// Rewrites `fuzz/seeds`. Needed after a change to its contents.
fn write_the_seeds() {
    for (name, writer) in gguf_seeds() {
        std::fs::write(seeds("gguf").join(name), writer.build()).unwrap();
    }
    let path = seeds("safetensors").join("model.safetensors");
    std::fs::write(path, safetensors_seed()).unwrap();
}
