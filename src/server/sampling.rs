//! The fields that every request for text shares.

use super::App;
use super::error::ApiError;
use super::sessions::{SessionPrompt, SessionTurn};
use crate::engine::{Prompt, Request};
use crate::sampling::SamplingParams;
use serde::Deserialize;
use std::collections::BTreeMap;
use uuid::Uuid;

/// Stop strings of a request at most.
const MAX_STOPS: usize = 16;

/// How to choose tokens and when to stop: OpenAI's fields, and those that vLLM and
/// llama.cpp add.
#[derive(Debug, Deserialize)]
pub(crate) struct SamplingFields {
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// −1 and 0 mean all.
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    seed: Option<i64>,
    stop: Option<Strings>,
    stop_token_ids: Option<Vec<u32>>,
    ignore_eos: Option<bool>,
    n: Option<usize>,
    /// Whom fairness counts it for.
    user: Option<String>,
    priority: Option<i32>,
    /// The session whose turn it is.
    session_id: Option<String>,
}

/// One string or several.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(crate) enum Strings {
    One(String),
    Many(Vec<String>),
}

impl Strings {
    pub fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl SamplingFields {
    /// The session whose turn it is, and what the prompt is to it.
    pub fn session(&self, prompt: SessionPrompt) -> Option<SessionTurn> {
        let id = self.session_id.clone()?;
        Some(SessionTurn { id, prompt })
    }

    /// How many answers are asked for.
    pub fn samples(&self, app: &App) -> Result<usize, ApiError> {
        let (n, most) = (self.n.unwrap_or(1), app.options.max_samples);
        if (1..=most).contains(&n) {
            Ok(n)
        } else {
            Err(ApiError::invalid(format!("n is {n}, but must be from 1 to {most}")).param("n"))
        }
    }

    /// The request for one prompt.
    pub fn request(
        self,
        app: &App,
        prompt: Prompt,
        max_tokens: Option<usize>,
        logprobs: Option<u32>,
    ) -> Result<Request, ApiError> {
        let stop = self.stop.map_or_else(Vec::new, Strings::into_vec);
        if stop.len() > MAX_STOPS {
            let problem = format!(
                "stop has {} strings, at most {MAX_STOPS} are accepted",
                stop.len()
            );
            return Err(ApiError::invalid(problem).param("stop"));
        }
        let mut request = Request::new(prompt);
        request.stop = stop;
        request.stop_token_ids = self.stop_token_ids.unwrap_or_default();
        request.ignore_eos = self.ignore_eos.unwrap_or(false);
        request.max_tokens = max_tokens;
        request.finish_within = app.options.request_timeout;
        request.priority = self.priority.unwrap_or(0);
        request.tenant = self.user.filter(|user| !user.is_empty()).map(Into::into);
        let default = SamplingParams::default();
        request.sampling = SamplingParams {
            temperature: self.temperature.unwrap_or(default.temperature),
            top_k: top_k(self.top_k)?,
            top_p: self.top_p.unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(default.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            logit_bias: self.logit_bias.map_or(Ok(Vec::new()), logit_bias)?,
            // Who gives no seed wants another answer each time.
            seed: match self.seed {
                Some(seed) => seed as u64,
                None => Uuid::new_v4().as_u64_pair().1,
            },
            logprobs,
        };
        Ok(request)
    }
}

fn top_k(top_k: Option<i64>) -> Result<u32, ApiError> {
    match top_k {
        None | Some(-1) => Ok(0),
        Some(k) => u32::try_from(k).map_err(|_| {
            let problem = format!("top_k is {k}, but must be -1, 0 or more, and below 2^32");
            ApiError::invalid(problem).param("top_k")
        }),
    }
}

/// Token ids come as the names of fields.
fn logit_bias(biases: BTreeMap<String, f32>) -> Result<Vec<(u32, f32)>, ApiError> {
    let each = biases.into_iter().map(|(id, bias)| {
        let problem = |what: String| Err(ApiError::invalid(what).param("logit_bias"));
        let Ok(token) = id.parse() else {
            return problem(format!("logit_bias has {id:?}, expected token ids"));
        };
        if !(-100.0..=100.0).contains(&bias) {
            return problem(format!(
                "logit_bias of token {id} is {bias}, but must be from -100 to 100"
            ));
        }
        Ok((token, bias))
    });
    each.collect()
}
