//! Position embeddings as `config.json` describes them: `rope_parameters`, or the older
//! `rope_scaling` with settings beside it.

use super::Config;
use super::settings::Settings;
use crate::model::{ModelError, RopeConfig, RopeScaling};
use serde_json::Value;

/// Keys under which `rope_parameters` holds one object for each kind of layer.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

impl<'a> Config<'a> {
    /// Reads the position embeddings of the layers with full attention and of those that slide.
    pub(super) fn ropes(&self) -> Result<(RopeConfig, RopeConfig), ModelError> {
        let settings = self.settings;
        let theta = settings.number("rope_theta")?;
        let theta = theta.unwrap_or(self.class().rope_theta);
        let is_new = settings.get("rope_scaling").is_none();
        if let Some(nested) = self.nested_ropes().filter(|_| is_new) {
            let full = self.rope(nested.part(FULL), theta)?;
            return Ok((full, self.rope(nested.part(SLIDING), theta)?));
        }
        let full = self.rope(self.rope_parameters(), theta)?;
        Ok((full.clone(), full))
    }

    /// Returns the parameters of the position embedding, if there are any: `rope_scaling`, or else
    /// `rope_parameters`.
    pub(in crate::model) fn rope_parameters(&self) -> Option<Settings<'a>> {
        let of = |key| self.settings.part(key);
        of("rope_scaling").or_else(|| of("rope_parameters"))
    }

    /// Returns the RoPE parameters of sliding layers, for models where these have their own.
    ///
    /// # Errors
    /// [`ModelError::BadSetting`] if there is one set of parameters for all layers.
    pub(in crate::model) fn sliding_rope_parameters(
        &self,
    ) -> Result<Option<Settings<'a>>, ModelError> {
        let key = "rope_parameters";
        match (self.nested_ropes(), self.settings.part(key)) {
            (Some(nested), _) => Ok(nested.part(SLIDING)),
            (None, Some(flat)) if !flat.is_empty() => {
                let expected = "an object for each of full_attention and sliding_attention";
                let found = self.settings.get(key).unwrap_or(&Value::Null);
                Err(self.settings.refused(key, found, expected))
            }
            (None, _) => Ok(None),
        }
    }

    /// Returns `rope_parameters` if it holds an object for each kind of layer.
    fn nested_ropes(&self) -> Option<Settings<'a>> {
        let parameters = self.settings.part("rope_parameters")?;
        let is_nested = [FULL, SLIDING].iter().any(|kind| parameters.says(kind));
        is_nested.then_some(parameters)
    }

    /// Reads one position embedding. `theta` is its base if the parameters have none.
    pub(in crate::model) fn rope(
        &self,
        parameters: Option<Settings<'_>>,
        theta: f32,
    ) -> Result<RopeConfig, ModelError> {
        let own = parameters.unwrap_or(Settings::new(&Value::Null));
        let (key, kind) = match own.text("rope_type")? {
            Some(kind) => ("rope_type", kind),
            None => ("type", own.text("type")?.unwrap_or("default")),
        };
        let kind = match self.class().rope.longrope_aliases.contains(&kind) {
            true => "longrope",
            false => kind,
        };
        let scaling = match kind {
            "default" => RopeScaling::None,
            // Dynamic scaling changes nothing within the context, which quell does not exceed.
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
            "proportional" if self.class().rope.is_proportional => {
                return Ok(RopeConfig {
                    theta: own.number("rope_theta")?.unwrap_or(theta),
                    rotary_dim: self.heads()?.head_dim,
                    scaling: RopeScaling::Proportional {
                        share: own.number("partial_rotary_factor")?.unwrap_or(1.0),
                        factor: own.number("factor")?.unwrap_or(1.0),
                    },
                });
            }
            other => {
                let expected = "default, dynamic, linear, llama3, yarn or longrope";
                return Err(own.refused(key, other, expected));
            }
        };
        Ok(RopeConfig {
            theta: own.number("rope_theta")?.unwrap_or(theta),
            rotary_dim: self.rotary_dim(own)?,
            scaling,
        })
    }

    /// Returns the number of elements per head that are rotated.
    fn rotary_dim(&self, own: Settings<'_>) -> Result<usize, ModelError> {
        let key = "partial_rotary_factor";
        let is_said = own.get(key).is_some() || self.settings.get(key).is_some();
        if let Some(key) = self.class().rope.dimension_key
            && let Some(dimension) = self.settings.size(key)?
            && !is_said
        {
            return Ok(dimension);
        }
        let (place, partial) = match own.number(key)? {
            Some(partial) => (own, partial),
            None => {
                let default = self.class().rope.partial.unwrap_or(1.0);
                (self.settings, self.settings.number(key)?.unwrap_or(default))
            }
        };
        if partial != 1.0 && self.class().rope.partial.is_none() {
            let expected = format!("1 for {}", self.architecture.name());
            return Err(place.refused(key, partial, expected));
        }
        Ok((self.heads()?.head_dim as f32 * partial) as usize)
    }

    /// Returns the context in tokens that the model was trained on before it was extended.
    pub(in crate::model) fn original_context(
        &self,
        own: Settings<'_>,
    ) -> Result<usize, ModelError> {
        let key = "original_max_position_embeddings";
        // A value beside the RoPE parameters takes precedence over one within them.
        let (place, original) = match (self.settings.size(key)?, own.size(key)?) {
            (Some(original), _) => (self.settings, original),
            (None, own_context) => match (self.class().rope.original_context, own_context) {
                (Some(original), _) => return Ok(original),
                (None, Some(original)) => (own, original),
                (None, None) => return self.trained_context(),
            },
        };
        match original {
            0 => Err(place.refused(key, 0, "at least 1")),
            original => Ok(original),
        }
    }

    fn yarn(&self, own: Settings<'_>) -> Result<RopeScaling, ModelError> {
        let original = self.original_context(own)? as f32;
        let factor = own.number("factor")?;
        let factor = factor.unwrap_or(self.trained_context()? as f32 / original);
        // For these settings, 0 means the default.
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

    /// Reads LongRoPE's two lists of factors, its original context and its magnitude.
    fn longrope(&self, own: Settings<'_>) -> Result<RopeScaling, ModelError> {
        let factors = |key: &str| {
            own.optional(key, "a list of numbers", |value| {
                let factors = value.as_array()?.iter();
                let factors = factors.map(|factor| factor.as_f64().map(|factor| factor as f32));
                factors.collect::<Option<Vec<f32>>>()
            })?
            .ok_or_else(|| own.missing(key))
        };
        let original = self.original_context(own)?;
        let factor = own.number("factor")?;
        let factor = factor.unwrap_or(self.trained_context()? as f32 / original as f32);
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
