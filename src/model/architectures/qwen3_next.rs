//! Qwen 3 Next: gated delta nets in most layers, gated attention in the others, and a mixture of
//! experts with a gated shared expert.

use super::smollm3::all_but_each;
use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, StackedExperts, Storage, qwen2,
    qwen3_moe, seed_oss,
};
use crate::device::{DeltaHeads, DeltaOrder, RouterScore, RoutingSpec};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, RopeRules};
use crate::model::layer::{Attention, Experts, GatedDelta, LayerSpec, Mixer, QkNormKind};
use crate::model::names::{self, Part};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "qwen3_next",
    aliases: &[],
    class: CLASS,
    read_config,
    gguf: Some(GgufFormat {
        name: "qwen3next",
        aliases: &[],
        read: |metadata| {
            let common = metadata.hyperparameters()?;
            with_experts(metadata, with_delta(metadata, common, DeltaOrder::Grouped)?)
        },
        settings: &[],
    }),
    storage: STORAGE,
    layer,
};

pub(super) const CLASS: ConfigClass = ConfigClass {
    hidden: 2048,
    intermediate: 5632,
    layers: 48,
    q_heads: 16,
    kv_heads: Some(2),
    head_dim: Some(256),
    local_attention: "linear_attention",
    rope: RopeRules {
        partial: Some(0.25),
        ..RopeRules::COMMON
    },
    ..qwen2::CLASS
};

pub(super) const STORAGE: Storage = Storage {
    huggingface_name,
    gguf_name,
    norm_weights_are_offsets: true,
    stacked_experts: Some(StackedExperts {
        gate_up: "mlp.experts.gate_up_proj",
        down: "mlp.experts.down_proj",
        are_transposed: false,
        alternates: false,
    }),
    ..Storage::COMMON
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = hybrid(config)?;
    let normalize = config.settings.flag("norm_topk_prob")?.unwrap_or(true);
    let dense_layers = qwen3_moe::dense_layers(config, common.layers)?;
    let numbers = configured_experts(config, common, [512, 10], normalize)?;
    Ok(Hyperparameters {
        dense_layers,
        ..numbers
    })
}

/// Reads the hyperparameters of a model whose layers have gated delta nets or attention.
pub(super) fn hybrid(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let key = "attn_output_gate";
    if settings.flag(key)? == Some(false) {
        return Err(settings.refused(key, false, "true"));
    }
    let key = "full_attention_interval";
    let interval = settings.size_or(key, 4)?;
    if interval == 0 {
        return Err(settings.refused(key, interval, "at least 1"));
    }
    let recurrent_layers = match config.recurrent_layers()? {
        Some(listed) => listed,
        None => all_but_each(interval, common.layers),
    };
    let heads = DeltaHeads {
        key_heads: settings.size_or("linear_num_key_heads", 16)?,
        value_heads: settings.size_or("linear_num_value_heads", 32)?,
        key_dim: settings.size_or("linear_key_head_dim", 128)?,
        value_dim: settings.size_or("linear_value_head_dim", 128)?,
        order: DeltaOrder::Grouped,
    };
    let taps = settings.size_or("linear_conv_kernel_dim", 4)?;
    let mut numbers = Hyperparameters {
        recurrent: Some(Mixer::GatedDelta(GatedDelta { heads, taps })),
        recurrent_layers,
        biases: config.attention_biases()?,
        ..common
    };
    let keys = &mut numbers.names.keys;
    keys.taps = "linear_conv_kernel_dim";
    keys.recurrent_heads = "linear_num_value_heads";
    keys.recurrent_head_dim = "linear_value_head_dim";
    keys.recurrent_groups = "linear_num_key_heads";
    keys.state_size = "linear_key_head_dim";
    Ok(numbers)
}

/// Adds the mixture of experts of a configuration to `common`. `count` and `top_k` are the defaults
/// for the number of experts and for the number chosen per token.
pub(super) fn configured_experts(
    config: &Config<'_>,
    common: Hyperparameters,
    [count, top_k]: [usize; 2],
    normalize: bool,
) -> Result<Hyperparameters, ModelError> {
    let settings = config.settings;
    let shared_key = "shared_expert_intermediate_size";
    let experts = Experts {
        count: config.expert_count(count)?,
        width: settings.size_or("moe_intermediate_size", 512)?,
        routing: RoutingSpec {
            top_k: settings.size_or("num_experts_per_tok", top_k)?,
            score: RouterScore::Softmax,
            normalize,
            activation: common.activation,
        },
        has_corrections: false,
        shared: Some(settings.size_or(shared_key, 512)?),
        has_shared_gate: true,
        has_own_norms: false,
    };
    let mut numbers = Hyperparameters {
        experts: Some(experts),
        ..common
    };
    numbers.names.keys.shared_experts = shared_key;
    Ok(numbers)
}

/// Adds the gated delta nets of a GGUF file to `common`. `order` is that of the value heads in the
/// file.
pub(super) fn with_delta(
    metadata: &Metadata<'_>,
    common: Hyperparameters,
    order: DeltaOrder,
) -> Result<Hyperparameters, ModelError> {
    let recurrent_layers = match metadata.flags("attention.recurrent_layers")? {
        Some(flags) => {
            let layers = flags.into_iter().enumerate();
            let recurrent = layers.filter(|(_, is_recurrent)| *is_recurrent);
            recurrent.map(|(layer, _)| layer).collect()
        }
        None => {
            let key = "full_attention_interval";
            let interval = metadata.size(key)?.unwrap_or(4);
            if interval == 0 {
                return Err(metadata.refused(key, interval, "at least 1"));
            }
            all_but_each(interval, common.layers)
        }
    };
    let value_heads = metadata.required_size("ssm.time_step_rank")?;
    let key = "ssm.inner_size";
    let inner = metadata.required_size(key)?;
    let least = value_heads.saturating_mul(DeltaHeads::DIM);
    if least > 0 && !inner.is_multiple_of(least) {
        let expected = format!(
            "a multiple of {} for each of the {value_heads} value heads",
            DeltaHeads::DIM
        );
        return Err(metadata.refused(key, inner, expected));
    }
    let heads = DeltaHeads {
        key_heads: metadata.required_size("ssm.group_count")?,
        value_heads,
        key_dim: metadata.required_size("ssm.state_size")?,
        value_dim: inner.checked_div(value_heads).unwrap_or(0),
        order,
    };
    let taps = metadata.required_size("ssm.conv_kernel")?;
    Ok(Hyperparameters {
        recurrent: Some(Mixer::GatedDelta(GatedDelta { heads, taps })),
        recurrent_layers,
        ..common
    })
}

/// Adds the mixture of experts of a GGUF file to `common`.
pub(super) fn with_experts(
    metadata: &Metadata<'_>,
    common: Hyperparameters,
) -> Result<Hyperparameters, ModelError> {
    let shared_key = "expert_shared_feed_forward_length";
    let shared = metadata.size(shared_key)?.unwrap_or(common.intermediate);
    let experts = metadata.experts()?.map(|experts| Experts {
        shared: Some(shared),
        has_shared_gate: true,
        ..experts
    });
    let mut numbers = Hyperparameters { experts, ..common };
    numbers.names.keys.shared_experts = shared_key;
    Ok(numbers)
}

pub(super) fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    let layer = numbers.layer(index);
    let mixer = match layer.mixer {
        Mixer::Attention(attention) => Mixer::Attention(Attention {
            qk_norm: Some(QkNormKind::PerHead),
            has_gate: true,
            ..attention
        }),
        recurrent => recurrent,
    };
    LayerSpec { mixer, ..layer }
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::Convolution => "linear_attn.conv1d",
        Part::RecurrentInput => "linear_attn.in_proj_qkvz",
        Part::DecayRates => "linear_attn.A_log",
        Part::StepBiases => "linear_attn.dt_bias",
        Part::RecurrentNorm => "linear_attn.norm",
        Part::RecurrentOutput => "linear_attn.out_proj",
        Part::SharedGate => "mlp.shared_expert.gate_proj",
        Part::SharedUp => "mlp.shared_expert.up_proj",
        Part::SharedDown => "mlp.shared_expert.down_proj",
        other => return names::huggingface(other),
    };
    name.to_owned()
}

fn gguf_name(part: Part) -> String {
    match part {
        Part::Convolution => "ssm_conv1d".to_owned(),
        other => seed_oss::gguf_name(other),
    }
}
