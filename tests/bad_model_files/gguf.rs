//! Broken GGUF files.

use crate::memory::assert_little_was_allocated;
use common::gguf_writer::{GgufWriter, Tensor};
use quell::WeightsError;
use quell::internals::weights::gguf::{Array, Value};
use quell::internals::weights::quant::dequantize;
use quell::internals::weights::{DType, Gguf, WeightSource};
use std::path::Path;

const NAME: &str = "broken.gguf";
/// Magic number, version, tensor count and metadata count.
const PREAMBLE: usize = 4 + 4 + 8 + 8;

fn valid() -> GgufWriter {
    let strings = ["a", "bc", ""].map(String::from).to_vec();
    GgufWriter::new()
        .string("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .f32("llama.rope.freq_base", 10_000.0)
        .metadata("flag", Value::Bool(true))
        .metadata("strings", Value::Array(Array::String(strings)))
        .metadata("scores", Value::Array(Array::F32(vec![0.5, -1.0])))
        .metadata("count", Value::U64(1 << 40))
        .f32_tensor("norm.weight", &[8], &[1.0; 8])
        .tensor("matrix.weight", DType::Q4_0, &[3, 32], vec![7; 3 * 18])
        .tensor("k.weight", DType::Q4K, &[1, 256], vec![9; 144])
}

/// Opens a file and reads all of its metadata and tensors.
fn read(bytes: &[u8]) -> Result<(), WeightsError> {
    let result = Gguf::from_bytes(bytes.to_vec(), Path::new(NAME)).map(|file| {
        for key in file.metadata_keys() {
            assert!(file.metadata(key).is_some());
        }
        for name in file.names() {
            let tensor = file.tensor(name).unwrap();
            assert_eq!(
                tensor.dtype.bytes_for(tensor.elements()),
                Some(tensor.bytes.len())
            );
            let row = tensor.shape[tensor.shape.len() - 1];
            let mut weights = vec![0.0; row];
            let bytes = tensor.dtype.bytes_for(row).unwrap();
            match file.read(&tensor) {
                Ok(data) => dequantize(tensor.dtype, &data[..bytes], &mut weights),
                Err(WeightsError::NotFinite { .. }) => {}
                Err(error) => panic!("{name}: {error}"),
            }
        }
    });
    assert_little_was_allocated();
    result
}

#[track_caller]
fn assert_malformed(bytes: &[u8], expected: &str) {
    match read(bytes) {
        Err(error @ WeightsError::Malformed { format: "GGUF", .. }) => {
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
            assert!(message.contains(NAME), "{message}");
        }
        other => panic!("not malformed: {other:?}"),
    }
}

#[track_caller]
fn assert_unsupported(bytes: &[u8], expected: &str) {
    match read(bytes) {
        Err(error @ WeightsError::Unsupported { .. }) => {
            let message = error.to_string();
            assert!(message.contains(expected), "{message}");
        }
        other => panic!("not unsupported: {other:?}"),
    }
}

/// Builds a file whose only metadata entry is `key`, with the given type and content.
fn one_metadata(key: &[u8], kind: u32, content: &[u8]) -> Vec<u8> {
    let mut file = GgufWriter::new().build()[..PREAMBLE].to_vec();
    file[16..24].copy_from_slice(&1u64.to_le_bytes());
    file.extend((key.len() as u64).to_le_bytes());
    file.extend(key);
    file.extend(kind.to_le_bytes());
    file.extend(content);
    file.resize(file.len() + 64, 0);
    file
}

/// Builds a file whose only tensor is `tensor`.
fn one_tensor(tensor: Tensor) -> Vec<u8> {
    GgufWriter::new().raw_tensor(tensor).build()
}

fn matrix() -> Tensor {
    Tensor::new("w", DType::F32, &[4, 8], vec![0; 4 * 8 * 4])
}

#[test]
fn a_valid_file_is_read() {
    read(&valid().build()).unwrap();
}

#[test]
fn a_file_truncated_anywhere_is_malformed() {
    let file = valid().build();
    for part in 0..64 {
        let cut = &file[..file.len() * part / 64];
        assert_malformed(cut, "");
    }
    for length in 0..file.len() {
        assert!(read(&file[..length]).is_err(), "cut to {length} bytes");
    }
}

#[test]
fn a_file_with_any_byte_changed_is_read_or_refused() {
    let file = valid().build();
    for position in 0..file.len() {
        for change in [0x01, 0x02, 0x10, 0x40, 0x80, 0xff] {
            let mut changed = file.clone();
            changed[position] ^= change;
            let _ = read(&changed);
        }
    }
}

#[test]
fn an_empty_file_has_no_magic_number() {
    assert_malformed(&[], "the magic number at offset 0 needs 4 bytes");
}

#[test]
fn a_file_in_another_format_is_reported_with_its_first_bytes() {
    assert_malformed(b"PK\x03\x04 something else", "PK\\\\x03\\\\x04");
    assert_malformed(b"ggjt\x01\0\0\0 an older format", "ggjt");
}

#[test]
fn unsupported_versions_are_reported() {
    assert_unsupported(&valid().version(1).build(), "GGUF version 1");
    assert_unsupported(&valid().version(4).build(), "GGUF version 4");
}

#[test]
fn a_big_endian_file_is_recognised() {
    let file = valid().version(3u32.swap_bytes()).build();
    assert_unsupported(&file, "a big-endian GGUF file (version 3)");
}

#[test]
fn counts_beyond_the_file_are_refused_before_anything_is_allocated() {
    for count in [100, 1 << 32, u64::MAX / 8, u64::MAX] {
        let mut tensors = valid().build();
        tensors[8..16].copy_from_slice(&count.to_le_bytes());
        assert_malformed(
            &tensors,
            &format!("the tensor count at offset 8 is {count}"),
        );
        let mut metadata = valid().build();
        metadata[16..24].copy_from_slice(&count.to_le_bytes());
        assert_malformed(
            &metadata,
            &format!("the metadata count at offset 16 is {count}"),
        );
    }
}

#[test]
fn lengths_beyond_the_file_are_refused_before_anything_is_allocated() {
    for length in [1000, 1 << 31, 1 << 62, u64::MAX] {
        let string = one_metadata(b"name", 8, &length.to_le_bytes());
        assert_malformed(&string, "the length of metadata \"name\"");
        for kind in (0..=8).chain(10..=12) {
            let mut content = u32::to_le_bytes(kind).to_vec();
            content.extend(length.to_le_bytes());
            let array = one_metadata(b"items", 9, &content);
            assert_malformed(&array, "the length of metadata \"items\"");
        }
        let mut key = one_metadata(b"name", 8, &[]);
        key[PREAMBLE..PREAMBLE + 8].copy_from_slice(&length.to_le_bytes());
        assert_malformed(&key, "the length of metadata key 0");
    }
}

#[test]
fn a_name_longer_than_the_format_allows_is_refused() {
    let key = vec![b'k'; 65_536];
    assert_malformed(
        &one_metadata(&key, 0, &[1]),
        "65536 bytes long; at most 65535",
    );
}

#[test]
fn text_that_is_not_utf8_is_refused_with_its_key() {
    let mut content = 2u64.to_le_bytes().to_vec();
    content.extend([0xc3, 0x28]);
    assert_malformed(
        &one_metadata(b"name", 8, &content),
        "metadata \"name\" at offset 40: invalid utf-8",
    );
    assert_malformed(
        &one_metadata(&[0xff], 0, &[1]),
        "metadata key 0 at offset 24",
    );
}

#[test]
fn metadata_of_an_unknown_type_is_refused() {
    assert_malformed(
        &one_metadata(b"x", 13, &[0; 8]),
        "metadata \"x\" has type 13",
    );
    let array = [13, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_malformed(&one_metadata(b"x", 9, &array), "an array of type 13");
}

#[test]
fn a_bool_other_than_zero_or_one_is_refused() {
    assert_malformed(&one_metadata(b"x", 7, &[2]), "is 2; a bool must be 0 or 1");
}

#[test]
fn nested_arrays_are_refused_at_any_depth() {
    let nested: Vec<u8> = [9u32.to_le_bytes().as_slice(), &1u64.to_le_bytes()].concat();
    let file = one_metadata(b"deep", 9, &nested.repeat(10_000));
    assert_unsupported(&file, "metadata \"deep\", an array of arrays,");
}

#[test]
fn repeated_names_are_refused() {
    let metadata = valid().u32("llama.block_count", 3).build();
    assert_malformed(&metadata, "metadata \"llama.block_count\" appears twice");
    let tensor = valid().f32_tensor("norm.weight", &[1], &[1.0]).build();
    assert_malformed(&tensor, "tensor \"norm.weight\" appears twice");
}

#[test]
fn an_alignment_that_is_not_a_power_of_two_is_refused() {
    for alignment in [0, 3, 48] {
        let file = valid().u32("general.alignment", alignment).build();
        assert_malformed(&file, &format!("\"general.alignment\" is {alignment}"));
    }
    let file = valid().string("general.alignment", "32").build();
    assert_malformed(&file, "\"general.alignment\" is of type string");
    let file = valid()
        .metadata("general.alignment", Value::U64(1 << 63))
        .build();
    assert_malformed(&file, "");
}

#[test]
fn tensors_without_one_to_four_dimensions_are_refused() {
    for dimensions in [0, 5, 1000] {
        let tensor = Tensor {
            dimensions: vec![1; dimensions],
            ..matrix()
        };
        assert_malformed(
            &one_tensor(tensor),
            &format!("tensor \"w\" has {dimensions} dimensions"),
        );
    }
}

#[test]
fn a_dimension_of_zero_is_refused() {
    let tensor = Tensor {
        dimensions: vec![8, 0],
        ..matrix()
    };
    assert_malformed(&one_tensor(tensor), "tensor \"w\" has a dimension of 0");
}

#[test]
fn a_shape_that_overflows_is_refused() {
    let tensor = Tensor {
        dimensions: vec![1 << 32, 1 << 32, 1 << 32],
        ..matrix()
    };
    assert_malformed(&one_tensor(tensor), "more bytes than can be addressed");
    let tensor = Tensor {
        dimensions: vec![1 << 62],
        ..matrix()
    };
    assert_malformed(&one_tensor(tensor), "more bytes than can be addressed");
}

#[test]
fn a_shape_larger_than_the_file_is_refused() {
    let tensor = Tensor {
        dimensions: vec![8, 5],
        ..matrix()
    };
    assert_malformed(&one_tensor(tensor), "tensor \"w\" of 160 bytes at offset 0");
}

#[test]
fn a_row_that_is_not_a_whole_number_of_blocks_is_refused() {
    let tensor = Tensor::new("w", DType::Q4K, &[8, 32], vec![0; 144]);
    assert_malformed(
        &one_tensor(tensor),
        "tensor \"w\" has rows of 32 weights; Q4_K needs a multiple of 256",
    );
}

#[test]
fn unsupported_tensor_types_are_reported() {
    let tensor = Tensor {
        kind: 16,
        ..matrix()
    };
    assert_unsupported(
        &one_tensor(tensor),
        "tensor \"w\": type IQ2_XXS (16) is not supported",
    );
    let tensor = Tensor {
        kind: 26,
        ..matrix()
    };
    assert_unsupported(&one_tensor(tensor), "type I32 (26)");
    let tensor = Tensor {
        kind: 12_345,
        ..matrix()
    };
    assert_unsupported(&one_tensor(tensor), "type 12345");
}

#[test]
fn offsets_outside_the_file_and_misaligned_offsets_are_refused() {
    let at = |offset| {
        one_tensor(Tensor {
            offset: Some(offset),
            ..matrix()
        })
    };
    assert_malformed(
        &at(8),
        "is at offset 8, which is not a multiple of the alignment 32",
    );
    assert_malformed(&at(32), "ends beyond the file's");
    assert_malformed(&at(1 << 40), "ends beyond the file's");
    assert_malformed(&at(u64::MAX - 31), "ends beyond the file's");
}

#[test]
fn overlapping_tensors_are_refused() {
    let file = GgufWriter::new()
        .raw_tensor(matrix())
        .raw_tensor(Tensor {
            name: "v".into(),
            offset: Some(32),
            ..matrix()
        })
        .build();
    assert_malformed(&file, "tensors \"w\"");
    assert_malformed(&file, "overlap");
}

#[test]
fn a_single_part_of_a_split_file_is_refused() {
    let part = |number, count| {
        let file = valid()
            .metadata("split.no", number)
            .metadata("split.count", count);
        file.build()
    };
    assert_unsupported(&part(Value::U16(0), Value::U16(3)), "one of 3 parts");
    assert_unsupported(&part(Value::U16(1), Value::U16(3)), "part 2 of 3");
    assert_malformed(&part(Value::U16(3), Value::U16(3)), "\"split.no\"");
    assert_malformed(&part(Value::U16(0), Value::I16(-1)), "\"split.count\"");
    assert_malformed(
        &part(Value::U16(0), Value::U64(u64::MAX)),
        "\"split.count\"",
    );
    read(&part(Value::U16(0), Value::U16(1))).unwrap();
}

#[test]
fn a_git_lfs_pointer_is_reported_as_such() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n";
    let error = read(pointer).unwrap_err();
    assert!(matches!(error, WeightsError::Unsupported { .. }), "{error}");
    let message = error.to_string();
    for part in [NAME, "a Git LFS pointer", "git lfs pull"] {
        assert!(message.contains(part), "{message}");
    }
}
