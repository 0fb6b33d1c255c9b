//! DeepSeek V2 and V2 Lite: latent attention, and a mixture of experts whose router is a softmax,
//! with shared experts, after some dense layers.
//!
//! GGUF files use this architecture's name for every model with latent attention, so models with
//! sigmoid routers are read from GGUF here as well.

use super::glm4_moe::without_prediction_layers;
use super::{Architecture, GgufFormat, Hyperparameters, ModelError, Storage, llama};
use crate::device::{LatentShape, RouterScore, RoutingSpec, SoftmaxRouting};
use crate::model::gguf::Metadata;
use crate::model::huggingface::{Config, ConfigClass, Settings};
use crate::model::layer::{Experts, Latent};
use crate::model::{RopeConfig, RopeScaling};

pub(super) static ARCHITECTURE: Architecture = Architecture {
    name: "deepseek_v2",
    aliases: &[],
    class: ConfigClass {
        vocabulary: 102_400,
        ..llama::CLASS
    },
    read_config,
    gguf: Some(GgufFormat {
        name: "deepseek2",
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
    storage: Storage::COMMON,
    layer: Hyperparameters::layer,
};

/// Default sizes of latent attention in a configuration class.
pub(super) struct LatentClass {
    /// `q_lora_rank`. In a file, null means that queries have no latent.
    pub(super) query_rank: usize,
    /// `kv_lora_rank`.
    pub(super) latent: usize,
    /// `qk_nope_head_dim`.
    pub(super) plain: usize,
    /// `qk_rope_head_dim`.
    pub(super) rotated: usize,
    /// `v_head_dim`.
    pub(super) value: usize,
}

pub(super) const LATENT: LatentClass = LatentClass {
    query_rank: 1536,
    latent: 512,
    plain: 128,
    rotated: 64,
    value: 128,
};

/// Epsilon of the RMSNorms on latents, which does not depend on `rms_norm_eps`.
const NORM_EPSILON: f32 = 1e-6;

fn read_config(config: &Config<'_>) -> Result<Hyperparameters, ModelError> {
    let settings = config.settings;
    require_text(settings, "scoring_func", "softmax")?;
    for key in ["mlp_bias", "norm_topk_prob"] {
        if settings.flag(key)? == Some(true) {
            return Err(settings.refused(key, true, "false"));
        }
    }
    let scale = settings.positive_or("routed_scaling_factor", 1.0)?;
    let key = "topk_method";
    let (groups, top_groups) = match settings.text(key)? {
        None if settings.says(key) => {
            return Err(settings.refused(key, "null", TOPK_METHODS));
        }
        None | Some("greedy") => (1, 1),
        Some("group_limited_greedy") => (
            required_size(settings, "n_group")?,
            required_size(settings, "topk_group")?,
        ),
        Some(other) => return Err(settings.refused(key, other, TOPK_METHODS)),
    };
    let numbers = read_latent(config, &LATENT, true)?;
    let width = settings.size_or("moe_intermediate_size", 1407)?;
    let experts = Experts {
        count: settings.size_or("n_routed_experts", 64)?,
        width,
        routing: RoutingSpec {
            top_k: required_size(settings, "num_experts_per_tok")?,
            score: softmax(scale, groups, top_groups),
            normalize: false,
            activation: numbers.activation,
        },
        has_corrections: false,
        has_shared_gate: false,
        has_own_norms: false,
        shared: shared(width, settings.size_or("n_shared_experts", 2)?),
    };
    Ok(Hyperparameters {
        dense_layers: numbers.leading_layers(settings.size_or("first_k_dense_replace", 0)?),
        experts: Some(experts),
        ..numbers
    })
}

const TOPK_METHODS: &str = "greedy or group_limited_greedy";

fn required_size(settings: Settings<'_>, key: &str) -> Result<usize, ModelError> {
    settings.size(key)?.ok_or_else(|| settings.missing(key))
}

/// Refuses a setting whose text is not `expected`. A missing setting and null are accepted.
pub(super) fn require_text(
    settings: Settings<'_>,
    key: &str,
    expected: &str,
) -> Result<(), ModelError> {
    match settings.text(key)? {
        Some(found) if found != expected => Err(settings.refused(key, found, expected)),
        _ => Ok(()),
    }
}

/// Returns a softmax router: the plain one if there is neither a factor nor more than one group.
fn softmax(scale: f32, groups: usize, top_groups: usize) -> RouterScore {
    match (scale, groups) {
        (1.0, 1) => RouterScore::Softmax,
        _ => RouterScore::GroupedSoftmax(SoftmaxRouting {
            scale,
            groups,
            top_groups,
        }),
    }
}

/// Returns the total width of `count` shared experts of the given width; `None` if there are none.
pub(super) fn shared(width: usize, count: usize) -> Option<usize> {
    (count > 0).then_some(width.saturating_mul(count))
}

/// Reads the hyperparameters that all models with latent attention share, without the experts.
pub(super) fn read_latent(
    config: &Config<'_>,
    class: &LatentClass,
    is_interleaved: bool,
) -> Result<Hyperparameters, ModelError> {
    let common = config.hyperparameters()?;
    let settings = config.settings;
    match settings.size_or("moe_layer_freq", 1)? {
        1 => {}
        other => return Err(settings.refused("moe_layer_freq", other, "1")),
    }
    let heads = common.heads;
    if heads.kv_heads != heads.q_heads {
        let expected = format!("{}, the number of query heads", heads.q_heads);
        return Err(settings.refused("num_key_value_heads", heads.kv_heads, expected));
    }
    let key = "q_lora_rank";
    let query_rank = match settings.size(key)? {
        None if !settings.says(key) => Some(class.query_rank),
        rank => rank,
    };
    let shape = LatentShape {
        heads: heads.q_heads,
        rotated: settings.size_or("qk_rope_head_dim", class.rotated)?,
        plain: settings.size_or("qk_nope_head_dim", class.plain)?,
        latent: settings.size_or("kv_lora_rank", class.latent)?,
        value: settings.size_or("v_head_dim", class.value)?,
    };
    let multiplier = match config.rope_parameters() {
        Some(own) => match own.number("mscale_all_dim")? {
            Some(all) if all != 0.0 && common.rope.scaling != RopeScaling::None => {
                magnitude(own.required_number("factor")?, all)
            }
            _ => 1.0,
        },
        None => 1.0,
    };
    Ok(Hyperparameters {
        biases: config.attention_biases()?,
        ..with_latent(common, shape, query_rank, multiplier, is_interleaved)
    })
}

/// Returns YaRN's factor on queries and keys, for a context extended by `factor` and a
/// `multiplier` from `mscale_all_dim`.
fn magnitude(factor: f32, multiplier: f32) -> f32 {
    match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * multiplier * factor.ln() + 1.0,
    }
}

/// Adds latent attention to `numbers`. `magnitude` is the factor on queries and on keys, so its
/// square multiplies the scores.
fn with_latent(
    numbers: Hyperparameters,
    shape: LatentShape,
    query_rank: Option<usize>,
    magnitude: f32,
    is_interleaved: bool,
) -> Hyperparameters {
    let columns = (shape.plain.saturating_add(shape.rotated)) as f32;
    let scale = magnitude * magnitude / columns.sqrt();
    let rope = RopeConfig {
        rotary_dim: shape.rotated,
        ..numbers.rope
    };
    Hyperparameters {
        heads: shape.heads(),
        attention_scale: scale,
        sliding_rope: rope.clone(),
        rope,
        latent: Some(Latent {
            shape,
            query_rank,
            scale,
            rope: 0,
            norm_epsilon: NORM_EPSILON,
            is_interleaved,
        }),
        ..numbers
    }
}

fn read_metadata(metadata: &Metadata<'_>) -> Result<Hyperparameters, ModelError> {
    let key = "attention.head_count";
    let heads = metadata.required_size(key)?;
    let rotated = metadata.required_size("rope.dimension_count")?;
    let [key, value_key] = head_keys(metadata)?;
    let columns = metadata.required_size(key)?;
    let plain = columns.checked_sub(rotated).filter(|&plain| plain > 0);
    let shape = LatentShape {
        heads,
        rotated,
        plain: plain.ok_or_else(|| {
            let expected = format!("more than the {rotated} elements that are rotated");
            metadata.refused(key, columns, expected)
        })?,
        latent: metadata.required_size("attention.kv_lora_rank")?,
        value: metadata.required_size(value_key)?,
    };
    let common = metadata.hyperparameters_of(shape.heads())?;
    let mut common = without_prediction_layers(metadata, common)?;
    let mut multiplier = 1.0;
    if let RopeScaling::Yarn {
        factor,
        attention_factor,
        ..
    } = &mut common.rope.scaling
        && let Some(tenth) = metadata.positive("rope.scaling.yarn_log_multiplier")?
    {
        // Converters write a tenth of `mscale_all_dim` and assume that `mscale` equals it, in which
        // case cosine and sine are not scaled.
        multiplier = magnitude(*factor, tenth / 0.1);
        let own = metadata.positive("rope.scaling.attn_factor")?;
        *attention_factor = Some(own.unwrap_or(1.0));
    }
    let query_rank = metadata.size("attention.q_lora_rank")?;
    let query_rank = query_rank.filter(|&rank| rank > 0);
    let mut numbers = with_latent(common, shape, query_rank, multiplier, true);
    numbers.names.keys.plain = key;
    numbers.names.keys.value = value_key;
    let dense = metadata.size("leading_dense_block_count")?.unwrap_or(0);
    let corrections = format!("blk.{dense}.exp_probs_b.bias");
    let experts = match metadata.size("expert_gating_func")? {
        // Older files lack the key. In them, a tensor of corrections indicates a sigmoid router.
        None if !metadata.holds(&corrections) => softmax_experts(metadata)?,
        Some(SOFTMAX) => softmax_experts(metadata)?,
        _ => metadata.sigmoid_experts()?,
    };
    Ok(Hyperparameters {
        dense_layers: numbers.leading_layers(dense),
        experts,
        ..numbers
    })
}

/// Returns the keys of the numbers of elements of a head's key and of its value. In files that do
/// not split the projection from the latent, these are those of other architectures, which in newer
/// files describe the attention over latents.
fn head_keys(metadata: &Metadata<'_>) -> Result<[&'static str; 2], ModelError> {
    let keys = ["attention.key_length_mla", "attention.value_length_mla"];
    let is_old = metadata.holds("blk.0.attn_kv_b.weight") && metadata.size(keys[0])?.is_none();
    Ok(match is_old {
        true => ["attention.key_length", "attention.value_length"],
        false => keys,
    })
}

/// Value of `expert_gating_func` for a softmax router.
const SOFTMAX: usize = 1;

/// Reads a mixture of experts with a softmax router; returns `None` if there are no experts.
fn softmax_experts(metadata: &Metadata<'_>) -> Result<Option<Experts>, ModelError> {
    let Some(experts) = metadata.experts()? else {
        return Ok(None);
    };
    let scale = metadata.positive("expert_weights_scale")?.unwrap_or(1.0);
    let size_or_1 = |key| Ok::<_, ModelError>(metadata.size(key)?.unwrap_or(1).max(1));
    let groups = size_or_1("expert_group_count")?;
    let top_groups = size_or_1("expert_group_used_count")?;
    let count = metadata.size("expert_shared_count")?.unwrap_or(0);
    Ok(Some(Experts {
        routing: RoutingSpec {
            score: softmax(scale, groups, top_groups),
            normalize: metadata.flag("expert_weights_norm")?.unwrap_or(false),
            ..experts.routing
        },
        shared: shared(experts.width, count),
        ..experts
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::huggingface;
    use crate::model::layer::Mixer;
    use serde_json::{Value, json};

    /// Returns the `config.json` of a small model with `changes` applied. A null is kept as null.
    fn config(changes: Value) -> Value {
        let mut config = json!({
            "model_type": "deepseek_v2",
            "num_attention_heads": 4,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_experts_per_tok": 2,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        config
    }

    fn latent(changes: Value) -> Latent {
        let model = huggingface::read(&config(changes)).unwrap();
        match model.layers[0].mixer {
            Mixer::Latent(latent) => latent,
            _ => panic!("attention is not latent"),
        }
    }

    #[test]
    fn sizes_that_are_not_given_are_those_of_the_class() {
        let found = latent(json!({}));
        let expected = LatentShape {
            heads: 4,
            rotated: 64,
            plain: 128,
            latent: 512,
            value: 128,
        };
        assert_eq!((found.shape, found.query_rank), (expected, Some(1536)));
        assert_eq!(latent(json!({"q_lora_rank": null})).query_rank, None);
        assert!((found.scale - 1.0 / 192f32.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn yarn_scales_the_scores_by_the_square_of_its_magnitude() {
        let rope = |mscale: f32, all: f32| {
            json!({"max_position_embeddings": 163_840, "rope_scaling": {
                "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                "beta_fast": 32, "beta_slow": 1, "mscale": mscale, "mscale_all_dim": all,
            }})
        };
        let magnitude = 0.1 * 0.707 * 40f32.ln() + 1.0;
        let expected = magnitude * magnitude / 192f32.sqrt();
        assert!((latent(rope(0.707, 0.707)).scale - expected).abs() < 1e-7);
        let model = huggingface::read(&config(rope(0.707, 0.707))).unwrap();
        assert_eq!(model.ropes[0].spec(100).magnitude, 1.0);
        assert_eq!(model.context, 163_840);
        let model = huggingface::read(&config(rope(1.0, 0.707))).unwrap();
        let quotient = (0.1 * 40f32.ln() + 1.0) / magnitude;
        assert!((model.ropes[0].spec(100).magnitude - quotient).abs() < 1e-6);
        // An `mscale_all_dim` of 0 is treated as missing.
        assert!((latent(rope(1.0, 0.0)).scale - 1.0 / 192f32.sqrt()).abs() < 1e-9);
    }

    #[test]
    fn routers_choose_among_all_experts_or_among_those_of_the_best_groups() {
        let score = |changes| {
            let model = huggingface::read(&config(changes)).unwrap();
            let routing = model.experts().unwrap().routing;
            assert!(!routing.normalize);
            routing.score
        };
        assert_eq!(
            score(json!({"n_group": 4, "topk_group": 2})),
            RouterScore::Softmax
        );
        let groups = json!({"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
            "routed_scaling_factor": 16.0});
        let expected = SoftmaxRouting {
            scale: 16.0,
            groups: 4,
            top_groups: 2,
        };
        assert_eq!(score(groups), RouterScore::GroupedSoftmax(expected));
    }

    #[test]
    fn settings_that_would_change_the_results_are_refused_by_key() {
        for (changes, message) in [
            (json!({"kv_lora_rank": null}), "kv_lora_rank is null"),
            (json!({"kv_lora_rank": 0}), "kv_lora_rank is 0"),
            (json!({"kv_lora_rank": u64::MAX}), "kv_lora_rank is 184"),
            (
                json!({"qk_rope_head_dim": u64::MAX}),
                "qk_rope_head_dim is 184",
            ),
            (json!({"q_lora_rank": 0}), "q_lora_rank is 0"),
            (json!({"qk_rope_head_dim": 63}), "qk_rope_head_dim is 63"),
            (json!({"qk_nope_head_dim": 1 << 20}), "qk_nope_head_dim is"),
            (json!({"v_head_dim": 0}), "v_head_dim is 0"),
            (
                json!({"num_key_value_heads": 2}),
                "num_key_value_heads is 2",
            ),
            (
                json!({"topk_method": "noaux_tc"}),
                "topk_method is noaux_tc",
            ),
            (json!({"topk_method": null}), "topk_method is null"),
            (
                json!({"topk_method": "group_limited_greedy"}),
                "n_group is missing",
            ),
            (
                json!({"scoring_func": "sigmoid"}),
                "scoring_func is sigmoid",
            ),
            (json!({"norm_topk_prob": true}), "norm_topk_prob is true"),
            (json!({"mlp_bias": true}), "mlp_bias is true"),
            (json!({"moe_layer_freq": 2}), "moe_layer_freq is 2"),
            (
                json!({"num_experts_per_tok": null}),
                "num_experts_per_tok is missing",
            ),
            (
                json!({"routed_scaling_factor": 0}),
                "routed_scaling_factor is 0",
            ),
            (
                json!({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}),
                "topk_group is 1 of 3",
            ),
            (
                json!({"rope_scaling": {"type": "yarn", "factor": 4, "mscale_all_dim": 1e38}}),
                "mscale_all_dim",
            ),
        ] {
            let error = huggingface::read(&config(changes)).unwrap_err().to_string();
            assert!(error.contains(message), "{message} is not in: {error}");
        }
    }
}
