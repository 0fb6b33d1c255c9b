//! Gemma 3: Gemma 2 without the soft caps, with norms on queries and keys, and with a separate
//! position embedding in layers with a sliding window. Of a model with a vision tower, only the
//! text model is read. EmbeddingGemma is an encoder with the same layers.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, gemma2};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{Attention, LayerSpec, Mixer, QkNormKind};
use crate::model::{RopeConfig, RopeScaling};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "gemma3_text",
    // The model type of checkpoints with a vision tower.
    aliases: &["gemma3"],
    class: ConfigClass {
        vocabulary: 262_208,
        context: 131_072,
        rope_theta: 1e6,
        may_encode: true,
        ..gemma2::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "gemma3",
        aliases: &[ENCODER],
        read: read_metadata,
        settings: &["attention.causal"],
    }),
    storage: gemma2::STORAGE,
    layer,
};

/// By default, the last of every `PERIOD` layers has full attention.
const PERIOD: usize = 6;
/// Base of the position embedding in layers with a sliding window.
const SLIDING_THETA: f32 = 10_000.0;
/// Name that GGUF files have for EmbeddingGemma.
const ENCODER: &str = "gemma-embedding";
/// Number of layers of the largest model, Gemma 3 27B.
const LAYERS_27B: usize = 62;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let parameters = config.sliding_rope_parameters()?;
    let theta = settings.number("rope_local_base_freq")?;
    let window = window_of(common.is_causal, config.window()?);
    Ok(Hyperparameters {
        embedding_scale: gemma2::embedding_scale(&common),
        logit_softcap: settings.number("final_logit_softcapping")?,
        sliding_rope: config.rope(parameters, theta.unwrap_or(SLIDING_THETA))?,
        windows: config.periodic_windows(window, PERIOD)?,
        biases: config.attention_biases()?,
        ..common
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let theta = metadata.number("rope.freq_base_swa")?;
    let said = metadata.flag("attention.causal")?;
    let is_causal = said.unwrap_or(metadata.name() != ENCODER);
    let window = window_of(is_causal, metadata.window(None)?);
    Ok(Hyperparameters {
        embedding_scale: gemma2::embedding_scale(&common),
        attention_scale: gemma2::attention_scale(&common, LAYERS_27B),
        sliding_rope: RopeConfig {
            theta: theta.unwrap_or(SLIDING_THETA),
            scaling: RopeScaling::None,
            ..common.rope.clone()
        },
        windows: metadata.windows(window, PERIOD)?,
        is_causal,
        ..common
    })
}

/// Returns the window of a layer that has one. In an encoder, it covers half of the tokens on each
/// side.
fn window_of(is_causal: bool, window: Option<usize>) -> Option<usize> {
    match is_causal {
        true => window,
        false => window.map(|window| window / 2 + 1),
    }
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer: Mixer::Attention(Attention {
            qk_norm: Some(QkNormKind::PerHead),
            ..numbers.attention(index)
        }),
        ..gemma2::layer(numbers, index)
    }
}
