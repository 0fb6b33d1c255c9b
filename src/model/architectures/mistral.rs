//! Mistral: Llama with a sliding window in every layer. GGUF files call it llama.

use super::{Architecture, Hyperparameters, ModelError, Storage, llama};
use crate::model::huggingface::{Config, ConfigClass};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "mistral",
    // Checkpoints with vision whose text model does not name another architecture.
    aliases: &["mistral3"],
    class: CLASS,
    read_config,
    gguf: None,
    storage: Storage::COMMON,
    layer: Hyperparameters::layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    intermediate: 14_336,
    kv_heads: Some(8),
    context: 131_072,
    window: Some(4096),
    ..llama::CLASS
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    Ok(Hyperparameters {
        windows: config.same_windows(config.window()?)?,
        ..common
    })
}
