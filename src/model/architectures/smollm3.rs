//! SmolLM3: Llama without RoPE in every fourth layer.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage, llama};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::MOST_LAYERS;
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "smollm3",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 128_256,
        hidden: 2048,
        layers: 36,
        q_heads: 16,
        kv_heads: Some(4),
        context: 32_768,
        rope_theta: 2e6,
        ties_embeddings: true,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "smollm3",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: Storage {
        rope_rows: RopeRows::InterleavedInGguf,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

/// By default, the last of every `PERIOD` layers has no RoPE.
const PERIOD: usize = 4;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let unrotated = unrotated_layers(config, common.layers)?;
    let window = match settings.flag("use_sliding_window")?.unwrap_or(false) {
        true => config.window()?,
        false => None,
    };
    Ok(Hyperparameters {
        windows: config.mixed_windows(window, |layer| unrotated.contains(&layer))?,
        unrotated,
        biases: llama::biases(config)?,
        ..common
    })
}

/// Returns the layers without RoPE: those with a 0 in `no_rope_layers`, or else the last of every
/// `no_rope_layer_interval` layers.
pub(super) fn unrotated_layers(
    config: &Config<'_>,
    layers: usize,
) -> Result<HashSet<usize>, ModelError> {
    let settings = config.settings;
    let key = "no_rope_layers";
    let expected = "a list of 0 and 1, one for each layer";
    let listed = settings.optional(key, expected, |value| {
        let all = value.as_array()?.iter();
        let all = all.map(|value| value.as_u64().filter(|&value| value <= 1));
        all.collect::<Option<Vec<u64>>>()
    })?;
    match listed.filter(|listed| !listed.is_empty()) {
        Some(listed) if listed.len() < layers => {
            let found = format!("{} entries long", listed.len());
            let expected = format!("one entry for each of the {layers} layers");
            Err(settings.refused(key, found, expected))
        }
        Some(listed) => {
            let layers = listed.iter().enumerate().take(layers);
            let unrotated = layers.filter(|(_, rotates)| **rotates == 0);
            Ok(unrotated.map(|(layer, _)| layer).collect())
        }
        None => {
            let key = "no_rope_layer_interval";
            let period = settings.size_or(key, PERIOD)?;
            if period == 0 {
                return Err(settings.refused(key, period, "at least 1"));
            }
            Ok(every(period, layers))
        }
    }
}

/// Returns the last of every `period` layers.
pub(super) fn every(period: usize, layers: usize) -> HashSet<usize> {
    let layers = 0..layers.min(MOST_LAYERS);
    layers.filter(|layer| (layer + 1) % period == 0).collect()
}

/// Returns all layers but the last of every `period`.
pub(super) fn all_but_each(period: usize, layers: usize) -> HashSet<usize> {
    let layers = 0..layers.min(MOST_LAYERS);
    layers.filter(|layer| (layer + 1) % period != 0).collect()
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    Ok(Hyperparameters {
        // GGUF has no key for these layers.
        unrotated: every(PERIOD, common.layers),
        ..common
    })
}
