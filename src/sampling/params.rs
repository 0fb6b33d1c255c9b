//! Sampling parameters and the checks of their ranges.

use thiserror::Error;

/// How tokens are chosen.
///
/// The parameters are applied in this order: repetition, presence and frequency penalty,
/// logit bias, temperature, top-k, top-p, min-p.
///
/// Construct it with `..SamplingParams::default()`: fields are added in minor releases.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Divides the logits. 0 means greedy: the largest logit wins, and the lowest token id
    /// among equal ones.
    pub temperature: f32,
    /// Keeps only the `top_k` likeliest tokens; 0 means all.
    pub top_k: u32,
    /// Keeps only the likeliest tokens whose probabilities add up to this number (nucleus
    /// sampling, Holtzman et al., 2019); 1 means all.
    pub top_p: f32,
    /// Keeps only tokens that are at least this fraction as likely as the likeliest; 0
    /// means all.
    pub min_p: f32,
    /// Divides the positive logits and multiplies the negative logits of tokens in the
    /// prompt or the answer (CTRL, Keskar et al., 2019); 1 means no penalty.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token that the answer contains.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token once per occurrence in the answer.
    pub frequency_penalty: f32,
    /// Numbers that are added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the random numbers. The same seed gives the same tokens, whatever else is in
    /// the batch.
    pub seed: u64,
    /// Number of likeliest tokens to report per step, with log probabilities of the
    /// unmodified logits. `None` reports nothing; `Some(0)` reports only the chosen token.
    pub logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            logprobs: None,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Clone, Debug, Error, PartialEq)]
#[error("{name} is {value}, but must be {expected}")]
#[non_exhaustive]
pub struct ParamError {
    /// Name of the parameter.
    pub name: &'static str,
    /// The value that was given.
    pub value: String,
    /// The values that are accepted.
    pub expected: &'static str,
}

impl SamplingParams {
    /// The largest value of [`SamplingParams::logprobs`].
    pub const MAX_LOGPROBS: u32 = 1024;

    /// Returns parameters for greedy decoding.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Returns whether the sampler needs the sequence's tokens so far.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Checks every parameter against its range, for a vocabulary of `vocabulary` tokens.
    ///
    /// # Errors
    /// Returns [`ParamError`] with the first parameter that is out of range.
    pub fn validate(&self, vocabulary: usize) -> Result<(), ParamError> {
        let check = |ok: bool, name, value: f32, expected| {
            if ok {
                Ok(())
            } else {
                Err(ParamError {
                    name,
                    value: value.to_string(),
                    expected,
                })
            }
        };
        let t = self.temperature;
        check(
            t.is_finite() && t >= 0.0,
            "temperature",
            t,
            "a finite number, 0 or more",
        )?;
        let p = self.top_p;
        check(p > 0.0 && p <= 1.0, "top_p", p, "more than 0 and at most 1")?;
        let m = self.min_p;
        check((0.0..=1.0).contains(&m), "min_p", m, "from 0 to 1")?;
        let r = self.repetition_penalty;
        check(
            r.is_finite() && r > 0.0,
            "repetition_penalty",
            r,
            "a finite number above 0",
        )?;
        for (name, value) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            check((-2.0..=2.0).contains(&value), name, value, "from -2 to 2")?;
        }
        for &(token, bias) in &self.logit_bias {
            if token as usize >= vocabulary {
                return Err(ParamError {
                    name: "logit_bias",
                    value: format!("for token {token}"),
                    expected: "for tokens of the vocabulary",
                });
            }
            check(!bias.is_nan(), "logit_bias", bias, "a number")?;
        }
        if self.logprobs.is_some_and(|k| k > Self::MAX_LOGPROBS) {
            return Err(ParamError {
                name: "logprobs",
                value: self.logprobs.unwrap_or(0).to_string(),
                expected: "at most 1024",
            });
        }
        Ok(())
    }
}
