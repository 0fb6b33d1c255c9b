//! Llama 4 (text): chunked attention in most layers; full attention without RoPE in the others,
//! with a factor on queries that grows with their position; and, in some layers, a mixture of
//! experts with one expert per token and a shared expert.

use super::smollm3::{all_but_each, every, unrotated_layers};
use super::{
    Architecture, GgufFormat, Hyperparameters, ModelError, RopeRows, StackedExperts, Storage, llama,
};
use crate::device::{QueryScale, RouterScore, RoutingSpec, SigmoidRouting};
use crate::model::RopeConfig;
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass};
use crate::model::hyperparameters::MOST_LAYERS;
use crate::model::layer::{Attention, Experts, LayerSpec, Mixer, QkNormKind};
use crate::model::names::{self, Part};
use serde_json::Value;
use std::collections::HashSet;

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "llama4_text",
    // The model type of checkpoints with vision.
    aliases: &["llama4"],
    class: ConfigClass {
        vocabulary: 202_048,
        hidden: 5120,
        intermediate: 8192,
        layers: 48,
        q_heads: 40,
        kv_heads: Some(8),
        head_dim: Some(128),
        local_attention: "chunked_attention",
        context: 131_072,
        norm_epsilon: 1e-5,
        rope_theta: 500_000.0,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "llama4",
        aliases: &[],
        read: read_metadata,
        settings: &["expert_gating_func"],
    }),
    storage: Storage {
        huggingface_name,
        rope_rows: RopeRows::Interleaved,
        stacked_experts: Some(StackedExperts {
            gate_up: "feed_forward.experts.gate_up_proj",
            down: "feed_forward.experts.down_proj",
            are_transposed: true,
            alternates: false,
        }),
        ..Storage::COMMON
    },
    layer,
};

/// Default length of a chunk.
const CHUNK: usize = 8192;
/// Default of the factor on queries in layers without RoPE.
const QUERY_SCALE: QueryScale = QueryScale {
    slope: 0.1,
    interval: 8192,
    offset: 1,
};
/// Scores of the router: sigmoids, which multiply the inputs of the chosen experts.
const SCORE: RouterScore = RouterScore::Sigmoid(SigmoidRouting {
    scale: 1.0,
    groups: 1,
    top_groups: 1,
    scales_input: true,
});
/// In GGUF files, the last of every `PERIOD` layers has full attention without RoPE.
const PERIOD: usize = 4;
/// Number of experts of the largest model, Maverick, which does not normalise queries and keys.
const EXPERTS_MAVERICK: usize = 128;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    let unrotated = unrotated_layers(config, common.layers)?;
    let key = "attention_chunk_size";
    let chunk = match settings.size(key)? {
        None if !settings.says(key) => Some(CHUNK),
        chunk => chunk,
    };
    let experts = Experts {
        count: config.expert_count(16)?,
        width: common.intermediate,
        routing: RoutingSpec {
            top_k: settings.size_or("num_experts_per_tok", 1)?,
            score: SCORE,
            normalize: false,
            activation: common.activation,
        },
        has_corrections: false,
        shared: Some(common.intermediate),
        has_shared_gate: false,
        has_own_norms: false,
    };
    let sparse = sparse_layers(config, common.layers)?;
    let mut numbers = Hyperparameters {
        intermediate: settings.size_or("intermediate_size_mlp", 16_384)?,
        is_chunked: true,
        windows: config.mixed_windows(chunk, |layer| !unrotated.contains(&layer))?,
        unrotated,
        has_qk_norm: settings.flag("use_qk_norm")?.unwrap_or(true),
        query_scale: query_scale(config)?,
        experts: Some(experts),
        dense_layers: (0..common.layers.min(MOST_LAYERS))
            .filter(|layer| !sparse.contains(layer))
            .collect(),
        biases: config.attention_biases()?,
        ..common
    };
    let keys = &mut numbers.names.keys;
    keys.expert_width = keys.intermediate;
    keys.shared_experts = keys.intermediate;
    keys.intermediate = "intermediate_size_mlp";
    keys.window = "attention_chunk_size";
    Ok(numbers)
}

/// Returns the layers with experts: those that `moe_layers` lists, or else the last of every
/// `interleave_moe_layer_step` layers.
fn sparse_layers(config: &Config<'_>, layers: usize) -> Result<HashSet<usize>, ModelError> {
    let settings = config.settings;
    let listed = settings.layers("moe_layers")?;
    if let Some(listed) = listed {
        return Ok(listed);
    }
    let key = "interleave_moe_layer_step";
    let step = settings.size_or(key, 1)?;
    if step == 0 {
        return Err(settings.refused(key, step, "at least 1"));
    }
    Ok(every(step, layers))
}

/// Reads the factor on queries in layers without RoPE; returns `None` if it is switched off.
fn query_scale(config: &Config<'_>) -> Result<Option<QueryScale>, ModelError> {
    let settings = config.settings;
    let key = "attn_temperature_tuning";
    // Older files have a number here, of which anything but 0 means true.
    let truth = |value: &Value| value.as_bool().or_else(|| Some(value.as_f64()? != 0.0));
    let is_on = settings
        .optional(key, "true, false or a number", truth)?
        .unwrap_or(true);
    let slope = settings.number_or("attn_scale", Some(QUERY_SCALE.slope))?;
    let slope = slope.filter(|slope| slope.is_finite());
    let slope = slope.ok_or_else(|| {
        let found = settings
            .get("attn_scale")
            .map_or("null".to_owned(), ToString::to_string);
        settings.refused("attn_scale", found, "a finite number")
    })?;
    let key = "floor_scale";
    let interval = settings.size_or(key, QUERY_SCALE.interval as usize)?;
    let interval = u32::try_from(interval)
        .ok()
        .filter(|&interval| interval > 0);
    let interval = interval.ok_or_else(|| {
        let found = settings
            .get(key)
            .map_or("0".to_owned(), ToString::to_string);
        settings.refused(key, found, "from 1 to 4294967295")
    })?;
    Ok(is_on.then_some(QueryScale {
        slope,
        interval,
        ..QUERY_SCALE
    }))
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    metadata.require_weights_norm(false)?;
    let common = metadata.hyperparameters()?;
    // Converters write this key only for models without chunks, as 0.
    let chunk = metadata.window(Some(CHUNK))?;
    let experts = metadata.sigmoid_experts()?.map(|experts| Experts {
        routing: RoutingSpec {
            score: SCORE,
            normalize: false,
            ..experts.routing
        },
        has_corrections: false,
        shared: Some(experts.width),
        ..experts
    });
    let theta = metadata.number("rope.freq_base_swa")?;
    let mut numbers = Hyperparameters {
        is_chunked: true,
        windows: metadata.windows(chunk, PERIOD)?,
        // GGUF has no keys for these layers, for the norms, and for the factor on queries.
        unrotated: match chunk {
            Some(_) => every(PERIOD, common.layers),
            None => HashSet::new(),
        },
        has_qk_norm: experts.is_none_or(|experts| experts.count != EXPERTS_MAVERICK),
        query_scale: Some(QUERY_SCALE),
        sliding_rope: RopeConfig {
            theta: theta.unwrap_or(common.rope.theta),
            ..common.rope.clone()
        },
        dense_layers: match experts {
            Some(_) => stated_dense_layers(metadata, common.layers)?,
            None => HashSet::new(),
        },
        experts,
        ..common
    };
    numbers.names.keys.shared_experts = "expert_feed_forward_length";
    Ok(numbers)
}

/// Reads the layers without experts from GGUF metadata.
fn stated_dense_layers(
    metadata: &Metadata<'_>,
    layers: usize,
) -> Result<HashSet<usize>, ModelError> {
    let key = "interleave_moe_layer_step";
    let step = metadata.required_size(key)?;
    if step == 0 {
        return Err(metadata.refused(key, step, "at least 1"));
    }
    Ok(all_but_each(step, layers))
}

fn layer(numbers: &Hyperparameters, index: usize) -> LayerSpec {
    let attention = numbers.attention(index);
    let attention = match attention.rope {
        // The model normalises after RoPE. Rotations preserve lengths, so normalising before RoPE
        // gives the same result.
        Some(_) => Attention {
            qk_norm: numbers.has_qk_norm.then_some(QkNormKind::PerHeadUnweighted),
            query_scale: None,
            ..attention
        },
        None => attention,
    };
    LayerSpec {
        mixer: Mixer::Attention(attention),
        ..numbers.layer(index)
    }
}

fn huggingface_name(part: Part) -> String {
    let name = match part {
        Part::Gate => "feed_forward.gate_proj",
        Part::Up => "feed_forward.up_proj",
        Part::Down => "feed_forward.down_proj",
        Part::Router => "feed_forward.router",
        Part::SharedGate => "feed_forward.shared_expert.gate_proj",
        Part::SharedUp => "feed_forward.shared_expert.up_proj",
        Part::SharedDown => "feed_forward.shared_expert.down_proj",
        other => return names::huggingface(other),
    };
    name.to_owned()
}
