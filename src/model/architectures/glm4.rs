//! GLM-4 (0414): norms before and after each part of a layer, and interleaved RoPE on half of
//! each head.

use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage, gemma2, llama,
};
use crate::model::Biases;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::names::{self, Part};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "glm4",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 151_552,
        intermediate: 13_696,
        layers: 40,
        kv_heads: Some(2),
        head_dim: Some(128),
        context: 131_072,
        norm_epsilon: 1.5625e-7,
        rope: RopeRules {
            partial: Some(0.5),
            ..RopeRules::COMMON
        },
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "glm4",
        aliases: &[],
        read: |metadata| metadata.hyperparameters(),
        settings: &[],
    }),
    storage: Storage {
        huggingface_name,
        fuses_gate_up: true,
        rope_rows: RopeRows::Interleaved,
        ..Storage::COMMON
    },
    layer: gemma2::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    Ok(Hyperparameters {
        biases: Biases {
            qkv: config.attention_bias(true)?,
            ..Biases::NONE
        },
        ..config.hyperparameters()?
    })
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::PostAttentionNorm => "post_self_attn_layernorm",
        Part::FeedForwardNorm => "post_attention_layernorm",
        Part::PostFeedForwardNorm => "post_mlp_layernorm",
        other => return names::huggingface(other),
    };
    name.to_owned()
}
