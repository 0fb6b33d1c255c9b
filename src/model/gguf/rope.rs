//! Position embeddings as GGUF metadata describes them.

use super::Metadata;
use crate::model::{ModelError, RopeConfig, RopeScaling};
use crate::weights::{WeightSource, quant};

impl Metadata<'_> {
    /// Reads the position embedding. `head_dim` is the default number of rotated elements per head.
    /// `context` is the default of the context in tokens before an extension.
    pub(super) fn rope(&self, head_dim: usize, context: usize) -> Result<RopeConfig, ModelError> {
        let rotary_dim = self.size("rope.dimension_count")?.unwrap_or(head_dim);
        let theta = self.number("rope.freq_base")?.unwrap_or(10_000.0);
        let original = self
            .size("rope.scaling.original_context_length")?
            .unwrap_or(context);
        let magnitude = self.number("rope.scaling.attn_factor")?;
        let factors = |name: &str| -> Result<Option<Vec<f32>>, ModelError> {
            let Some(tensor) = self.file.tensor(name) else {
                return Ok(None);
            };
            let mut factors = vec![0.0; tensor.elements()];
            let data = self.file.read(&tensor)?;
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
        // A factor of 0 means that positions are not scaled.
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        let factor = factor.filter(|&factor| factor != 0.0);
        let scaling = match (self.text("rope.scaling.type")?, factor) {
            (Some("none"), _) | (_, None) => RopeScaling::None,
            (Some("linear") | None, Some(factor)) => RopeScaling::Linear { factor },
            (Some("yarn"), Some(factor)) => RopeScaling::Yarn {
                factor,
                original_context: original as f32,
                beta_fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                truncate: true,
                // GGUF's `attn_factor` multiplies the factor that follows from `factor`.
                attention_factor: self.yarn_magnitude(magnitude, factor)?,
            },
            (Some(other), Some(_)) => {
                let expected = "none, linear or yarn";
                return Err(self.refused("rope.scaling.type", other, expected));
            }
        };
        Ok(RopeConfig {
            theta,
            rotary_dim,
            scaling,
        })
    }

    /// Returns YaRN's factor on the cosine and the sine, or `None` if the file does not change its
    /// default of `0.1 · ln(factor) + 1`. The default is multiplied by `own` and, if the file has a
    /// multiplier `m` of the logarithm, divided by `0.1 · m · ln(factor) + 1`. Both of these sums
    /// count as 1 if `factor` is at most 1.
    fn yarn_magnitude(&self, own: Option<f32>, factor: f32) -> Result<Option<f32>, ModelError> {
        let magnitude = |multiplier: f32| match factor <= 1.0 {
            true => 1.0,
            false => 0.1 * multiplier * factor.ln() + 1.0,
        };
        let multiplier = self.positive("rope.scaling.yarn_log_multiplier")?;
        let divisor = multiplier.map(magnitude);
        Ok(match (own, divisor) {
            (None, None) => None,
            (own, divisor) => Some(own.unwrap_or(1.0) * magnitude(1.0) / divisor.unwrap_or(1.0)),
        })
    }
}
