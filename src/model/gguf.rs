//! Reads a model's numbers from GGUF metadata.

use super::{Biases, ExpertConfig, Family, ModelConfig, ModelError, RopeConfig, RopeScaling};
use crate::device::HeadShape;
use crate::weights::gguf::{Gguf, Value};
use crate::weights::{WeightSource, quant};

/// The settings of one architecture, whose keys begin with its name.
struct Settings<'a> {
    file: &'a Gguf,
    architecture: &'a str,
}

impl<'a> Settings<'a> {
    fn key(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    fn optional<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let key = self.key(key);
        let Some(value) = self.file.metadata(&key) else {
            return Ok(None);
        };
        match read(value) {
            Some(value) => Ok(Some(value)),
            None => Err(ModelError::setting(key, value.type_name(), expected)),
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
        self.size(key)?
            .ok_or_else(|| ModelError::MissingSetting { key: self.key(key) })
    }

    /// A number that some files give once and some for each layer; quell needs it
    /// to be the same for all.
    fn uniform_size(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let all = self.optional(key, "a whole number", |value| match value {
            Value::Array(_) => value.as_u64s(),
            single => Some(vec![single.as_u64()?]),
        })?;
        let Some(all) = all else { return Ok(None) };
        match all.first() {
            Some(&first) if all.iter().all(|&value| value == first) => {
                Ok(usize::try_from(first).ok())
            }
            _ => Err(ModelError::setting(
                self.key(key),
                format!("{all:?}"),
                "the same number for every layer",
            )),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f32>, ModelError> {
        self.optional(key, "a number", Value::as_f32)
    }

    fn text(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.optional(key, "a string", Value::as_str)
    }
}

/// The model that a GGUF file describes.
pub(super) fn read(file: &Gguf) -> Result<ModelConfig, ModelError> {
    let key = "general.architecture";
    let architecture =
        file.metadata(key)
            .and_then(Value::as_str)
            .ok_or_else(|| ModelError::MissingSetting {
                key: key.to_owned(),
            })?;
    let family =
        Family::from_gguf(architecture).ok_or_else(|| ModelError::UnknownArchitecture {
            found: architecture.to_owned(),
            supported: Family::supported(Family::gguf_name),
        })?;
    let settings = Settings { file, architecture };

    refuse_unknown(&settings)?;

    let layers = settings.required_size("block_count")?;
    let hidden = settings.required_size("embedding_length")?;
    let q_heads = settings
        .uniform_size("attention.head_count")?
        .ok_or_else(|| ModelError::MissingSetting {
            key: settings.key("attention.head_count"),
        })?;
    let head_dim = match settings.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None if q_heads > 0 => hidden / q_heads,
        None => 0,
    };
    if let Some(value_dim) = settings.size("attention.value_length")?
        && value_dim != head_dim
    {
        let expected = format!("{head_dim}, the key length");
        return Err(ModelError::setting(
            "attention.value_length",
            value_dim,
            expected,
        ));
    }
    let heads = HeadShape {
        q_heads,
        kv_heads: settings
            .uniform_size("attention.head_count_kv")?
            .unwrap_or(q_heads),
        head_dim,
    };
    let context = settings.required_size("context_length")?;
    let experts = experts(&settings, family)?;
    let intermediate = match settings.uniform_size("feed_forward_length")? {
        Some(intermediate) => intermediate,
        None => experts.map_or(0, |experts| experts.intermediate),
    };
    let rope = rope(&settings, head_dim, context)?;
    let sliding_rope = match family {
        Family::Gemma3 => RopeConfig {
            theta: settings.number("rope.freq_base_swa")?.unwrap_or(10_000.0),
            scaling: RopeScaling::None,
            ..rope.clone()
        },
        // OLMo 3 is called olmo2 here; its sliding layers are not extended.
        Family::Olmo2 => RopeConfig {
            theta: settings.number("rope.freq_base_swa")?.unwrap_or(rope.theta),
            scaling: RopeScaling::None,
            ..rope.clone()
        },
        _ => rope.clone(),
    };
    // Early Gemma 2 files lack what never differs.
    let gemma2 = |value: f32| (family == Family::Gemma2).then_some(value);
    let window = match settings.size("attention.sliding_window")? {
        None if family == Family::Gemma2 => Some(4096),
        window => window.filter(|&window| window > 0),
    };
    ModelConfig {
        family,
        layers,
        hidden,
        intermediate,
        heads,
        vocabulary: vocabulary(file, &settings)?,
        context,
        norm_epsilon: settings
            .number("attention.layer_norm_rms_epsilon")?
            .unwrap_or(1e-6),
        attention_scale: 1.0 / query_scale(family, layers, hidden, heads).sqrt(),
        attention_softcap: settings
            .number("attn_logit_softcapping")?
            .or(gemma2(50.0))
            .filter(|_| family == Family::Gemma2),
        logit_softcap: settings.number("final_logit_softcapping")?.or(gemma2(30.0)),
        rope,
        sliding_rope,
        window,
        sliding_layers: sliding_layers(&settings, family, layers)?,
        experts,
        dense_layers: Vec::new(),
        biases: Biases::AS_STORED,
        end_tokens: Vec::new(),
    }
    .validate()
}

/// Refuses settings that change the results and that these architectures do not have.
fn refuse_unknown(settings: &Settings<'_>) -> Result<(), ModelError> {
    for (key, neutral) in [
        ("attention.clamp_kqv", 0.0),
        ("attention.max_alibi_bias", 0.0),
        ("attention.scale", 0.0),
        ("embedding_scale", 1.0),
        ("expert_shared_count", 0.0),
        ("expert_weights_scale", 1.0),
        ("leading_dense_block_count", 0.0),
        ("logit_scale", 1.0),
        ("nextn_predict_layers", 0.0),
        ("residual_scale", 1.0),
    ] {
        // A 0 stands for none.
        let value = settings.number(key)?.filter(|&value| value != 0.0);
        if let Some(value) = value.filter(|&value| value != neutral) {
            let expected = format!("{neutral} for the architecture '{}'", settings.architecture);
            return Err(ModelError::setting(settings.key(key), value, expected));
        }
    }
    let (key, expected) = ("attention.causal", "true: quell decodes causally");
    match settings.optional(key, "true or false", Value::as_bool)? {
        Some(false) => Err(ModelError::setting(settings.key(key), false, expected)),
        _ => Ok(()),
    }
}

/// The number whose root divides `q · k`. The largest Gemmas divide by the width of
/// a head as if the hidden size were split evenly; GGUF has no key for it.
fn query_scale(family: Family, layers: usize, hidden: usize, heads: HeadShape) -> f32 {
    let gemma_27b = matches!(
        (family, layers),
        (Family::Gemma2, 46) | (Family::Gemma3, 62)
    );
    if gemma_27b && heads.q_heads > 0 {
        (hidden / heads.q_heads) as f32
    } else {
        heads.head_dim as f32
    }
}

fn vocabulary(file: &Gguf, settings: &Settings<'_>) -> Result<usize, ModelError> {
    // The embedding knows best: some files pad it beyond the tokenizer.
    if let Some(embedding) = file.tensor("token_embd.weight")
        && let &[rows, _] = embedding.shape
    {
        return Ok(rows);
    }
    settings.required_size("vocab_size")
}

/// How a file says which layers have a window.
enum Pattern {
    List(Vec<bool>),
    Period(usize),
}

/// Which layers have a window: every layer but the last of a period, or as listed.
fn sliding_layers(
    settings: &Settings<'_>,
    family: Family,
    layers: usize,
) -> Result<Vec<bool>, ModelError> {
    let key = "attention.sliding_window_pattern";
    let expected = "a number or a list of true and false";
    let pattern = settings.optional(key, expected, |value| match value {
        Value::Array(_) => value.as_bools().map(|list| Pattern::List(list.to_vec())),
        _ => Some(Pattern::Period(usize::try_from(value.as_u64()?).ok()?)),
    })?;
    let period = match (pattern, family) {
        (Some(Pattern::List(list)), _) => return Ok(list),
        (Some(Pattern::Period(period)), _) => period,
        (None, Family::Gemma2) => 2,
        (None, Family::Gemma3) => 6,
        (None, Family::Olmo2) => 4,
        // 0: every layer.
        _ => 0,
    };
    let slides = |layer: usize| period == 0 || layer % period < period - 1;
    Ok((0..layers.min(1 << 16)).map(slides).collect())
}

fn experts(settings: &Settings<'_>, family: Family) -> Result<Option<ExpertConfig>, ModelError> {
    let Some(count) = settings.size("expert_count")?.filter(|&count| count > 0) else {
        return Ok(None);
    };
    if !matches!(family, Family::Llama | Family::Qwen3Moe) {
        let expected = format!("0 for the architecture '{}'", settings.architecture);
        return Err(ModelError::setting(
            settings.key("expert_count"),
            count,
            expected,
        ));
    }
    let intermediate = match settings.size("expert_feed_forward_length")? {
        Some(intermediate) => intermediate,
        None => settings
            .uniform_size("feed_forward_length")?
            .ok_or_else(|| ModelError::MissingSetting {
                key: settings.key("feed_forward_length"),
            })?,
    };
    let top_k = settings.required_size("expert_used_count")?;
    Ok(Some(ExpertConfig {
        count,
        top_k,
        normalize: true,
        intermediate,
    }))
}

fn rope(
    settings: &Settings<'_>,
    head_dim: usize,
    context: usize,
) -> Result<RopeConfig, ModelError> {
    let rotary_dim = settings.size("rope.dimension_count")?.unwrap_or(head_dim);
    let theta = settings.number("rope.freq_base")?.unwrap_or(10_000.0);
    let original = settings
        .size("rope.scaling.original_context_length")?
        .unwrap_or(context);
    let magnitude = settings.number("rope.scaling.attn_factor")?;
    let factors = |name: &str| -> Result<Option<Vec<f32>>, ModelError> {
        let Some(tensor) = settings.file.tensor(name) else {
            return Ok(None);
        };
        let mut factors = vec![0.0; tensor.elements()];
        let data = settings.file.read(&tensor)?;
        quant::dequantize(tensor.dtype, &data, &mut factors);
        Ok(Some(factors))
    };
    let (short, long) = ("rope_factors_short.weight", "rope_factors_long.weight");
    let missing = |name: &str| ModelError::MissingTensor {
        name: name.to_owned(),
    };
    let pair = match (factors(short)?, factors(long)?) {
        (Some(_), None) => return Err(missing(long)),
        (None, Some(_)) => return Err(missing(short)),
        (short, long) => short.zip(long),
    };
    if let Some((short, long)) = pair {
        let scaling = RopeScaling::Long {
            short,
            long,
            original_context: original,
            magnitude: magnitude.unwrap_or(1.0),
        };
        return Ok(RopeConfig {
            theta,
            rotary_dim,
            scaling,
        });
    }
    if let Some(factors) = factors("rope_freqs.weight")? {
        return Ok(RopeConfig {
            theta,
            rotary_dim,
            scaling: RopeScaling::Factors { factors },
        });
    }
    // A factor of 0 stands for none.
    let factor = match settings.number("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => settings.number("rope.scale_linear")?,
    };
    let factor = factor.filter(|&factor| factor != 0.0);
    let scaling = match (settings.text("rope.scaling.type")?, factor) {
        (Some("none"), _) | (_, None) => RopeScaling::None,
        (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor },
        (Some("yarn"), Some(factor)) => RopeScaling::Yarn {
            factor,
            original_context: original as f32,
            beta_fast: settings
                .number("rope.scaling.yarn_beta_fast")?
                .unwrap_or(32.0),
            beta_slow: settings
                .number("rope.scaling.yarn_beta_slow")?
                .unwrap_or(1.0),
            truncate: true,
            // GGUF's factor comes on top of the derived one.
            attention_factor: magnitude.map(|own| own * (0.1 * factor.ln() + 1.0)),
        },
        (Some(other), Some(_)) => {
            let expected = "none, linear or yarn";
            return Err(ModelError::setting(
                settings.key("rope.scaling.type"),
                other,
                expected,
            ));
        }
    };
    Ok(RopeConfig {
        theta,
        rotary_dim,
        scaling,
    })
}
