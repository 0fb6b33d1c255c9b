//! Seed-OSS: Llama with biases on query, key and value.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama};
use crate::model::Biases;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::names::{self, Part};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "seed_oss",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 155_136,
        intermediate: 27_648,
        layers: 64,
        q_heads: 80,
        kv_heads: Some(8),
        head_dim: Some(128),
        context: 524_288,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "seed_oss",
        aliases: &[],
        read: |metadata| metadata.hyperparameters(),
        settings: &[],
    }),
    storage: Storage {
        gguf_name,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let attention_out = config.settings.flag("attention_out_bias")?;
    Ok(Hyperparameters {
        biases: Biases {
            qkv: config.attention_bias(true)?,
            attention_out: Some(attention_out.unwrap_or(false)),
            ..llama::biases(config)?
        },
        ..common
    })
}

pub(super) fn gguf_name(part: Part) -> String {
    match part {
        Part::FeedForwardNorm => "post_attention_norm".to_owned(),
        other => names::gguf(other),
    }
}
