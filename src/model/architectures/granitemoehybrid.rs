//! Granite 4: Mamba-2 in most layers and attention without RoPE in the others, a mixture of experts
//! with a dense part beside it, and Granite's factors. Some models of this type have no experts, no
//! Mamba-2 layers, or use RoPE.

use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, StackedExperts, Storage,
    granite, llama,
};
use crate::device::{Mamba2Spec, RouterScore, RoutingSpec};
use crate::model::Biases;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::MOST_LAYERS;
use crate::model::layer::{Experts, Mamba2, Mixer};
use crate::model::names::{self, Part};
use serde_json::Value;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "granitemoehybrid",
    aliases: &[],
    class: ConfigClass {
        local_attention: "linear_attention",
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "granitehybrid",
        aliases: &[],
        read: read_metadata,
        settings: granite::SETTINGS,
    }),
    storage: Storage {
        huggingface_name,
        gguf_name,
        fuses_gate_up: true,
        rope_rows: RopeRows::InterleavedInGguf,
        stacked_experts: Some(StackedExperts {
            gate_up: "block_sparse_moe.input_linear.weight",
            down: "block_sparse_moe.output_linear.weight",
            are_transposed: false,
            alternates: false,
        }),
        ..Storage::COMMON
    },
    layer: Hyperparameters::layer,
};

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = granite::with_factors(config)?;
    let settings = config.settings;
    let key = "normalization_function";
    if let Some(function) = settings
        .text(key)?
        .filter(|&function| function != "rmsnorm")
    {
        return Err(settings.refused(key, function, "rmsnorm"));
    }
    let key = "position_embedding_type";
    let is_rotated = match settings.text(key)? {
        Some("rope") => true,
        Some("nope") | None => false,
        Some(other) => return Err(settings.refused(key, other, "rope or nope")),
    };
    let shared = settings.size_or("shared_intermediate_size", 1024)?;
    let all = 0..common.layers.min(MOST_LAYERS);
    let (mixer, has_bias) = mamba2(config, common.hidden)?;
    let mut numbers = Hyperparameters {
        unrotated: match is_rotated {
            true => common.unrotated,
            false => all.clone().collect(),
        },
        recurrent: Some(mixer),
        recurrent_layers: match config.recurrent_layers()? {
            Some(listed) => listed,
            None => all.collect(),
        },
        biases: Biases {
            recurrent: Some(has_bias),
            ..config.attention_biases()?
        },
        ..common
    };
    let keys = &mut numbers.names.keys;
    keys.shared_experts = "shared_intermediate_size";
    match config.expert_count(8)? {
        0 => {
            numbers.intermediate = shared;
            keys.intermediate = "shared_intermediate_size";
        }
        count => {
            keys.expert_width = keys.intermediate;
            numbers.experts = Some(Experts {
                count,
                width: numbers.intermediate,
                routing: RoutingSpec {
                    top_k: settings.size_or("num_experts_per_tok", 2)?,
                    score: RouterScore::Softmax,
                    normalize: true,
                    activation: numbers.activation,
                },
                has_corrections: false,
                shared: Some(shared),
                has_shared_gate: false,
                has_own_norms: false,
            });
        }
    }
    Ok(numbers)
}

/// Reads the mixer of the Mamba-2 layers, and whether their projections have a bias.
fn mamba2(config: &Config<'_>, hidden: usize) -> Result<(Mixer, bool), ModelError> {
    let settings = config.settings;
    let heads = settings.size_or("mamba_n_heads", 128)?;
    let expanded = settings.size_or("mamba_expand", 2)?.saturating_mul(hidden);
    let key = "mamba_d_head";
    let is_derived = matches!(
        settings.get(key).map(Value::as_str),
        None | Some(Some("auto"))
    );
    let head_dim = match is_derived {
        true => expanded.checked_div(heads).unwrap_or(0),
        false => settings.size_or(key, 0)?,
    };
    if heads.checked_mul(head_dim) != Some(expanded) {
        let expected = format!("such that {heads} heads have {expanded} columns together");
        return Err(settings.refused(key, head_dim, expected));
    }
    let mixer = Mixer::Mamba2(Mamba2 {
        recurrence: Mamba2Spec {
            heads,
            head_dim,
            state_size: settings.size_or("mamba_d_state", 256)?,
            groups: settings.size_or("mamba_n_groups", 1)?,
            step_limits: step_limits(config, "time_step_limit")?,
        },
        taps: settings.size_or("mamba_d_conv", 4)?,
        has_conv_bias: settings.flag("mamba_conv_bias")?.unwrap_or(true),
        // Unlike the other norms' epsilon, not divided by the square of the residual factor: this
        // norm does not read the residual stream.
        norm_epsilon: settings.positive_or("rms_norm_eps", llama::CLASS.norm_epsilon)?,
    });
    let has_bias = settings.flag("mamba_proj_bias")?.unwrap_or(false);
    Ok((mixer, has_bias))
}

/// Reads the least and the largest step of the recurrence from `key`. Limits may be infinite;
/// missing ones are [`UNLIMITED`].
pub(super) fn step_limits(config: &Config<'_>, key: &str) -> Result<[f32; 2], ModelError> {
    let number = |value: &Value| match value.as_str() {
        // Python writes infinity as a bare word, which `from_python_json` turns into a string.
        Some("Infinity") => Some(f32::INFINITY),
        Some(_) => None,
        None => Some(value.as_f64()? as f32),
    };
    let expected = "two numbers in ascending order";
    let limits = config.settings.optional(key, expected, |value| {
        let [least, most] = value.as_array()?.as_slice() else {
            return None;
        };
        let limits = [number(least)?, number(most)?];
        (limits[0] <= limits[1]).then_some(limits)
    })?;
    Ok(limits.unwrap_or(UNLIMITED))
}

/// Step limits that have no effect, since steps are never negative.
pub(super) const UNLIMITED: [f32; 2] = [0.0, f32::INFINITY];

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let mut numbers = granite::read_metadata(metadata)?;
    let key = "expert_shared_feed_forward_length";
    let shared = metadata.size(key)?.filter(|&shared| shared > 0);
    let experts = metadata.experts()?;
    numbers.experts = experts.map(|experts| Experts { shared, ..experts });
    numbers.names.keys.shared_experts = key;
    let Some(&first) = numbers.recurrent_layers.iter().min() else {
        return Ok(numbers);
    };
    let epsilon = metadata.number("attention.layer_norm_rms_epsilon")?;
    let epsilon = epsilon.unwrap_or(llama::CLASS.norm_epsilon);
    numbers.recurrent = Some(stated_mamba2(metadata, first, epsilon, UNLIMITED)?);
    Ok(numbers)
}

/// Reads the mixer of the Mamba-2 layers from GGUF metadata. `layer` is one of these layers, and
/// `norm_epsilon` the epsilon of their own norms.
pub(super) fn stated_mamba2(
    metadata: &Metadata<'_>,
    layer: usize,
    norm_epsilon: f32,
    step_limits: [f32; 2],
) -> Result<Mixer, ModelError> {
    let heads = metadata.required_size("ssm.time_step_rank")?;
    let key = "ssm.inner_size";
    let columns = metadata.required_size(key)?;
    if heads > 0 && !columns.is_multiple_of(heads) {
        let expected = format!("a multiple of the {heads} heads");
        return Err(metadata.refused(key, columns, expected));
    }
    Ok(Mixer::Mamba2(Mamba2 {
        recurrence: Mamba2Spec {
            heads,
            head_dim: columns.checked_div(heads).unwrap_or(0),
            state_size: metadata.required_size("ssm.state_size")?,
            groups: metadata.required_size("ssm.group_count")?,
            step_limits,
        },
        taps: metadata.required_size("ssm.conv_kernel")?,
        has_conv_bias: metadata.holds(&format!("blk.{layer}.ssm_conv1d.bias")),
        norm_epsilon,
    }))
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::Convolution => "mamba.conv1d",
        Part::Router => "block_sparse_moe.router.layer",
        // The dense part has the same names in models with and without experts.
        Part::FusedGateUp | Part::FusedSharedGateUp => "shared_mlp.input_linear",
        Part::Down | Part::SharedDown => "shared_mlp.output_linear",
        other => return names::huggingface(other),
    };
    name.to_owned()
}

pub(super) fn gguf_name(part: Part) -> String {
    match part {
        Part::Convolution => "ssm_conv1d".to_owned(),
        other => names::gguf(other),
    }
}
