//! Qwen 3 with a mixture of experts. Some layers may be dense.

use super::smollm3::all_but_each;
use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, qwen2, qwen3};
use crate::device::{RouterScore, RoutingSpec};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::Experts;
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "qwen3_moe",
    aliases: &[],
    class: ConfigClass {
        hidden: 2048,
        intermediate: 6144,
        layers: 24,
        kv_heads: Some(4),
        ..qwen2::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "qwen3moe",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: Storage::COMMON,
    layer: qwen3::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let experts = Experts {
        count: config.expert_count(128)?,
        width: settings.size_or("moe_intermediate_size", 768)?,
        routing: RoutingSpec {
            top_k: settings.size_or("num_experts_per_tok", 8)?,
            score: RouterScore::Softmax,
            normalize: settings.flag("norm_topk_prob")?.unwrap_or(false),
            activation: common.activation,
        },
        has_corrections: false,
        shared: None,
        has_shared_gate: false,
        has_own_norms: false,
    };
    Ok(Hyperparameters {
        windows: config.same_windows(qwen2::switched_window(config)?)?,
        experts: Some(experts),
        dense_layers: dense_layers(config, common.layers)?,
        biases: config.attention_biases()?,
        ..common
    })
}

/// Returns the layers without experts: those that `mlp_only_layers` lists, and all but the last of
/// every `decoder_sparse_step` layers.
pub(super) fn dense_layers(
    config: &Config<'_>,
    layers: usize,
) -> Result<HashSet<usize>, ModelError> {
    let key = "decoder_sparse_step";
    let step = config.settings.size_or(key, 1)?;
    if step == 0 {
        return Err(config.settings.refused(key, step, "at least 1"));
    }
    let key = "mlp_only_layers";
    let listed = config.settings.layers(key)?;
    let mut dense = listed.unwrap_or_default();
    dense.extend(all_but_each(step, layers));
    Ok(dense)
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = metadata.hyperparameters()?;
    Ok(Hyperparameters {
        experts: metadata.experts()?,
        ..common
    })
}
