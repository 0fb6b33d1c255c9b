//! Tests of the settings of models with recurrent layers.

use super::*;
use crate::device::{Mamba2Spec, SigmoidRouting};
use crate::model::layer::{FeedForward, LayerSpec, Mamba2, Mixer, ShortConv};

fn refusals(config: &Value, cases: &[(Value, &str)]) {
    for (changes, key) in cases {
        let error = read(&with(config.clone(), changes.clone())).unwrap_err();
        let error = error.to_string();
        let start = format!("the model's {key}");
        assert!(error.starts_with(&start), "{key}: {error}");
    }
}

/// Returns the number of elements of the states of all layers together.
pub(super) fn state_elements(config: &ModelConfig) -> usize {
    let layers = config.layers.iter();
    layers
        .flat_map(|layer| layer.state_elements(config.hidden))
        .sum()
}

fn has_attention(config: &ModelConfig) -> Vec<bool> {
    let layers = config.layers.iter();
    layers.map(|layer| layer.attention().is_some()).collect()
}

fn mamba2(layer: &LayerSpec) -> Mamba2 {
    match layer.mixer {
        Mixer::Mamba2(spec) => spec,
        other => panic!("not Mamba-2: {other:?}"),
    }
}

fn lfm2() -> Value {
    json!({"model_type": "lfm2", "num_hidden_layers": 4, "full_attn_idxs": [2]})
}

#[test]
fn lfm2_convolves_in_the_layers_without_attention() {
    let config = read(&lfm2()).unwrap();
    assert_eq!(has_attention(&config), [false, false, true, false]);
    let expected = ShortConv {
        taps: 3,
        has_bias: false,
    };
    assert_eq!(config.layers[0].mixer, Mixer::ShortConv(expected));
    assert!(attention(&config, 2).qk_norm.is_some());
    assert_eq!(config.ropes[0].theta, 1e6);
    assert_eq!(state_elements(&config), 3 * 2 * 2560);
    let types = json!({"layer_types": ["full_attention", "conv", "conv", "conv"]});
    let config = read(&with(lfm2(), types)).unwrap();
    assert_eq!(has_attention(&config), [true, false, false, false]);
    // Without `full_attn_idxs` and `layer_types`, no layer is recurrent.
    let config = read(&json!({"model_type": "lfm2"})).unwrap();
    assert_eq!(has_attention(&config), [true; 32]);
    assert_eq!(state_elements(&config), 0);
    let biased = read(&with(lfm2(), json!({"conv_bias": true}))).unwrap();
    assert_eq!(biased.biases.recurrent, Some(true));
    assert_eq!(biased.biases.feed_forward, Some(false));
}

#[test]
fn lfm2_adjusts_the_width_of_its_feed_forward_parts() {
    let width = |changes| read(&with(lfm2(), changes)).unwrap().dense_width();
    assert_eq!(width(json!({})), Some(8192));
    // The width is 2/3 of the stated one, rounded up to a multiple of 256.
    assert_eq!(width(json!({"block_ff_dim": 10_240})), Some(6912));
    assert_eq!(width(json!({"intermediate_size": 10_240})), Some(6912));
    let scaled = json!({"block_ff_dim": 1024, "block_ffn_dim_multiplier": 1.5,
        "block_multiple_of": 100});
    assert_eq!(width(scaled), Some(1100));
    let unscaled = json!({"block_ff_dim": 1000, "block_ffn_dim_multiplier": null});
    assert_eq!(width(unscaled), Some(666));
    let stated = json!({"block_ff_dim": 1000, "block_auto_adjust_ff_dim": false});
    assert_eq!(width(stated), Some(1000));
}

#[test]
fn settings_of_lfm2_that_make_no_sense_are_refused_by_their_keys() {
    refusals(
        &lfm2(),
        &[
            (json!({"conv_L_cache": 1}), "conv_L_cache"),
            (json!({"conv_L_cache": 9}), "conv_L_cache"),
            (
                json!({"hidden_size": 72, "num_attention_heads": 4, "num_key_value_heads": 4}),
                "hidden_size",
            ),
            (json!({"full_attn_idxs": [-1]}), "full_attn_idxs"),
            (json!({"full_attn_idxs": []}), "layer_types"),
            (json!({"block_multiple_of": 0}), "block_multiple_of"),
            (
                json!({"block_ffn_dim_multiplier": -1}),
                "block_ffn_dim_multiplier",
            ),
            (json!({"norm_eps": 0}), "norm_eps"),
            (json!({"layer_types": ["mamba"]}), "layer_types entry"),
        ],
    );
}

#[test]
fn lfm2_chooses_experts_behind_its_dense_layers() {
    let types = json!(["conv", "conv", "full_attention", "conv"]);
    let sparse = json!({"model_type": "lfm2_moe", "num_hidden_layers": 4, "layer_types": types});
    let config = read(&sparse).unwrap();
    let experts = config.experts().unwrap();
    assert_eq!(
        (experts.count, experts.width, experts.routing.top_k),
        (32, 1792, 4)
    );
    assert!(experts.routing.normalize && experts.has_corrections);
    let is_dense = |layer: &LayerSpec| matches!(layer.feed_forward, FeedForward::Dense { .. });
    let dense: Vec<bool> = config.layers.iter().map(is_dense).collect();
    assert_eq!(dense, [true, true, false, false]);
    // Models with experts do not adjust the width of their dense layers.
    assert_eq!(config.dense_width(), Some(7168));
    let plain = read(&with(sparse, json!({"use_expert_bias": false}))).unwrap();
    assert!(!plain.experts().unwrap().has_corrections);
}

fn granite() -> Value {
    json!({
        "model_type": "granitemoehybrid", "num_hidden_layers": 3, "hidden_size": 1536,
        "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 48, "mamba_d_head": 64,
        "num_attention_heads": 12, "num_key_value_heads": 4, "mamba_d_state": 128,
        "intermediate_size": 512, "residual_multiplier": 0.5, "rms_norm_eps": 1e-5,
        "position_embedding_type": "nope", "num_local_experts": 64,
        "time_step_limit": [0.0, "Infinity"],
    })
}

#[test]
fn granite_mixes_mamba2_and_attention_without_rope() {
    let config = read(&granite()).unwrap();
    assert_eq!(has_attention(&config), [false, true, false]);
    assert_eq!(attention(&config, 1).rope, None);
    let spec = mamba2(&config.layers[0]);
    let expected = Mamba2Spec {
        heads: 48,
        head_dim: 64,
        state_size: 128,
        groups: 1,
        step_limits: [0.0, f32::INFINITY],
    };
    assert_eq!(spec.recurrence, expected);
    assert_eq!((spec.taps, spec.has_conv_bias), (4, true));
    // The residual stream is kept divided by the factor, so the epsilon changes only in the norms
    // that read that stream.
    assert_eq!(spec.norm_epsilon, 1e-5);
    assert_eq!(config.norm_epsilon, 4e-5);
    let experts = config.experts().unwrap();
    assert_eq!(
        (experts.count, experts.width, experts.shared),
        (64, 512, Some(1024))
    );
    let [convolution, state] = config.layers[2].state_elements(config.hidden);
    assert_eq!(convolution, 3 * (3072 + 256));
    assert_eq!(state, 3072 * 128);
    let limited = read(&with(granite(), json!({"time_step_limit": [0.001, 0.1]})));
    let spec = mamba2(&limited.unwrap().layers[0]);
    assert_eq!(spec.recurrence.step_limits, [0.001, 0.1]);
    let derived = read(&with(granite(), json!({"mamba_d_head": "auto"}))).unwrap();
    assert_eq!(mamba2(&derived.layers[0]).recurrence.head_dim, 64);
}

#[test]
fn granite_may_have_neither_experts_nor_recurrent_layers() {
    let dense = json!({
        "num_local_experts": 0, "layer_types": ["attention", "attention", "attention"],
        "position_embedding_type": "rope", "shared_intermediate_size": 4096,
        "normalization_function": "rmsnorm",
    });
    let config = read(&with(granite(), dense)).unwrap();
    assert_eq!(has_attention(&config), [true; 3]);
    assert_eq!(attention(&config, 0).rope, Some(0));
    assert_eq!((config.dense_width(), config.experts()), (Some(4096), None));
    assert_eq!(state_elements(&config), 0);
}

#[test]
fn settings_of_granite_that_make_no_sense_are_refused_by_their_keys() {
    refusals(
        &granite(),
        &[
            (json!({"mamba_d_head": 32}), "mamba_d_head"),
            (
                json!({"mamba_n_heads": 384, "mamba_d_head": 8}),
                "mamba_d_head",
            ),
            (json!({"mamba_n_heads": 0}), "mamba_d_head"),
            (json!({"mamba_d_state": 12}), "mamba_d_state"),
            (json!({"mamba_n_groups": 5}), "mamba_n_groups"),
            (json!({"mamba_n_groups": 0}), "mamba_n_groups"),
            (json!({"mamba_d_conv": 1}), "mamba_d_conv"),
            (json!({"time_step_limit": [1.0, 0.5]}), "time_step_limit"),
            (json!({"time_step_limit": [0.0, "NaN"]}), "time_step_limit"),
            (json!({"time_step_limit": [0.0]}), "time_step_limit"),
            (
                json!({"position_embedding_type": "learned"}),
                "position_embedding_type",
            ),
            (
                json!({"normalization_function": "layernorm"}),
                "normalization_function",
            ),
            (json!({"layer_types": null}), "layer_types"),
            (
                json!({"layer_types": ["conv", "mamba"]}),
                "layer_types entry",
            ),
            (
                json!({"shared_intermediate_size": 0}),
                "shared_intermediate_size",
            ),
        ],
    );
}

fn nemotron() -> Value {
    json!({
        "model_type": "nemotron_h", "hybrid_override_pattern": "M-*E", "n_routed_experts": 128,
        "moe_intermediate_size": 1856, "moe_shared_expert_intermediate_size": 3712,
        "num_experts_per_tok": 6, "routed_scaling_factor": 2.5,
    })
}

#[test]
fn each_layer_of_nemotron_is_one_part() {
    let words = json!(["mamba", "mlp", "attention", "moe"]);
    let listed = json!({"layers_block_type": words, "hybrid_override_pattern": null});
    let default = json!({"hybrid_override_pattern": "MM*"});
    for (changes, attention) in [
        (json!({}), vec![false, false, true, false]),
        (listed, vec![false, false, true, false]),
        (default, vec![false, false, true]),
    ] {
        let config = read(&with(nemotron(), changes)).unwrap();
        assert_eq!(has_attention(&config), attention);
        for layer in &config.layers {
            let has_mixer = layer.mixer != Mixer::None;
            assert_ne!(has_mixer, layer.feed_forward != FeedForward::None);
            assert_eq!(layer.mixer_norms.is_before(), has_mixer);
            assert_ne!(layer.feed_forward_norms.is_before(), has_mixer);
        }
    }
    let config = read(&nemotron()).unwrap();
    assert_eq!(attention(&config, 2).rope, None);
    let recurrence = mamba2(&config.layers[0]).recurrence;
    assert_eq!(recurrence.groups, 8);
    assert_eq!(recurrence.step_limits, [0.001, f32::INFINITY]);
    let is_squared = |layer: &LayerSpec| match layer.feed_forward {
        FeedForward::Dense { activation, .. } => activation == Activation::SquaredRelu,
        _ => false,
    };
    assert!(config.layers.iter().any(is_squared));
    let experts = config.experts().unwrap();
    assert_eq!(experts.routing.activation, Activation::SquaredRelu);
    assert_eq!((experts.width, experts.shared), (1856, Some(3712)));
    let expected = SigmoidRouting {
        scale: 2.5,
        groups: 1,
        top_groups: 1,
        scales_input: false,
    };
    assert_eq!(experts.routing.score, RouterScore::Sigmoid(expected));
    assert_eq!(config.recurrent_layers(), 1);
}

#[test]
fn settings_of_nemotron_that_make_no_sense_are_refused_by_their_keys() {
    refusals(
        &nemotron(),
        &[
            (
                json!({"hybrid_override_pattern": "M?*"}),
                "hybrid_override_pattern",
            ),
            (json!({"hybrid_override_pattern": "MM-"}), "layer_types"),
            (json!({"layers_block_type": ["conv"]}), "layers_block_type"),
            (json!({"layers_block_type": []}), "layers_block_type"),
            (
                json!({"hybrid_override_pattern": ""}),
                "hybrid_override_pattern",
            ),
            (json!({"num_hidden_layers": 5}), "num_hidden_layers"),
            (json!({"mlp_hidden_act": "silu"}), "mlp_hidden_act"),
            (json!({"mamba_hidden_act": "relu"}), "mamba_hidden_act"),
            (json!({"moe_latent_size": 1024}), "moe_latent_size"),
            (json!({"n_shared_experts": 2}), "n_shared_experts"),
            (json!({"sliding_window": 16}), "sliding_window"),
            (json!({"attention_head_dim": 64}), "attention_head_dim"),
            (json!({"mlp_bias": true}), "mlp_bias"),
            (json!({"mamba_head_dim": 24}), "mamba_head_dim"),
            (json!({"ssm_state_size": 12}), "ssm_state_size"),
            (json!({"n_groups": 3}), "n_groups"),
            (json!({"mamba_d_conv": 9}), "mamba_d_conv"),
            (json!({"time_step_min": -0.1}), "time_step_min"),
            (json!({"time_step_limit": [0.0, 0.1]}), "time_step_limit"),
        ],
    );
}
