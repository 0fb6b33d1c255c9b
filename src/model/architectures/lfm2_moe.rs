//! LFM2 with a mixture of experts and a sigmoid router, after some dense layers.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, lfm2, qwen3};
use crate::device::{RouterScore, RoutingSpec, SigmoidRouting};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::Experts;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "lfm2_moe",
    aliases: &[],
    class: ConfigClass {
        hidden: 2048,
        intermediate: 7168,
        ..lfm2::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "lfm2moe",
        aliases: &[],
        read: read_metadata,
        settings: &["expert_gating_func", "leading_dense_block_count"],
    }),
    storage: lfm2::STORAGE,
    layer: qwen3::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = lfm2::with_convolutions(config)?;
    let settings = config.settings;
    let experts = Experts {
        count: settings.size_or("num_experts", 32)?,
        width: settings.size_or("moe_intermediate_size", 1792)?,
        routing: RoutingSpec {
            top_k: settings.size_or("num_experts_per_tok", 4)?,
            score: RouterScore::Sigmoid(SigmoidRouting {
                scale: settings.positive_or("routed_scaling_factor", 1.0)?,
                groups: 1,
                top_groups: 1,
                scales_input: false,
            }),
            normalize: settings.flag("norm_topk_prob")?.unwrap_or(true),
            activation: common.activation,
        },
        has_corrections: settings.flag("use_expert_bias")?.unwrap_or(true),
        shared: None,
        has_shared_gate: false,
        has_own_norms: false,
    };
    let dense = settings.size_or("num_dense_layers", 2)?;
    Ok(Hyperparameters {
        dense_layers: common.leading_layers(dense),
        experts: Some(experts),
        ..common
    })
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let common = lfm2::read_metadata(metadata)?;
    let dense = metadata.size("leading_dense_block_count")?.unwrap_or(0);
    let experts = metadata.sigmoid_experts()?.map(|experts| Experts {
        routing: RoutingSpec {
            // The models normalise these weights, and the files have no key for it.
            normalize: true,
            ..experts.routing
        },
        has_corrections: metadata.holds(&format!("blk.{dense}.exp_probs_b.bias")),
        ..experts
    });
    Ok(Hyperparameters {
        dense_layers: common.leading_layers(dense),
        experts,
        ..common
    })
}
