//! Reads a model's numbers from a Hugging Face `config.json`, as transformers does: what it
//! leaves out is as in the family's configuration class, and what would change the results
//! and is not supported is refused by its key.

mod defaults;
mod rope;
mod settings;
#[cfg(test)]
mod tests;

use super::{Biases, ExpertConfig, Family, ModelConfig, ModelError};
use crate::device::HeadShape;
use defaults::Defaults;
use serde_json::Value;
use settings::Settings;

/// The family that `config.json` names.
fn family(config: &Value) -> Result<Family, ModelError> {
    let name = Settings(config).text("model_type")?;
    let name = name.ok_or_else(|| ModelError::MissingSetting {
        key: "model_type".to_owned(),
    })?;
    Family::from_huggingface(name).ok_or_else(|| ModelError::UnknownArchitecture {
        found: name.to_owned(),
        supported: Family::supported(Family::huggingface_name),
    })
}

/// The text model's settings: models with vision keep them in a part of their own.
fn text_settings(config: &Value) -> Settings<'_> {
    let root = Settings(config);
    root.get("text_config").map_or(root, Settings)
}

/// The model that `config.json` describes.
pub(super) fn read(config: &Value) -> Result<ModelConfig, ModelError> {
    let family = family(config)?;
    let settings = text_settings(config);
    let defaults = Defaults::of(family);
    check_activation(settings, family)?;
    let key = "use_bidirectional_attention";
    if settings.flag(key)? == Some(true) {
        let expected = "false: quell decodes causally";
        return Err(ModelError::setting(key, true, expected));
    }
    let layers = settings.size_or("num_hidden_layers", defaults.layers)?;
    let hidden = settings.size_or("hidden_size", defaults.hidden)?;
    let heads = heads(settings, &defaults, hidden)?;
    let head_dim = heads.head_dim;
    let trained_context = settings.size_or("max_position_embeddings", defaults.context)?;
    let (rope, sliding_rope) = rope::read(settings, family, head_dim, trained_context)?;
    let intermediate = settings.size_or("intermediate_size", defaults.intermediate)?;
    let query_scale = match defaults.query_scale {
        Some(default) => settings.number_or("query_pre_attn_scalar", Some(default))?,
        None => None,
    };
    let window = window(settings, family, &defaults)?;
    let of_gemma = |key: &str, wanted: bool, default: Option<f32>| match wanted {
        true => settings.number_or(key, default),
        false => Ok(None),
    };
    ModelConfig {
        family,
        layers,
        hidden,
        intermediate,
        heads,
        vocabulary: settings.size_or("vocab_size", defaults.vocabulary)?,
        context: rope.extended_context(trained_context),
        norm_epsilon: settings
            .number_or("rms_norm_eps", Some(defaults.norm_epsilon))?
            .ok_or_else(|| ModelError::setting("rms_norm_eps", "null", "a number"))?,
        attention_scale: 1.0 / query_scale.unwrap_or(head_dim as f32).sqrt(),
        attention_softcap: of_gemma(
            "attn_logit_softcapping",
            family == Family::Gemma2,
            defaults.attention_softcap,
        )?,
        logit_softcap: of_gemma(
            "final_logit_softcapping",
            matches!(family, Family::Gemma2 | Family::Gemma3),
            defaults.logit_softcap,
        )?,
        rope,
        sliding_rope,
        window,
        sliding_layers: sliding_layers(settings, family, layers, window)?,
        experts: experts(settings, family, &defaults, intermediate)?,
        dense_layers: dense_layers(settings, family, layers)?,
        biases: biases(settings, family)?,
        end_tokens: end_tokens(Settings(config), settings)?,
    }
    .validate()
}

/// Whether the output projection is the embedding where the file has none of its own.
pub(super) fn ties_embeddings(config: &Value) -> Result<bool, ModelError> {
    let key = "tie_word_embeddings";
    for settings in [Settings(config), text_settings(config)] {
        if let Some(tied) = settings.flag(key)? {
            return Ok(tied);
        }
    }
    Ok(Defaults::of(family(config)?).ties_embeddings)
}

/// The attention heads.
fn heads(
    settings: Settings<'_>,
    defaults: &Defaults,
    hidden: usize,
) -> Result<HeadShape, ModelError> {
    let q_heads = settings.size_or("num_attention_heads", defaults.q_heads)?;
    let split = hidden.checked_div(q_heads).unwrap_or(0);
    let key = "head_dim";
    let head_dim = match (settings.size(key)?, defaults.head_dim) {
        (Some(head_dim), _) => head_dim,
        (None, None) => split,
        (None, Some(_)) if settings.says(key) => {
            return Err(ModelError::setting(key, "null", "a whole number"));
        }
        (None, Some(head_dim)) => head_dim,
    };
    let key = "num_key_value_heads";
    let kv_heads = match settings.size(key)? {
        Some(kv_heads) => kv_heads,
        // A null stands for as many as there are query heads.
        None if settings.says(key) => q_heads,
        None => defaults.kv_heads.unwrap_or(q_heads),
    };
    Ok(HeadShape {
        q_heads,
        kv_heads,
        head_dim,
    })
}

/// The sliding window, where the family has one and it is switched on.
fn window(
    settings: Settings<'_>,
    family: Family,
    defaults: &Defaults,
) -> Result<Option<usize>, ModelError> {
    let key = "sliding_window";
    let on = match family {
        Family::Llama | Family::Olmo2 => false,
        Family::Qwen2 | Family::Qwen3 | Family::Qwen3Moe => {
            settings.flag("use_sliding_window")?.unwrap_or(false)
        }
        _ => true,
    };
    let window = match settings.size(key)? {
        None if !settings.says(key) => defaults.window,
        window => window,
    };
    Ok(window.filter(|_| on))
}

/// Refuses non-linearities that the family is not computed with.
fn check_activation(settings: Settings<'_>, family: Family) -> Result<(), ModelError> {
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

/// Which layers have a sliding window.
fn sliding_layers(
    settings: Settings<'_>,
    family: Family,
    layers: usize,
    window: Option<usize>,
) -> Result<Vec<bool>, ModelError> {
    let types = settings.optional("layer_types", "a list of layer types", Value::as_array)?;
    if let Some(types) = types {
        let slides = types.iter().map(|kind| match kind.as_str() {
            Some("sliding_attention") => Ok(true),
            Some("full_attention") => Ok(false),
            _ => {
                let expected = "sliding_attention or full_attention";
                Err(ModelError::setting("layer_types entry", kind, expected))
            }
        });
        let slides = slides.collect::<Result<Vec<bool>, _>>()?;
        let mixes = matches!(
            family,
            Family::Qwen2 | Family::Qwen3 | Family::Gemma2 | Family::Gemma3
        );
        // transformers gives all layers of the other families the window, whatever is listed.
        if !mixes && window.is_some() && slides.contains(&false) {
            let expected = format!(
                "sliding_attention for every layer of a {} model with a sliding_window",
                family.huggingface_name()
            );
            return Err(ModelError::setting(
                "layer_types entry",
                "full_attention",
                expected,
            ));
        }
        return Ok(slides);
    }
    let key = "sliding_window_pattern";
    let pattern = settings.size(key)?.unwrap_or(defaults::GEMMA3_PATTERN);
    if pattern == 0 {
        return Err(ModelError::setting(key, pattern, "at least 1"));
    }
    let full_below = settings.size("max_window_layers")?;
    let full_below = full_below.unwrap_or(defaults::QWEN_FULL_LAYERS);
    Ok((0..layers.min(1 << 16))
        .map(|layer| match family {
            Family::Gemma2 => layer % 2 == 0,
            Family::Gemma3 => (layer + 1) % pattern != 0,
            Family::Qwen2 | Family::Qwen3 => layer >= full_below,
            _ => true,
        })
        .collect())
}

fn experts(
    settings: Settings<'_>,
    family: Family,
    defaults: &Defaults,
    intermediate: usize,
) -> Result<Option<ExpertConfig>, ModelError> {
    let Some((count, top_k)) = defaults.experts else {
        return Ok(None);
    };
    let count = match settings.size("num_local_experts")? {
        Some(count) => count,
        None => settings.size_or("num_experts", count)?,
    };
    let mixtral = family == Family::Mixtral;
    Ok(Some(ExpertConfig {
        count,
        top_k: settings.size_or("num_experts_per_tok", top_k)?,
        normalize: mixtral || settings.flag("norm_topk_prob")?.unwrap_or(false),
        intermediate: match mixtral {
            true => intermediate,
            false => settings.size_or("moe_intermediate_size", defaults::QWEN3_EXPERT_WIDTH)?,
        },
    }))
}

/// Layers without experts in a model that has them (Qwen 3 MoE).
fn dense_layers(
    settings: Settings<'_>,
    family: Family,
    layers: usize,
) -> Result<Vec<usize>, ModelError> {
    if family != Family::Qwen3Moe {
        return Ok(Vec::new());
    }
    let key = "decoder_sparse_step";
    let step = settings.size_or(key, 1)?;
    if step == 0 {
        return Err(ModelError::setting(key, step, "at least 1"));
    }
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

/// Which projections have a bias.
fn biases(settings: Settings<'_>, family: Family) -> Result<Biases, ModelError> {
    let flag = |key: &str| Ok::<_, ModelError>(settings.flag(key)?.unwrap_or(false));
    Ok(match family {
        Family::Mistral | Family::Mixtral | Family::Phi3 => Biases::NONE,
        Family::Qwen2 => Biases {
            qkv: Some(true),
            ..Biases::NONE
        },
        _ => {
            let attention = Some(flag("attention_bias")?);
            let mlp = family == Family::Llama && flag("mlp_bias")?;
            Biases {
                qkv: attention,
                attention_out: attention,
                feed_forward: Some(mlp),
            }
        }
    })
}

fn end_tokens(root: Settings<'_>, settings: Settings<'_>) -> Result<Vec<u32>, ModelError> {
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
