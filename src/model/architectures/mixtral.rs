//! Mixtral: Mistral with a mixture of experts. GGUF files call it llama.

use super::{Architecture, Hyperparameters, ModelError, Storage, mistral};
use crate::device::{RouterScore, RoutingSpec};
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::Experts;
use crate::model::names::{self, Part};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "mixtral",
    aliases: &[],
    class: ConfigClass {
        window: None,
        norm_epsilon: 1e-5,
        rope_theta: 1e6,
        ..mistral::CLASS
    },
    read_config,
    gguf: None,
    storage: Storage {
        huggingface_name,
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let experts = Experts {
        count: config.expert_count(8)?,
        width: common.intermediate,
        routing: RoutingSpec {
            top_k: config.settings.size_or("num_experts_per_tok", 2)?,
            score: RouterScore::Softmax,
            normalize: true,
            activation: common.activation,
        },
        has_corrections: false,
        shared: None,
        has_shared_gate: false,
    };
    let mut names = common.names.clone();
    names.keys.expert_width = names.keys.intermediate;
    Ok(Hyperparameters {
        windows: config.same_windows(config.window()?)?,
        experts: Some(experts),
        names,
        ..common
    })
}

pub(super) fn huggingface_name(part: Part) -> String {
    match part {
        Part::Router => "block_sparse_moe.gate".to_owned(),
        Part::ExpertGate(expert) => format!("block_sparse_moe.experts.{expert}.w1"),
        Part::ExpertUp(expert) => format!("block_sparse_moe.experts.{expert}.w3"),
        Part::ExpertDown(expert) => format!("block_sparse_moe.experts.{expert}.w2"),
        other => names::huggingface(other),
    }
}
