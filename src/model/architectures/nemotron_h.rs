//! Nemotron-H, and Nemotron 3 with a mixture of experts: each layer is only a Mamba-2 recurrence,
//! only attention without RoPE, or only a feed-forward part, whose activation has no gate.

use super::deepseek_v3::ExpertClass;
use super::{
    Architecture, FinalNorm, Hyperparameters, ModelError, Storage, granitemoehybrid, llama,
};
use crate::device::{Activation, Mamba2Spec};
use crate::model::Biases;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{Experts, Mamba2, Mixer};
use crate::model::names::{self, Part};
use serde_json::Value;
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "nemotron_h",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: None,
    storage: Storage {
        embedding: "embeddings",
        final_norm: FinalNorm {
            huggingface: "norm_f",
            ..Storage::COMMON.final_norm
        },
        huggingface_name,
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

/// What a layer is.
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
    // Other values would mean something that is not computed.
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
    let layers = |of: &[Kind]| -> HashSet<usize> {
        let listed = kinds.iter().enumerate();
        let layers = listed.filter(|(_, kind)| of.contains(kind));
        layers.map(|(layer, _)| layer).collect()
    };
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
        layers: kinds.len(),
        windows: vec![None; kinds.len()],
        norm_epsilon: epsilon,
        unrotated: (0..kinds.len()).collect(),
        recurrent: Some(mamba2(config, epsilon)?),
        recurrent_layers: layers(&[Kind::Recurrent]),
        without_mixer: layers(&[Kind::Dense, Kind::Experts]),
        without_feed_forward: layers(&[Kind::Recurrent, Kind::Attention]),
        experts,
        dense_layers: layers(&[Kind::Dense]),
        biases: Biases {
            feed_forward: Some(mlp_bias),
            recurrent: Some(use_bias),
            ..config.attention_biases()?
        },
        ..common
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

/// Returns the older name of a setting where a file uses it, and the current one otherwise.
fn either(config: &Config<'_>, older: &'static str, current: &'static str) -> &'static str {
    match config.settings.get(older) {
        Some(_) => older,
        None => current,
    }
}

/// What each layer is: as a list of words, or as a string of characters.
fn kinds(config: &Config<'_>) -> Result<Vec<Kind>, ModelError> {
    /// No model has more layers.
    const MOST: usize = 4096;
    let settings = config.settings;
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
        words.map(of_word).collect::<Option<Vec<_>>>()
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
        characters.map(of_character).collect::<Option<Vec<_>>>()
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

/// The limits of steps. Steps of a prompt are limited by `time_step_min` in transformers, which
/// reads no other limit.
fn step_limits(config: &Config<'_>) -> Result<[f32; 2], ModelError> {
    let settings = config.settings;
    let key = either(config, "mamba_dt_limit", "time_step_limit");
    let limits = granitemoehybrid::step_limits(config, key)?;
    if limits != granitemoehybrid::UNLIMITED {
        let found = format!("{limits:?}");
        return Err(settings.refused(key, found, "0 and Infinity"));
    }
    let key = either(config, "mamba_dt_min", "time_step_min");
    match settings.number_or(key, Some(0.001))? {
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
