//! Settings of `config.json`, read and refused.

use super::*;
use crate::model::RopeScaling;
use serde_json::json;

fn llama() -> Value {
    json!({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
        "num_attention_heads": 4, "max_position_embeddings": 512,
        "intermediate_size": 128, "vocab_size": 100,
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().cloned().unwrap_or_default() {
        config[key] = value;
    }
    config
}

#[test]
fn gemma3_with_vision_gets_what_its_configuration_leaves_out() {
    let config = read(&json!({
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "text_config": {
            "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "sliding_window": 1024,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        },
    }))
    .unwrap();
    let HeadShape {
        q_heads,
        kv_heads,
        head_dim,
    } = config.heads;
    assert_eq!((q_heads, kv_heads, head_dim), (8, 4, 256));
    assert_eq!(config.attention_scale, 1.0 / 16.0);
    assert_eq!((config.context, config.vocabulary), (131_072, 262_208));
    assert_eq!((config.rope.theta, config.sliding_rope.theta), (1e6, 1e4));
    assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(config.sliding_rope.scaling, RopeScaling::None);
    assert_eq!(config.layer_window(4), Some(1024));
    assert_eq!(config.layer_window(5), None);
    assert_eq!(config.end_tokens, [1, 106]);
}

#[test]
fn a_window_counts_only_where_the_family_has_one_and_it_is_on() {
    let window = |changes| read(&with(llama(), changes)).unwrap().window;
    assert_eq!(window(json!({"sliding_window": 16})), None);
    assert_eq!(
        window(json!({"model_type": "mistral", "sliding_window": 16})),
        Some(16)
    );
    let qwen = json!({"model_type": "qwen2", "sliding_window": 16});
    assert_eq!(window(qwen.clone()), None);
    assert_eq!(
        window(with(qwen, json!({"use_sliding_window": true}))),
        Some(16)
    );
}

#[test]
fn yarn_extends_the_context() {
    let rope = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
    });
    let config = read(&with(llama(), json!({"rope_scaling": rope}))).unwrap();
    assert_eq!(config.context, 2048);
}

#[test]
fn what_cannot_be_run_is_refused_by_its_key() {
    for (changes, key) in [
        (json!({"num_hidden_layers": null}), "num_hidden_layers"),
        (json!({"hidden_size": "64"}), "hidden_size"),
        (json!({"vocab_size": 0}), "vocabulary size"),
        (json!({"num_key_value_heads": 3}), "attention heads"),
        (json!({"rms_norm_eps": -1.0}), "norm epsilon"),
        (
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (json!({"layer_types": ["full_attention"]}), "layer types"),
        (json!({"rope_theta": 0.0}), "RoPE base"),
    ] {
        let error = read(&with(llama(), changes)).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn end_tokens_may_be_one_many_or_none() {
    let ends = |id: Value| {
        let config = with(llama(), json!({"eos_token_id": id}));
        read(&config).unwrap().end_tokens
    };
    assert_eq!(ends(json!(2)), [2]);
    assert_eq!(ends(json!([2, 5])), [2, 5]);
    assert_eq!(ends(json!(null)), [0u32; 0]);
    assert_eq!(ends(json!(-1)), [0u32; 0]);
}
