//! OLMo 3: OLMo 2 with a sliding window in three of four layers, whose position embedding has no
//! context extension. GGUF files call it olmo2.

use super::{Architecture, Hyperparameters, ModelError, Storage, olmo2};
use crate::model::huggingface::{Config, ConfigClass};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "olmo3",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: None,
    storage: Storage::COMMON,
    layer: olmo2::layer,
};

const CLASS: ConfigClass = ConfigClass {
    window: Some(4096),
    rope_theta: 500_000.0,
    ..olmo2::CLASS
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let parameters = config.sliding_rope_parameters()?;
    Ok(Hyperparameters {
        sliding_rope: config.rope(parameters, CLASS.rope_theta)?,
        windows: config.mixed_windows(config.window()?, |layer| (layer + 1) % 4 != 0)?,
        biases: config.attention_biases()?,
        ..common
    })
}
