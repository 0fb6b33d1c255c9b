//! MiniMax M2: a mixture of experts with a sigmoid router in every layer, norms on queries and keys
//! across all heads, and RoPE on part of each head.

use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama, mixtral};
use crate::device::{RouterScore, RoutingSpec, SigmoidRouting};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::layer::{Experts, LayerSpec, QkNormKind};
use crate::model::names::Part;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "minimax_m2",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 200_064,
        hidden: 3072,
        intermediate: 1536,
        layers: 62,
        q_heads: 48,
        kv_heads: Some(8),
        head_dim: Some(128),
        context: 196_608,
        rope_theta: 5e6,
        rope: RopeRules {
            partial: Some(1.0),
            dimension_key: Some("rotary_dim"),
            ..RopeRules::COMMON
        },
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "minimax-m2",
        aliases: &[],
        read: read_metadata,
        settings: &["expert_gating_func"],
    }),
    storage: Storage {
        huggingface_name,
        ..Storage::COMMON
    },
    layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let experts = Experts {
        count: config.expert_count(256)?,
        width: common.intermediate,
        routing: RoutingSpec {
            top_k: config.settings.size_or("num_experts_per_tok", 8)?,
            score: RouterScore::Sigmoid(SigmoidRouting {
                scale: 1.0,
                groups: 1,
                top_groups: 1,
                scales_input: false,
            }),
            normalize: true,
            activation: common.activation,
        },
        has_corrections: true,
        shared: None,
        has_shared_gate: false,
        has_own_norms: false,
    };
    let mut numbers = Hyperparameters {
        experts: Some(experts),
        ..common
    };
    numbers.names.keys.expert_width = numbers.names.keys.intermediate;
    Ok(numbers)
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    metadata.require_weights_norm(true)?;
    let experts = metadata.sigmoid_experts()?.map(|experts| Experts {
        routing: RoutingSpec {
            // The models normalise these weights, and the files have no key for it.
            normalize: true,
            ..experts.routing
        },
        ..experts
    });
    Ok(Hyperparameters {
        experts,
        ..metadata.hyperparameters()?
    })
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    numbers.layer(index).with_qk_norm(QkNormKind::WholeRow)
}

fn huggingface_name(part: Part) -> String {
    match part {
        Part::Corrections => "block_sparse_moe.e_score_correction_bias".to_owned(),
        other => mixtral::huggingface_name(other),
    }
}
