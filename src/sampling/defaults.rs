//! Sampling settings that a model's authors recommend, for requests that set none.

use super::{ParamError, SamplingParams};

/// A model's own sampling settings; `None` if the model does not set one.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct SamplingDefaults {
    /// Default of [`SamplingParams::temperature`].
    pub temperature: Option<f32>,
    /// Default of [`SamplingParams::top_k`].
    pub top_k: Option<u32>,
    /// Default of [`SamplingParams::top_p`].
    pub top_p: Option<f32>,
    /// Default of [`SamplingParams::min_p`].
    pub min_p: Option<f32>,
    /// Default of [`SamplingParams::repetition_penalty`].
    pub repetition_penalty: Option<f32>,
    /// Default of [`Request::max_tokens`](crate::Request::max_tokens). It is not part of
    /// [`SamplingDefaults::params`].
    pub max_tokens: Option<usize>,
}

impl SamplingDefaults {
    /// Returns sampling parameters with these settings, and with those of
    /// [`SamplingParams::default`] for the rest.
    pub fn params(&self) -> SamplingParams {
        let neutral = SamplingParams::default();
        SamplingParams {
            temperature: self.temperature.unwrap_or(neutral.temperature),
            top_k: self.top_k.unwrap_or(neutral.top_k),
            top_p: self.top_p.unwrap_or(neutral.top_p),
            min_p: self.min_p.unwrap_or(neutral.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(neutral.repetition_penalty),
            ..neutral
        }
    }

    /// Checks every setting against its range.
    ///
    /// # Errors
    /// Returns [`ParamError`] with the first setting that is out of range.
    pub fn validate(&self) -> Result<(), ParamError> {
        self.params().validate(usize::MAX)
    }

    /// Returns the names and values of the settings that the model has.
    pub fn named(&self) -> Vec<(&'static str, f64)> {
        let each = [
            ("temperature", self.temperature.map(decimal)),
            ("top_k", self.top_k.map(f64::from)),
            ("top_p", self.top_p.map(decimal)),
            ("min_p", self.min_p.map(decimal)),
            ("repetition_penalty", self.repetition_penalty.map(decimal)),
            ("max_tokens", self.max_tokens.map(|tokens| tokens as f64)),
        ];
        let set = each
            .into_iter()
            .filter_map(|(name, value)| Some((name, value?)));
        set.collect()
    }
}

/// Returns the number with the shortest decimal form of this float32: 0.7, not
/// 0.699999988079071.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_model_says_replaces_the_neutral_settings_only() {
        let defaults = SamplingDefaults {
            temperature: Some(0.7),
            top_k: Some(20),
            max_tokens: Some(512),
            ..SamplingDefaults::default()
        };
        let expected = SamplingParams {
            temperature: 0.7,
            top_k: 20,
            ..SamplingParams::default()
        };
        assert_eq!(defaults.params(), expected);
        let named = [("temperature", 0.7), ("top_k", 20.0), ("max_tokens", 512.0)];
        assert_eq!(defaults.named(), named);
        assert_eq!(SamplingDefaults::default().named(), []);
    }
}
