//! Nemotron-H, and Nemotron 3 with a mixture of experts: each layer is a single part, which is a
//! Mamba-2 recurrence, attention without RoPE, or a feed-forward part without a gate.

use super::deepseek_v3::ExpertClass;
use super::glm4_moe::without_prediction_layers;
use super::{
    Architecture, FinalNorm, GgufFormat, Hyperparameters, ModelError, Storage, granitemoehybrid,
    llama,
};
use crate::device::{Activation, Mamba2Spec};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::MOST_LAYERS;
use crate::model::layer::{Experts, Mamba2, Mixer};
use crate::model::names::{self, Part};
use crate::model::{Biases, RopeConfig, RopeScaling};
use serde_json::Value;
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "nemotron_h",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "nemotron_h",
        // With experts.
        aliases: &["nemotron_h_moe"],
        read: read_metadata,
        settings: &[
            "expert_gating_func",
            "expert_group_count",
            "expert_shared_count",
            "expert_weights_scale",
            "feed_forward_length",
            "nextn_predict_layers",
        ],
    }),
    storage: Storage {
        embedding: "embeddings",
        final_norm: FinalNorm {
            huggingface: "norm_f",
            ..Storage::COMMON.final_norm
        },
        huggingface_name,
        gguf_name,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

const CLASS: ConfigClass = ConfigClass {
    vocabulary: 131_072,
    intermediate: 21_504,
    activation: Activation::SquaredRelu,
    layers: 4,
    kv_heads: Some(8),
    head_dim: Some(128),
    context: 4096,
    norm_epsilon: 1e-5,
    ..llama::CLASS
};

/// Default of `time_step_min`.
const LEAST_STEP: f32 = 0.001;

/// Kind of a layer, by its only part.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Recurrent,
    Attention,
    Dense,
    Experts,
}

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    for (key, only) in [("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")] {
        if let Some(found) = settings.text(key)?.filter(|&found| found != only) {
            return Err(settings.refused(key, found, only));
        }
    }
    // Other values would change the results, and are not supported.
    for (key, expected) in [
        ("sliding_window", None),
        ("moe_latent_size", None),
        ("attention_head_dim", Some(common.heads.head_dim)),
        ("n_shared_experts", Some(1)),
    ] {
        if let Some(found) = settings.size(key)?.filter(|&found| Some(found) != expected) {
            let expected = expected.map_or("null".to_owned(), |size| size.to_string());
            return Err(settings.refused(key, found, expected));
        }
    }
    let kinds = kinds(config)?;
    let key = "num_hidden_layers";
    if let Some(stated) = settings.size(key)?.filter(|&stated| stated != kinds.len()) {
        let expected = format!("{}, the number of layers that are listed", kinds.len());
        return Err(settings.refused(key, stated, expected));
    }
    let epsilon = settings.positive_or("layer_norm_epsilon", CLASS.norm_epsilon)?;
    let mlp_bias = settings.flag("mlp_bias")?.unwrap_or(false);
    let experts = match kinds.contains(&Kind::Experts) {
        true => Some(experts(config)?),
        false => None,
    };
    if experts.is_some() && mlp_bias {
        return Err(settings.refused("mlp_bias", true, "false beside experts"));
    }
    let use_bias = settings.flag("use_bias")?.unwrap_or(false);
    let mut numbers = Hyperparameters {
        norm_epsilon: epsilon,
        recurrent: Some(mamba2(config, epsilon)?),
        experts,
        biases: Biases {
            feed_forward: Some(mlp_bias),
            recurrent: Some(use_bias),
            ..config.attention_biases()?
        },
        ..with_kinds(common, &kinds)
    };
    let keys = &mut numbers.names.keys;
    keys.norm_epsilon = "layer_norm_epsilon";
    keys.shared_experts = "moe_shared_expert_intermediate_size";
    keys.recurrent_heads = "mamba_num_heads";
    keys.recurrent_head_dim = "mamba_head_dim";
    keys.state_size = "ssm_state_size";
    keys.recurrent_groups = either(config, "mamba_n_groups", "n_groups");
    keys.taps = either(config, "mamba_d_conv", "conv_kernel");
    Ok(numbers)
}

/// Gives `numbers` layers of these kinds.
fn with_kinds(numbers: Hyperparameters, kinds: &[Kind]) -> Hyperparameters {
    let layers = |of: &[Kind]| -> HashSet<usize> {
        let listed = kinds.iter().enumerate();
        let layers = listed.filter(|(_, kind)| of.contains(kind));
        layers.map(|(layer, _)| layer).collect()
    };
    Hyperparameters {
        layers: kinds.len(),
        windows: vec![None; kinds.len()],
        unrotated: (0..kinds.len()).collect(),
        recurrent_layers: layers(&[Kind::Recurrent]),
        without_mixer: layers(&[Kind::Dense, Kind::Experts]),
        without_feed_forward: layers(&[Kind::Recurrent, Kind::Attention]),
        dense_layers: layers(&[Kind::Dense]),
        ..numbers
    }
}

/// Returns the older name of a setting where a file uses it, and the current one otherwise.
fn either(config: &Config<'_>, older: &'static str, current: &'static str) -> &'static str {
    match config.settings.get(older) {
        Some(_) => older,
        None => current,
    }
}

/// Reads the kind of each layer, from a list of words (`layers_block_type`) or from a string with
/// one character per layer (`hybrid_override_pattern`).
fn kinds(config: &Config<'_>) -> Result<Vec<Kind>, ModelError> {
    /// Limit on the number of layers. One more entry is read, so that a longer list is refused
    /// when the hyperparameters are validated.
    const MOST: usize = 4096;
    let settings = config.settings;
    let has_layers = |kinds: &Vec<Kind>| !kinds.is_empty();
    let of_word = |word: &Value| match word.as_str()? {
        "linear_attention" | "mamba" => Some(Kind::Recurrent),
        "full_attention" | "attention" => Some(Kind::Attention),
        "mlp" => Some(Kind::Dense),
        "moe" => Some(Kind::Experts),
        _ => None,
    };
    let expected = "a list of linear_attention, full_attention, mlp and moe";
    let listed = settings.optional("layers_block_type", expected, |value| {
        let words = value.as_array()?.iter().take(MOST + 1);
        words
            .map(of_word)
            .collect::<Option<Vec<_>>>()
            .filter(has_layers)
    })?;
    if let Some(listed) = listed {
        return Ok(listed);
    }
    let of_character = |character| match character {
        'M' => Some(Kind::Recurrent),
        '*' => Some(Kind::Attention),
        '-' => Some(Kind::Dense),
        'E' => Some(Kind::Experts),
        _ => None,
    };
    let (key, expected) = ("hybrid_override_pattern", "a string of M, *, - and E");
    let pattern = settings.optional(key, expected, |value| {
        let characters = value.as_str()?.chars().take(MOST + 1);
        let kinds = characters.map(of_character).collect::<Option<Vec<_>>>();
        kinds.filter(has_layers)
    })?;
    Ok(pattern.unwrap_or(vec![
        Kind::Recurrent,
        Kind::Experts,
        Kind::Attention,
        Kind::Dense,
    ]))
}

fn mamba2(config: &Config<'_>, epsilon: f32) -> Result<Mixer, ModelError> {
    let settings = config.settings;
    let of = |older, current| either(config, older, current);
    let conv_bias = settings.flag(of("mamba_conv_bias", "use_conv_bias"))?;
    Ok(Mixer::Mamba2(Mamba2 {
        recurrence: Mamba2Spec {
            heads: settings.size_or("mamba_num_heads", 128)?,
            head_dim: settings.size_or("mamba_head_dim", 64)?,
            state_size: settings.size_or("ssm_state_size", 128)?,
            groups: settings.size_or(of("mamba_n_groups", "n_groups"), 8)?,
            step_limits: step_limits(config)?,
        },
        taps: settings.size_or(of("mamba_d_conv", "conv_kernel"), 4)?,
        has_conv_bias: conv_bias.unwrap_or(true),
        norm_epsilon: epsilon,
    }))
}

/// Reads the least and the largest step of the recurrence. transformers limits the steps of a
/// prompt by `time_step_min` and reads no other limit, so other limits are refused.
fn step_limits(config: &Config<'_>) -> Result<[f32; 2], ModelError> {
    let settings = config.settings;
    let key = either(config, "mamba_dt_limit", "time_step_limit");
    let limits = granitemoehybrid::step_limits(config, key)?;
    if limits != granitemoehybrid::UNLIMITED {
        let found = format!("{limits:?}");
        return Err(settings.refused(key, found, "0 and Infinity"));
    }
    let key = either(config, "mamba_dt_min", "time_step_min");
    match settings.number_or(key, Some(LEAST_STEP))? {
        Some(least) if least.is_finite() && least >= 0.0 => Ok([least, f32::INFINITY]),
        Some(least) => Err(settings.refused(key, least, "at least 0")),
        None => Err(settings.refused(key, "null", "at least 0")),
    }
}

fn experts(config: &Config<'_>) -> Result<Experts, ModelError> {
    let settings = config.settings;
    let shared = settings.size_or("moe_shared_expert_intermediate_size", 7688)?;
    let class = ExpertClass {
        count: 8,
        width: 7688,
        top_k: 2,
        scale: 1.0,
        groups: 1,
        top_groups: 1,
    };
    Ok(Experts {
        shared: Some(shared),
        ..class.read(config, CLASS.activation)?
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let listed = metadata.hyperparameters()?;
    let all = listed.layers.min(MOST_LAYERS);
    let kv_heads = metadata.required_size_of_each("attention.head_count_kv", all)?;
    let widths = metadata.required_size_of_each("feed_forward_length", all)?;
    let common = without_prediction_layers(metadata, listed)?;
    let experts = stated_experts(metadata)?;
    let kind = |layer: usize| match (kv_heads[layer], widths[layer]) {
        (0, 0) => Kind::Recurrent,
        (_, 0) => Kind::Attention,
        _ if experts.is_some() => Kind::Experts,
        _ => Kind::Dense,
    };
    let kinds: Vec<Kind> = (0..common.layers.min(all)).map(kind).collect();
    let key = "attention.layer_norm_epsilon";
    let epsilon = metadata.number(key)?;
    let mut numbers = Hyperparameters {
        norm_epsilon: epsilon.unwrap_or(common.norm_epsilon),
        experts,
        // Layers without a feed-forward part have a width of 0.
        intermediate: widths.iter().copied().max().unwrap_or(0),
        ..with_kinds(common, &kinds)
    };
    if epsilon.is_some() {
        numbers.names.keys.norm_epsilon = key;
    }
    numbers.names.keys.shared_experts = SHARED_WIDTH;
    if let Some(&first) = numbers.recurrent_layers.iter().min() {
        // GGUF has no key for the least step, which is the same in all published models. Like
        // transformers, and unlike llama.cpp, which limits no step from below.
        let limits = [LEAST_STEP, f32::INFINITY];
        let mixer = granitemoehybrid::stated_mamba2(metadata, first, numbers.norm_epsilon, limits)?;
        numbers.recurrent = Some(mixer);
    }
    let dense = numbers.dense_layers.iter();
    numbers.variations.widths = dense.map(|&layer| (layer, widths[layer])).collect();
    // Nothing is rotated, and files give a number of rotated elements that does not fit the heads.
    numbers.rope = RopeConfig {
        rotary_dim: numbers.heads.head_dim,
        scaling: RopeScaling::None,
        ..numbers.rope
    };
    numbers.sliding_rope = numbers.rope.clone();
    Ok(numbers)
}

/// Key of the width of the dense part beside the experts in GGUF metadata.
const SHARED_WIDTH: &str = "expert_shared_feed_forward_length";

/// Reads the mixture of experts from GGUF metadata, if there is one.
fn stated_experts(metadata: &Metadata<'_>) -> Result<Option<Experts>, ModelError> {
    let Some(experts) = metadata.sigmoid_experts()? else {
        return Ok(None);
    };
    let key = "expert_shared_count";
    if let Some(count) = metadata.size(key)?.filter(|&count| count != 1) {
        return Err(metadata.refused(key, count, "1"));
    }
    Ok(Some(Experts {
        shared: Some(metadata.required_size(SHARED_WIDTH)?),
        ..experts
    }))
}

fn huggingface_name(part: Part) -> String {
    match part {
        // A layer has only one of the two.
        Part::AttentionNorm | Part::FeedForwardNorm => "norm".to_owned(),
        Part::Convolution => "mixer.conv1d".to_owned(),
        other => {
            let common = names::huggingface(other);
            let own = common.split_once('.').map_or(&*common, |(_, own)| own);
            format!("mixer.{own}")
        }
    }
}

fn gguf_name(part: Part) -> String {
    match part {
        // A layer has only one of the two.
        Part::FeedForwardNorm => "attn_norm".to_owned(),
        other => granitemoehybrid::gguf_name(other),
    }
}
