//! Tests of how settings of `config.json` are read and refused.

mod recurrent;

use super::*;
use crate::device::{DeltaHeads, DeltaOrder, RouterScore};
use crate::model::layer::Attention;
use crate::model::{RopeConfig, RopeScaling};
use serde_json::json;

fn llama() -> Value {
    json!({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
        "intermediate_size": 128, "vocab_size": 100,
    })
}

fn attention(config: &ModelConfig, layer: usize) -> &Attention {
    config.layers[layer].attention().unwrap()
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
        ..
    } = config.heads();
    assert_eq!((q_heads, kv_heads, head_dim), (8, 4, 256));
    assert_eq!(attention(&config, 0).scale, 1.0 / 16.0);
    assert_eq!((config.context, config.vocabulary), (131_072, 262_208));
    let [full, sliding] = config.ropes.as_slice() else {
        panic!("not two position embeddings: {:?}", config.ropes);
    };
    assert_eq!((full.theta, sliding.theta), (1e6, 1e4));
    assert_eq!(full.scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(sliding.scaling, RopeScaling::None);
    let [slides, sees_all] = [4, 5].map(|layer: usize| *attention(&config, layer));
    assert_eq!((slides.window, slides.rope), (Some(1024), Some(1)));
    assert_eq!((sees_all.window, sees_all.rope), (None, Some(0)));
    assert_eq!(config.end_tokens, [1, 106]);
}

#[test]
fn a_window_counts_only_where_the_family_has_one_and_it_is_on() {
    let window = |changes| read(&with(llama(), changes)).unwrap().window();
    assert_eq!(window(json!({"sliding_window": 16})), None);
    assert_eq!(
        window(json!({"model_type": "mistral", "sliding_window": 16})),
        Some(16)
    );
    let qwen = json!({"model_type": "qwen2", "sliding_window": 16, "max_window_layers": 0});
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
        (json!({"vocab_size": 0}), "vocab_size"),
        (json!({"num_key_value_heads": 3}), "num_attention_heads"),
        (json!({"rms_norm_eps": -1.0}), "rms_norm_eps"),
        (
            json!({"use_bidirectional_attention": true}),
            "use_bidirectional_attention",
        ),
        (json!({"layer_types": ["full_attention"]}), "layer_types"),
        (json!({"rope_theta": 0.0}), "rope_theta"),
    ] {
        let error = read(&with(llama(), changes)).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn a_setting_is_named_with_the_objects_that_it_is_in() {
    let refused = |changes: Value, key: &str| {
        let error = read(&with(llama(), changes)).unwrap_err().to_string();
        let start = format!("the model's {key} is ");
        assert!(error.starts_with(&start), "{key}: {error}");
    };
    let text = |settings: Value| json!({"model_type": "gemma3", "text_config": settings});
    refused(
        text(json!({"hidden_size": "64"})),
        "text_config.hidden_size",
    );
    refused(text(json!({"hidden_size": 0})), "text_config.hidden_size");
    refused(text(json!({"head_dim": null})), "text_config.head_dim");
    refused(
        text(json!({"hidden_activation": "relu"})),
        "text_config.hidden_activation",
    );
    let types = json!({"num_hidden_layers": 1, "layer_types": ["odd"]});
    refused(text(types), "text_config.layer_types entry");
    refused(
        text(json!({"sliding_window_pattern": 0})),
        "text_config.sliding_window_pattern",
    );
    let scaled = |scaling: Value| json!({ "rope_scaling": scaling });
    refused(
        scaled(json!({"rope_type": "linear"})),
        "rope_scaling.factor",
    );
    refused(scaled(json!({"rope_type": 5})), "rope_scaling.rope_type");
    refused(scaled(json!({"type": "odd"})), "rope_scaling.type");
    refused(
        scaled(json!({"rope_type": "linear", "factor": -1})),
        "rope_scaling.factor",
    );
    let partial = json!({"rope_parameters": {"partial_rotary_factor": 0.5}});
    refused(partial, "rope_parameters.partial_rotary_factor");
    let sliding = json!({"full_attention": {}, "sliding_attention": {"rope_type": "odd"}});
    refused(
        text(json!({ "rope_parameters": sliding })),
        "text_config.rope_parameters.sliding_attention.rope_type",
    );
    let original = json!({
        "original_max_position_embeddings": 0, "rope_scaling": {"rope_type": "yarn", "factor": 2},
    });
    refused(original, "original_max_position_embeddings");
    let experts = |model_type: &str, changes| with(json!({ "model_type": model_type }), changes);
    refused(
        experts("mixtral", json!({"num_local_experts": 0})),
        "num_local_experts",
    );
    refused(
        experts("qwen3_moe", json!({"num_experts": 0})),
        "num_experts",
    );
    refused(
        experts("qwen3_moe", json!({"moe_intermediate_size": 0})),
        "moe_intermediate_size",
    );
    refused(
        experts("mixtral", json!({"num_experts_per_tok": 99})),
        "num_experts_per_tok",
    );
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

/// Reads a `config.json` that contains only `model_type`.
fn bare(model_type: &str) -> ModelConfig {
    read(&json!({"model_type": model_type})).unwrap()
}

#[test]
fn what_a_configuration_leaves_out_is_as_in_the_configuration_class() {
    let shape = |config: &ModelConfig| {
        let HeadShape {
            q_heads,
            kv_heads,
            head_dim,
            ..
        } = config.heads();
        let experts = config.experts().map(|experts| experts.width);
        let width = config.dense_width().or(experts).unwrap();
        (
            (config.layers.len(), config.hidden, width),
            (q_heads, kv_heads, head_dim),
            (config.vocabulary, config.context, config.window()),
        )
    };
    let expected = [
        (
            "llama",
            (32, 4096, 11_008),
            (32, 32, 128),
            (32_000, 2048, None),
        ),
        (
            "mistral",
            (32, 4096, 14_336),
            (32, 8, 128),
            (32_000, 131_072, Some(4096)),
        ),
        (
            "mixtral",
            (32, 4096, 14_336),
            (32, 8, 128),
            (32_000, 131_072, None),
        ),
        (
            "qwen2",
            (32, 4096, 22_016),
            (32, 32, 128),
            (151_936, 32_768, None),
        ),
        (
            "qwen3",
            (32, 4096, 22_016),
            (32, 32, 128),
            (151_936, 32_768, None),
        ),
        (
            "qwen3_moe",
            (24, 2048, 768),
            (32, 4, 64),
            (151_936, 32_768, None),
        ),
        (
            "gemma2",
            (26, 2304, 9216),
            (8, 4, 256),
            (256_000, 8192, Some(4096)),
        ),
        (
            "gemma3_text",
            (26, 2304, 9216),
            (8, 4, 256),
            (262_208, 131_072, Some(4096)),
        ),
        ("phi3", (32, 3072, 8192), (32, 32, 96), (32_064, 4096, None)),
        (
            "olmo2",
            (32, 4096, 11_008),
            (32, 32, 128),
            (50_304, 2048, None),
        ),
        (
            "olmo3",
            (32, 4096, 11_008),
            (32, 32, 128),
            (50_304, 2048, Some(4096)),
        ),
        (
            "granite",
            (32, 4096, 11_008),
            (32, 32, 128),
            (32_000, 2048, None),
        ),
        (
            "smollm3",
            (36, 2048, 11_008),
            (16, 4, 128),
            (128_256, 32_768, None),
        ),
        (
            "seed_oss",
            (64, 4096, 27_648),
            (80, 8, 128),
            (155_136, 524_288, None),
        ),
        (
            "ernie4_5",
            (18, 1024, 3072),
            (16, 2, 128),
            (103_424, 131_072, None),
        ),
        (
            "exaone4",
            (32, 4096, 16_384),
            (32, 32, 128),
            (102_400, 2048, Some(4096)),
        ),
        (
            "glm4",
            (40, 4096, 13_696),
            (32, 2, 128),
            (151_552, 131_072, None),
        ),
        (
            "cohere2",
            (40, 8192, 22_528),
            (64, 64, 128),
            (256_000, 8192, Some(4096)),
        ),
        (
            "ministral3",
            (34, 4096, 14_336),
            (32, 8, 128),
            (131_072, 262_144, None),
        ),
        (
            "gpt_oss",
            (36, 2880, 2880),
            (64, 8, 64),
            (201_088, 131_072, Some(128)),
        ),
        (
            "minimax_m2",
            (62, 3072, 1536),
            (48, 8, 128),
            (200_064, 196_608, None),
        ),
        (
            "llama4_text",
            (48, 5120, 8192),
            (40, 8, 128),
            (202_048, 131_072, Some(8192)),
        ),
    ];
    for (name, sizes, heads, rest) in expected {
        let config = bare(name);
        assert_eq!(shape(&config), (sizes, heads, rest), "{name}");
        let epsilon = match name {
            "llama" | "mistral" | "qwen2" | "qwen3" | "qwen3_moe" => 1e-6,
            "gemma2" | "gemma3_text" | "granite" | "smollm3" | "seed_oss" => 1e-6,
            "minimax_m2" => 1e-6,
            "glm4" => 1.5625e-7,
            _ => 1e-5,
        };
        assert_eq!(config.norm_epsilon, epsilon, "{name}");
        let theta = match name {
            "mixtral" | "gemma3_text" | "ministral3" => 1e6,
            "smollm3" => 2e6,
            "olmo3" | "ernie4_5" | "llama4_text" => 500_000.0,
            "gpt_oss" => 150_000.0,
            "minimax_m2" => 5e6,
            _ => 10_000.0,
        };
        assert_eq!(config.ropes[0].theta, theta, "{name}");
    }
    let experts = |name| bare(name).experts().unwrap();
    let (mixtral, qwen) = (experts("mixtral"), experts("qwen3_moe"));
    assert_eq!((mixtral.count, mixtral.routing.top_k), (8, 2));
    assert_eq!((qwen.count, qwen.routing.top_k, qwen.width), (128, 8, 768));
    assert!(!qwen.routing.normalize && mixtral.routing.normalize);
    let dense = json!({"model_type": "qwen3_moe", "decoder_sparse_step": 2});
    assert_eq!(read(&dense).unwrap().dense_width(), Some(6144));
    assert!(ties_embeddings(&json!({"model_type": "gemma2"})).unwrap());
    assert!(!ties_embeddings(&json!({"model_type": "llama"})).unwrap());
}

#[test]
fn gemmas_caps_and_scale_are_the_classes_unless_they_are_null() {
    let caps = |config: &ModelConfig| {
        let softcap = attention(config, 0).softcap;
        (softcap, config.logit_softcap)
    };
    let scale = |config: &ModelConfig| attention(config, 0).scale;
    let gemma = bare("gemma2");
    assert_eq!(caps(&gemma), (Some(50.0), Some(30.0)));
    assert_eq!(scale(&gemma), 1.0 / 16.0);
    let uncapped = read(&json!({
        "model_type": "gemma2", "attn_logit_softcapping": null, "final_logit_softcapping": null,
        "query_pre_attn_scalar": 64,
    }))
    .unwrap();
    assert_eq!(caps(&uncapped), (None, None));
    assert_eq!(scale(&uncapped), 1.0 / 8.0);
    assert_eq!(bare("gemma3_text").logit_softcap, None);
    // Other classes do not read these settings.
    let changes = json!({"final_logit_softcapping": 30.0, "query_pre_attn_scalar": 1});
    let config = read(&with(llama(), changes)).unwrap();
    assert_eq!((config.logit_softcap, scale(&config)), (None, 0.25));
}

#[test]
fn a_qwen_window_begins_at_layer_28_and_a_moe_one_at_the_first() {
    let slides = |model_type: &str, changes: Value| {
        let config = json!({
            "model_type": model_type, "num_hidden_layers": 30, "use_sliding_window": true,
        });
        let config = read(&with(config, changes)).unwrap();
        assert_eq!(config.window(), Some(4096));
        let windows = config
            .layers
            .iter()
            .map(|layer| layer.attention().unwrap().window);
        windows.flatten().count()
    };
    assert_eq!(slides("qwen2", json!({})), 2);
    assert_eq!(slides("qwen3", json!({"max_window_layers": 10})), 20);
    assert_eq!(slides("qwen3_moe", json!({"max_window_layers": 10})), 30);
}

fn rope_of(family: &str, rope: Value) -> RopeConfig {
    let config = json!({
        "model_type": family, "num_attention_heads": 4, "hidden_size": 64,
        "max_position_embeddings": 1024, "rope_scaling": rope,
    });
    read(&config).unwrap().ropes.remove(0)
}

#[test]
fn yarn_reads_its_magnitude_its_rounding_and_its_zeros() {
    let yarn = |changes: Value| {
        let rope = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256,
        });
        match rope_of("llama", with(rope, changes)).scaling {
            RopeScaling::Yarn {
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
                ..
            } => (beta_fast, beta_slow, truncate, attention_factor),
            other => panic!("not YaRN: {other:?}"),
        }
    };
    assert_eq!(yarn(json!({})), (32.0, 1.0, true, None));
    assert!(!yarn(json!({"truncate": false})).2);
    assert_eq!(yarn(json!({"beta_fast": 0, "beta_slow": null})).0, 32.0);
    let scale = |scale: f32| 0.1 * scale * 4f32.ln() + 1.0;
    let both = yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.5}))
        .3
        .unwrap();
    assert!((both - scale(1.0) / scale(0.5)).abs() < 1e-6);
    assert_eq!(yarn(json!({"mscale": 1.0, "mscale_all_dim": 0})).3, None);
    let given = json!({"attention_factor": 1.25, "mscale": 1.0, "mscale_all_dim": 0.5});
    assert_eq!(yarn(given).3, Some(1.25));
}

#[test]
fn longrope_derives_its_magnitude_from_the_factor_and_keeps_to_the_original_context() {
    let factors = vec![1.0; 8];
    let longrope = |changes: Value| {
        let mut config = json!({
            "model_type": "phi3", "num_attention_heads": 4, "hidden_size": 64,
            "max_position_embeddings": 1024, "original_max_position_embeddings": 128,
            "rope_scaling": {"type": "su", "short_factor": factors, "long_factor": factors},
        });
        config["rope_scaling"] = with(config["rope_scaling"].clone(), changes);
        let config = read(&config).unwrap();
        let contexts = (config.native_context(), config.context);
        match &config.ropes[0].scaling {
            RopeScaling::Long { magnitude, .. } => (*magnitude, contexts),
            other => panic!("not LongRoPE: {other:?}"),
        }
    };
    let magnitude = |factor: f32| (1.0 + factor.ln() / 128f32.ln()).sqrt();
    let near = |found: f32, expected: f32| assert!((found - expected).abs() < 1e-6, "{found}");
    let (derived, contexts) = longrope(json!({}));
    near(derived, magnitude(8.0));
    assert_eq!(contexts, (128, 1024));
    near(longrope(json!({"factor": 4.0})).0, magnitude(4.0));
    near(longrope(json!({"factor": 0.5})).0, 1.0);
    near(longrope(json!({"attention_factor": 1.5})).0, 1.5);
    assert_eq!(bare("llama").native_context(), 2048);
}

#[test]
fn gemma3_takes_a_position_embedding_for_each_kind_of_layer() {
    let gemma = |rope: Value| {
        let config = json!({"model_type": "gemma3_text", "rope_parameters": rope});
        read(&config)
    };
    let nested = json!({
        "full_attention": {"rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0},
    });
    let config = gemma(nested).unwrap();
    let thetas: Vec<f32> = config.ropes.iter().map(|rope| rope.theta).collect();
    assert_eq!(thetas, [1e6, 5000.0]);
    let linear = RopeScaling::Linear { factor: 8.0 };
    assert_eq!(config.ropes[0].scaling, linear);
    let flat = gemma(json!({"rope_type": "default", "rope_theta": 5.0})).unwrap_err();
    assert!(flat.to_string().contains("rope_parameters"), "{flat}");
}

#[test]
fn settings_that_would_change_the_results_are_refused_by_key() {
    let refused = |changes: Value, key: &str| {
        let error = read(&with(llama(), changes)).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    };
    refused(
        json!({"partial_rotary_factor": 0.5}),
        "partial_rotary_factor",
    );
    refused(json!({"hidden_act": "relu2"}), "hidden_act");
    refused(
        json!({"rope_scaling": {"type": "ntk-by-parts", "factor": 2}}),
        "ntk-by-parts",
    );
    refused(json!({"rope_scaling": {"rope_type": "linear"}}), "factor");
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0});
    refused(json!({ "rope_scaling": llama3 }), "low_freq_factor");
    let window = json!({
        "model_type": "mistral", "sliding_window": 64,
        "layer_types": ["full_attention", "sliding_attention"],
    });
    refused(window, "layer_types");
    let step = json!({"model_type": "qwen3_moe", "decoder_sparse_step": 0});
    refused(step, "decoder_sparse_step");
    refused(json!({"model_type": "qwen3", "head_dim": null}), "head_dim");
    // JSON has no infinity; `from_python_json` turns Python's into a string.
    refused(json!({"rope_theta": "Infinity"}), "rope_theta");
}

#[test]
fn biases_are_those_that_the_settings_say() {
    let biases = |changes: Value| {
        let biases = read(&with(llama(), changes)).unwrap().biases;
        let of = [biases.qkv, biases.attention_out, biases.feed_forward];
        of.map(|bias| bias == Some(true))
    };
    assert_eq!(biases(json!({})), [false, false, false]);
    assert_eq!(biases(json!({"attention_bias": true})), [true, true, false]);
    assert_eq!(biases(json!({"mlp_bias": true})), [false, false, true]);
    assert_eq!(biases(json!({"model_type": "qwen2"})), [true, false, false]);
    let mistral = json!({"model_type": "mistral", "attention_bias": true});
    assert_eq!(biases(mistral), [false, false, false]);
}

#[test]
fn granites_factor_on_the_residual_stream_is_moved_to_embeddings_and_norms() {
    let config = read(&json!({
        "model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.25,
        "attention_multiplier": 0.5, "logits_scaling": 8.0, "rms_norm_eps": 1e-5,
    }))
    .unwrap();
    assert_eq!(config.embedding_scale, 48.0);
    assert_eq!(config.norm_epsilon, 1.6e-4);
    assert_eq!(attention(&config, 0).scale, 0.5);
    assert_eq!(config.logit_scale, 0.125);
    for key in [
        "embedding_multiplier",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
    ] {
        for value in [json!(0), json!(-1.0), json!(null), json!("1")] {
            let mut config = json!({"model_type": "granite"});
            config[key] = value;
            let error = read(&config).unwrap_err().to_string();
            let start = format!("the model's {key} is ");
            assert!(error.starts_with(&start), "{key}: {error}");
        }
    }
}

#[test]
fn layers_without_rope_are_listed_or_come_at_an_interval() {
    let rotated = |config: Value| {
        let config = read(&config).unwrap();
        let layers = config
            .layers
            .iter()
            .map(|layer| layer.attention().unwrap().rope);
        layers.map(|rope| rope.is_some()).collect::<Vec<_>>()
    };
    let smollm = |changes| {
        with(
            json!({"model_type": "smollm3", "num_hidden_layers": 4}),
            changes,
        )
    };
    assert_eq!(rotated(smollm(json!({}))), [true, true, true, false]);
    let listed = smollm(json!({"no_rope_layers": [0, 1, 1, 0]}));
    assert_eq!(rotated(listed), [false, true, true, false]);
    let pairs = smollm(json!({"no_rope_layer_interval": 2}));
    assert_eq!(rotated(pairs), [true, false, true, false]);
    let exaone = |changes| {
        with(
            json!({"model_type": "exaone4", "num_hidden_layers": 4}),
            changes,
        )
    };
    assert_eq!(rotated(exaone(json!({}))), [true, true, true, false]);
    assert_eq!(rotated(exaone(json!({"sliding_window": null}))), [true; 4]);
    // The file has a window size, but no layer has a window.
    let full = json!({"layer_types": vec!["full_attention"; 4]});
    assert_eq!(rotated(exaone(full)), [false; 4]);
    let cohere = json!({
        "model_type": "cohere2", "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    });
    assert_eq!(rotated(cohere), [false, true]);
    for (key, value) in [
        ("no_rope_layers", json!([1, 1])),
        ("no_rope_layers", json!([1, 1, 2, 1])),
        ("no_rope_layer_interval", json!(0)),
    ] {
        let mut config = smollm(json!({}));
        config[key] = value;
        let error = read(&config).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn cohere2_reads_its_own_epsilon_and_factor() {
    let cohere = |changes| read(&with(json!({"model_type": "cohere2"}), changes));
    let config = cohere(json!({"rms_norm_eps": 0.5})).unwrap();
    assert_eq!((config.norm_epsilon, config.logit_scale), (1e-5, 0.0625));
    assert_eq!(config.norm, NormKind::Layer);
    for key in ["layer_norm_eps", "logit_scale"] {
        let error = cohere(json!({ key: 0.0 })).unwrap_err().to_string();
        assert!(error.contains(key), "{error}");
    }
}

#[test]
fn ministral3_is_extended_and_scales_its_queries_by_default() {
    let config = bare("ministral3");
    let scale = attention(&config, 0).query_scale.unwrap();
    assert_eq!(
        (scale.slope, scale.interval, scale.offset),
        (0.1, 16_384, 0)
    );
    match config.ropes[0].scaling {
        RopeScaling::Yarn {
            factor,
            attention_factor,
            ..
        } => assert_eq!((factor, attention_factor), (16.0, Some(1.0))),
        ref other => panic!("not YaRN: {other:?}"),
    }
    let rope = json!({"rope_type": "yarn", "factor": 2.0});
    let config = json!({"model_type": "ministral3", "rope_parameters": rope});
    let error = read(&config).unwrap_err().to_string();
    assert!(
        error.contains("rope_parameters.llama_4_scaling_beta"),
        "{error}"
    );
}

#[test]
fn a_name_with_vision_is_read_as_the_text_model_that_it_holds() {
    let name = |config: Value| read(&config).unwrap().architecture.name();
    let mistral = |text: Value| json!({"model_type": "mistral3", "text_config": text});
    assert_eq!(name(mistral(json!({}))), "mistral");
    assert_eq!(name(mistral(json!({"model_type": "mistral"}))), "mistral");
    let text = json!({"model_type": "ministral3"});
    assert_eq!(name(mistral(text)), "ministral3");
    let unknown = json!({"model_type": "llava9", "text_config": {"model_type": "other9"}});
    let error = read(&unknown).unwrap_err().to_string();
    assert!(error.contains("llava9"), "{error}");
}

#[test]
fn mixtures_of_sigmoids_read_how_their_routers_choose() {
    let sigmoid = |config: &ModelConfig| match config.experts().unwrap().routing.score {
        RouterScore::Sigmoid(sigmoid) => sigmoid,
        RouterScore::Softmax | RouterScore::GroupedSoftmax(_) => panic!("not a sigmoid"),
    };
    let glm = |changes| {
        read(&with(
            json!({"model_type": "glm4_moe", "head_dim": 128}),
            changes,
        ))
    };
    let config = glm(json!({
        "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 3,
        "n_shared_experts": 2, "num_nextn_predict_layers": 1,
    }))
    .unwrap();
    let routing = sigmoid(&config);
    assert_eq!((routing.groups, routing.top_groups), (8, 4));
    assert_eq!(routing.scale, 2.5);
    assert_eq!(config.shared_width(), Some(2 * 1408));
    assert_eq!(config.prediction_layers, 1);
    let is_dense = |layer: usize| {
        matches!(
            config.layers[layer].feed_forward,
            crate::model::layer::FeedForward::Dense { .. }
        )
    };
    assert_eq!([0, 2, 3, 45].map(is_dense), [true, true, false, false]);
    assert_eq!(config.ropes[0].rotary_dim, 64);
    for (changes, key) in [
        (json!({"n_group": 7}), "topk_group"),
        (json!({"n_group": 4, "topk_group": 5}), "topk_group"),
        (json!({"n_group": 64, "topk_group": 1}), "topk_group"),
        (json!({"routed_scaling_factor": 0}), "routed_scaling_factor"),
        (json!({"n_routed_experts": 0}), "n_routed_experts"),
        (json!({"num_experts_per_tok": 129}), "num_experts_per_tok"),
    ] {
        let error = glm(changes).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
    assert!(bare("minimax_m2").experts().unwrap().has_corrections);
    let rotary = json!({"model_type": "minimax_m2", "rotary_dim": 64});
    assert_eq!(read(&rotary).unwrap().ropes[0].rotary_dim, 64);
}

#[test]
fn gated_delta_nets_take_their_sizes_from_the_settings() {
    let next = |changes| read(&with(json!({"model_type": "qwen3_next"}), changes));
    let config = next(json!({})).unwrap();
    let delta = config.gated_delta().unwrap();
    let heads = DeltaHeads {
        key_heads: 16,
        value_heads: 32,
        key_dim: 128,
        value_dim: 128,
        order: DeltaOrder::Grouped,
    };
    assert_eq!((delta.heads, delta.taps), (heads, 4));
    let kinds = |config: &ModelConfig| {
        let layers = config.layers.iter();
        let full = layers.map(|layer| layer.attention().is_some());
        full.collect::<Vec<bool>>()
    };
    let full = kinds(&config).into_iter().enumerate();
    let full = full.filter(|(_, is_full)| *is_full);
    let expected: Vec<usize> = (3..48).step_by(4).collect();
    assert_eq!(full.map(|(layer, _)| layer).collect::<Vec<_>>(), expected);
    assert!(attention(&config, 3).has_gate);
    assert_eq!(config.ropes[0].rotary_dim, 64);
    let experts = config.experts().unwrap();
    assert_eq!((experts.count, experts.routing.top_k), (512, 10));
    assert!(experts.has_shared_gate && experts.routing.normalize);
    assert_eq!(config.shared_width(), Some(512));
    let elements = 3 * 8192 + 32 * 128 * 128;
    assert_eq!(recurrent::state_elements(&config), 36 * elements);
    let dense = read(&json!({
        "model_type": "qwen3_5", "vision_config": {},
        "text_config": {
            "num_hidden_layers": 3, "full_attention_interval": 2, "attn_output_gate": true,
            "rope_parameters": {"mrope_section": [11, 11, 10], "mrope_interleaved": true,
                "partial_rotary_factor": 0.5, "rope_theta": 1e7, "rope_type": "default"},
        },
    }))
    .unwrap();
    assert_eq!(kinds(&dense), [false, true, false]);
    assert!(dense.experts().is_none());
    assert_eq!(dense.ropes[0].rotary_dim, 128);
    assert!(dense.ropes[0].scaling == RopeScaling::None && dense.ropes[0].theta == 1e7);
    let listed =
        json!({"num_hidden_layers": 2, "layer_types": ["full_attention", "linear_attention"]});
    assert_eq!(kinds(&next(listed).unwrap()), [true, false]);
    for (changes, key) in [
        (json!({"linear_num_key_heads": 0}), "linear_num_key_heads"),
        (
            json!({"linear_num_value_heads": 24}),
            "linear_num_value_heads",
        ),
        (json!({"linear_key_head_dim": 100}), "linear_key_head_dim"),
        (json!({"linear_value_head_dim": 8}), "linear_value_head_dim"),
        (
            json!({"linear_conv_kernel_dim": 9}),
            "linear_conv_kernel_dim",
        ),
        (
            json!({"full_attention_interval": 0}),
            "full_attention_interval",
        ),
        (json!({"full_attention_interval": 99}), "layer_types"),
        (json!({"layer_types": ["sliding_attention"]}), "layer_types"),
        (json!({"layer_types": ["full_attention"]}), "layer_types"),
        (json!({"attn_output_gate": false}), "attn_output_gate"),
        (
            json!({"shared_expert_intermediate_size": 0}),
            "shared_expert_intermediate_size",
        ),
        (json!({"hidden_act": "gelu"}), "hidden_act"),
    ] {
        let error = next(changes).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn llama4_mixes_chunks_and_layers_without_rope() {
    let llama = |changes| read(&with(json!({"model_type": "llama4_text"}), changes));
    let config = llama(json!({"interleave_moe_layer_step": 2, "num_hidden_layers": 4})).unwrap();
    let [first, last] = [0, 3].map(|layer: usize| *attention(&config, layer));
    assert_eq!((first.window, first.is_chunked), (Some(8192), true));
    assert_eq!((first.rope, first.query_scale), (Some(0), None));
    assert!(first.qk_norm.is_some() && last.qk_norm.is_none());
    assert_eq!(
        (last.window, last.is_chunked, last.rope),
        (None, false, None)
    );
    let scale = last.query_scale.unwrap();
    assert_eq!((scale.slope, scale.interval, scale.offset), (0.1, 8192, 1));
    assert_eq!(config.dense_width(), Some(16_384));
    assert_eq!(config.shared_width(), Some(8192));
    // Older files have a number here instead of a flag.
    let older = llama(json!({"attn_temperature_tuning": 4})).unwrap();
    assert!((older.layers.iter()).any(|layer| layer.attention().unwrap().query_scale.is_some()));
    let plain = json!({"attn_temperature_tuning": false, "attention_chunk_size": null});
    let config = llama(plain).unwrap();
    let attentions = || config.layers.iter().map(|layer| layer.attention().unwrap());
    assert!(attentions().all(|one| one.query_scale.is_none() && one.window.is_none()));
    for (changes, key) in [
        (json!({"attention_chunk_size": 0}), "attention_chunk_size"),
        (
            json!({"interleave_moe_layer_step": 0}),
            "interleave_moe_layer_step",
        ),
        (json!({"moe_layers": [0.5]}), "moe_layers"),
        (json!({"floor_scale": 0}), "floor_scale"),
        (json!({"attn_scale": null}), "attn_scale"),
        (json!({"attn_scale": 1e39}), "attn_scale"),
        (
            json!({"attn_temperature_tuning": "4"}),
            "attn_temperature_tuning",
        ),
        (
            json!({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}),
            "layer_types",
        ),
    ] {
        let error = llama(changes).unwrap_err().to_string();
        assert!(error.contains(key), "{key}: {error}");
    }
}

#[test]
fn gpt_oss_is_extended_by_default_and_limits_its_experts() {
    let config = bare("gpt_oss");
    let limits = Activation::ClampedSwiGlu {
        slope: 1.702,
        limit: 7.0,
    };
    assert_eq!(config.experts().unwrap().routing.activation, limits);
    assert!(
        config
            .layers
            .iter()
            .all(|layer| layer.attention().unwrap().has_sinks)
    );
    let windows = [0, 1].map(|layer: usize| attention(&config, layer).window);
    assert_eq!(windows, [Some(128), None]);
    match config.ropes[0].scaling {
        RopeScaling::Yarn {
            factor, truncate, ..
        } => assert_eq!((factor, truncate), (32.0, false)),
        ref other => panic!("not YaRN: {other:?}"),
    }
    let error = read(&json!({"model_type": "gpt_oss", "swiglu_limit": -7.0}));
    assert!(error.unwrap_err().to_string().contains("swiglu_limit"));
}
