//! Broken Hugging Face folders.

use crate::memory::assert_little_was_allocated;
use quell::WeightsError;
use quell::internals::weights::{ModelFolder, WeightSource};
use serde_json::{Value, json};
use std::path::Path;
use tempfile::TempDir;

/// Builds a safetensors file with the given header and this many bytes of data.
fn weights(header: &Value, data: usize) -> Vec<u8> {
    raw_weights(header.to_string().as_bytes(), data)
}

fn raw_weights(header: &[u8], data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    file.resize(file.len() + data, 1);
    file
}

fn tensor(dtype: &str, shape: &[u64], start: u64, end: u64) -> Value {
    json!({"dtype": dtype, "shape": shape, "data_offsets": [start, end]})
}

/// The header of two tensors of 24 and 16 bytes.
fn valid_header() -> Value {
    json!({
        "__metadata__": {"format": "pt"},
        "a": tensor("F32", &[2, 3], 0, 24),
        "b": tensor("BF16", &[8], 24, 40),
    })
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(
        folder.path().join("config.json"),
        b"{\"model_type\": \"llama\"}",
    )
    .unwrap();
    for (name, contents) in files {
        std::fs::write(folder.path().join(name), contents).unwrap();
    }
    folder
}

fn open(path: &Path) -> Result<ModelFolder, WeightsError> {
    let result = ModelFolder::open(path);
    if let Ok(folder) = &result {
        for name in folder.names() {
            let tensor = folder.tensor(name).unwrap();
            assert_eq!(
                tensor.dtype.bytes_for(tensor.elements()),
                Some(tensor.bytes.len())
            );
            match folder.read(&tensor) {
                Ok(data) => assert_eq!(data.len(), tensor.bytes.len()),
                Err(WeightsError::NotFinite { .. }) => {}
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
    assert_little_was_allocated();
    result
}

/// Opens a folder with this `model.safetensors`.
fn open_weights(contents: &[u8]) -> Result<ModelFolder, WeightsError> {
    open(folder(&[("model.safetensors", contents)]).path())
}

/// Opens a folder with this index and a valid `one.safetensors`.
fn open_index(index: &Value) -> Result<ModelFolder, WeightsError> {
    let index = index.to_string();
    let shard = weights(&valid_header(), 40);
    let files: [(&str, &[u8]); 2] = [
        ("model.safetensors.index.json", index.as_bytes()),
        ("one.safetensors", &shard),
    ];
    open(folder(&files).path())
}

#[track_caller]
fn assert_malformed(result: Result<ModelFolder, WeightsError>, expected: &str) {
    match result {
        Err(error @ WeightsError::Malformed { .. }) => {
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
        }
        other => panic!("not malformed: {other:?}"),
    }
}

#[track_caller]
fn assert_unsupported(result: Result<ModelFolder, WeightsError>, expected: &str) {
    match result {
        Err(error @ WeightsError::Unsupported { .. }) => {
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
        }
        other => panic!("not unsupported: {other:?}"),
    }
}

#[track_caller]
fn assert_missing(result: Result<ModelFolder, WeightsError>, file: &str) {
    match result {
        Err(WeightsError::MissingFile { path, .. }) => assert!(path.ends_with(file), "{path:?}"),
        other => panic!("nothing missing: {other:?}"),
    }
}

#[test]
fn a_valid_folder_is_read() {
    let folder = open_weights(&weights(&valid_header(), 40)).unwrap();
    assert_eq!(folder.names(), ["a", "b"]);
}

#[test]
fn a_git_lfs_pointer_is_reported_as_such() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    assert_unsupported(open_weights(pointer), "a Git LFS pointer");
    let files: [(&str, &[u8]); 1] = [("model.safetensors.index.json", pointer)];
    assert_unsupported(open(folder(&files).path()), "git lfs pull");
    let files: [(&str, &[u8]); 1] = [("config.json", pointer)];
    assert_unsupported(open(folder(&files).path()), "config.json");
}

#[test]
fn a_weight_file_truncated_anywhere_is_malformed() {
    let file = weights(&valid_header(), 40);
    for part in 0..64 {
        assert_malformed(
            open_weights(&file[..file.len() * part / 64]),
            "model.safetensors",
        );
    }
}

#[test]
fn a_weight_file_with_any_header_byte_changed_is_read_or_refused() {
    let file = weights(&valid_header(), 40);
    let folder = folder(&[]);
    let path = folder.path().join("model.safetensors");
    for position in 0..file.len() - 40 {
        for change in [0x01, 0x10, 0x80] {
            let mut changed = file.clone();
            changed[position] ^= change;
            std::fs::write(&path, changed).unwrap();
            let _ = open(folder.path());
        }
    }
}

#[test]
fn a_header_longer_than_the_file_is_refused() {
    let mut file = weights(&valid_header(), 40);
    file[..8].copy_from_slice(&5000u64.to_le_bytes());
    assert_malformed(
        open_weights(&file),
        "the header is 5000 bytes long, but the file has",
    );
    file[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert_malformed(
        open_weights(&file),
        "the header is 18446744073709551615 bytes long",
    );
}

#[test]
fn a_header_that_is_not_json_is_refused() {
    assert_malformed(open_weights(&raw_weights(b"{\"a\": ", 0)), "JSON");
    assert_malformed(open_weights(&raw_weights(b"[1, 2]", 0)), "");
    assert_malformed(open_weights(&raw_weights(&[0xff, 0xfe], 0)), "UTF-8");
    assert_malformed(open_weights(&raw_weights(&b"[".repeat(100_000), 0)), "");
}

#[test]
fn offsets_outside_the_file_or_in_reverse_order_are_refused() {
    let far = json!({"a": tensor("F32", &[2, 3], 0, 24), "b": tensor("BF16", &[8], 24, 40)});
    assert_malformed(
        open_weights(&weights(&far, 39)),
        "bytes of data, but the file has",
    );
    assert_malformed(
        open_weights(&weights(&far, 41)),
        "bytes of data, but the file has",
    );
    let backwards = json!({"a": tensor("F32", &[2], 8, 0)});
    assert_malformed(open_weights(&weights(&backwards, 8)), "tensor \"a\"");
    let huge = json!({"a": tensor("F32", &[2], u64::MAX - 7, u64::MAX)});
    assert_malformed(open_weights(&weights(&huge, 8)), "tensor \"a\"");
}

#[test]
fn overlapping_tensors_are_refused() {
    let header = json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 4, 12)});
    assert_malformed(open_weights(&weights(&header, 12)), "tensor \"b\"");
    let header = json!({"a": tensor("F32", &[2], 0, 8), "b": tensor("F32", &[2], 0, 8)});
    assert_malformed(open_weights(&weights(&header, 8)), "tensor");
}

#[test]
fn a_shape_that_does_not_fit_its_bytes_is_refused() {
    let header = json!({"a": tensor("F32", &[3], 0, 8)});
    assert_malformed(open_weights(&weights(&header, 8)), "shape");
    let header = json!({"a": tensor("F32", &[1 << 40, 1 << 40], 0, 8)});
    assert_malformed(
        open_weights(&weights(&header, 8)),
        "more bytes than can be addressed",
    );
}

#[test]
fn a_repeated_tensor_name_is_refused() {
    let entry = tensor("F32", &[2], 0, 8);
    let header = format!("{{\"a\": {entry}, \"a\": {entry}}}");
    assert_malformed(
        open_weights(&raw_weights(header.as_bytes(), 8)),
        "tensor \"a\" appears twice",
    );
}

#[test]
fn an_unsupported_tensor_type_is_reported() {
    let header = json!({"a": tensor("F32", &[2], 0, 8), "ids": tensor("I64", &[1], 8, 16)});
    assert_unsupported(
        open_weights(&weights(&header, 16)),
        "tensor \"ids\" of type I64",
    );
}

#[test]
fn a_folder_without_a_configuration_or_weights_is_refused() {
    let empty = tempfile::tempdir().unwrap();
    assert_missing(open(empty.path()), "config.json");
    assert_missing(open(&empty.path().join("nowhere")), "config.json");
    assert_missing(open(folder(&[]).path()), "model.safetensors");
    let says = |files: &[(&str, &[u8])], part: &str| {
        let error = open(folder(files).path()).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    };
    says(&[("consolidated.safetensors", b"")], "Mistral's own layout");
    says(&[("other.safetensors", b"")], "other.safetensors exists");
    let bare = |name: &str, part: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(name), "{}").unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("config.json") && error.contains(part),
            "{error}"
        );
    };
    bare("adapter_config.json", "this is an adapter");
    bare("model.Q4_0.gguf", "to run model.Q4_0.gguf, give the path");
    let pickled = folder(&[("pytorch_model.bin", b"\x80\x02")]);
    assert_unsupported(open(pickled.path()), "a PyTorch checkpoint");
}

#[test]
fn a_configuration_that_is_not_a_json_object_is_refused() {
    for contents in [
        &b""[..],
        b"[1]",
        b"{\"a\": ",
        b"\xff",
        &b"[".repeat(100_000),
    ] {
        let folder = folder(&[("config.json", contents)]);
        assert_malformed(open(folder.path()), "config.json");
    }
}

#[test]
fn a_broken_index_is_refused() {
    assert_malformed(open_index(&json!({})), "weight_map");
    assert_malformed(open_index(&json!({"weight_map": {"a": 1}})), "index.json");
    assert_malformed(open_index(&json!([])), "index.json");
}

#[test]
fn a_missing_shard_is_reported() {
    let index = json!({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}});
    assert_missing(open_index(&index), "two.safetensors");
}

#[test]
fn a_tensor_missing_from_its_shard_is_reported() {
    let index = json!({"weight_map": {"a": "one.safetensors", "c": "one.safetensors"}});
    assert_malformed(open_index(&index), "lacks tensor \"c\"");
}

#[test]
fn shards_outside_the_folder_are_refused() {
    for name in [
        "../one.safetensors",
        "/etc/one.safetensors",
        "..\\one.safetensors",
        "C:one.safetensors",
        "sub/one.safetensors",
        "one\0.safetensors",
        "..",
        "",
        "config.json",
    ] {
        let index = json!({"weight_map": {"a": name}});
        assert_malformed(open_index(&index), "it names the shard");
    }
}

#[test]
fn a_truncated_shard_is_refused() {
    let shard = weights(&valid_header(), 12);
    let index = json!({"weight_map": {"a": "one.safetensors"}}).to_string();
    let files: [(&str, &[u8]); 2] = [
        ("model.safetensors.index.json", index.as_bytes()),
        ("one.safetensors", &shard),
    ];
    assert_malformed(open(folder(&files).path()), "one.safetensors");
}
