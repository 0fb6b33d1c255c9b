//! The contents of model files are read back as they were written.

use common::gguf_writer::GgufWriter;
use common::golden::tiny;
use common::quantize::quantize;
use quell::internals::model::ModelSource;
use quell::internals::runner::ModelFiles;
use quell::internals::weights::gguf::{Array, Value};
use quell::internals::weights::quant::dequantize;
use quell::internals::weights::{DType, Gguf, ModelFolder, WeightSource};
use quell::{
    DeviceChoice, Engine, EngineBuilder, EngineConfig, LoadError, LoadOptions, Preemption, Request,
    WeightsError,
};
use serde_json::{Value as Json, json};
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;

fn ramp(count: usize) -> Vec<f32> {
    (0..count).map(|index| index as f32 / 16.0 - 2.0).collect()
}

fn open(writer: &GgufWriter) -> Gguf {
    Gguf::from_bytes(writer.build(), Path::new("test.gguf")).unwrap()
}

/// Reads the bytes of a tensor.
fn bytes(source: &dyn WeightSource, name: &str) -> Vec<u8> {
    let tensor = source.tensor(name).unwrap();
    source.read(&tensor).unwrap().into_owned()
}

#[test]
fn metadata_of_every_type_is_read_back() {
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
        assert_eq!(file.metadata_keys().count(), values.len());
        for (index, value) in values.iter().enumerate() {
            assert_eq!(file.metadata(&format!("key.{index}")), Some(value));
        }
        assert_eq!(file.metadata("absent"), None);
    }
}

#[test]
fn shapes_are_outermost_first_and_rows_are_contiguous() {
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
fn quantised_weights_are_within_half_a_step_of_the_originals() {
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
fn a_file_reports_its_size_and_weight_types() {
    let matrix = quantize(DType::Q8_0, &ramp(2 * 32));
    let writer = GgufWriter::new()
        .u32("general.file_type", 7)
        .f32_tensor("norm", &[32], &[1.0; 32])
        .tensor("matrix", DType::Q8_0, &[2, 32], matrix);
    let file = open(&writer);
    assert_eq!(file.count().total, 96);
    assert_eq!(file.count().main_format(), Some(DType::Q8_0));
    assert_eq!(file.file_type(), Some("Q8_0"));
    assert_eq!(file.file_bytes(), writer.build().len() as u64);
    let empty = open(&GgufWriter::new());
    let empty = empty.count();
    assert_eq!((empty.total, empty.main_format()), (0, None));
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
    // Both shards contain "b"; the index decides which one is used.
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
    assert_eq!(
        (model.count().total, model.count().main_format()),
        (3, Some(DType::F32))
    );

    // A single file takes precedence over an index.
    write("model.safetensors", &safetensors(&[("c", &[4.0])]));
    let model = ModelFolder::open(folder.path()).unwrap();
    assert_eq!(model.names(), ["c"]);
}

/// Matrices and vectors by name: shape and values.
type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

const HIDDEN: usize = 32;
const VOCABULARY: usize = 64;

fn llama_config() -> Json {
    json!({
        "model_type": "llama", "num_hidden_layers": 1, "hidden_size": HIDDEN,
        "num_attention_heads": 2, "max_position_embeddings": 64, "intermediate_size": HIDDEN,
        "vocab_size": VOCABULARY, "tie_word_embeddings": true, "eos_token_id": null,
    })
}

fn noise(shape: &[usize], seed: u32) -> (Vec<usize>, Vec<f32>) {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    let count = shape.iter().product();
    (shape.to_vec(), (0..count).map(next).collect())
}

/// The weights of a tiny Llama whose output projection is tied to its embedding.
fn llama_tensors() -> Tensors {
    let square = |seed| noise(&[HIDDEN, HIDDEN], seed);
    let ones = || (vec![HIDDEN], vec![1.0; HIDDEN]);
    let layer = |name: &str| format!("model.layers.0.{name}.weight");
    let mut tensors = Tensors::new();
    let embedding = noise(&[VOCABULARY, HIDDEN], 1);
    tensors.insert("model.embed_tokens.weight".to_owned(), embedding);
    tensors.insert("model.norm.weight".to_owned(), ones());
    for name in ["input_layernorm", "post_attention_layernorm"] {
        tensors.insert(layer(name), ones());
    }
    let matrices = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    for (seed, name) in (2..).zip(matrices) {
        tensors.insert(layer(name), square(seed));
    }
    tensors
}

fn write_folder(config: &Json, tensors: &Tensors) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, (shape, weights)) in tensors {
        let start = data.len();
        data.extend(weights.iter().flat_map(|weight| weight.to_le_bytes()));
        let offsets = [start, data.len()];
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
    }
    let header = Json::from(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    std::fs::write(folder.path().join("model.safetensors"), file).unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    folder
}

fn source(config: &Json, tensors: &Tensors) -> Result<ModelSource, String> {
    let folder = write_folder(config, tensors);
    let folder = ModelFolder::open(folder.path()).map_err(|error| error.to_string())?;
    ModelSource::from_folder(folder).map_err(|error| error.to_string())
}

fn start(folder: &TempDir) -> Result<Engine, LoadError> {
    let config = EngineConfig {
        kv_cache_bytes: Some(1 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    Engine::load_with(folder.path(), config, LoadOptions::cpu())
}

/// Returns the greedy answer of eight tokens to a fixed prompt.
fn answer(config: &Json, tensors: &Tensors) -> Vec<u32> {
    let engine = start(&write_folder(config, tensors)).unwrap();
    let request = Request::new(vec![3, 5, 7]).greedy().max_tokens(8);
    let answer = engine.generate(request).unwrap().complete_blocking();
    answer
        .unwrap()
        .tokens
        .iter()
        .map(|token| token.id)
        .collect()
}

#[track_caller]
fn assert_names(result: Result<ModelSource, String>, parts: &[&str]) {
    let error = result.expect_err("the model is refused");
    for part in parts {
        assert!(error.contains(part), "'{part}' is not in: {error}");
    }
}

#[test]
fn unused_tensors_are_refused_unless_they_are_known_to_be_redundant() {
    let config = llama_config();
    for name in [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.0.self_attn.k_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.norm.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    ] {
        let mut tensors = llama_tensors();
        tensors.insert(name.to_owned(), noise(&[HIDDEN], 9));
        assert_names(source(&config, &tensors), &[name, "llama"]);
    }
    let plain = answer(&config, &llama_tensors());
    let mut tensors = llama_tensors();
    for name in [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.layers.0.weight",
        "multi_modal_projector.weight",
    ] {
        tensors.insert(name.to_owned(), noise(&[4], 9));
    }
    assert_eq!(answer(&config, &tensors), plain);
}

#[test]
fn a_bias_required_by_the_settings_must_exist() {
    let mut config = llama_config();
    config["attention_bias"] = json!(true);
    assert_names(source(&config, &llama_tensors()), &["q_proj.bias"]);
}

#[test]
fn a_stored_output_projection_takes_precedence_over_tied_embeddings() {
    let (mut tied, mut untied) = (llama_config(), llama_config());
    tied["tie_word_embeddings"] = json!(true);
    untied["tie_word_embeddings"] = json!(false);
    assert_names(
        source(&untied, &llama_tensors()),
        &["lm_head.weight", "tie_word_embeddings"],
    );

    let mut other = llama_tensors();
    let head = noise(&[VOCABULARY, HIDDEN], 77);
    other.insert("lm_head.weight".to_owned(), head);
    let expected = answer(&untied, &other);
    assert_ne!(expected, answer(&tied, &llama_tensors()));
    assert_eq!(answer(&tied, &other), expected);

    // A stored copy of the embedding is equivalent to the tied embedding.
    let mut copy = llama_tensors();
    let embedding = copy["model.embed_tokens.weight"].clone();
    copy.insert("lm_head.weight".to_owned(), embedding);
    assert_eq!(answer(&tied, &copy), answer(&tied, &llama_tensors()));
    assert_eq!(answer(&untied, &copy), answer(&tied, &llama_tensors()));
}

#[test]
fn an_unused_gguf_tensor_is_refused() {
    let square = || noise(&[HIDDEN, HIDDEN], 5).1;
    let ones = [1.0; HIDDEN];
    let file = |extra: Option<&str>| {
        let mut file = GgufWriter::new()
            .string("general.architecture", "llama")
            .u32("llama.block_count", 1)
            .u32("llama.embedding_length", HIDDEN as u32)
            .u32("llama.feed_forward_length", HIDDEN as u32)
            .u32("llama.attention.head_count", 2)
            .u32("llama.context_length", 64)
            .f32_tensor(
                "token_embd.weight",
                &[VOCABULARY, HIDDEN],
                &noise(&[VOCABULARY, HIDDEN], 1).1,
            )
            .f32_tensor("output_norm.weight", &[HIDDEN], &ones)
            .f32_tensor("blk.0.attn_norm.weight", &[HIDDEN], &ones)
            .f32_tensor("blk.0.ffn_norm.weight", &[HIDDEN], &ones);
        for name in [
            "attn_q",
            "attn_k",
            "attn_v",
            "attn_output",
            "ffn_gate",
            "ffn_up",
            "ffn_down",
        ] {
            let name = format!("blk.0.{name}.weight");
            file = file.f32_tensor(&name, &[HIDDEN, HIDDEN], &square());
        }
        if let Some(name) = extra {
            file = file.f32_tensor(name, &[HIDDEN], &ones);
        }
        ModelSource::from_gguf(open(&file)).map_err(|error| error.to_string())
    };
    for name in [None, Some("blk.0.attn_q.bias"), Some("v.blk.0.ln1.weight")] {
        file(name).unwrap();
    }
    for name in [
        "blk.0.attn_q.scale",
        "blk.0.attn_q_norm.weight",
        "blk.1.attn_norm.weight",
    ] {
        assert_names(file(Some(name)), &[name]);
    }
}

#[test]
fn a_gguf_setting_is_named_with_its_architecture() {
    let refused = |key: &str, value: Value| {
        let mut settings = BTreeMap::from([
            ("block_count", Value::U32(1)),
            ("embedding_length", Value::U32(64)),
            ("feed_forward_length", Value::U32(64)),
            ("attention.head_count", Value::U32(2)),
            ("context_length", Value::U32(64)),
            ("vocab_size", Value::U32(10)),
            ("rope.scaling.type", Value::String("yarn".into())),
            ("rope.scaling.factor", Value::F32(2.0)),
        ]);
        settings.insert(key, value);
        let mut file = GgufWriter::new().string("general.architecture", "llama");
        for (key, value) in settings {
            file = file.metadata(&format!("llama.{key}"), value);
        }
        let result = ModelSource::from_gguf(open(&file)).map_err(|error| error.to_string());
        assert_names(result, &[&format!("the model's llama.{key} is ")]);
    };
    for key in [
        "block_count",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "context_length",
        "vocab_size",
        "rope.dimension_count",
    ] {
        refused(key, Value::U32(0));
        refused(key, Value::String("many".into()));
    }
    for key in [
        "attention.layer_norm_rms_epsilon",
        "final_logit_softcapping",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.attn_factor",
    ] {
        refused(key, Value::F32(-1.0));
        refused(key, Value::String("large".into()));
    }
    refused("attention.value_length", Value::U32(16));
    refused("attention.causal", Value::Bool(false));
    refused("attention.scale", Value::F32(2.0));
    refused("rope.scaling.original_context_length", Value::U32(0));
    refused("rope.scaling.type", Value::String("odd".into()));
    let uneven = Value::Array(Array::U32(vec![2, 3]));
    refused("attention.head_count_kv", uneven);
    // Only some architectures have layers without attention.
    let without = Value::Array(Array::U32(vec![2, 0]));
    refused("attention.head_count_kv", without);
    let pattern = Value::Array(Array::Bool(vec![true, false]));
    refused("attention.sliding_window_pattern", pattern);
}

#[test]
fn a_non_finite_weight_fails_the_load_and_its_tensor_is_reported() {
    for (name, index) in [
        ("model.embed_tokens.weight", 70),
        ("model.norm.weight", 3),
        ("model.layers.0.mlp.up_proj.weight", 0),
        ("model.layers.0.self_attn.q_proj.weight", 1023),
    ] {
        for value in [f32::NAN, f32::NEG_INFINITY] {
            let mut tensors = llama_tensors();
            tensors.get_mut(name).unwrap().1[index] = value;
            let error = start(&write_folder(&llama_config(), &tensors)).unwrap_err();
            let error = error.to_string();
            let expected = [name, &format!("weight {index} "), "model.safetensors"];
            assert!(expected.iter().all(|part| error.contains(part)), "{error}");
        }
    }
}

#[test]
fn a_file_truncated_during_the_load_is_a_typed_error() {
    let folder = write_folder(&llama_config(), &llama_tensors());
    let path = folder.path().join("model.safetensors");
    let size = std::fs::metadata(&path).unwrap().len();
    for kept in [0, 512, size / 2, size - 1] {
        let files = ModelFiles::open(folder.path()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let writer = std::fs::File::options().write(true).open(&path).unwrap();
        writer.set_len(kept).unwrap();
        let error = Engine::from_files(files, EngineConfig::default(), LoadOptions::cpu());
        let error = error.expect_err("the model is refused").to_string();
        let found = format!("had {size} bytes and now has {kept}");
        assert!(
            error.contains("model.safetensors") && error.contains(&found),
            "{error}"
        );
        std::fs::write(&path, whole).unwrap();
    }
}

#[test]
fn infinity_in_an_unused_setting_is_accepted() {
    let folder = write_folder(&llama_config(), &llama_tensors());
    let path = folder.path().join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let with = |setting: &str| config.replacen('{', &format!("{{{setting}, "), 1);
    std::fs::write(
        &path,
        with("\"time_step_limit\": [0.0, Infinity], \"x\": NaN"),
    )
    .unwrap();
    start(&folder).unwrap();
    std::fs::write(&path, with("\"rope_theta\": Infinity")).unwrap();
    let error = start(&folder).unwrap_err().to_string();
    assert!(error.contains("rope_theta"), "{error}");
}

#[test]
fn settings_that_contradict_the_model_or_each_other_are_refused() {
    let build = |model: &str, set: fn(EngineBuilder) -> EngineBuilder| {
        let builder = Engine::builder(tiny(model)).device(DeviceChoice::Cpu);
        set(builder.kv_cache_bytes(8 << 20)).build()
    };
    for (model, set, expected) in [
        (
            "llama",
            (|builder| builder.max_context(1 << 30)) as fn(EngineBuilder) -> EngineBuilder,
            "max_context is 1073741824, but must be at most 512, the context of the model",
        ),
        (
            "llama",
            |builder| builder.state_slots(8),
            "state_slots is 8, but must be unset",
        ),
        (
            "qwen3.5",
            |builder| builder.state_slots(1),
            "state_slots is 1, but must be from 2 to ",
        ),
        (
            "qwen3.5",
            |builder| builder.state_slots(1 << 20),
            "kv_cache_bytes is 8388608, but must be more than ",
        ),
        (
            "llama",
            |builder| builder.preemption(Preemption::Swap, 0),
            "swap_bytes is 0, but must be at least 1",
        ),
        (
            "llama",
            |builder| builder.preemption(Preemption::Swap, 100),
            "swap_bytes is 100, but must be at least ",
        ),
        (
            "llama",
            |builder| builder.block_tokens(1 << 15),
            "kv_cache_bytes is 8388608, but must be at least ",
        ),
    ] {
        let error = build(model, set).unwrap_err();
        assert!(matches!(error, LoadError::Config { .. }), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    let most = build("llama", |builder| builder.max_context(512)).unwrap();
    assert_eq!(most.info().context_tokens, 512);
}
