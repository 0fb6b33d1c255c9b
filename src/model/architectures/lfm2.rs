//! LFM2: gated convolutions over a few tokens in most layers, and attention with per-head norms on
//! queries and keys in the others.

use super::{
    Architecture, FinalNorm, GgufFormat, Hyperparameters, ModelError, Storage, llama, qwen3,
};
use crate::model::Biases;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::MOST_LAYERS;
use crate::model::layer::{Mixer, ShortConv};
use crate::model::names::{self, Part};
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "lfm2",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "lfm2",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: STORAGE,
    layer: qwen3::layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 65_536,
    hidden: 2560,
    intermediate: 12_288,
    kv_heads: Some(8),
    local_attention: "conv",
    context: 128_000,
    norm_epsilon: 1e-5,
    rope_theta: 1e6,
    ties_embeddings: true,
    ..llama::CLASS
};

pub(super) const STORAGE: Storage = Storage {
    final_norm: FinalNorm {
        huggingface: "embedding_norm",
        gguf: "token_embd_norm",
    },
    huggingface_name,
    ..Storage::COMMON
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = with_convolutions(config)?;
    Ok(Hyperparameters {
        intermediate: intermediate(config)?,
        ..common
    })
}

/// Reads the hyperparameters of a model with convolutions, without its feed-forward parts.
pub(super) fn with_convolutions(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let taps = settings.size_or("conv_L_cache", 3)?;
    let has_bias = settings.flag("conv_bias")?.unwrap_or(false);
    let listed = config.recurrent_layers()?;
    let mut numbers = Hyperparameters {
        norm_epsilon: settings.positive_or("norm_eps", CLASS.norm_epsilon)?,
        recurrent: Some(Mixer::ShortConv(ShortConv { taps, has_bias })),
        recurrent_layers: match listed {
            Some(listed) => listed,
            None => others(config, common.layers)?,
        },
        biases: Biases {
            recurrent: Some(has_bias),
            ..Biases::NONE
        },
        ..common
    };
    numbers.names.keys.norm_epsilon = "norm_eps";
    numbers.names.keys.taps = "conv_L_cache";
    Ok(numbers)
}

/// Returns the convolution layers: those that `full_attn_idxs` does not list. Without a list, all
/// layers have attention.
fn others(config: &Config<'_>, layers: usize) -> Result<HashSet<usize>, ModelError> {
    let key = "full_attn_idxs";
    let listed = config.settings.layers(key)?;
    let Some(listed) = listed else {
        return Ok(HashSet::new());
    };
    let others = (0..layers.min(MOST_LAYERS)).filter(|layer| !listed.contains(layer));
    Ok(others.collect())
}

/// Reads the width of the feed-forward parts. Files give it before the adjustment that
/// `block_auto_adjust_ff_dim` switches on.
fn intermediate(config: &Config<'_>) -> Result<usize, ModelError> {
    let settings = config.settings;
    let stated = match settings.size("block_ff_dim")? {
        Some(stated) => stated,
        None => settings.size_or("intermediate_size", CLASS.intermediate)?,
    };
    let adjusts = settings.flag("block_auto_adjust_ff_dim")?.unwrap_or(true);
    if !adjusts {
        return Ok(stated);
    }
    let width = stated.saturating_mul(2) / 3;
    let key = "block_ffn_dim_multiplier";
    let Some(factor) = settings.number_or(key, Some(1.0))? else {
        return Ok(width);
    };
    if !(factor.is_finite() && factor > 0.0) {
        return Err(settings.refused(key, factor, "a positive number"));
    }
    let key = "block_multiple_of";
    let multiple = settings.size_or(key, 256)?;
    let width = (width as f64 * f64::from(factor)) as usize;
    let rounded = width.div_ceil(multiple.max(1)).checked_mul(multiple);
    match rounded.filter(|_| multiple > 0) {
        Some(rounded) => Ok(rounded),
        None => Err(settings.refused(key, multiple, "at least 1, and not too large")),
    }
}

pub(super) fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let mut numbers = metadata.hyperparameters()?;
    let key = "shortconv.l_cache";
    let mut layers = numbers.recurrent_layers.iter();
    let has_bias = layers.any(|layer| metadata.holds(&format!("blk.{layer}.shortconv.conv.bias")));
    numbers.recurrent = Some(Mixer::ShortConv(ShortConv {
        taps: metadata.required_size(key)?,
        has_bias,
    }));
    numbers.names.keys.taps = key;
    Ok(numbers)
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::AttentionNorm => "operator_norm",
        Part::FeedForwardNorm => "ffn_norm",
        Part::AttentionOut => "self_attn.out_proj",
        Part::QueryNorm => "self_attn.q_layernorm",
        Part::KeyNorm => "self_attn.k_layernorm",
        Part::Gate => "feed_forward.w1",
        Part::Up => "feed_forward.w3",
        Part::Down => "feed_forward.w2",
        Part::Router => "feed_forward.gate",
        Part::Corrections => "feed_forward.expert_bias",
        Part::ExpertGate(expert) => return format!("feed_forward.experts.{expert}.w1"),
        Part::ExpertUp(expert) => return format!("feed_forward.experts.{expert}.w3"),
        Part::ExpertDown(expert) => return format!("feed_forward.experts.{expert}.w2"),
        other => return names::huggingface(other),
    };
    name.to_owned()
}
