//! Phi 3, 3.5 and 4-mini: Llama with a sliding window, fused projections, and LongRoPE.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama};
use crate::model::huggingface::{Config, ConfigClass, RopeRules};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "phi3",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 32_064,
        hidden: 3072,
        intermediate: 8192,
        context: 4096,
        norm_epsilon: 1e-5,
        rope: RopeRules {
            partial: Some(1.0),
            dimension_key: None,
            // Early checkpoints use these names for LongRoPE.
            longrope_aliases: &["su", "yarn"],
            original_context: Some(4096),
            ..RopeRules::COMMON
        },
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "phi3",
        aliases: &[],
        read: |metadata| metadata.hyperparameters(),
        settings: &[],
    }),
    storage: Storage {
        fuses_qkv: true,
        fuses_gate_up: true,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    Ok(Hyperparameters {
        windows: config.same_windows(config.window()?)?,
        ..common
    })
}
