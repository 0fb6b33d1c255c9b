//! Llama 1, 2 and 3, and everything that is built the same way (SmolLM2, TinyLlama, …).
//!
//! GGUF files use this name for Mistral and Mixtral as well, so windows and experts are read from
//! them here.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage};
use crate::device::Activation;
use crate::model::Biases;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "llama",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "llama",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: Storage {
        rope_rows: RopeRows::InterleavedInGguf,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 32_000,
    hidden: 4096,
    intermediate: 11_008,
    lists_widths: false,
    activation: Activation::Silu,
    layers: 32,
    q_heads: 32,
    kv_heads: None,
    head_dim: None,
    query_scale: None,
    window: None,
    local_attention: "sliding_attention",
    context: 2048,
    norm_epsilon: 1e-6,
    rope_theta: 10_000.0,
    rope: RopeRules::COMMON,
    may_encode: false,
    ties_embeddings: false,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    Ok(Hyperparameters {
        biases: biases(config)?,
        ..config.hyperparameters()?
    })
}

/// Returns the biases that `attention_bias` and `mlp_bias` switch on.
pub(super) fn biases(config: &Config<'_>) -> Result<Biases, ModelError> {
    let feed_forward = config.settings.flag("mlp_bias")?.unwrap_or(false);
    Ok(Biases {
        feed_forward: Some(feed_forward),
        ..config.attention_biases()?
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    Ok(Hyperparameters {
        experts: metadata.experts()?,
        ..common
    })
}
