//! Rotary position embeddings: computes their frequencies from a checkpoint's settings.

use super::ModelError;
use super::key_names::{KeyNames, Keys};
use crate::device::RopeSpec;
use std::f32::consts::PI;

/// A rotary position embedding of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the frequencies.
    pub theta: f32,
    /// Number of elements of a head that are rotated.
    pub rotary_dim: usize,
    /// Scaling of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// How RoPE frequencies are scaled for longer contexts than the model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies are not scaled.
    None,
    /// Positions are divided (Chen et al., *Position Interpolation*, 2023).
    Linear {
        /// Divisor of positions.
        factor: f32,
    },
    /// Low frequencies are divided, high ones are kept, and those between are blended
    /// (Llama 3.1).
    Llama3 {
        /// Divisor of low frequencies.
        factor: f32,
        /// Frequencies with wavelengths above `original_context / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Frequencies with wavelengths below `original_context / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length that the model was trained on, in tokens.
        original_context: f32,
    },
    /// Low frequencies are divided, high ones are kept, and those between are blended by a ramp
    /// over the pairs. Cosine and sine are scaled (Peng et al., *YaRN*, 2023).
    Yarn {
        /// Factor by which the context is extended: the divisor of low frequencies.
        factor: f32,
        /// Context length that the model was trained on, in tokens.
        original_context: f32,
        /// Number of rotations in the original context above which a frequency is kept.
        beta_fast: f32,
        /// Number of rotations in the original context below which a frequency is divided.
        beta_slow: f32,
        /// Whether the ends of the ramp are rounded outwards to whole pairs.
        truncate: bool,
        /// Factor on cosine and sine; derived from `factor` if `None`.
        attention_factor: Option<f32>,
    },
    /// Each frequency is divided by its own factor, from the `rope_freqs` tensor of a GGUF file.
    Factors {
        /// One factor per rotated pair.
        factors: Vec<f32>,
    },
    /// Only the first pairs rotate, with the frequencies that they have if all pairs rotate
    /// (Gemma 4).
    Proportional {
        /// Fraction of the pairs that rotate.
        share: f32,
        /// Divisor of the frequencies.
        factor: f32,
    },
    /// Each frequency is divided by its own factor, from one of two lists (Ding et al.,
    /// *LongRoPE*, 2024). As in llama.cpp, the engine's maximum sequence length selects the list
    /// for all sequences, since cached keys are already rotated.
    Long {
        /// Factors for contexts up to the original one, one per rotated pair.
        short: Vec<f32>,
        /// Factors for longer contexts, one per rotated pair.
        long: Vec<f32>,
        /// Context length that the model was trained on, in tokens.
        original_context: usize,
        /// Factor on cosine and sine.
        magnitude: f32,
    },
}

impl RopeConfig {
    /// Checks that the numbers are valid. `names` gives the keys for error messages.
    pub(super) fn validate(&self, head_dim: usize, names: &KeyNames) -> Result<(), ModelError> {
        let positive = |key: fn(&Keys) -> &'static str, value: f32| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                let key = names.of_rope(key);
                Err(ModelError::setting(key, value, "a positive number"))
            }
        };
        if !(self.theta.is_finite() && self.theta > 0.0) {
            let key = names.of(|keys| keys.rope_base);
            return Err(ModelError::setting(key, self.theta, "a positive number"));
        }
        if self.rotary_dim == 0 || self.rotary_dim > head_dim || !self.rotary_dim.is_multiple_of(2)
        {
            let dim = self.rotary_dim;
            return Err(ModelError::setting(
                names.of(|keys| keys.rope_dimension),
                format!("for {dim} elements of a head"),
                format!("for an even number of elements from 2 to the head size of {head_dim}"),
            ));
        }
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } => positive(|keys| keys.rope_factor, *factor),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                positive(|keys| keys.rope_factor, *factor)?;
                positive(|keys| keys.rope_low_frequency, *low_freq_factor)?;
                positive(|keys| keys.rope_original_context, *original_context)?;
                if high_freq_factor >= low_freq_factor {
                    return Ok(());
                }
                Err(ModelError::setting(
                    names.of_rope(|keys| keys.rope_high_frequency),
                    high_freq_factor,
                    format!("at least the low frequency factor of {low_freq_factor}"),
                ))
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                attention_factor,
                ..
            } => {
                positive(|keys| keys.rope_factor, *factor)?;
                positive(|keys| keys.rope_original_context, *original_context)?;
                positive(|keys| keys.rope_beta_fast, *beta_fast)?;
                positive(|keys| keys.rope_beta_slow, *beta_slow)?;
                let factor = attention_factor.unwrap_or(1.0);
                positive(|keys| keys.rope_attention_factor, factor)
            }
            RopeScaling::Factors { factors } => self.check_factors(factors),
            RopeScaling::Proportional { share, factor } => {
                positive(|keys| keys.rope_factor, *factor)?;
                if *share > 0.0 && *share <= 1.0 {
                    return Ok(());
                }
                let key = names.of_rope(|keys| keys.rope_dimension);
                Err(ModelError::setting(key, share, "above 0 and at most 1"))
            }
            RopeScaling::Long {
                short,
                long,
                magnitude,
                ..
            } => {
                positive(|keys| keys.rope_attention_factor, *magnitude)?;
                self.check_factors(short)?;
                self.check_factors(long)
            }
        }
    }

    fn check_factors(&self, factors: &[f32]) -> Result<(), ModelError> {
        let pairs = self.rotary_dim / 2;
        if factors.len() != pairs {
            return Err(ModelError::setting(
                "RoPE factors",
                format!("{} numbers", factors.len()),
                format!("{pairs} numbers, one a rotated pair"),
            ));
        }
        match factors
            .iter()
            .find(|factor| !(factor.is_finite() && **factor > 0.0))
        {
            Some(factor) => Err(ModelError::setting(
                "RoPE factors",
                factor,
                "positive numbers",
            )),
            None => Ok(()),
        }
    }

    /// Returns the context length to which the scaling extends `trained`.
    pub(super) fn extended_context(&self, trained: usize) -> usize {
        match self.scaling {
            RopeScaling::Yarn {
                factor,
                original_context,
                ..
            } => trained.max((original_context * factor) as usize),
            _ => trained,
        }
    }

    /// Returns the largest maximum sequence length, up to `context`, with which results match the
    /// reference implementation. With LongRoPE, a larger maximum selects other factors, which apply
    /// to short sequences as well.
    pub(super) fn native_context(&self, context: usize) -> usize {
        match self.scaling {
            RopeScaling::Long {
                original_context, ..
            } => context.min(original_context),
            _ => context,
        }
    }

    /// Returns the frequencies and the magnitude, for positions below `max_positions`.
    pub fn spec(&self, max_positions: usize) -> RopeSpec {
        let pairs = self.rotary_dim / 2;
        let plain: Vec<f32> = (0..pairs)
            .map(|pair| 1.0 / self.theta.powf((2 * pair) as f32 / self.rotary_dim as f32))
            .collect();
        let (inverse_frequencies, magnitude) = match &self.scaling {
            RopeScaling::None => (plain, 1.0),
            RopeScaling::Linear { factor } => (
                plain
                    .into_iter()
                    .map(|frequency| frequency / factor)
                    .collect(),
                1.0,
            ),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context,
            } => {
                let scaled = |frequency: f32| {
                    let wavelength = 2.0 * PI / frequency;
                    if wavelength > original_context / low_freq_factor {
                        return frequency / factor;
                    }
                    // If the factors are equal (Llama 4 Scout), there is no range to blend.
                    if wavelength < original_context / high_freq_factor
                        || high_freq_factor == low_freq_factor
                    {
                        return frequency;
                    }
                    let smooth = (original_context / wavelength - low_freq_factor)
                        / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                };
                (plain.into_iter().map(scaled).collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            } => {
                let ends = self.yarn_ends(*original_context, [*beta_fast, *beta_slow], *truncate);
                let frequencies = yarn(&plain, *factor, ends);
                let derived = if *factor <= 1.0 {
                    1.0
                } else {
                    0.1 * factor.ln() + 1.0
                };
                (frequencies, attention_factor.unwrap_or(derived))
            }
            RopeScaling::Factors { factors } => (divide(&plain, factors), 1.0),
            RopeScaling::Proportional { share, factor } => {
                let rotated = (share * self.rotary_dim as f32 / 2.0) as usize;
                let plain = plain.into_iter().enumerate();
                let frequencies = plain.map(|(pair, frequency)| match pair < rotated {
                    true => frequency / factor,
                    false => 0.0,
                });
                (frequencies.collect(), 1.0)
            }
            RopeScaling::Long {
                short,
                long,
                original_context,
                magnitude,
            } => {
                let factors = if max_positions > *original_context {
                    long
                } else {
                    short
                };
                (divide(&plain, factors), *magnitude)
            }
        };
        RopeSpec {
            inverse_frequencies,
            magnitude,
            max_positions,
        }
    }

    /// Returns the ends of YaRN's ramp: the fractional indices of the pairs that rotate `fast` and
    /// `slow` times in the original context. Frequencies before the first end are kept, and those
    /// after the second end are divided.
    fn yarn_ends(&self, original: f32, [fast, slow]: [f32; 2], truncate: bool) -> [f32; 2] {
        use std::f64::consts::PI;
        let dim = self.rotary_dim as f64;
        let pair_with = |rotations: f32| {
            let rotations = f64::from(original) / (f64::from(rotations) * 2.0 * PI);
            dim * rotations.ln() / (2.0 * f64::from(self.theta).ln())
        };
        let (mut low, mut high) = (pair_with(fast), pair_with(slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        [low as f32, high as f32]
    }
}

/// Blends interpolated and extrapolated frequencies by a ramp over the pairs between `low`
/// and `high`.
fn yarn(plain: &[f32], factor: f32, [low, high]: [f32; 2]) -> Vec<f32> {
    let blended = plain.iter().enumerate().map(|(pair, frequency)| {
        let ramp = ((pair as f32 - low) / (high - low)).clamp(0.0, 1.0);
        frequency / factor * ramp + frequency * (1.0 - ramp)
    });
    blended.collect()
}

fn divide(frequencies: &[f32], factors: &[f32]) -> Vec<f32> {
    let pairs = frequencies.iter().zip(factors);
    pairs
        .map(|(frequency, factor)| frequency / factor)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::key_names;

    fn rope(scaling: RopeScaling) -> RopeConfig {
        RopeConfig {
            theta: 10_000.0,
            rotary_dim: 8,
            scaling,
        }
    }

    #[test]
    fn plain_frequencies_are_powers_of_the_base() {
        let spec = rope(RopeScaling::None).spec(100);
        for (found, expected) in spec.inverse_frequencies.iter().zip([1.0, 0.1, 0.01, 0.001]) {
            assert!((found / expected - 1.0f32).abs() < 1e-5);
        }
        assert_eq!(spec.magnitude, 1.0);
    }

    #[test]
    fn llama3_blends_nothing_if_both_factors_are_equal() {
        let scaling = RopeScaling::Llama3 {
            factor: 16.0,
            low_freq_factor: 1.0,
            high_freq_factor: 1.0,
            original_context: 100.0,
        };
        let found = rope(scaling).spec(100).inverse_frequencies;
        // Wavelengths 6.3, 63, 628, 6283; kept up to 100.
        for (found, expected) in found.into_iter().zip([1.0, 0.1, 0.01 / 16.0, 0.001 / 16.0]) {
            assert!(
                (found - expected).abs() < 1e-6 * expected,
                "{found} {expected}"
            );
        }
    }

    #[test]
    fn llama3_keeps_high_and_divides_low_frequencies() {
        let spec = rope(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 100.0,
        })
        .spec(100);
        // Wavelengths 6.3, 63, 628, 6283; kept below 25, divided above 100.
        let expected = [
            1.0,
            0.1 * (0.469_16 + 0.530_84 * 0.125),
            0.01 / 8.0,
            0.001 / 8.0,
        ];
        let smooth = (100.0 / (2.0 * PI / 0.1) - 1.0) / 3.0;
        let blended = (1.0 - smooth) * 0.1 / 8.0 + smooth * 0.1;
        let found = spec.inverse_frequencies;
        assert!((found[0] - expected[0]).abs() < 1e-6);
        assert!((found[1] - blended).abs() < 1e-6);
        assert!((found[2] - expected[2]).abs() < 1e-8);
        assert!((found[3] - expected[3]).abs() < 1e-9);
    }

    #[test]
    fn longrope_takes_the_factors_of_the_context_in_use() {
        let config = rope(RopeScaling::Long {
            short: vec![1.0, 2.0, 4.0, 8.0],
            long: vec![2.0, 4.0, 8.0, 16.0],
            original_context: 100,
            magnitude: 1.5,
        });
        for (context, scale) in [(100, 1.0), (101, 2.0)] {
            let spec = config.spec(context);
            for (found, expected) in spec
                .inverse_frequencies
                .iter()
                .zip([1.0, 0.05, 0.0025, 0.000_125])
            {
                assert!((found * scale / expected - 1.0f32).abs() < 1e-5);
            }
            assert_eq!(spec.magnitude, 1.5);
        }
    }

    #[test]
    fn yarn_keeps_the_fastest_and_divides_the_slowest() {
        let spec = rope(RopeScaling::Yarn {
            factor: 4.0,
            original_context: 2048.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: None,
        })
        .spec(100);
        assert!((spec.inverse_frequencies[0] - 1.0).abs() < 1e-6);
        assert!((spec.inverse_frequencies[3] - 0.001 / 4.0).abs() < 1e-8);
        assert!((spec.magnitude - (0.1 * 4.0f32.ln() + 1.0)).abs() < 1e-6);
    }

    #[test]
    fn yarn_blends_between_whole_pairs_only_if_it_truncates() {
        let spec = |truncate| {
            rope(RopeScaling::Yarn {
                factor: 4.0,
                original_context: 2048.0,
                beta_fast: 32.0,
                beta_slow: 1.0,
                truncate,
                attention_factor: None,
            })
            .spec(100)
        };
        // Pairs 1.007 and 2.512 rotate 32 times and once in 2048 tokens.
        let (whole, exact) = (spec(true), spec(false));
        assert!((whole.inverse_frequencies[2] - (0.01 * 0.5 + 0.0025 * 0.5)).abs() < 1e-5);
        let ramp = (2.0 - 1.0068) / (2.5124 - 1.0068);
        let expected = 0.01 * (1.0 - ramp) + 0.0025 * ramp;
        assert!((exact.inverse_frequencies[2] - expected).abs() < 1e-5);
        assert_eq!(exact.inverse_frequencies[1], 0.1);
    }

    #[test]
    fn nonsense_is_named() {
        let bad = RopeConfig {
            theta: f32::NAN,
            ..rope(RopeScaling::None)
        };
        let names = KeyNames {
            keys: key_names::GGUF,
            place: "any.".to_owned(),
            rope_place: "any.rope.scaling.".to_owned(),
        };
        let refused = |rope: &RopeConfig, head_dim, what: &str| {
            let error = rope.validate(head_dim, &names).unwrap_err().to_string();
            assert!(error.contains(what), "{what}: {error}");
        };
        refused(&bad, 8, "any.rope.freq_base is NaN");
        let shrinking = rope(RopeScaling::Linear { factor: -1.0 });
        refused(&shrinking, 8, "any.rope.scaling.factor is -1");
        let wide = rope(RopeScaling::None);
        refused(&wide, 4, "any.rope.dimension_count");
        let few = rope(RopeScaling::Factors { factors: vec![1.0] });
        refused(&few, 8, "one a rotated pair");
    }
}
