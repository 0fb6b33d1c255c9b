//! Compares the demo model with transformers, by the rule in ARCHITECTURE.md, with both kinds
//! of activations. `make test` fetches the model file.

use common::golden::{Tolerance, ids, smollm2_case, smollm2_reference};
use common::{golden, model};
use quell::{Activations, CpuOptions, Engine, EngineConfig, LoadOptions, Message, Prompt};

fn engine(activations: Activations) -> Engine {
    let config = EngineConfig {
        kv_cache_bytes: Some(64 << 20),
        audit: true,
        ..EngineConfig::default()
    };
    let cpu = CpuOptions {
        activations,
        ..CpuOptions::default()
    };
    Engine::load_with(
        model::smollm2(),
        config,
        LoadOptions {
            cpu,
            ..LoadOptions::cpu()
        },
    )
    .unwrap()
}

fn check(activations: Activations, mean_allowed: f32, tolerance: Tolerance) {
    let engine = engine(activations);
    let mut errors = Vec::new();
    for value in smollm2_reference() {
        errors.extend(golden::check(
            &engine,
            &smollm2_case(&value),
            1024,
            tolerance,
        ));
    }
    assert_eq!(
        errors.len(),
        6 * 8 * 10,
        "six cases of eight steps of ten tokens"
    );
    let mean = errors.iter().sum::<f32>() / errors.len() as f32;
    let max = errors.iter().copied().fold(0.0, f32::max);
    println!("{activations:?}: mean error {mean:.4}, max {max:.4}");
    assert!(
        mean <= mean_allowed,
        "mean error {mean} above {mean_allowed}"
    );
}

#[test]
fn float32_activations_agree_with_transformers() {
    check(
        Activations::F32,
        0.005,
        Tolerance {
            max: 0.02,
            margin: 0.01,
        },
    );
}

#[test]
fn int8_activations_agree_with_transformers() {
    check(
        Activations::Int8,
        0.08,
        Tolerance {
            max: 0.4,
            margin: 0.3,
        },
    );
}

#[test]
fn prompts_are_tokenized_like_the_reference() {
    let engine = engine(Activations::Auto);
    for value in smollm2_reference() {
        let text = Prompt::Text(value["text"].as_str().unwrap().to_owned());
        assert_eq!(*engine.tokenize(text).unwrap(), ids(&value["prompt_ids"]));
        if let Some(messages) = value.get("messages") {
            let messages: Vec<Message> = serde_json::from_value(messages.clone()).unwrap();
            let tokens = engine.tokenize(messages).unwrap();
            assert_eq!(*tokens, ids(&value["prompt_ids"]), "{}", value["name"]);
        }
    }
}
