//! Reads a model's numbers from a Hugging Face `config.json`.

use super::{ExpertConfig, Family, ModelConfig, ModelError, RopeConfig, RopeScaling};
use crate::device::HeadShape;
use serde_json::Value;

/// The settings of `config.json`, read with the name of what is wrong.
struct Settings<'a>(&'a Value);

impl<'a> Settings<'a> {
    /// The setting, unless it is missing or null.
    fn get(&self, key: &str) -> Option<&'a Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(ModelError::setting(key, value, expected)),
        }
    }

    fn size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        self.optional(key, "a whole number", |value| {
            value
                .as_u64()
                .and_then(|number| usize::try_from(number).ok())
        })
    }

    fn required_size(&self, key: &str) -> Result<usize, ModelError> {
        self.size(key)?.ok_or_else(|| ModelError::MissingSetting {
            key: key.to_owned(),
        })
    }

    fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.optional(key, "a number", |value| {
            value.as_f64().map(|number| number as f32)
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, ModelError> {
        self.optional(key, "true or false", Value::as_bool)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.optional(key, "a string", Value::as_str)
    }
}

/// The model that `config.json` describes.
pub(super) fn read(config: &Value) -> Result<ModelConfig, ModelError> {
    let root = Settings(config);
    let name = root
        .text("model_type")?
        .ok_or_else(|| ModelError::MissingSetting {
            key: "model_type".to_owned(),
        })?;
    let family = Family::from_huggingface(name).ok_or_else(|| ModelError::UnknownArchitecture {
        found: name.to_owned(),
        supported: Family::supported(Family::huggingface_name),
    })?;
    // Models with vision keep the text model's settings in a part of their own.
    let settings = Settings(root.get("text_config").unwrap_or(config));
    check_activation(&settings, family)?;

    let layers = settings.required_size("num_hidden_layers")?;
    let hidden = settings.required_size("hidden_size")?;
    let q_heads = settings.required_size("num_attention_heads")?;
    let head_dim = match settings.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if q_heads > 0 => hidden / q_heads,
        None => 0,
    };
    let heads = HeadShape {
        q_heads,
        kv_heads: settings.size("num_key_value_heads")?.unwrap_or(q_heads),
        head_dim,
    };
    let context = settings.required_size("max_position_embeddings")?;
    let (rope, sliding_rope) = ropes(&settings, family, head_dim, context)?;
    let query_scale = settings
        .number("query_pre_attn_scalar")?
        .unwrap_or(head_dim as f32);
    let window = settings.size("sliding_window")?;
    let uses_window = settings.flag("use_sliding_window")?.unwrap_or(true);
    let gemma2 = family == Family::Gemma2;
    let intermediate = settings.required_size("intermediate_size")?;
    ModelConfig {
        family,
        layers,
        hidden,
        intermediate,
        heads,
        vocabulary: settings.required_size("vocab_size")?,
        context,
        norm_epsilon: settings.number("rms_norm_eps")?.unwrap_or(1e-6),
        attention_scale: 1.0 / query_scale.sqrt(),
        attention_softcap: settings
            .number("attn_logit_softcapping")?
            .filter(|_| gemma2),
        logit_softcap: settings.number("final_logit_softcapping")?,
        rope,
        sliding_rope,
        window: window.filter(|_| uses_window),
        sliding_layers: sliding_layers(&settings, family, layers)?,
        experts: experts(&settings, family, intermediate)?,
        dense_layers: dense_layers(&settings, layers)?,
        end_tokens: end_tokens(&root, &settings)?,
    }
    .validate()
}

/// Refuses non-linearities that the family is not computed with.
fn check_activation(settings: &Settings<'_>, family: Family) -> Result<(), ModelError> {
    use crate::device::Activation;
    let expected: &[&str] = match family.activation() {
        Activation::Silu => &["silu", "swish"],
        Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu_fast", "gelu_new"],
    };
    let key = if settings.get("hidden_activation").is_some() {
        "hidden_activation"
    } else {
        "hidden_act"
    };
    // Early Gemma checkpoints say "gelu" in hidden_act and mean the tanh form.
    match settings.text(key)? {
        Some("gelu") if key == "hidden_act" && family.scales_embeddings() => Ok(()),
        Some(found) if !expected.contains(&found) => {
            Err(ModelError::setting(key, found, expected.join(" or ")))
        }
        _ => Ok(()),
    }
}

fn sliding_layers(
    settings: &Settings<'_>,
    family: Family,
    layers: usize,
) -> Result<Vec<bool>, ModelError> {
    let types = settings.optional("layer_types", "a list of layer types", Value::as_array)?;
    if let Some(types) = types {
        return types
            .iter()
            .map(|kind| match kind.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => {
                    let expected = "sliding_attention or full_attention";
                    Err(ModelError::setting("layer_types entry", kind, expected))
                }
            })
            .collect();
    }
    let pattern = settings.size("sliding_window_pattern")?.unwrap_or(6).max(1);
    let full_below = settings.size("max_window_layers")?.unwrap_or(0);
    Ok((0..layers.min(1 << 16))
        .map(|layer| match family {
            Family::Gemma2 => layer % 2 == 0,
            Family::Gemma3 => (layer + 1) % pattern != 0,
            Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => layer >= full_below,
            _ => true,
        })
        .collect())
}

fn experts(
    settings: &Settings<'_>,
    family: Family,
    intermediate: usize,
) -> Result<Option<ExpertConfig>, ModelError> {
    if !matches!(family, Family::Mixtral | Family::Qwen3Moe) {
        return Ok(None);
    }
    let count = match settings.size("num_local_experts")? {
        Some(count) => count,
        None => settings.required_size("num_experts")?,
    };
    let mixtral = family == Family::Mixtral;
    Ok(Some(ExpertConfig {
        count,
        top_k: settings.required_size("num_experts_per_tok")?,
        normalize: mixtral || settings.flag("norm_topk_prob")?.unwrap_or(false),
        intermediate: settings
            .size("moe_intermediate_size")?
            .unwrap_or(intermediate),
    }))
}

/// Layers without experts in a model that has them (Qwen 3 MoE).
fn dense_layers(settings: &Settings<'_>, layers: usize) -> Result<Vec<usize>, ModelError> {
    let step = settings.size("decoder_sparse_step")?.unwrap_or(1).max(1);
    let listed = settings.optional("mlp_only_layers", "a list of layers", |value| {
        value
            .as_array()?
            .iter()
            .map(|layer| layer.as_u64().map(|layer| layer as usize))
            .collect()
    })?;
    let mut dense: Vec<usize> = listed.unwrap_or_default();
    dense.extend((0..layers.min(1 << 16)).filter(|layer| (layer + 1) % step != 0));
    Ok(dense)
}

fn end_tokens(root: &Settings<'_>, settings: &Settings<'_>) -> Result<Vec<u32>, ModelError> {
    let read = |value: &Value| -> Option<Vec<u32>> {
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
        match value {
            Value::Array(ids) => ids.iter().map(id).collect(),
            single => Some(vec![id(single)?]),
        }
    };
    let key = "eos_token_id";
    let own = root.optional(key, "a token id or a list of them", read)?;
    Ok(match own {
        Some(ids) => ids,
        None => settings
            .optional(key, "a token id or a list of them", read)?
            .unwrap_or_default(),
    })
}

/// The position embeddings of full and of sliding layers.
fn ropes(
    settings: &Settings<'_>,
    family: Family,
    head_dim: usize,
    context: usize,
) -> Result<(RopeConfig, RopeConfig), ModelError> {
    let partial = settings.number("partial_rotary_factor")?;
    let one = |parameters: Option<&Value>, theta: Option<f32>| {
        rope(settings, parameters, theta, partial, head_dim, context)
    };
    let parameters = settings.get("rope_parameters");
    if let Some(by_type) = parameters.filter(|value| value.get("full_attention").is_some()) {
        let full = one(by_type.get("full_attention"), None)?;
        let sliding = one(by_type.get("sliding_attention"), None)?;
        return Ok((full, sliding));
    }
    let theta = settings.number("rope_theta")?;
    let full = one(parameters.or_else(|| settings.get("rope_scaling")), theta)?;
    let sliding = if family == Family::Gemma3 {
        let local = settings.number("rope_local_base_freq")?.unwrap_or(10_000.0);
        one(None, Some(local))?
    } else {
        full.clone()
    };
    Ok((full, sliding))
}

/// One position embedding, from `rope_parameters` or the older `rope_scaling`.
fn rope(
    settings: &Settings<'_>,
    parameters: Option<&Value>,
    theta: Option<f32>,
    partial: Option<f32>,
    head_dim: usize,
    context: usize,
) -> Result<RopeConfig, ModelError> {
    let none = Value::Null;
    let own = Settings(parameters.unwrap_or(&none));
    let theta = own.number("rope_theta")?.or(theta).unwrap_or(10_000.0);
    let partial = own
        .number("partial_rotary_factor")?
        .or(partial)
        .unwrap_or(1.0);
    let rotary_dim = (head_dim as f32 * partial) as usize;
    let kind = match own.text("rope_type")? {
        Some(kind) => kind,
        None => own.text("type")?.unwrap_or("default"),
    };
    let factor = || {
        own.number("factor")?
            .ok_or_else(|| ModelError::MissingSetting {
                key: "RoPE factor".to_owned(),
            })
    };
    let original = match own.size("original_max_position_embeddings")? {
        Some(original) => original,
        None => settings
            .size("original_max_position_embeddings")?
            .unwrap_or(context),
    };
    let scaling = match kind {
        // Dynamic scaling changes nothing below the context length, quell's limit.
        "default" | "dynamic" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: own.number("low_freq_factor")?.unwrap_or(1.0),
            high_freq_factor: own.number("high_freq_factor")?.unwrap_or(4.0),
            original_context: original as f32,
        },
        "yarn" => RopeScaling::Yarn {
            factor: factor()?,
            original_context: original as f32,
            beta_fast: own.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: own.number("beta_slow")?.unwrap_or(1.0),
            attention_factor: own.number("attention_factor")?,
        },
        "longrope" | "su" => longrope(&own, original, context)?,
        other => {
            let expected = "default, dynamic, linear, llama3, yarn or longrope";
            return Err(ModelError::setting("RoPE type", other, expected));
        }
    };
    Ok(RopeConfig {
        theta,
        rotary_dim,
        scaling,
    })
}

/// LongRoPE's factors: the long ones where the context is longer than the original.
fn longrope(
    own: &Settings<'_>,
    original: usize,
    context: usize,
) -> Result<RopeScaling, ModelError> {
    let key = if context > original {
        "long_factor"
    } else {
        "short_factor"
    };
    let factors = own
        .optional(key, "a list of numbers", |value| {
            value
                .as_array()?
                .iter()
                .map(|factor| factor.as_f64().map(|factor| factor as f32))
                .collect::<Option<Vec<f32>>>()
        })?
        .ok_or_else(|| ModelError::MissingSetting {
            key: key.to_owned(),
        })?;
    let ratio = context as f32 / original as f32;
    let derived = if ratio <= 1.0 {
        1.0
    } else {
        (1.0 + ratio.ln() / (original as f32).ln()).sqrt()
    };
    let magnitude = own.number("attention_factor")?.unwrap_or(derived);
    Ok(RopeScaling::Factors { factors, magnitude })
}
