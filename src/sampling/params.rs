//! What a caller can ask of the sampler, and the check that it makes sense.

use thiserror::Error;

/// How tokens are chosen.
///
/// Applied in this order: repetition, presence and frequency penalty, logit bias,
/// temperature, top-k, top-p, min-p.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Logits are divided by it; 0 means greedy: the largest logit wins, and of
    /// equal ones the lower token id.
    pub temperature: f32,
    /// Only the `top_k` likeliest tokens; 0 means all.
    pub top_k: u32,
    /// Only the likeliest tokens whose probabilities reach this sum (nucleus
    /// sampling, Holtzman et al., 2019); 1 means all.
    pub top_p: f32,
    /// Only tokens at least this fraction as likely as the likeliest; 0 means all.
    pub min_p: f32,
    /// Positive logits of tokens in the prompt or the answer are divided by it,
    /// negative ones multiplied (CTRL, Keskar et al., 2019); 1 means none.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that the answer contains.
    pub presence_penalty: f32,
    /// Subtracted once for each time that the answer contains the token.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// The same seed gives the same tokens, whoever else is in the batch.
    pub seed: u64,
    /// How many of the likeliest tokens to report a step, with log-probabilities
    /// of the unmodified logits; `None` reports nothing, `Some(0)` the chosen only.
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
pub struct ParamError {
    /// The parameter.
    pub name: &'static str,
    /// What was given.
    pub value: String,
    /// What is accepted.
    pub expected: &'static str,
}

impl SamplingParams {
    /// The largest value of [`SamplingParams::logprobs`].
    pub const MAX_LOGPROBS: u32 = 1024;

    /// Greedy decoding.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Whether the sampler needs to know the tokens so far.
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
    }

    /// Checks every parameter against its range.
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
