//! Random weights in place of a checkpoint: the same tensors, without its file.

use quell::internals::model::ModelSource;
use quell::internals::runner::random_model;
use quell::internals::weights::{DType, ModelFolder, from_python_json};
use quell::{Engine, EngineConfig, LoadOptions, Request};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Returns the folders of the tiny checkpoints, one or more per architecture.
fn checkpoints() -> Vec<PathBuf> {
    let root = common::root();
    let folders = std::fs::read_dir(root.join("tests/fixtures/golden/tiny")).unwrap();
    let mut folders: Vec<PathBuf> = folders.map(|entry| entry.unwrap().path()).collect();
    folders.sort();
    assert!(folders.len() >= 10);
    folders
}

fn settings(folder: &Path) -> Value {
    from_python_json(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
}

fn engine(folder: &Path, format: DType) -> Engine {
    engine_of(&settings(folder), format)
}

fn engine_of(settings: &Value, format: DType) -> Engine {
    let files = random_model(settings, format).unwrap();
    let config = EngineConfig {
        kv_cache_bytes: Some(4 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    Engine::from_files(files, config, LoadOptions::cpu()).unwrap()
}

fn tokens(engine: &Engine) -> Vec<u32> {
    let mut request = Request::new(vec![3, 1, 4, 1, 5]).greedy().max_tokens(6);
    request.ignore_eos = true;
    let done = engine.generate(request).unwrap().complete_blocking();
    done.unwrap().tokens.iter().map(|token| token.id).collect()
}

#[test]
fn a_random_model_has_the_parameter_count_of_its_checkpoint() {
    for folder in checkpoints() {
        let stored = ModelSource::from_folder(ModelFolder::open(&folder).unwrap()).unwrap();
        let random = ModelSource::random(&settings(&folder), DType::BF16).unwrap();
        assert_eq!(random.config(), stored.config(), "{}", folder.display());
        // A model with vision counts the weights of its tower, too.
        if settings(&folder).get("vision_config").is_some() {
            continue;
        }
        let (random, stored) = (random.parameters().total, stored.parameters().total);
        assert_eq!(random, stored, "{}", folder.display());
    }
}

#[test]
fn every_architecture_gives_reproducible_tokens_on_random_weights() {
    for folder in checkpoints() {
        let first = tokens(&engine(&folder, DType::BF16));
        assert_eq!(first.len(), 6, "{}", folder.display());
        let second = tokens(&engine(&folder, DType::BF16));
        assert_eq!(first, second, "{}", folder.display());
    }
}

#[test]
fn variants_of_hybrid_models_without_a_checkpoint_run() {
    let folders = checkpoints();
    for (name, changes) in [
        ("lfm2", json!({"conv_bias": true})),
        (
            "granite-hybrid",
            json!({
                "num_local_experts": 0, "position_embedding_type": "rope",
                "layer_types": ["attention", "attention", "attention", "attention"],
            }),
        ),
        (
            "granite-hybrid",
            json!({"mamba_conv_bias": false, "mamba_proj_bias": true, "attention_bias": true}),
        ),
        (
            "nemotron-h",
            json!({
                "hybrid_override_pattern": "ME*E", "n_routed_experts": 8,
                "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64,
                "n_group": 4, "topk_group": 2, "use_bias": true,
            }),
        ),
        (
            "nemotron-h",
            json!({"hybrid_override_pattern": "*-*-", "mlp_bias": true}),
        ),
    ] {
        let folder = folders.iter().find(|folder| folder.ends_with(name));
        let mut settings = settings(folder.unwrap());
        for (key, value) in changes.as_object().unwrap() {
            settings[key] = value.clone();
        }
        let first = tokens(&engine_of(&settings, DType::BF16));
        assert_eq!(first.len(), 6, "{changes}");
        let second = tokens(&engine_of(&settings, DType::BF16));
        assert_eq!(first, second, "{changes}");
    }
}

#[test]
fn quantised_random_weights_run_if_their_rows_fit_the_format() {
    let folders = checkpoints();
    let llama = folders.iter().find(|folder| folder.ends_with("llama"));
    let llama = llama.unwrap();
    for format in [DType::Q4_0, DType::Q8_0] {
        assert_eq!(tokens(&engine(llama, format)).len(), 6, "{format}");
    }
    // The model's rows have 64 columns, but a Q4_K block has 256 weights.
    let error = random_model(&settings(llama), DType::Q4K).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("Q4_K") && text.contains("64"), "{text}");
}
