//! Granite 3 and 4 (dense): Llama with factors on the embeddings, the scores, the logits, and on
//! what each part of a layer adds to the residual stream.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage, llama};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::MOST_LAYERS;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "granite",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "granite",
        aliases: &[],
        read: read_metadata,
        settings: SETTINGS,
    }),
    storage: Storage {
        rope_rows: RopeRows::InterleavedInGguf,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

const CLASS: ConfigClass = llama::CLASS;

/// Keys of the factors in GGUF metadata.
pub(super) const SETTINGS: &[&str] = &[
    "attention.scale",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
];

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    Ok(Hyperparameters {
        biases: llama::biases(config)?,
        ..with_factors(config)?
    })
}

/// Reads the common hyperparameters and Granite's factors.
pub(super) fn with_factors(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let factor = |key| settings.positive_or(key, 1.0);
    let mut numbers = Hyperparameters {
        attention_scale: factor("attention_multiplier")?,
        embedding_scale: factor("embedding_multiplier")?,
        logit_scale: 1.0 / factor("logits_scaling")?,
        ..common
    };
    numbers.names.keys.attention_scale = "attention_multiplier";
    numbers.names.keys.logit_scale = "logits_scaling";
    Ok(scale_residual(numbers, factor("residual_multiplier")?))
}

pub(super) fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let factor = |key| metadata.positive(key);
    let mut numbers = Hyperparameters {
        attention_scale: factor("attention.scale")?.unwrap_or(common.attention_scale),
        embedding_scale: factor("embedding_scale")?.unwrap_or(1.0),
        logit_scale: 1.0 / factor("logit_scale")?.unwrap_or(1.0),
        ..common
    };
    numbers.names.keys.attention_scale = "attention.scale";
    // In these files, `false` means that the model has no RoPE.
    if metadata.flag("rope.scaling.finetuned")? == Some(false) {
        numbers.unrotated.extend(0..numbers.layers.min(MOST_LAYERS));
    }
    let residual = factor("residual_scale")?.unwrap_or(1.0);
    Ok(scale_residual(numbers, residual))
}

/// Applies a factor on everything that is added to the residual stream. The decoder keeps the
/// stream divided by the factor, so that additions need no multiplication: the embeddings are
/// divided by the factor, and norms cancel the division if their epsilon is divided by its square.
fn scale_residual(numbers: Hyperparameters, factor: f32) -> Hyperparameters {
    Hyperparameters {
        embedding_scale: numbers.embedding_scale / factor,
        norm_epsilon: numbers.norm_epsilon / (factor * factor),
        ..numbers
    }
}
