//! Ministral 3: Mistral with YaRN, and a factor on queries that grows with their position. Of a
//! checkpoint with vision, `mistral3`, only the text model is read.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, Storage, mistral};
use crate::device::QueryScale;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::{RopeConfig, RopeScaling};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "ministral3",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "mistral3",
        aliases: &[],
        read: read_metadata,
        settings: &["attention.temperature_scale"],
    }),
    storage: Storage {
        rope_rows: RopeRows::InterleavedInGguf,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

const CLASS: ConfigClass = ConfigClass {
    vocabulary: 131_072,
    layers: 34,
    head_dim: Some(128),
    window: None,
    context: 262_144,
    norm_epsilon: 1e-5,
    rope_theta: 1e6,
    rope: RopeRules::COMMON,
    ..mistral::CLASS
};

/// The configuration class's `rope_parameters`, for files that have none.
const FACTOR: f32 = 16.0;
const ORIGINAL_CONTEXT: usize = 16_384;
const SLOPE: f32 = 0.1;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let (rope, slope, interval) = match config.rope_parameters() {
        Some(own) => {
            let slope = own.required_number("llama_4_scaling_beta")?;
            (common.rope.clone(), slope, config.original_context(own)?)
        }
        None => {
            let rope = RopeConfig {
                scaling: RopeScaling::Yarn {
                    factor: FACTOR,
                    original_context: ORIGINAL_CONTEXT as f32,
                    beta_fast: 32.0,
                    beta_slow: 1.0,
                    truncate: true,
                    attention_factor: Some(1.0),
                },
                ..common.rope.clone()
            };
            (rope, SLOPE, ORIGINAL_CONTEXT)
        }
    };
    Ok(Hyperparameters {
        windows: config.same_windows(config.window()?)?,
        sliding_rope: rope.clone(),
        rope,
        query_scale: query_scale(slope, interval),
        ..common
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    let query_scale = match metadata.positive("attention.temperature_scale")? {
        Some(slope) => {
            let key = "rope.scaling.original_context_length";
            query_scale(slope, metadata.required_size(key)?)
        }
        None => None,
    };
    Ok(Hyperparameters {
        query_scale,
        experts: metadata.experts()?,
        ..common
    })
}

/// Returns the factor on queries, which grows every `interval` positions. `interval` is the context
/// that the model was trained on before it was extended. Returns `None` if `slope` is 0.
fn query_scale(slope: f32, interval: usize) -> Option<QueryScale> {
    let interval = u32::try_from(interval.max(1)).unwrap_or(u32::MAX);
    let scale = QueryScale {
        slope,
        interval,
        offset: 0,
    };
    (slope != 0.0).then_some(scale)
}
