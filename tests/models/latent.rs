//! Models with latent attention: what their cache takes, and what their GGUF files must say.

use crate::golden_gguf::agrees;
use common::gguf_writer::GgufWriter;
use common::golden::{gguf, tiny};
use quell::internals::model::ModelSource;
use quell::internals::weights::gguf::Value as Metadata;
use quell::internals::weights::{DType, Gguf, WeightSource};
use quell::{CpuOptions, Engine, EngineConfig, KvType, LoadOptions};
use serde_json::{Value, json};
use std::path::Path;

#[test]
fn the_cache_holds_a_latent_and_one_rotated_key_per_token_and_layer() {
    for (kv, element) in [(KvType::F32, 4), (KvType::F16, 2)] {
        let options = LoadOptions {
            cpu: CpuOptions {
                kv,
                ..CpuOptions::default()
            },
            ..LoadOptions::cpu()
        };
        let config = EngineConfig {
            kv_cache_bytes: Some(1 << 20),
            ..EngineConfig::default()
        };
        let engine = Engine::load_with(tiny("deepseek-v3"), config, options).unwrap();
        let memory = engine.info().model.as_ref().unwrap().memory.clone();
        // Three layers, a latent of 32 elements, and 16 that are rotated. Keys and values of four
        // heads would be 4 · (48 + 32) elements.
        assert_eq!(memory.cache_per_token, 3 * (32 + 16) * element);
        assert_eq!(memory.block_bytes, 16 * memory.cache_per_token);
        assert_eq!(memory.sequence_bytes(512), 512 * memory.cache_per_token);
    }
}

/// The bytes of the file of the fixtures, without the metadata `left_out` and with some more.
fn bytes(left_out: &str, more: &[(&str, Metadata)]) -> Vec<u8> {
    let bytes = std::fs::read(gguf("deepseek-v3")).unwrap();
    let file = Gguf::from_bytes(bytes, Path::new("fixture.gguf")).unwrap();
    let copied = GgufWriter::copy(&file, |key| key != left_out);
    let changed = more.iter().fold(copied, |copy, (key, value)| {
        copy.metadata(key, value.clone())
    });
    changed.build()
}

/// The model of such a file.
fn changed(left_out: &str, more: &[(&str, Metadata)]) -> Result<ModelSource, String> {
    let file = Gguf::from_bytes(bytes(left_out, more), Path::new("changed.gguf")).unwrap();
    ModelSource::from_gguf(file).map_err(|error| error.to_string())
}

#[test]
fn sizes_that_a_gguf_file_lacks_are_named() {
    for key in [
        "attention.kv_lora_rank",
        "attention.key_length_mla",
        "attention.value_length_mla",
        "rope.dimension_count",
        "attention.head_count",
    ] {
        let key = format!("deepseek2.{key}");
        let error = changed(&key, &[]).unwrap_err();
        assert_eq!(error, format!("the model's {key} is missing"));
    }
    let (key, value) = ("deepseek2.rope.dimension_count", Metadata::U32(48));
    let error = changed(key, &[(key, value)]).unwrap_err();
    assert!(
        error.contains("key_length_mla is 48, but must be more than the 48"),
        "{error}"
    );
}

/// The settings of the fixture, with some changes.
fn settings(changes: &[(&str, Value)]) -> Value {
    let text = std::fs::read(tiny("deepseek-v3").join("config.json")).unwrap();
    let mut settings: Value = serde_json::from_slice(&text).unwrap();
    for (key, value) in changes {
        settings[key] = value.clone();
    }
    settings
}

#[test]
fn both_formats_describe_the_same_layers() {
    let compare = |file: ModelSource, changes: &[(&str, Value)]| {
        let folder = ModelSource::random(&settings(changes), DType::BF16).unwrap();
        assert_eq!(file.config().layers, folder.config().layers);
        assert_eq!(file.config().ropes, folder.config().ropes);
    };
    compare(changed("", &[]).unwrap(), &[]);
    // As converters write YaRN, with a tenth of `mscale_all_dim`.
    let key = |key: &str| format!("deepseek2.rope.scaling.{key}");
    let scaling = [
        (key("type"), Metadata::String("yarn".into())),
        (key("factor"), Metadata::F32(4.0)),
        (key("original_context_length"), Metadata::U32(128)),
        (key("yarn_log_multiplier"), Metadata::F32(0.1)),
    ];
    let scaling: Vec<_> = scaling
        .iter()
        .map(|(key, value)| (&key[..], value.clone()))
        .collect();
    let rope = json!({"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0});
    compare(changed("", &scaling).unwrap(), &[("rope_parameters", rope)]);
    // Older files do not say that the router has sigmoids, but have corrections.
    compare(changed("deepseek2.expert_gating_func", &[]).unwrap(), &[]);
}

/// Returns the file of a checkpoint as older versions of llama.cpp's converter made it, which did
/// not split the projection from the latent.
pub(crate) fn unsplit(name: &str) -> GgufWriter {
    let file = Gguf::open(&gguf(name)).unwrap();
    let key = |key: &str| format!("deepseek2.attention.{key}");
    let size = |name: &str| file.metadata(&key(name)).unwrap().as_u64().unwrap() as u32;
    let changes = [
        ("head_count_kv", Some(size("head_count"))),
        ("key_length", Some(size("key_length_mla"))),
        ("value_length", Some(size("value_length_mla"))),
        ("key_length_mla", None),
        ("value_length_mla", None),
    ];
    let mut old = GgufWriter::new();
    for name in file.metadata_keys() {
        let change = changes.iter().find(|(changed, _)| key(changed) == name);
        let value = match change {
            Some((_, None)) => continue,
            Some((_, Some(value))) => Metadata::U32(*value),
            None => file.metadata(name).unwrap().clone(),
        };
        old = old.metadata(name, value);
    }
    let numbers = |name: &str| {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype, DType::BF16);
        let data = file.read(&tensor).unwrap().into_owned();
        let shape: [usize; 3] = tensor.shape.try_into().unwrap();
        (
            shape,
            data.chunks(2).map(<[u8]>::to_vec).collect::<Vec<_>>(),
        )
    };
    for name in file.names() {
        if name.ends_with(".attn_v_b.weight") {
            continue;
        }
        let Some(layer) = name.strip_suffix(".attn_k_b.weight") else {
            let tensor = file.tensor(name).unwrap();
            let data = file.read(&tensor).unwrap().into_owned();
            old = old.tensor(name, tensor.dtype, tensor.shape, data);
            continue;
        };
        // Keys are stored transposed.
        let ([heads, latent, plain], keys) = numbers(name);
        let ([_, value, _], values) = numbers(&format!("{layer}.attn_v_b.weight"));
        let mut data = Vec::new();
        for head in 0..heads {
            let keys = &keys[head * latent * plain..];
            data.extend((0..plain * latent).map(|at| &keys[at % latent * plain + at / latent]));
            data.extend(&values[head * value * latent..(head + 1) * value * latent]);
        }
        let shape = [heads * (plain + value), latent];
        let data = data.into_iter().flatten().copied().collect();
        old = old.tensor(
            &format!("{layer}.attn_kv_b.weight"),
            DType::BF16,
            &shape,
            data,
        );
    }
    old
}

#[test]
fn old_files_with_latent_attention_agree_with_transformers() {
    for name in ["deepseek-v2", "deepseek-v3"] {
        let (_folder, path) = unsplit(name).written();
        agrees(&path, name);
    }
}

#[test]
fn weights_of_heads_must_have_the_shape_that_the_settings_say() {
    let (key, value) = ("deepseek2.attention.value_length_mla", Metadata::U32(16));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changed.gguf");
    std::fs::write(&path, bytes(key, &[(key, value)])).unwrap();
    let error = Engine::load_with(&path, EngineConfig::default(), LoadOptions::cpu());
    let error = error.err().unwrap().to_string();
    let expected = "attn_v_b.weight' has shape [4, 32, 32], but must have [4, 16, 32]";
    assert!(error.contains(expected), "{error}");
}
