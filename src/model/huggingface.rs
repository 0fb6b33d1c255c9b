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

    /// Whether the setting is there at all, null included.
    fn says(&self, key: &str) -> bool {
        self.0.get(key).is_some()
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

    // Gemma 3 checkpoints with vision leave out what is as in its configuration class.
    let gemma3 = family == Family::Gemma3;
    let size_or = |key: &str, default: usize| match settings.size(key)? {
        Some(value) => Ok(value),
        None if gemma3 => Ok(default),
        None => Err(ModelError::MissingSetting {
            key: key.to_owned(),
        }),
    };
    let layers = size_or("num_hidden_layers", 26)?;
    let hidden = size_or("hidden_size", 2304)?;
    let q_heads = size_or("num_attention_heads", 8)?;
    let head_dim = match settings.size("head_dim")? {
        Some(head_dim) => head_dim,
        None if gemma3 => 256,
        None if q_heads > 0 => hidden / q_heads,
        None => 0,
    };
    let kv_heads = match settings.size("num_key_value_heads")? {
        Some(kv_heads) => kv_heads,
        None if gemma3 => 4,
        None => q_heads,
    };
    let heads = HeadShape {
        q_heads,
        kv_heads,
        head_dim,
    };
    let trained_context = size_or("max_position_embeddings", 131_072)?;
    let (rope, sliding_rope) = ropes(&settings, family, head_dim, trained_context)?;
    let intermediate = size_or("intermediate_size", 9216)?;
    let query_scale = settings.number("query_pre_attn_scalar")?;
    let default_scale = if gemma3 { 256.0 } else { head_dim as f32 };
    if settings.flag("use_bidirectional_attention")? == Some(true) {
        let key = "use_bidirectional_attention";
        return Err(ModelError::setting(
            key,
            true,
            "false: quell decodes causally",
        ));
    }
    ModelConfig {
        family,
        layers,
        hidden,
        intermediate,
        heads,
        vocabulary: size_or("vocab_size", 262_208)?,
        context: rope.extended_context(trained_context),
        norm_epsilon: settings.number("rms_norm_eps")?.unwrap_or(1e-6),
        attention_scale: 1.0 / query_scale.unwrap_or(default_scale).sqrt(),
        attention_softcap: settings
            .number("attn_logit_softcapping")?
            .filter(|_| family == Family::Gemma2),
        logit_softcap: settings.number("final_logit_softcapping")?,
        rope,
        sliding_rope,
        window: window(&settings, family)?,
        sliding_layers: sliding_layers(&settings, family, layers)?,
        experts: experts(&settings, family, intermediate)?,
        dense_layers: dense_layers(&settings, layers)?,
        end_tokens: end_tokens(&root, &settings)?,
    }
    .validate()
}

/// Whether the output projection is the embedding.
pub(super) fn ties_embeddings(config: &Value) -> bool {
    let parts = [config, config.get("text_config").unwrap_or(config)];
    let key = "tie_word_embeddings";
    parts
        .iter()
        .any(|part| part.get(key).and_then(Value::as_bool) == Some(true))
}

/// The sliding window, where the family has one and it is switched on.
fn window(settings: &Settings<'_>, family: Family) -> Result<Option<usize>, ModelError> {
    let key = "sliding_window";
    let window = settings.size(key)?;
    Ok(match family {
        Family::Llama | Family::Olmo2 => None,
        Family::Gemma2 | Family::Gemma3 if !settings.says(key) => Some(4096),
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => {
            let used = settings.flag("use_sliding_window")?.unwrap_or(false);
            window.filter(|_| used)
        }
        _ => window,
    })
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
    // A negative id stands for none.
    let read = |value: &Value| -> Option<Vec<u32>> {
        let ids = match value {
            Value::Array(ids) => ids.as_slice(),
            single => std::slice::from_ref(single),
        };
        let ids: Option<Vec<i64>> = ids.iter().map(Value::as_i64).collect();
        let ids = ids?.into_iter().filter(|&id| id >= 0);
        ids.map(|id| u32::try_from(id).ok()).collect()
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
    let default_theta = (family == Family::Gemma3).then_some(1e6);
    let theta = settings.number("rope_theta")?.or(default_theta);
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

/// LongRoPE's two lists of factors.
fn longrope(
    own: &Settings<'_>,
    original: usize,
    context: usize,
) -> Result<RopeScaling, ModelError> {
    let factors = |key: &str| {
        own.optional(key, "a list of numbers", |value| {
            value
                .as_array()?
                .iter()
                .map(|factor| factor.as_f64().map(|factor| factor as f32))
                .collect::<Option<Vec<f32>>>()
        })?
        .ok_or_else(|| ModelError::MissingSetting {
            key: key.to_owned(),
        })
    };
    let ratio = context as f32 / original as f32;
    let derived = if ratio <= 1.0 {
        1.0
    } else {
        (1.0 + ratio.ln() / (original as f32).ln()).sqrt()
    };
    Ok(RopeScaling::Long {
        short: factors("short_factor")?,
        long: factors("long_factor")?,
        original_context: original,
        magnitude: own.number("attention_factor")?.unwrap_or(derived),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn llama() -> Value {
        json!({
            "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
            "num_attention_heads": 4, "max_position_embeddings": 512,
            "intermediate_size": 128, "vocab_size": 100,
        })
    }

    fn with(mut config: Value, changes: Value) -> Value {
        for (key, value) in changes.as_object().cloned().unwrap_or_default() {
            config[key] = value;
        }
        config
    }

    #[test]
    fn gemma3_with_vision_gets_what_its_configuration_leaves_out() {
        let config = read(&json!({
            "model_type": "gemma3",
            "eos_token_id": [1, 106],
            "text_config": {
                "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                "num_hidden_layers": 34, "sliding_window": 1024,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
        }))
        .unwrap();
        let HeadShape {
            q_heads,
            kv_heads,
            head_dim,
        } = config.heads;
        assert_eq!((q_heads, kv_heads, head_dim), (8, 4, 256));
        assert_eq!(config.attention_scale, 1.0 / 16.0);
        assert_eq!((config.context, config.vocabulary), (131_072, 262_208));
        assert_eq!((config.rope.theta, config.sliding_rope.theta), (1e6, 1e4));
        assert_eq!(config.rope.scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(config.sliding_rope.scaling, RopeScaling::None);
        assert_eq!(config.layer_window(4), Some(1024));
        assert_eq!(config.layer_window(5), None);
        assert_eq!(config.end_tokens, [1, 106]);
    }

    #[test]
    fn a_window_counts_only_where_the_family_has_one_and_it_is_on() {
        let window = |changes| read(&with(llama(), changes)).unwrap().window;
        assert_eq!(window(json!({"sliding_window": 16})), None);
        assert_eq!(
            window(json!({"model_type": "mistral", "sliding_window": 16})),
            Some(16)
        );
        let qwen = json!({"model_type": "qwen2", "sliding_window": 16});
        assert_eq!(window(qwen.clone()), None);
        assert_eq!(
            window(with(qwen, json!({"use_sliding_window": true}))),
            Some(16)
        );
    }

    #[test]
    fn yarn_extends_the_context() {
        let rope = json!({
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512,
        });
        let config = read(&with(llama(), json!({"rope_scaling": rope}))).unwrap();
        assert_eq!(config.context, 2048);
    }

    #[test]
    fn what_cannot_be_run_is_refused_by_its_key() {
        for (changes, key) in [
            (json!({"num_hidden_layers": null}), "num_hidden_layers"),
            (json!({"hidden_size": "64"}), "hidden_size"),
            (json!({"vocab_size": 0}), "vocabulary size"),
            (json!({"num_key_value_heads": 3}), "attention heads"),
            (json!({"rms_norm_eps": -1.0}), "norm epsilon"),
            (
                json!({"use_bidirectional_attention": true}),
                "use_bidirectional_attention",
            ),
            (json!({"layer_types": ["full_attention"]}), "layer types"),
            (json!({"rope_theta": 0.0}), "RoPE base"),
        ] {
            let error = read(&with(llama(), changes)).unwrap_err().to_string();
            assert!(error.contains(key), "{key}: {error}");
        }
    }

    #[test]
    fn end_tokens_may_be_one_many_or_none() {
        let ends = |id: Value| {
            let config = with(llama(), json!({"eos_token_id": id}));
            read(&config).unwrap().end_tokens
        };
        assert_eq!(ends(json!(2)), [2]);
        assert_eq!(ends(json!([2, 5])), [2, 5]);
        assert_eq!(ends(json!(null)), [0u32; 0]);
        assert_eq!(ends(json!(-1)), [0u32; 0]);
    }
}
