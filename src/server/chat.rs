//! `POST /v1/chat/completions`: a conversation answered.

use super::answer::{EndTokens, Usage, complete, finish_reason, token_text};
use super::error::ApiError;
use super::json::JsonBody;
use super::sampling::SamplingFields;
use super::sse::{self, Events, Writer};
use super::{App, StreamOptions, unix_time};
use crate::engine::{Chunk, Prompt, Token};
use crate::text::{Message, Tokenizer};
use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Likeliest tokens reported a step, at most.
const MAX_TOP_LOGPROBS: u32 = 20;

#[derive(Debug, Deserialize)]
struct ChatRequest {
    model: Option<String>,
    messages: Vec<Message>,
    max_tokens: Option<usize>,
    /// The newer name of `max_tokens`; wins over it.
    max_completion_tokens: Option<usize>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<bool>,
    top_logprobs: Option<u32>,
}

/// What every object of an answer says.
#[derive(Clone, Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

#[derive(Serialize)]
struct ChatCompletion<'a, C> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
}

/// A whole answer.
#[derive(Serialize)]
struct Choice {
    index: usize,
    message: AssistantMessage,
    logprobs: Option<LogProbs>,
    finish_reason: &'static str,
}

#[derive(Serialize)]
struct AssistantMessage {
    role: &'static str,
    content: String,
    refusal: Option<String>,
}

/// A piece of an answer.
#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<LogProbs>,
    finish_reason: Option<&'static str>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

#[derive(Serialize)]
struct LogProbs {
    content: Vec<TokenLogProb>,
    refusal: Option<String>,
}

#[derive(Serialize)]
struct TokenLogProb {
    #[serde(flatten)]
    token: NamedLogProb,
    top_logprobs: Vec<NamedLogProb>,
}

#[derive(Serialize)]
struct NamedLogProb {
    token: String,
    logprob: f32,
    bytes: Vec<u8>,
}

/// Answers the request.
pub(crate) async fn chat_completions(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let request: ChatRequest = body.parse()?;
    let sampling: SamplingFields = body.parse()?;
    let model = app.check_model(request.model.as_deref())?;
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages is an empty list").param("messages"));
    }
    let logprobs = logprobs(request.logprobs, request.top_logprobs)?;
    let samples = sampling.samples(&app)?;
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    let prompt = Prompt::Chat(request.messages);
    let session = sampling.session_id.clone();
    let id = app.answer_id("chatcmpl");
    let asked = sampling.request(&app, prompt, max_tokens, logprobs)?;
    let streams = app
        .submit_turn(session, vec![asked.label(id.as_str())], samples)
        .await
        .map_err(|mut error| {
            if error.body.param.as_deref() == Some("prompt") {
                error.body.param = Some("messages".to_owned());
            }
            error
        })?;
    let streaming = request.stream.unwrap_or(false);
    let head = Head {
        id,
        object: if streaming {
            "chat.completion.chunk"
        } else {
            "chat.completion"
        },
        created: unix_time(),
        model,
        system_fingerprint: app.fingerprint.clone(),
    };
    let tokenizer = app.engine.tokenizer().cloned();
    if streaming {
        let writer = ChatWriter {
            head,
            tokenizer,
            ends: streams.iter().map(EndTokens::of).collect(),
            logprobs: logprobs.is_some(),
            usage_wanted: request
                .stream_options
                .is_some_and(|options| options.usage()),
            usage: Usage::default(),
        };
        return Ok(sse::respond(streams, writer));
    }
    let answers = complete(streams).await?;
    let mut usage = Usage::default();
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        usage.add(&answer.finish, index == 0);
        let tokens = logprobs.map(|_| reported(tokenizer.as_deref(), &answer.tokens));
        choices.push(Choice {
            index,
            message: AssistantMessage {
                role: "assistant",
                content: answer.text,
                refusal: None,
            },
            logprobs: tokens,
            finish_reason: answer.finish_reason,
        });
    }
    let completion = ChatCompletion {
        head: &head,
        choices: &choices,
        usage: Some(Some(usage)),
    };
    Ok(Json(completion).into_response())
}

/// How many log-probabilities a step are asked for.
fn logprobs(wanted: Option<bool>, top: Option<u32>) -> Result<Option<u32>, ApiError> {
    let invalid = |problem: String| Err(ApiError::invalid(problem).param("top_logprobs"));
    match (wanted.unwrap_or(false), top) {
        (false, Some(1..)) => invalid("top_logprobs needs logprobs: true".to_owned()),
        (_, Some(top)) if top > MAX_TOP_LOGPROBS => invalid(format!(
            "top_logprobs is {top}, but must be from 0 to {MAX_TOP_LOGPROBS}"
        )),
        (false, _) => Ok(None),
        (true, top) => Ok(Some(top.unwrap_or(0))),
    }
}

/// Tokens with their log-probabilities.
fn reported(tokenizer: Option<&Tokenizer>, tokens: &[Token]) -> LogProbs {
    let named = |id, logprob| {
        let (token, bytes) = token_text(tokenizer, id);
        NamedLogProb {
            token,
            logprob,
            bytes,
        }
    };
    let each = tokens.iter().map(|token| TokenLogProb {
        token: named(token.id, token.logprob),
        top_logprobs: token.top.iter().map(|&(id, p)| named(id, p)).collect(),
    });
    LogProbs {
        content: each.collect(),
        refusal: None,
    }
}

/// Writes the answers as events.
struct ChatWriter {
    head: Head,
    tokenizer: Option<Arc<Tokenizer>>,
    ends: Vec<EndTokens>,
    logprobs: bool,
    usage_wanted: bool,
    usage: Usage,
}

impl ChatWriter {
    fn send(&self, choices: &[ChunkChoice], usage: Option<Usage>, events: &mut Events) {
        events.json(&ChatCompletion {
            head: &self.head,
            choices,
            usage: self.usage_wanted.then_some(usage),
        });
    }
}

impl Writer for ChatWriter {
    fn open(&mut self, events: &mut Events) {
        for index in 0..self.ends.len() {
            let choice = ChunkChoice {
                index,
                delta: Delta {
                    role: Some("assistant"),
                    content: Some(String::new()),
                },
                logprobs: None,
                finish_reason: None,
            };
            self.send(&[choice], None, events);
        }
    }

    fn chunk(
        &mut self,
        index: usize,
        mut chunk: Chunk,
        events: &mut Events,
    ) -> Result<(), ApiError> {
        let token = self.ends[index].visible(&mut chunk);
        let finish_reason = chunk
            .finish
            .map(|finish| finish_reason(finish.outcome))
            .transpose()?;
        if let Some(finish) = &chunk.finish {
            self.usage.add(finish, index == 0);
        }
        let reports = self.logprobs && token.is_some();
        if !chunk.text.is_empty() || reports {
            let choice = ChunkChoice {
                index,
                delta: Delta {
                    role: None,
                    content: Some(chunk.text),
                },
                logprobs: reports.then(|| reported(self.tokenizer.as_deref(), token.as_slice())),
                finish_reason: None,
            };
            self.send(&[choice], None, events);
        }
        if finish_reason.is_some() {
            let choice = ChunkChoice {
                index,
                delta: Delta::default(),
                logprobs: None,
                finish_reason,
            };
            self.send(&[choice], None, events);
        }
        Ok(())
    }

    fn close(&mut self, events: &mut Events) {
        if self.usage_wanted {
            self.send(&[], Some(self.usage), events);
        }
        events.done();
    }
}
