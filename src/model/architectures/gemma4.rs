//! Gemma 4: Gemma 3 with larger heads in layers with full attention, norms on values, layers that
//! share a KV cache, per-layer inputs, and a factor on the residual stream after each layer. Larger
//! models have experts beside the dense part, and use keys as values in layers with full attention.
//! Of a model with vision and audio towers, only the text model is read.

use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, StackedExperts, Storage, gemma2,
};
use crate::device::{HeadShape, RouterScore, RoutingSpec};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::hyperparameters::{MOST_LAYERS, Variations};
use crate::model::layer::{Attention, Experts, LayerSpec, Mixer, PerLayerInputs, QkNormKind};
use crate::model::names::{self, Part};
use crate::model::{RopeConfig, RopeScaling};
use serde_json::{Map, Value};
use std::collections::HashMap;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "gemma4_text",
    // The model type of checkpoints with vision and audio towers.
    aliases: &["gemma4"],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "gemma4",
        aliases: &[],
        read: read_metadata,
        settings: &["attention.head_count_kv", "feed_forward_length"],
    }),
    storage: Storage {
        huggingface_name,
        gguf_name,
        stacked_experts: Some(StackedExperts {
            gate_up: "experts.gate_up_proj",
            down: "experts.down_proj",
            alternates: false,
            are_transposed: false,
        }),
        ..Storage::COMMON
    },
    layer,
};

const CLASS: ConfigClass = ConfigClass {
    vocabulary: 262_144,
    layers: 30,
    // Scores are not scaled, whatever the head dimension.
    query_scale: None,
    window: Some(512),
    context: 131_072,
    rope_theta: 1e6,
    rope: RopeRules {
        is_proportional: true,
        ..RopeRules::COMMON
    },
    ..gemma2::CLASS
};

/// By default, the last of every `PERIOD` layers has full attention.
const PERIOD: usize = 6;
/// Base of the position embedding in layers with a sliding window.
const SLIDING_THETA: f32 = 10_000.0;
/// RoPE scaling of layers with full attention, for files without RoPE parameters.
const FULL_ROPE: RopeScaling = RopeScaling::Proportional {
    share: 0.25,
    factor: 1.0,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let mut windows = config.mixed_windows(config.window()?, |layer| (layer + 1) % PERIOD != 0)?;
    // transformers gives the last layer full attention, whatever `layer_types` lists.
    if let Some(last) = windows.last_mut() {
        *last = None;
    }
    let full: Vec<usize> = (0..windows.len())
        .filter(|&layer| windows[layer].is_none())
        .collect();
    let keys_are_values = settings.flag("attention_k_eq_v")?.unwrap_or(false);
    let heads = match settings.get("per_layer_config") {
        Some(_) => listed_heads(config, common.heads, windows.len())?,
        None => {
            let mut own = HeadShape {
                head_dim: settings.size_or("global_head_dim", 512)?,
                ..common.heads
            };
            if let Some(kv_heads) = settings.size("num_global_key_value_heads")?
                && keys_are_values
            {
                own.kv_heads = kv_heads;
            }
            full.iter().map(|&layer| (layer, own)).collect()
        }
    };
    let shared_caches = settings.size_or("num_kv_shared_layers", 0)?;
    let is_wide = settings.flag("use_double_wide_mlp")?.unwrap_or(false);
    let wide = match is_wide {
        true => windows.len().saturating_sub(shared_caches)..windows.len(),
        false => 0..0,
    };
    let width = common.intermediate.saturating_mul(2);
    let rope_of = |layer: Option<&usize>| {
        let heads = layer.and_then(|layer| heads.get(layer));
        heads.map_or(common.heads.head_dim, |heads| heads.head_dim)
    };
    let parameters = config.sliding_rope_parameters()?;
    let is_said = config.rope_parameters().is_some();
    let sliding_rope = RopeConfig {
        rotary_dim: rope_of(
            (0..windows.len())
                .find(|&at| windows[at].is_some())
                .as_ref(),
        ),
        ..config.rope(parameters, SLIDING_THETA)?
    };
    let rope = RopeConfig {
        rotary_dim: rope_of(full.first()),
        scaling: match is_said {
            true => common.rope.scaling.clone(),
            false => FULL_ROPE,
        },
        ..common.rope.clone()
    };
    let width_of_inputs = settings.size_or("hidden_size_per_layer_input", 256)?;
    let inputs = match width_of_inputs {
        0 => None,
        width => Some(PerLayerInputs {
            width,
            vocabulary: settings.size_or("vocab_size_per_layer_input", 262_144)?,
            activation: common.activation,
        }),
    };
    Ok(Hyperparameters {
        embedding_scale: gemma2::embedding_scale(&common),
        attention_scale: 1.0,
        logit_softcap: settings.number("final_logit_softcapping")?,
        rope,
        sliding_rope,
        experts: experts(config, common.intermediate)?,
        biases: config.attention_biases()?,
        variations: Variations {
            heads,
            widths: wide.map(|layer| (layer, width)).collect(),
            shared_caches,
            keys_as_values: match keys_are_values {
                true => full.into_iter().collect(),
                false => Default::default(),
            },
            scaled: (0..windows.len()).collect(),
            inputs,
            ..Variations::default()
        },
        windows,
        ..common
    })
}

/// Reads the heads of the layers that `per_layer_config` lists, by layer index.
fn listed_heads(
    config: &Config<'_>,
    common: HeadShape,
    layers: usize,
) -> Result<HashMap<usize, HeadShape>, ModelError> {
    let settings = config.settings;
    let key = "per_layer_config";
    let read = |value| Value::as_object(value);
    let listed = settings.optional(key, "an object with an entry for each layer", read)?;
    let nothing = Map::new();
    let mut heads = HashMap::new();
    for (name, own) in listed.unwrap_or(&nothing) {
        let refused = |value: &dyn ToString, expected: String| {
            settings.refused(key, value.to_string(), expected)
        };
        let layer: usize = match name.parse() {
            Ok(layer) if layer < layers => layer,
            _ => {
                let expected = format!("layers from 0 to {}", layers.saturating_sub(1));
                return Err(refused(&format!("for layer {name}"), expected));
            }
        };
        let mut shape = common;
        for (name, value) in own.as_object().unwrap_or(&nothing) {
            let place = match name.as_str() {
                "head_dim" => &mut shape.head_dim,
                "num_key_value_heads" => &mut shape.kv_heads,
                _ => {
                    let expected = "head_dim and num_key_value_heads only".to_owned();
                    return Err(refused(&format!("{name} for layer {layer}"), expected));
                }
            };
            let number = value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok());
            *place = number.ok_or_else(|| {
                let found = format!("a {name} of {value} for layer {layer}");
                refused(&found, "whole numbers".to_owned())
            })?;
        }
        heads.insert(layer, shape);
    }
    Ok(heads)
}

/// Reads the mixture of experts, if there is one. `width` is that of the dense part beside the
/// experts.
fn experts(config: &Config<'_>, width: usize) -> Result<Option<Experts>, ModelError> {
    let settings = config.settings;
    if !settings.flag("enable_moe_block")?.unwrap_or(false) {
        return Ok(None);
    }
    let required = |key: &str| settings.size(key)?.ok_or_else(|| settings.missing(key));
    let count = required("num_experts")?;
    let key = "top_k_experts";
    let top_k = required(key)?;
    if !(1..=count).contains(&top_k) {
        return Err(settings.refused(key, top_k, format!("from 1 to the {count} experts")));
    }
    Ok(Some(Experts {
        width: required("moe_intermediate_size")?,
        ..of_experts(count, top_k, width)
    }))
}

/// Returns a mixture of experts beside a dense part of width `dense`. The caller sets the width of
/// the experts.
fn of_experts(count: usize, top_k: usize, dense: usize) -> Experts {
    Experts {
        count,
        width: 0,
        routing: RoutingSpec {
            top_k,
            score: RouterScore::Softmax,
            normalize: true,
            activation: CLASS.activation,
        },
        has_corrections: false,
        shared: Some(dense),
        has_shared_gate: false,
        has_own_norms: true,
    }
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let windows = metadata.windows(metadata.window(None)?, PERIOD)?;
    let layers = windows.len().min(MOST_LAYERS);
    let key = "attention.head_count_kv";
    let kv_heads = metadata.size_of_each(key, layers)?;
    let head_dim = metadata.size("attention.key_length_swa")?;
    let head_dim = head_dim.unwrap_or(common.heads.head_dim);
    let key = "attention.value_length_swa";
    if let Some(value_dim) = metadata.size(key)?
        && value_dim != head_dim
    {
        let expected = format!("{head_dim}, the key length");
        return Err(metadata.refused(key, value_dim, expected));
    }
    let heads = (0..layers).map(|layer| HeadShape {
        kv_heads: kv_heads
            .as_ref()
            .map_or(common.heads.kv_heads, |all| all[layer]),
        head_dim: match windows[layer] {
            Some(_) => head_dim,
            None => common.heads.head_dim,
        },
        ..common.heads
    });
    let widths = metadata.size_of_each("feed_forward_length", layers)?;
    let widths = widths.unwrap_or_default().into_iter().enumerate();
    let holds = |layer: usize, part: &str| metadata.holds(&format!("blk.{layer}.{part}.weight"));
    let theta = metadata.number("rope.freq_base_swa")?;
    let rotary_dim = metadata.size("rope.dimension_count_swa")?;
    let width = metadata
        .size("embedding_length_per_layer_input")?
        .unwrap_or(0);
    let vocabulary = metadata.rows("per_layer_token_embd.weight");
    Ok(Hyperparameters {
        embedding_scale: gemma2::embedding_scale(&common),
        attention_scale: 1.0,
        sliding_rope: RopeConfig {
            theta: theta.unwrap_or(SLIDING_THETA),
            rotary_dim: rotary_dim.unwrap_or(head_dim),
            scaling: RopeScaling::None,
        },
        experts: metadata.experts()?.map(|experts| Experts {
            width: experts.width,
            ..of_experts(experts.count, experts.routing.top_k, common.intermediate)
        }),
        variations: Variations {
            heads: heads.enumerate().collect(),
            widths: widths.collect(),
            shared_caches: metadata.size("attention.shared_kv_layers")?.unwrap_or(0),
            keys_as_values: (0..layers)
                .filter(|&layer| holds(layer, "attn_k") && !holds(layer, "attn_v"))
                .collect(),
            scaled: (0..layers)
                .filter(|&layer| holds(layer, "layer_output_scale"))
                .collect(),
            inputs: (width > 0).then_some(PerLayerInputs {
                width,
                vocabulary: vocabulary.unwrap_or(common.vocabulary),
                activation: common.activation,
            }),
            ..Variations::default()
        },
        windows,
        ..common
    })
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer: Mixer::Attention(Attention {
            qk_norm: Some(QkNormKind::PerHead),
            normalizes_values: true,
            ..numbers.attention(index)
        }),
        ..gemma2::layer(numbers, index)
    }
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::FeedForwardNorm => "pre_feedforward_layernorm",
        Part::Router => "router.proj",
        Part::SharedGate => "mlp.gate_proj",
        Part::SharedUp => "mlp.up_proj",
        Part::SharedDown => "mlp.down_proj",
        other => return names::huggingface(other),
    };
    name.to_owned()
}

fn gguf_name(part: Part) -> String {
    let name = match part {
        Part::SharedGate => "ffn_gate",
        Part::SharedUp => "ffn_up",
        Part::SharedDown => "ffn_down",
        other => return names::gguf(other),
    };
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use crate::model::{ModelConfig, ModelError, huggingface};
    use serde_json::{Value, json};

    /// Reads the settings of a small model with `changes` applied.
    fn read(changes: Value) -> Result<ModelConfig, ModelError> {
        let mut settings = json!({
            "model_type": "gemma4_text", "num_hidden_layers": 12, "hidden_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512,
        });
        for (key, value) in changes.as_object().unwrap() {
            settings[key] = value.clone();
        }
        huggingface::read(&settings)
    }

    #[test]
    fn layers_with_full_attention_have_larger_heads_and_rotate_a_quarter_of_them() {
        let model = read(json!({})).unwrap();
        let heads = |layer: usize| model.layers[layer].attention().unwrap().heads;
        assert_eq!((heads(4).head_dim, heads(5).head_dim), (32, 512));
        assert_eq!((heads(4).kv_heads, heads(5).kv_heads), (2, 2));
        assert_eq!(model.layers[4].attention().unwrap().window, Some(512));
        assert_eq!(model.layers[5].attention().unwrap().window, None);
        let [full, sliding] = [0, 1].map(|rope: usize| model.ropes[rope].spec(16));
        assert_eq!(full.inverse_frequencies.len(), 256);
        let rotates = |pair: usize| full.inverse_frequencies[pair] > 0.0;
        assert!(rotates(0) && rotates(63) && !rotates(64) && !rotates(255));
        // The frequencies are those of a head that is rotated as a whole.
        let expected = 1.0 / 1e6f32.powf(2.0 / 512.0);
        assert!((full.inverse_frequencies[1] - expected).abs() < 1e-6);
        assert_eq!(sliding.inverse_frequencies.len(), 16);
        assert_eq!(model.per_layer_inputs.unwrap().width, 256);
    }

    #[test]
    fn the_last_layers_share_the_cache_of_the_last_layer_of_their_kind() {
        let model = read(json!({"num_kv_shared_layers": 5, "use_double_wide_mlp": true})).unwrap();
        let shares = |layer: usize| model.layers[layer].attention().unwrap().shares;
        assert_eq!(
            [6, 7, 8, 10, 11].map(shares),
            [None, Some(6), Some(6), Some(6), Some(5)]
        );
        assert_eq!(model.dense_widths(), [[128, 256], [256, 512]]);
        assert_ne!(model.layers[0].heads(), model.layers[5].heads());
        assert!(model.layers.iter().all(|layer| layer.has_scale));
    }

    #[test]
    fn keys_are_values_only_in_layers_with_full_attention() {
        let model = read(json!({
            "attention_k_eq_v": true, "num_global_key_value_heads": 1, "enable_moe_block": true,
            "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16,
            "hidden_size_per_layer_input": 0,
        }))
        .unwrap();
        let attention = |layer: usize| *model.layers[layer].attention().unwrap();
        assert!(!attention(4).keys_are_values && attention(5).keys_are_values);
        assert_eq!(attention(5).heads.kv_heads, 1);
        // These layers have both the largest KV cache and the fewest key-value heads.
        assert_eq!(model.cache_heads(), attention(5).heads);
        assert_eq!(model.narrow_heads(), None);
        assert_eq!(model.per_layer_inputs, None);
        let experts = model.experts().unwrap();
        assert!(experts.has_own_norms);
        assert_eq!((experts.width, experts.shared), (16, Some(128)));
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_its_key() {
        for (changes, key) in [
            (json!({"num_kv_shared_layers": 12}), "num_kv_shared_layers"),
            // No layer with full attention is left whose cache could be shared.
            (json!({"num_kv_shared_layers": 8}), "num_kv_shared_layers"),
            (json!({"num_kv_shared_layers": 13}), "num_kv_shared_layers"),
            (
                json!({"use_bidirectional_attention": "all"}),
                "use_bidirectional_attention",
            ),
            (
                json!({"per_layer_config": {"12": {"head_dim": 64}}}),
                "per_layer_config",
            ),
            (
                json!({"per_layer_config": {"1": {"sliding_window": 64}}}),
                "per_layer_config is sliding_window for layer 1",
            ),
            (
                json!({"per_layer_config": {"1": {"head_dim": "64"}}}),
                "per_layer_config",
            ),
            // All layers of a kind share one position embedding, and thus a head dimension.
            (
                json!({"per_layer_config": {"5": {"head_dim": 64}}}),
                "head_dim",
            ),
            (json!({"global_head_dim": 0}), "head_dim"),
            (
                json!({"num_global_key_value_heads": 3, "attention_k_eq_v": true}),
                "num_attention_heads",
            ),
            (json!({"enable_moe_block": true}), "num_experts"),
            (
                json!({"enable_moe_block": true, "num_experts": 4, "moe_intermediate_size": 8}),
                "top_k_experts",
            ),
            (
                json!({"enable_moe_block": true, "num_experts": 4, "moe_intermediate_size": 8,
                    "top_k_experts": 5}),
                "top_k_experts is 5, but must be from 1 to the 4 experts",
            ),
            (
                json!({"hidden_size_per_layer_input": 1_000_000}),
                "hidden_size_per_layer_input",
            ),
            (
                json!({"vocab_size_per_layer_input": 0}),
                "vocab_size_per_layer_input",
            ),
            (
                json!({"rope_parameters": {
                    "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 2.0},
                    "sliding_attention": {"rope_type": "default"},
                }}),
                "partial_rotary_factor",
            ),
        ] {
            let error = read(changes).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
