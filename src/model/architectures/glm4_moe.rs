//! GLM-4.5 to 4.7: a mixture of experts with a sigmoid router and a shared expert, after some dense
//! layers; RoPE on half of each head.

use super::deepseek_v2::shared;
use super::deepseek_v3::ExpertClass;
use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama, qwen3, seed_oss,
};
use crate::model::Biases;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::layer::{Experts, LayerSpec};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "glm4_moe",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 151_552,
        intermediate: 10_944,
        layers: 46,
        q_heads: 96,
        kv_heads: Some(8),
        context: 131_072,
        norm_epsilon: 1e-5,
        rope: RopeRules {
            partial: Some(0.5),
            ..RopeRules::COMMON
        },
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "glm4moe",
        aliases: &[],
        read: read_metadata,
        settings: &[
            "expert_gating_func",
            "expert_group_count",
            "expert_shared_count",
            "expert_weights_scale",
            "leading_dense_block_count",
            "nextn_predict_layers",
        ],
    }),
    storage: Storage {
        gguf_name: seed_oss::gguf_name,
        ..Storage::COMMON
    },
    layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let class = ExpertClass {
        count: 128,
        width: 1408,
        top_k: 8,
        scale: 1.0,
        groups: 1,
        top_groups: 1,
    };
    let experts = class.read(config, common.activation)?;
    let experts = Experts {
        shared: shared(experts.width, settings.size_or("n_shared_experts", 1)?),
        ..experts
    };
    let dense = settings.size_or("first_k_dense_replace", 1)?;
    Ok(Hyperparameters {
        dense_layers: common.leading_layers(dense),
        experts: Some(experts),
        has_qk_norm: settings.flag("use_qk_norm")?.unwrap_or(false),
        prediction_layers: settings.size_or("num_nextn_predict_layers", 1)?.min(64),
        biases: Biases {
            qkv: config.attention_bias(false)?,
            ..Biases::NONE
        },
        ..common
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = without_prediction_layers(metadata, metadata.hyperparameters()?)?;
    let dense = metadata.size("leading_dense_block_count")?.unwrap_or(0);
    Ok(Hyperparameters {
        dense_layers: common.leading_layers(dense),
        experts: metadata.sigmoid_experts()?,
        has_qk_norm: metadata.holds("blk.0.attn_q_norm.weight"),
        ..common
    })
}

/// Removes from `common` the layers for multi-token prediction, which GGUF files include in the
/// number of layers.
pub(super) fn without_prediction_layers(
    metadata: &Metadata<'_>,
    common: Hyperparameters,
) -> Result<Hyperparameters, ModelError> {
    let key = "nextn_predict_layers";
    let prediction_layers = metadata.size(key)?.unwrap_or(0);
    let layers = common.layers.checked_sub(prediction_layers);
    let layers = layers.ok_or_else(|| {
        let expected = format!("at most the {} layers", common.layers);
        metadata.refused(key, prediction_layers, expected)
    })?;
    Ok(Hyperparameters {
        layers,
        windows: common.windows[..layers.min(common.windows.len())].to_vec(),
        prediction_layers,
        ..common
    })
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    match numbers.has_qk_norm {
        true => qwen3::layer(numbers, index),
        false => numbers.layer(index),
    }
}
