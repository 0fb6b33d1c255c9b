//! gpt-oss: a mixture of experts with a clamped activation and biases everywhere, attention with
//! sinks, and a sliding window in every other layer.

use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, StackedExperts, Storage, llama,
};
use crate::device::{Activation, RouterScore, RoutingSpec};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::layer::{Attention, Experts, LayerSpec, Mixer};
use crate::model::names::{self, Part};
use crate::model::{Biases, RopeConfig, RopeScaling};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "gpt_oss",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 201_088,
        hidden: 2880,
        intermediate: 2880,
        layers: 36,
        q_heads: 64,
        kv_heads: Some(8),
        head_dim: Some(64),
        window: Some(128),
        context: 131_072,
        norm_epsilon: 1e-5,
        rope_theta: 150_000.0,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "gpt-oss",
        aliases: &[],
        read: read_metadata,
        settings: &[],
    }),
    storage: Storage {
        huggingface_name,
        gguf_name,
        stacked_experts: Some(StackedExperts {
            gate_up: "mlp.experts.gate_up_proj",
            down: "mlp.experts.down_proj",
            are_transposed: true,
            alternates: true,
        }),
        ..Storage::COMMON
    },
    layer,
};

/// By default, the last of every `PERIOD` layers has full attention.
const PERIOD: usize = 2;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let slope = settings.positive_or("swiglu_alpha", 1.702)?;
    let limit = settings.positive_or("swiglu_limit", 7.0)?;
    let experts = Experts {
        count: config.expert_count(128)?,
        width: common.intermediate,
        routing: RoutingSpec {
            top_k: settings.size_or("num_experts_per_tok", 4)?,
            score: RouterScore::Softmax,
            normalize: true,
            activation: Activation::ClampedSwiGlu { slope, limit },
        },
        has_corrections: false,
        shared: None,
        has_shared_gate: false,
        has_own_norms: false,
    };
    let rope = match config.rope_parameters() {
        Some(_) => common.rope.clone(),
        None => RopeConfig {
            scaling: RopeScaling::Yarn {
                factor: 32.0,
                original_context: 4096.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate: false,
                attention_factor: None,
            },
            ..common.rope.clone()
        },
    };
    let attention = config.attention_bias(true)?;
    let mut numbers = Hyperparameters {
        sliding_rope: rope.clone(),
        rope,
        windows: config.mixed_windows(config.window()?, |layer| (layer + 1) % PERIOD != 0)?,
        experts: Some(experts),
        biases: Biases {
            qkv: attention,
            attention_out: attention,
            feed_forward: Some(true),
            ..Biases::NONE
        },
        ..common
    };
    numbers.names.keys.expert_width = numbers.names.keys.intermediate;
    Ok(numbers)
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let mut numbers = metadata.hyperparameters()?;
    // The models were trained with `truncate` set to false, for which GGUF has no key.
    if let RopeScaling::Yarn { truncate, .. } = &mut numbers.rope.scaling {
        *truncate = false;
    }
    numbers.sliding_rope = numbers.rope.clone();
    numbers.windows = metadata.windows(metadata.window(None)?, PERIOD)?;
    numbers.experts = metadata.experts()?.map(|experts| Experts {
        routing: RoutingSpec {
            activation: Activation::ClampedSwiGlu {
                slope: 1.702,
                limit: 7.0,
            },
            ..experts.routing
        },
        ..experts
    });
    Ok(numbers)
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    LayerSpec {
        mixer: Mixer::Attention(Attention {
            has_sinks: true,
            ..numbers.attention(index)
        }),
        ..numbers.layer(index)
    }
}

fn huggingface_name(part: Part) -> String {
    match part {
        Part::Router => "mlp.router".to_owned(),
        other => names::huggingface(other),
    }
}

fn gguf_name(part: Part) -> String {
    match part {
        Part::FeedForwardNorm => "post_attention_norm".to_owned(),
        other => names::gguf(other),
    }
}
