//! OLMo 2: norms only on the output of each part of a layer, and norms on queries and keys across
//! all heads. GGUF files use this name for OLMo 3 as well, so its sliding windows are read from
//! them here.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{LayerSpec, NormPlacement, QkNormKind};
use crate::model::{RopeConfig, RopeScaling};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "olmo2",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "olmo2",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: Storage::COMMON,
    layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 50_304,
    norm_epsilon: 1e-5,
    ..llama::CLASS
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    Ok(Hyperparameters {
        biases: config.attention_biases()?,
        ..common
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let theta = metadata.number("rope.freq_base_swa")?;
    Ok(Hyperparameters {
        // OLMo 3 does not extend the context of the position embedding in sliding layers.
        sliding_rope: RopeConfig {
            theta: theta.unwrap_or(common.rope.theta),
            scaling: RopeScaling::None,
            ..common.rope.clone()
        },
        windows: metadata.windows(metadata.window(None)?, 4)?,
        ..common
    })
}

pub(super) fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer_norms: NormPlacement::After,
        feed_forward_norms: NormPlacement::After,
        ..numbers.layer(index).with_qk_norm(QkNormKind::WholeRow)
    }
}
