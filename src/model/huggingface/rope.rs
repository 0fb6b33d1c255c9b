//! Position embeddings as `config.json` describes them: `rope_parameters`, or the older
//! `rope_scaling` with settings beside it.

use super::defaults::{Defaults, GEMMA3_LOCAL_THETA, PHI3_ORIGINAL_CONTEXT};
use super::settings::Settings;
use crate::model::{Family, ModelError, RopeConfig, RopeScaling};
use serde_json::Value;

/// What the position embeddings of a model have in common.
struct Common<'a> {
    settings: Settings<'a>,
    family: Family,
    head_dim: usize,
    /// `max_position_embeddings`.
    context: usize,
}

/// The position embeddings of full and of sliding layers.
pub(super) fn read(
    settings: Settings<'_>,
    family: Family,
    head_dim: usize,
    context: usize,
) -> Result<(RopeConfig, RopeConfig), ModelError> {
    let common = Common {
        settings,
        family,
        head_dim,
        context,
    };
    let theta = settings.number("rope_theta")?;
    let theta = theta.unwrap_or(Defaults::of(family).rope_theta);
    let scaling = settings.get("rope_scaling");
    let parameters = settings.get("rope_parameters");
    let kinds = ["full_attention", "sliding_attention"];
    let nested = parameters.filter(|value| kinds.iter().any(|kind| value.get(kind).is_some()));
    if family == Family::Gemma3 {
        let flat = |value: &&Value| value.as_object().is_none_or(|object| !object.is_empty());
        if let Some(flat) = parameters.filter(flat).filter(|_| nested.is_none()) {
            let expected = "an object for each of full_attention and sliding_attention";
            return Err(ModelError::setting("rope_parameters", flat, expected));
        }
        let local = settings.number("rope_local_base_freq")?;
        let local = local.unwrap_or(GEMMA3_LOCAL_THETA);
        let of = |kind: &str| nested.and_then(|nested| nested.get(kind));
        let full = common.rope(scaling.or_else(|| of(kinds[0])), theta)?;
        return Ok((full, common.rope(of(kinds[1]), local)?));
    }
    if let Some(nested) = nested.filter(|_| scaling.is_none()) {
        let full = common.rope(nested.get(kinds[0]), theta)?;
        return Ok((full, common.rope(nested.get(kinds[1]), theta)?));
    }
    let full = common.rope(scaling.or(parameters), theta)?;
    Ok((full.clone(), full))
}

impl Common<'_> {
    /// One position embedding; `theta` is its base where the parameters have none.
    fn rope(&self, parameters: Option<&Value>, theta: f32) -> Result<RopeConfig, ModelError> {
        let none = Value::Null;
        let own = Settings(parameters.unwrap_or(&none));
        let kind = match own.text("rope_type")? {
            Some(kind) => kind,
            None => own.text("type")?.unwrap_or("default"),
        };
        // Early Phi 3 checkpoints call it so.
        let kind = match kind {
            "su" | "yarn" if self.family == Family::Phi3 => "longrope",
            kind => kind,
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            // Changes nothing below the context length, which is quell's limit.
            "dynamic" => {
                own.required_number("factor")?;
                RopeScaling::None
            }
            "linear" => RopeScaling::Linear {
                factor: own.required_number("factor")?,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: own.required_number("factor")?,
                low_freq_factor: own.required_number("low_freq_factor")?,
                high_freq_factor: own.required_number("high_freq_factor")?,
                original_context: self.original_context(own)? as f32,
            },
            "yarn" => self.yarn(own)?,
            "longrope" => self.longrope(own)?,
            other => {
                let expected = "default, dynamic, linear, llama3, yarn or longrope";
                return Err(ModelError::setting("RoPE type", other, expected));
            }
        };
        Ok(RopeConfig {
            theta: own.number("rope_theta")?.unwrap_or(theta),
            rotary_dim: self.rotary_dim(own)?,
            scaling,
        })
    }

    /// Elements of a head that are rotated.
    fn rotary_dim(&self, own: Settings<'_>) -> Result<usize, ModelError> {
        let key = "partial_rotary_factor";
        let partial = match own.number(key)? {
            Some(partial) => partial,
            None => self.settings.number(key)?.unwrap_or(1.0),
        };
        // The other families rotate all of a head whatever it says, or fail.
        if partial != 1.0 && self.family != Family::Phi3 {
            let expected = format!("1 for {}", self.family.huggingface_name());
            return Err(ModelError::setting(key, partial, expected));
        }
        Ok((self.head_dim as f32 * partial) as usize)
    }

    /// The context that the model was trained on before it was extended.
    fn original_context(&self, own: Settings<'_>) -> Result<usize, ModelError> {
        let key = "original_max_position_embeddings";
        // Beside the parameters it counts more than in them.
        if let Some(original) = self.settings.size(key)? {
            return Ok(original);
        }
        if self.family == Family::Phi3 {
            return Ok(PHI3_ORIGINAL_CONTEXT);
        }
        Ok(own.size(key)?.unwrap_or(self.context))
    }

    fn yarn(&self, own: Settings<'_>) -> Result<RopeScaling, ModelError> {
        let original = self.original_context(own)? as f32;
        let factor = own.number("factor")?;
        let factor = factor.unwrap_or(self.context as f32 / original);
        // 0 stands for none here.
        let set = |key: &str| -> Result<Option<f32>, ModelError> {
            Ok(own.number(key)?.filter(|&number| number != 0.0))
        };
        let magnitude = |scale: f32| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * scale * factor.ln() + 1.0,
        };
        let derived = match (set("mscale")?, set("mscale_all_dim")?) {
            (Some(scale), Some(all)) => Some(magnitude(scale) / magnitude(all)),
            _ => None,
        };
        Ok(RopeScaling::Yarn {
            factor,
            original_context: original,
            beta_fast: set("beta_fast")?.unwrap_or(32.0),
            beta_slow: set("beta_slow")?.unwrap_or(1.0),
            truncate: own.flag("truncate")?.unwrap_or(true),
            attention_factor: own.number("attention_factor")?.or(derived),
        })
    }

    /// LongRoPE's two lists of factors.
    fn longrope(&self, own: Settings<'_>) -> Result<RopeScaling, ModelError> {
        let factors = |key: &str| {
            own.optional(key, "a list of numbers", |value| {
                let factors = value.as_array()?.iter();
                let factors = factors.map(|factor| factor.as_f64().map(|factor| factor as f32));
                factors.collect::<Option<Vec<f32>>>()
            })?
            .ok_or_else(|| ModelError::MissingSetting {
                key: key.to_owned(),
            })
        };
        let original = self.original_context(own)?;
        let factor = own.number("factor")?;
        let factor = factor.unwrap_or(self.context as f32 / original as f32);
        let derived = match factor <= 1.0 {
            true => 1.0,
            false => (1.0 + factor.ln() / (original as f32).ln()).sqrt(),
        };
        Ok(RopeScaling::Long {
            short: factors("short_factor")?,
            long: factors("long_factor")?,
            original_context: original,
            magnitude: own.number("attention_factor")?.unwrap_or(derived),
        })
    }
}
