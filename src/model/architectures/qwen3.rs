//! Qwen 3: Qwen 2 with per-head norms on queries and keys, and without its biases.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, qwen2};
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{LayerSpec, QkNormKind};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "qwen3",
    aliases: &[],
    class: ConfigClass {
        head_dim: Some(128),
        ..qwen2::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "qwen3",
        aliases: &[],
        read: |metadata| metadata.hyperparameters(),
        settings: &[],
    }),
    storage: Storage::COMMON,
    layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    Ok(Hyperparameters {
        windows: qwen2::upper_windows(config)?,
        biases: config.attention_biases()?,
        ..common
    })
}

pub(super) fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    numbers.layer(index).with_qk_norm(QkNormKind::PerHead)
}
