//! Qwen 3.5 (text): the layers of Qwen 3 Next without experts. Its position embedding has three
//! positions per token, which are equal for text.

use super::qwen3_next::{self, hybrid, with_delta};
use super::{Architecture, GgufFormat, glm4_moe};
use crate::device::DeltaOrder;
use crate::model::huggingface::ConfigClass;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "qwen3_5_text",
    // The model type of checkpoints with vision.
    aliases: &["qwen3_5"],
    class: CLASS,
    read_config: hybrid,
    gguf: Some(GgufFormat {
        name: "qwen35",
        aliases: &[],
        read: |metadata| {
            let common =
                glm4_moe::without_prediction_layers(metadata, metadata.hyperparameters()?)?;
            with_delta(metadata, common, DeltaOrder::Tiled)
        },
        settings: &["nextn_predict_layers"],
    }),
    storage: qwen3_next::STORAGE,
    layer: qwen3_next::layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 248_320,
    hidden: 4096,
    intermediate: 12_288,
    layers: 32,
    kv_heads: Some(4),
    ..qwen3_next::CLASS
};
