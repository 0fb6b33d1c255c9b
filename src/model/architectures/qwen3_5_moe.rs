//! Qwen 3.5 with a mixture of experts (text): Qwen 3 Next, with the position embedding of Qwen 3.5.

use super::qwen3_next::{self, configured_experts, hybrid, with_delta, with_experts};
use super::{Architecture, GgufFormat, glm4_moe, qwen3_5};
use crate::device::DeltaOrder;
use crate::model::huggingface::ConfigClass;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "qwen3_5_moe_text",
    // The model type of checkpoints with vision.
    aliases: &["qwen3_5_moe"],
    class: ConfigClass {
        hidden: 2048,
        layers: 40,
        kv_heads: Some(2),
        ..qwen3_5::CLASS
    },
    // The weights of the chosen experts always sum to 1.
    read_config: |config| configured_experts(config, hybrid(config)?, [256, 8], true),
    gguf: Some(GgufFormat {
        name: "qwen35moe",
        aliases: &[],
        read: |metadata| {
            let common =
                glm4_moe::without_prediction_layers(metadata, metadata.hyperparameters()?)?;
            with_experts(metadata, with_delta(metadata, common, DeltaOrder::Tiled)?)
        },
        settings: &["nextn_predict_layers"],
    }),
    storage: qwen3_next::STORAGE,
    layer: qwen3_next::layer,
};
