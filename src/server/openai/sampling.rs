//! The fields that all requests for text share.

use super::session_turn::{SessionPrompt, SessionTurn};
use crate::engine::{EmbedRequest, Prompt, Request, Truncation};
use crate::sampling::{Constraint, SamplingParams, TokenLimits};
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::body::integer;
use crate::text::{EncodeOptions, Tokenizer};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::sync::Arc;
use uuid::Uuid;

/// Maximum number of stop strings of a request.
const MAX_STOPS: usize = 16;

/// Maximum number of words that a request may forbid, and the maximum length of one in bytes.
const MAX_BAD_WORDS: usize = 256;
const MAX_BAD_WORD_BYTES: usize = 256;

/// Maximum number of alternatives reported per prompt token.
const MAX_PROMPT_LOGPROBS: u32 = 20;

/// Maximum length of a cache salt in characters. It is limited because blocks of the prefix
/// cache keep it.
const MAX_SALT: usize = 128;
/// Maximum length of all stop strings of a request together, in bytes.
const MAX_STOP_BYTES: usize = 16 << 10;

/// Maximum number of stop tokens, and of biased tokens, per request.
const MAX_TOKEN_IDS: usize = 1024;

/// Maximum length of a user's name in bytes.
const MAX_USER_BYTES: usize = 512;

/// How to choose tokens and when to stop: OpenAI's fields, and those that vLLM and llama.cpp
/// add.
#[derive(Debug, Deserialize)]
pub(crate) struct SamplingFields {
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// −1 and 0 mean no limit.
    #[serde(default, deserialize_with = "integer::optional")]
    top_k: Option<i64>,
    min_p: Option<f32>,
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    #[serde(default, deserialize_with = "integer::optional")]
    seed: Option<i64>,
    stop: Option<Strings>,
    #[serde(default, deserialize_with = "integer::optional_list")]
    stop_token_ids: Option<Vec<u32>>,
    include_stop_str_in_output: Option<bool>,
    ignore_eos: Option<bool>,
    #[serde(default, deserialize_with = "integer::optional")]
    min_tokens: Option<usize>,
    bad_words: Option<Vec<String>>,
    #[serde(default, deserialize_with = "integer::optional_list")]
    allowed_token_ids: Option<Vec<u32>>,
    skip_special_tokens: Option<bool>,
    /// −1 means as many as fit in the context.
    #[serde(default, deserialize_with = "integer::optional")]
    truncate_prompt_tokens: Option<i64>,
    truncation_side: Option<Side>,
    #[serde(default, deserialize_with = "integer::optional")]
    prompt_logprobs: Option<u32>,
    #[serde(default, deserialize_with = "integer::optional")]
    n: Option<usize>,
    /// The user to whom fair scheduling attributes the request.
    user: Option<String>,
    #[serde(default, deserialize_with = "integer::optional")]
    priority: Option<i32>,
    /// The client's name for the request, which becomes part of the answer's id.
    request_id: Option<String>,
    /// Only requests with the same salt share cached prefixes.
    cache_salt: Option<String>,
    /// The session that the request is a turn of.
    session_id: Option<String>,
}

/// The side on which a prompt that is too long is truncated.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Side {
    /// The end is kept.
    #[default]
    Left,
    /// The beginning is kept.
    Right,
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
    /// Returns the session that the request is a turn of, if any, and how the prompt relates to
    /// it.
    pub fn session(&self, prompt: SessionPrompt) -> Option<SessionTurn> {
        let id = self.session_id.clone()?;
        Some(SessionTurn { id, prompt })
    }

    /// Returns how many answers are asked for.
    pub fn samples(&self, app: &App) -> Result<usize, ApiError> {
        let (n, most) = (self.n.unwrap_or(1), app.options.max_samples);
        if (1..=most).contains(&n) {
            Ok(n)
        } else {
            Err(ApiError::invalid(format!("n is {n}, but must be from 1 to {most}")).param("n"))
        }
    }

    /// Returns how many alternatives to report per prompt token; `None` without log
    /// probabilities.
    pub fn prompt_logprobs(&self, stream: bool) -> Result<Option<u32>, ApiError> {
        let wrong = |problem: String| Err(ApiError::invalid(problem).param("prompt_logprobs"));
        match self.prompt_logprobs {
            Some(count) if count > MAX_PROMPT_LOGPROBS => wrong(format!(
                "prompt_logprobs is {count}, but must be from 0 to {MAX_PROMPT_LOGPROBS}"
            )),
            Some(_) if stream => wrong("prompt_logprobs is not available in a stream".to_owned()),
            count => Ok(count),
        }
    }

    /// Returns an id for the answer, which clients and logs use: the client's own, or a new
    /// one.
    pub fn answer_id(&self, app: &App, kind: &str) -> Result<String, ApiError> {
        match &self.request_id {
            Some(id) if id.is_empty() || id.len() > 256 => {
                let problem = format!("request_id has {} bytes, expected 1 to 256", id.len());
                Err(ApiError::invalid(problem).param("request_id"))
            }
            Some(id) => Ok(format!("{kind}-{id}")),
            None => Ok(app.answer_id(kind)),
        }
    }

    /// Returns the request without its prompt.
    pub fn request(
        self,
        app: &App,
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
        at_most(
            "stop",
            stop.iter().map(String::len).sum(),
            "bytes",
            MAX_STOP_BYTES,
        )?;
        let stop_tokens = self.stop_token_ids.as_ref().map_or(0, Vec::len);
        at_most("stop_token_ids", stop_tokens, "tokens", MAX_TOKEN_IDS)?;
        let biased = self.logit_bias.as_ref().map_or(0, BTreeMap::len);
        at_most("logit_bias", biased, "tokens", MAX_TOKEN_IDS)?;
        let user = self.user.as_ref().map_or(0, String::len);
        at_most("user", user, "bytes", MAX_USER_BYTES)?;
        let mut request = Request::new(Prompt::Tokens(Arc::default()));
        request.limits = TokenLimits {
            min_tokens: self.min_tokens.unwrap_or(0),
            allowed: self.allowed_token_ids.map(Into::into),
            banned: match self.bad_words {
                Some(words) => banned(&words, app.require_tokenizer("bad_words")?)?.into(),
                None => TokenLimits::default().banned,
            },
        };
        let room = app.engine.max_sequence_tokens();
        let room = room.saturating_sub(max_tokens.unwrap_or(1).max(1));
        request.truncate_prompt =
            truncation(self.truncate_prompt_tokens, self.truncation_side, room)?;
        if request.truncate_prompt.is_some() && self.session_id.is_some() {
            let problem = "truncate_prompt_tokens is not supported with a session_id";
            return Err(ApiError::invalid(problem).param("truncate_prompt_tokens"));
        }
        request.stop = stop;
        request.include_stop = self.include_stop_str_in_output.unwrap_or(false);
        request.keep_special = !self.skip_special_tokens.unwrap_or(true);
        request.stop_token_ids = self.stop_token_ids.unwrap_or_default();
        request.ignore_eos = self.ignore_eos.unwrap_or(false);
        request.max_tokens = max_tokens;
        request.finish_within = app.options.request_timeout;
        request.priority = self.priority.unwrap_or(0);
        request.cache_salt = cache_salt(self.cache_salt)?;
        request.tenant = tenant(self.user);
        let default = app.engine.sampling_defaults().params();
        // A `top_p` of 0 leaves only the likeliest token.
        let greedy = self.top_p == Some(0.0);
        request.sampling = SamplingParams {
            temperature: match greedy {
                true => 0.0,
                false => self.temperature.unwrap_or(default.temperature),
            },
            top_k: top_k(self.top_k)?.unwrap_or(default.top_k),
            top_p: self.top_p.filter(|_| !greedy).unwrap_or(default.top_p),
            min_p: self.min_p.unwrap_or(default.min_p),
            repetition_penalty: self
                .repetition_penalty
                .unwrap_or(default.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(default.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(default.frequency_penalty),
            logit_bias: self.logit_bias.map_or(Ok(Vec::new()), logit_bias)?,
            // Without a seed, each request gets a different answer.
            seed: match self.seed {
                Some(seed) => seed as u64,
                None => Uuid::new_v4().as_u64_pair().1,
            },
            logprobs,
        };
        Ok(request)
    }
}

/// Constrains the answer to a form. Refuses a request that also excludes tokens, because the
/// form might need them.
pub(crate) fn constrain(
    request: &mut Request,
    constraint: Option<Box<dyn Constraint>>,
) -> Result<(), ApiError> {
    if constraint.is_some() && request.limits.exclude_tokens() {
        let field = match request.limits.allowed {
            Some(_) => "allowed_token_ids",
            None => "bad_words",
        };
        let problem =
            format!("{field} is not supported for an answer that is constrained to a form");
        return Err(ApiError::invalid(problem).param(field));
    }
    request.constraint = constraint;
    Ok(())
}

/// Returns which part of a prompt to keep; `room` is the number of tokens that fit.
pub(crate) fn truncation(
    tokens: Option<i64>,
    side: Option<Side>,
    room: usize,
) -> Result<Option<Truncation>, ApiError> {
    let tokens = match tokens {
        None => return Ok(None),
        Some(-1) => room,
        Some(tokens) => match usize::try_from(tokens) {
            Ok(tokens) if tokens > 0 => tokens,
            _ => {
                let problem =
                    format!("truncate_prompt_tokens is {tokens}, but must be -1, or 1 or more");
                return Err(ApiError::invalid(problem).param("truncate_prompt_tokens"));
            }
        },
    };
    Ok(Some(match side.unwrap_or_default() {
        Side::Left => Truncation::Last(tokens),
        Side::Right => Truncation::First(tokens),
    }))
}

/// Returns the token sequences of forbidden words: as at the beginning of a text, and as after
/// a space.
fn banned(words: &[String], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = |problem: String| ApiError::invalid(problem).param("bad_words");
    if words.len() > MAX_BAD_WORDS {
        let (count, most) = (words.len(), MAX_BAD_WORDS);
        return Err(wrong(format!(
            "bad_words has {count} words, at most {most} are accepted"
        )));
    }
    let mut banned: Vec<Vec<u32>> = Vec::with_capacity(2 * words.len());
    for (index, word) in words.iter().enumerate() {
        let bare = word.trim_start();
        if bare.is_empty() || word.len() > MAX_BAD_WORD_BYTES {
            let most = MAX_BAD_WORD_BYTES;
            return Err(wrong(format!(
                "bad_words[{index}] has {} bytes, expected a word of 1 to {most}",
                word.len()
            )));
        }
        for text in [bare.to_owned(), format!(" {bare}")] {
            let encoded = tokenizer.encode(&text, EncodeOptions::default());
            let tokens = encoded.map_err(|error| wrong(format!("bad_words: {error}")))?;
            if !tokens.is_empty() && !banned.contains(&tokens) {
                banned.push(tokens);
            }
        }
    }
    Ok(banned)
}

/// Checks a cache salt, which must not be empty, as in vLLM.
fn cache_salt(salt: Option<String>) -> Result<Option<Arc<str>>, ApiError> {
    let length = salt.as_ref().map_or(1, |salt| salt.chars().count());
    if (1..=MAX_SALT).contains(&length) {
        return Ok(salt.map(Into::into));
    }
    let problem = format!("cache_salt has {length} characters, but must have from 1 to {MAX_SALT}");
    Err(ApiError::invalid(problem).param("cache_salt"))
}

/// Returns the tenant that a request's user is.
fn tenant(user: Option<String>) -> Option<Arc<str>> {
    user.filter(|user| !user.is_empty()).map(Into::into)
}

/// Returns the request of an embedding, without a prompt, by what the client says of itself.
pub(crate) fn embed_request(
    user: Option<String>,
    priority: Option<i32>,
    salt: Option<String>,
) -> Result<EmbedRequest, ApiError> {
    Ok(EmbedRequest {
        priority: priority.unwrap_or(0),
        cache_salt: cache_salt(salt)?,
        tenant: tenant(user),
        ..EmbedRequest::new(Prompt::Tokens(Arc::default()))
    })
}

/// Refuses a field that has more of something than is accepted.
fn at_most(
    field: &'static str,
    count: usize,
    what: &'static str,
    most: usize,
) -> Result<(), ApiError> {
    if count <= most {
        return Ok(());
    }
    let problem = format!("{field} has {count} {what}, at most {most} are accepted");
    Err(ApiError::invalid(problem).param(field))
}

fn top_k(top_k: Option<i64>) -> Result<Option<u32>, ApiError> {
    match top_k {
        None => Ok(None),
        Some(-1) => Ok(Some(0)),
        Some(k) => u32::try_from(k).map(Some).map_err(|_| {
            let problem = format!("top_k is {k}, but must be -1 or from 0 to 2^32 - 1");
            ApiError::invalid(problem).param("top_k")
        }),
    }
}

/// Reads biases from an object whose field names are token ids.
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
