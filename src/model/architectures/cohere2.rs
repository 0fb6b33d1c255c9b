//! Cohere 2 (Command R7B, Command A): attention and the feed-forward part run in parallel on the
//! output of one LayerNorm; interleaved RoPE, only in layers with a sliding window; a factor on
//! logits.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage, llama};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{LayerSpec, NormKind, NormPlacement};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "cohere2",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "cohere2",
        aliases: &[],
        read: read_metadata,
        settings: &["logit_scale"],
    }),
    storage: Storage {
        rope_rows: RopeRows::Interleaved,
        ..Storage::COMMON
    },
    layer,
};

const CLASS: ConfigClass = ConfigClass {
    vocabulary: 256_000,
    hidden: 8192,
    intermediate: 22_528,
    layers: 40,
    q_heads: 64,
    window: Some(4096),
    context: 8192,
    norm_epsilon: 1e-5,
    ties_embeddings: true,
    ..llama::CLASS
};

/// By default, the last of every `PERIOD` layers has full attention.
const PERIOD: usize = 4;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let mut numbers = Hyperparameters {
        norm: NormKind::Layer,
        norm_epsilon: settings.positive_or("layer_norm_eps", CLASS.norm_epsilon)?,
        logit_scale: settings.positive_or("logit_scale", 0.0625)?,
        windows: config.periodic_windows(config.window()?, PERIOD)?,
        biases: config.attention_biases()?,
        ..common
    };
    numbers.names.keys.norm_epsilon = "layer_norm_eps";
    numbers.unrotated = numbers.layers_without_window();
    Ok(numbers)
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let epsilon = metadata.number("attention.layer_norm_epsilon")?;
    let mut numbers = Hyperparameters {
        norm: NormKind::Layer,
        norm_epsilon: epsilon.unwrap_or(CLASS.norm_epsilon),
        logit_scale: metadata.positive("logit_scale")?.unwrap_or(1.0),
        windows: metadata.windows(metadata.window(None)?, PERIOD)?,
        ..common
    };
    numbers.names.keys.norm_epsilon = "attention.layer_norm_epsilon";
    numbers.unrotated = numbers.layers_without_window();
    Ok(numbers)
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        feed_forward_norms: NormPlacement::BesideMixer,
        ..numbers.layer(index)
    }
}
