//! Qwen 2 and 2.5: Llama with biases on query, key and value. If a sliding window is switched on,
//! it applies from a given layer on.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama};
use crate::model::Biases;
use crate::model::huggingface::{Config, ConfigClass};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "qwen2",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "qwen2",
        aliases: &[],
        read: |metadata| metadata.hyperparameters(),
        settings: &[],
    }),
    storage: Storage::COMMON,
    layer: Hyperparameters::layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 151_936,
    intermediate: 22_016,
    kv_heads: Some(32),
    window: Some(4096),
    context: 32_768,
    ..llama::CLASS
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    Ok(Hyperparameters {
        windows: upper_windows(config)?,
        biases: Biases {
            qkv: Some(true),
            ..Biases::NONE
        },
        ..common
    })
}

/// Returns the sliding window, if `use_sliding_window` switches it on.
pub(super) fn switched_window(config: &Config<'_>) -> Result<Option<usize>, ModelError> {
    let is_on = config.settings.flag("use_sliding_window")?.unwrap_or(false);
    Ok(config.window()?.filter(|_| is_on))
}

/// Returns the window of each layer. Unless `layer_types` lists the layers with a sliding window,
/// they are those from `max_window_layers` on.
pub(super) fn upper_windows(config: &Config<'_>) -> Result<Vec<Option<usize>>, ModelError> {
    let first = config.settings.size("max_window_layers")?.unwrap_or(28);
    config.mixed_windows(switched_window(config)?, |layer| layer >= first)
}
