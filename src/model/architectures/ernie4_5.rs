//! ERNIE 4.5 (dense): Llama with interleaved RoPE.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage, llama};
use crate::model::Biases;
use crate::model::huggingface::{Config, ConfigClass};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "ernie4_5",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 103_424,
        hidden: 1024,
        intermediate: 3072,
        layers: 18,
        q_heads: 16,
        kv_heads: Some(2),
        head_dim: Some(128),
        context: 131_072,
        norm_epsilon: 1e-5,
        rope_theta: 500_000.0,
        ties_embeddings: true,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "ernie4_5",
        aliases: &[],
        read: |metadata| metadata.hyperparameters(),
        settings: &[],
    }),
    storage: Storage {
        rope_rows: RopeRows::Interleaved,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let all = Some(config.settings.flag("use_bias")?.unwrap_or(false));
    Ok(Hyperparameters {
        biases: Biases {
            qkv: all,
            attention_out: all,
            feed_forward: all,
            ..Biases::NONE
        },
        ..common
    })
}
