//! Gemma 2: norms before and after each part of a layer, soft-capped scores and logits, scaled
//! embeddings, and a sliding window in every other layer.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama};
use crate::device::Activation;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{LayerSpec, NormPlacement};
use crate::model::names::{self, Part};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "gemma2",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "gemma2",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: STORAGE,
    layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    vocabulary: 256_000,
    hidden: 2304,
    intermediate: 9216,
    activation: Activation::GeluTanh,
    layers: 26,
    q_heads: 8,
    kv_heads: Some(4),
    head_dim: Some(256),
    query_scale: Some(256.0),
    window: Some(4096),
    context: 8192,
    ties_embeddings: true,
    ..llama::CLASS
};

pub(super) const STORAGE: Storage = Storage {
    huggingface_name,
    norm_weights_are_offsets: true,
    ..Storage::COMMON
};

const ATTENTION_SOFTCAP: f32 = 50.0;
const LOGIT_SOFTCAP: f32 = 30.0;
/// Number of layers of the largest model, Gemma 2 27B.
const LAYERS_27B: usize = 46;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let cap = |key, default| config.settings.number_or(key, Some(default));
    Ok(Hyperparameters {
        embedding_scale: embedding_scale(&common),
        attention_softcap: cap("attn_logit_softcapping", ATTENTION_SOFTCAP)?,
        logit_softcap: cap("final_logit_softcapping", LOGIT_SOFTCAP)?,
        windows: config.mixed_windows(config.window()?, |layer| layer % 2 == 0)?,
        biases: config.attention_biases()?,
        ..common
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    // Early files lack these keys, whose values are the same in every Gemma 2 model.
    let cap = metadata.number("attn_logit_softcapping")?;
    let window = metadata.window(CLASS.window)?;
    Ok(Hyperparameters {
        embedding_scale: embedding_scale(&common),
        attention_scale: attention_scale(&common, LAYERS_27B),
        attention_softcap: cap.or(Some(ATTENTION_SOFTCAP)),
        logit_softcap: common.logit_softcap.or(Some(LOGIT_SOFTCAP)),
        windows: metadata.windows(window, 2)?,
        ..common
    })
}

/// Returns the factor on token embeddings: the square root of the hidden size.
pub(super) fn embedding_scale(numbers: &Hyperparameters) -> f32 {
    (numbers.hidden as f32).sqrt()
}

/// Returns the factor on `q · k`, for which GGUF has no key: one over the square root of the head
/// dimension. The largest model, recognised by its number of layers, uses the hidden size divided
/// by the number of query heads instead of the head dimension.
pub(super) fn attention_scale(numbers: &Hyperparameters, largest: usize) -> f32 {
    let heads = numbers.heads;
    let width = match numbers.hidden.checked_div(heads.q_heads) {
        Some(split) if numbers.layers == largest => split,
        _ => heads.head_dim,
    };
    1.0 / (width as f32).sqrt()
}

/// Returns a layer with norms before and after both the mixer and the feed-forward part.
pub(super) fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer_norms: NormPlacement::BeforeAndAfter,
        feed_forward_norms: NormPlacement::BeforeAndAfter,
        ..numbers.layer(index)
    }
}

fn huggingface_name(part: Part) -> String {
    match part {
        Part::FeedForwardNorm => "pre_feedforward_layernorm".to_owned(),
        other => names::huggingface(other),
    }
}
