//! Gemma 3n (text): several residual streams (AltUp), a low-rank path beside the attention
//! (LAuReL), layers that share a KV cache, norms on values, per-layer inputs, and sparse gates in
//! the first layers. Of a model with vision and audio towers, only the text model is read.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, gemma2};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::hyperparameters::{MOST_LAYERS, Variations};
use crate::model::layer::{Attention, LayerSpec, Mixer, PerLayerInputs, QkNormKind, Streams};
use crate::model::names::{self, Part};
use crate::model::{RopeConfig, RopeScaling};
use serde_json::Value;
use std::collections::HashMap;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "gemma3n_text",
    // The model type of checkpoints with vision and audio towers.
    aliases: &["gemma3n"],
    class: ConfigClass {
        vocabulary: 262_400,
        hidden: 2048,
        intermediate: 16_384,
        layers: 35,
        kv_heads: Some(2),
        // Scores are not scaled.
        query_scale: None,
        window: Some(512),
        context: 32_768,
        rope_theta: 1e6,
        rope: RopeRules::COMMON,
        lists_widths: true,
        ..gemma2::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "gemma3n",
        aliases: &[],
        read: read_metadata,
        settings: &["feed_forward_length"],
    }),
    storage: Storage {
        huggingface_name,
        ..Storage::COMMON
    },
    layer,
};

/// By default, the last of every `PERIOD` layers has full attention.
const PERIOD: usize = 5;
/// Base of the position embedding in layers with a sliding window.
const SLIDING_THETA: f32 = 10_000.0;
/// Number of leading layers with sparse gates in models without `activation_sparsity_pattern`.
/// Folders of models with no more layers than this have no sparse gates.
const SPARSE_LAYERS: usize = 10;
/// Share of the gates that are 0 in these layers.
const SPARSITY: f64 = 0.95;
/// Soft cap on logits in files that do not give it.
const LOGIT_SOFTCAP: f32 = 30.0;
/// Default of the width of the per-layer inputs.
const INPUT_WIDTH: usize = 256;
/// Default of the number of residual streams.
const STREAMS: usize = 4;
/// Default of the rank of the paths beside the attention.
const SIDE_RANK: usize = 64;
/// Limit on that rank.
const MOST_SIDE_RANK: usize = 1 << 16;
/// Number of leading layers with KV caches of their own in GGUF files that do not give it.
const OWN_CACHES: usize = 20;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let theta = settings.number("rope_local_base_freq")?;
    let sliding_rope = config.rope(
        config.sliding_rope_parameters()?,
        theta.unwrap_or(SLIDING_THETA),
    )?;
    let windows = config.mixed_windows(config.window()?, |layer| (layer + 1) % PERIOD != 0)?;
    let key = "hidden_size_per_layer_input";
    let width = settings.size_or(key, INPUT_WIDTH)?;
    if width == 0 {
        return Err(settings.refused(key, 0, "at least 1"));
    }
    Ok(Hyperparameters {
        embedding_scale: gemma2::embedding_scale(&common),
        attention_scale: 1.0,
        logit_softcap: settings.number_or("final_logit_softcapping", Some(LOGIT_SOFTCAP))?,
        sliding_rope,
        biases: config.attention_biases()?,
        variations: Variations {
            widths: widths(config, windows.len())?,
            shared_caches: settings.size_or("num_kv_shared_layers", 15)?,
            inputs: Some(PerLayerInputs {
                width,
                vocabulary: settings.size_or("vocab_size_per_layer_input", 262_144)?,
                activation: common.activation,
            }),
            streams: Some(streams(config)?),
            side_rank: Some(side_rank(config)?),
            cuts: cuts(config, windows.len())?,
            ..Variations::default()
        },
        windows,
        ..common
    })
}

/// Reads a setting that lists one number per layer; returns `None` if it is missing or null.
fn list<T>(
    config: &Config<'_>,
    key: &str,
    layers: usize,
    read: impl Fn(&Value) -> Option<T>,
) -> Result<Option<Vec<T>>, ModelError> {
    let expected = format!("a number for each of the {layers} layers");
    let of_list = |value: &Value| {
        let all = value.as_array()?.iter().map(&read);
        let all = all.collect::<Option<Vec<T>>>()?;
        (all.len() == layers).then_some(all)
    };
    config.settings.optional(key, &expected, of_list)
}

/// Reads the widths of the dense parts by layer; returns an empty map unless `intermediate_size`
/// is a list.
fn widths(config: &Config<'_>, layers: usize) -> Result<HashMap<usize, usize>, ModelError> {
    let key = "intermediate_size";
    if !config.settings.get(key).is_some_and(Value::is_array) {
        return Ok(HashMap::new());
    }
    let read = |value: &Value| usize::try_from(value.as_u64()?).ok();
    let widths = list(config, key, layers, read)?.unwrap_or_default();
    Ok(widths.into_iter().enumerate().collect())
}

fn streams(config: &Config<'_>) -> Result<Streams, ModelError> {
    let settings = config.settings;
    let keys = ["altup_num_inputs", "altup_active_idx"];
    let streams = Streams {
        count: settings.size_or(keys[0], STREAMS)?,
        active: settings.size_or(keys[1], 0)?,
        scales_output: settings.flag("altup_correct_scale")?.unwrap_or(true),
    };
    check_streams(streams, keys, |key, value, expected| {
        settings.refused(key, value, expected)
    })
}

/// Checks the residual streams. `keys` are what the file calls their number and the index of the
/// active one, and `refused` returns the error for a key, its value and what is expected.
fn check_streams(
    streams: Streams,
    keys: [&str; 2],
    refused: impl Fn(&str, usize, String) -> ModelError,
) -> Result<Streams, ModelError> {
    let Streams { count, active, .. } = streams;
    if !(1..=64).contains(&count) {
        return Err(refused(keys[0], count, "from 1 to 64".to_owned()));
    }
    if active >= count {
        let expected = format!("below the {count} of {}", keys[0]);
        return Err(refused(keys[1], active, expected));
    }
    Ok(streams)
}

fn side_rank(config: &Config<'_>) -> Result<usize, ModelError> {
    let key = "laurel_rank";
    let rank = config.settings.size_or(key, SIDE_RANK)?;
    if !(1..=MOST_SIDE_RANK).contains(&rank) {
        let expected = format!("from 1 to {MOST_SIDE_RANK}");
        return Err(config.settings.refused(key, rank, expected));
    }
    Ok(rank)
}

/// Reads the threshold of the gates in each sparse layer, in standard deviations above their
/// mean.
fn cuts(config: &Config<'_>, layers: usize) -> Result<HashMap<usize, f32>, ModelError> {
    let key = "activation_sparsity_pattern";
    let shares = match list(config, key, layers, Value::as_f64)? {
        Some(shares) => shares,
        None => {
            let sparse = if layers > SPARSE_LAYERS {
                SPARSE_LAYERS
            } else {
                0
            };
            let share = |layer: usize| if layer < sparse { SPARSITY } else { 0.0 };
            (0..layers).map(share).collect()
        }
    };
    if let Some(share) = shares.iter().find(|share| !(0.0..1.0).contains(*share)) {
        let expected = "from 0 to less than 1 for each layer";
        return Err(config.settings.refused(key, share, expected));
    }
    let cuts = shares.into_iter().enumerate();
    let cuts = cuts.filter(|(_, share)| *share > 0.0);
    Ok(cuts
        .map(|(layer, share)| (layer, quantile(share) as f32))
        .collect())
}

/// Returns the quantile of the standard normal distribution: the number of standard deviations
/// below which `share` of it lies. Uses Newton's method on a series of the distribution function
/// whose terms are all positive.
fn quantile(share: f64) -> f64 {
    if share < 0.5 {
        return -quantile(1.0 - share);
    }
    let density = |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
    let below = |x: f64| {
        let (mut term, mut sum, mut odd) = (x, 0.0, 1.0);
        while term > 1e-18 {
            sum += term;
            odd += 2.0;
            term *= x * x / odd;
        }
        0.5 + density(x) * sum
    };
    let mut x = 0.0;
    // The distribution function is concave here, so all steps go in one direction, up to rounding.
    // A share close to 1 takes about forty steps.
    for _ in 0..100 {
        x = f64::clamp(x + (share - below(x)) / density(x), 0.0, 9.0);
    }
    x
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let window = metadata.required_size("attention.sliding_window")?;
    let windows = metadata.windows(Some(window), PERIOD)?;
    let layers = common.layers.min(MOST_LAYERS);
    let widths = metadata.required_size_of_each("feed_forward_length", layers)?;
    let theta = metadata.number("rope.freq_base_swa")?;
    let width = metadata.size("embedding_length_per_layer_input")?;
    let shared_caches = metadata.size("attention.shared_kv_layers")?;
    let vocabulary = metadata.rows("per_layer_token_embd.weight");
    // There is no key for the rank.
    let rank = metadata.rows("blk.0.laurel_l.weight");
    let rank = rank.filter(|&rank| rank <= MOST_SIDE_RANK);
    Ok(Hyperparameters {
        embedding_scale: gemma2::embedding_scale(&common),
        attention_scale: 1.0,
        logit_softcap: common.logit_softcap.or(Some(LOGIT_SOFTCAP)),
        sliding_rope: RopeConfig {
            theta: theta.unwrap_or(SLIDING_THETA),
            scaling: RopeScaling::None,
            ..common.rope.clone()
        },
        variations: Variations {
            widths: widths.into_iter().enumerate().collect(),
            shared_caches: shared_caches.unwrap_or(layers.saturating_sub(OWN_CACHES)),
            inputs: Some(PerLayerInputs {
                width: width.unwrap_or(INPUT_WIDTH),
                vocabulary: vocabulary.unwrap_or(common.vocabulary),
                activation: common.activation,
            }),
            streams: Some(stated_streams(metadata)?),
            side_rank: Some(rank.unwrap_or(SIDE_RANK)),
            cuts: stated_cuts(metadata, layers)?,
            ..Variations::default()
        },
        windows,
        ..common
    })
}

/// Reads the residual streams from GGUF metadata.
fn stated_streams(metadata: &Metadata<'_>) -> Result<Streams, ModelError> {
    let keys = ["altup.num_inputs", "altup.active_idx"];
    let streams = Streams {
        count: metadata.size(keys[0])?.unwrap_or(STREAMS),
        active: metadata.size(keys[1])?.unwrap_or(0),
        scales_output: true,
    };
    check_streams(streams, keys, |key, value, expected| {
        metadata.refused(key, value, expected)
    })
}

/// Reads from GGUF metadata the threshold of the gates in each sparse layer, in standard deviations
/// above their mean. That of the other layers is minus infinity in the file.
fn stated_cuts(metadata: &Metadata<'_>, layers: usize) -> Result<HashMap<usize, f32>, ModelError> {
    let key = "activation_sparsity_scale";
    let Some(cuts) = metadata.numbers(key)? else {
        let sparse = 0..SPARSE_LAYERS.min(layers);
        let cut = quantile(SPARSITY) as f32;
        return Ok(sparse.map(|layer| (layer, cut)).collect());
    };
    if cuts.len() != layers {
        let found = format!("a list of {} numbers", cuts.len());
        let expected = format!("one number for each of the {layers} layers");
        return Err(metadata.refused(key, found, expected));
    }
    let is_bad = |cut: &&f32| cut.is_nan() || **cut == f32::INFINITY;
    if let Some(cut) = cuts.iter().find(is_bad) {
        return Err(metadata.refused(key, cut, "less than infinity for each layer"));
    }
    let cuts = cuts.into_iter().enumerate();
    Ok(cuts.filter(|(_, cut)| cut.is_finite()).collect())
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
    match part {
        Part::FeedForwardNorm => "pre_feedforward_layernorm".to_owned(),
        other => names::huggingface(other),
    }
}

#[cfg(test)]
mod tests {
    use super::quantile;
    use crate::model::layer::FeedForward;
    use crate::model::{ModelConfig, ModelError, huggingface};
    use serde_json::{Value, json};

    /// Reads the settings of a small model with `changes` applied.
    fn read(changes: Value) -> Result<ModelConfig, ModelError> {
        let mut settings = json!({
            "model_type": "gemma3n_text", "num_hidden_layers": 12, "hidden_size": 64,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512,
            "num_kv_shared_layers": 2,
        });
        for (key, value) in changes.as_object().unwrap() {
            settings[key] = value.clone();
        }
        huggingface::read(&settings)
    }

    fn cuts(model: &ModelConfig) -> Vec<Option<f32>> {
        let layers = model.layers.iter();
        let cuts = layers.map(|layer| match layer.feed_forward {
            FeedForward::Dense { cut, .. } => cut,
            FeedForward::Experts(_) | FeedForward::None => None,
        });
        cuts.collect()
    }

    #[test]
    fn the_first_ten_layers_have_sparse_gates_unless_the_file_says_otherwise() {
        let found = cuts(&read(json!({})).unwrap());
        assert!(
            found[..10]
                .iter()
                .all(|cut| (cut.unwrap() - 1.644_853_6).abs() < 1e-6)
        );
        assert_eq!(found[10..], [None, None]);
        let listed = vec![0.5; 12];
        let found = cuts(&read(json!({"activation_sparsity_pattern": listed})).unwrap());
        assert_eq!(found, vec![Some(0.0); 12]);
        let found = cuts(&read(json!({"activation_sparsity_pattern": vec![0.0; 12]})).unwrap());
        assert_eq!(found, vec![None; 12]);
    }

    #[test]
    fn quantiles_are_those_of_the_normal_distribution() {
        for (share, expected) in [
            (0.5, 0.0),
            (0.841_344_746_068_542_9, 1.0),
            (0.95, 1.644_853_626_951_472_2),
            (0.999, 3.090_232_306_167_813),
            (0.05, -1.644_853_626_951_472_2),
        ] {
            assert!((quantile(share) - expected).abs() < 1e-9, "{share}");
        }
        let most = quantile(1.0 - f64::EPSILON / 2.0);
        // The value depends on rounding here, but nothing overflows.
        assert!((6.0..=9.0).contains(&most), "{most}");
    }

    #[test]
    fn each_layer_may_have_a_width_of_its_own() {
        let mut widths = vec![128; 12];
        widths[3] = 256;
        let model = read(json!({"intermediate_size": widths})).unwrap();
        assert_eq!(model.dense_widths(), [[128, 256], [256, 512]]);
        assert_eq!(model.streams.map(|streams| streams.count), Some(4));
        assert!(model.layers.iter().any(|layer| {
            matches!(layer.feed_forward, FeedForward::Dense { cut: Some(_), .. })
        }));
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_its_key() {
        for (changes, key) in [
            (json!({"altup_num_inputs": 0}), "altup_num_inputs"),
            (json!({"altup_active_idx": 4}), "altup_active_idx"),
            (json!({"laurel_rank": 0}), "laurel_rank"),
            (json!({"intermediate_size": [128]}), "intermediate_size"),
            (json!({"num_kv_shared_layers": 12}), "num_kv_shared_layers"),
            (
                json!({"hidden_size_per_layer_input": 0}),
                "hidden_size_per_layer_input",
            ),
            (
                json!({"activation_sparsity_pattern": [0.5]}),
                "activation_sparsity_pattern",
            ),
            (
                json!({"activation_sparsity_pattern": vec![1.0; 12]}),
                "activation_sparsity_pattern",
            ),
        ] {
            let error = read(changes).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }
}
