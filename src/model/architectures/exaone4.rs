//! EXAONE 4: norms only on the output of each part of a layer, per-head norms on queries and keys,
//! and, in models with a sliding window, full attention without RoPE in every fourth layer.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama, qwen3};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{LayerSpec, NormPlacement};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "exaone4",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 102_400,
        intermediate: 16_384,
        kv_heads: Some(32),
        window: Some(4096),
        norm_epsilon: 1e-5,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "exaone4",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: Storage::COMMON,
    layer,
};

/// By default, the last of every `PERIOD` layers has full attention.
const PERIOD: usize = 4;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let window = config.window()?;
    let windows = match window {
        Some(_) => config.periodic_windows(window, PERIOD)?,
        None => config.mixed_windows(None, |_| false)?,
    };
    Ok(with_windows(common, windows, window.is_some()))
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let window = metadata.window(None)?;
    let windows = metadata.windows(window, PERIOD)?;
    Ok(with_windows(common, windows, window.is_some()))
}

/// Sets the window of each layer. `has_size` says whether the model defines a sliding window, even
/// if no layer uses it; layers without a window then have no RoPE.
fn with_windows(
    numbers: Hyperparameters,
    windows: Vec<Option<usize>>,
    has_size: bool,
) -> Hyperparameters {
    let mut numbers = Hyperparameters { windows, ..numbers };
    if has_size {
        numbers.unrotated = numbers.layers_without_window();
    }
    numbers
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer_norms: NormPlacement::After,
        feed_forward_norms: NormPlacement::After,
        ..qwen3::layer(numbers, index)
    }
}
