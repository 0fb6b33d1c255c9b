//! `POST /v1/chat/completions`: a conversation answered.

use super::answer::{EndTokens, complete, finish_reason, token_text};
use super::conversation::Conversation;
use super::envelope::Envelope;
use super::error::ApiError;
use super::json::JsonBody;
use super::parts::{Part, Parts, call_id};
use super::sampling::SamplingFields;
use super::sessions::SessionPrompt;
use super::sse::{self, Events, Writer};
use super::structure::StructureFields;
use super::tools::ToolFields;
use super::{App, StreamOptions};
use crate::engine::{Chunk, Prompt, Token};
use crate::text::{Message, Tokenizer};
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
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
    /// Variables of the chat template, as vLLM has it.
    chat_template_kwargs: Option<Map<String, Value>>,
    /// One of these variables, as OpenAI has it.
    reasoning_effort: Option<String>,
    add_generation_prompt: Option<bool>,
    include_reasoning: Option<bool>,
}

/// A whole answer.
#[derive(Serialize)]
struct Choice {
    index: usize,
    message: AssistantMessage,
    logprobs: Option<LogProbs>,
    finish_reason: &'static str,
}

#[derive(Default, Serialize)]
struct AssistantMessage {
    role: &'static str,
    /// Null when there are only calls.
    content: Option<String>,
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
    /// The call of an answer to a request that speaks of functions.
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function>,
}

/// A call, or in a stream a piece of one.
#[derive(Serialize)]
struct ToolCall {
    /// In a stream only.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    function: Function,
}

#[derive(Serialize)]
struct Function {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    arguments: String,
}

impl ToolCall {
    fn begin(index: Option<usize>, name: String) -> Self {
        Self {
            index,
            id: Some(call_id()),
            kind: Some("function"),
            function: Function {
                name: Some(name),
                arguments: String::new(),
            },
        }
    }
}

impl AssistantMessage {
    /// The message of an answer; with functions instead of tools for a `legacy` request.
    fn new(parts: Vec<Part>, legacy: bool) -> Self {
        let mut content = String::new();
        let mut message = Self {
            role: "assistant",
            ..Self::default()
        };
        for part in parts {
            match part {
                Part::Reasoning(text) => message
                    .reasoning_content
                    .get_or_insert_default()
                    .push_str(&text),
                Part::Text(text) => content.push_str(&text),
                Part::CallBegin { name, .. } => {
                    message.tool_calls.push(ToolCall::begin(None, name));
                }
                Part::CallArguments { delta, .. } => {
                    if let Some(call) = message.tool_calls.last_mut() {
                        call.function.arguments.push_str(&delta);
                    }
                }
                Part::CallEnd => {}
            }
        }
        let silent = content.is_empty() && !message.tool_calls.is_empty();
        message.content = (!silent).then_some(content);
        if legacy {
            let mut calls = std::mem::take(&mut message.tool_calls).into_iter();
            message.function_call = calls.next().map(|call| call.function);
        }
        message
    }
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
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[ToolCall; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function>,
}

impl Delta {
    fn text(text: String) -> Self {
        Self {
            content: Some(text),
            ..Self::default()
        }
    }

    /// `None` when there is nothing to say.
    fn new(part: Part, legacy: bool) -> Option<Self> {
        let call = match part {
            Part::Text(text) => return Some(Self::text(text)),
            Part::Reasoning(text) => {
                return Some(Self {
                    reasoning_content: Some(text),
                    ..Self::default()
                });
            }
            Part::CallBegin { index, name } => ToolCall::begin(Some(index), name),
            Part::CallArguments { index, delta } => ToolCall {
                index: Some(index),
                id: None,
                kind: None,
                function: Function {
                    name: None,
                    arguments: delta,
                },
            },
            Part::CallEnd => return None,
        };
        if legacy {
            return Some(Self {
                function_call: Some(call.function),
                ..Self::default()
            });
        }
        Some(Self {
            tool_calls: Some([call]),
            ..Self::default()
        })
    }
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
    let newer_name = request.max_completion_tokens.is_some();
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    let mut variables = request.chat_template_kwargs.unwrap_or_default();
    if let Some(effort) = request.reasoning_effort {
        variables.entry("reasoning_effort").or_insert(effort.into());
    }
    let tools = body.parse::<ToolFields>()?.check()?;
    let legacy = tools.legacy;
    let conversation = Conversation {
        messages: request.messages,
        tools,
        structure: body.parse::<StructureFields>()?.structure()?,
        variables,
        add_generation_prompt: request.add_generation_prompt.unwrap_or(true),
        hide_reasoning: !request.include_reasoning.unwrap_or(true),
    };
    let prepared = conversation.prepare(&app).await?;
    let (reading, notices) = (prepared.reading, prepared.notices);
    let prompt = Prompt::Tokens(prepared.prompt);
    let session = sampling.session(SessionPrompt::Whole);
    let id = app.answer_id("chatcmpl");
    let mut asked = sampling
        .request(&app, prompt, max_tokens, logprobs)?
        .label(id.as_str());
    asked.constraint = prepared.constraint;
    asked.keep_special = prepared.keep_special;
    let streams = app
        .submit_turn(session, vec![asked], samples)
        .await
        .map_err(|mut error| {
            // The fields by their names here.
            let renamed = match error.body.param.as_deref() {
                Some("prompt") => Some("messages"),
                Some("max_tokens") if newer_name => Some("max_completion_tokens"),
                _ => None,
            };
            if let Some(name) = renamed {
                error.body.param = Some(name.to_owned());
            }
            error
        })?;
    let streaming = request.stream.unwrap_or(false);
    let object = match streaming {
        true => "chat.completion.chunk",
        false => "chat.completion",
    };
    let mut envelope = Envelope::new(&app, id, object, model, request.stream_options);
    let tokenizer = app.engine.tokenizer().cloned();
    if streaming {
        let writer = ChatWriter {
            envelope,
            tokenizer,
            ends: streams.iter().map(EndTokens::of).collect(),
            parts: streams.iter().map(|_| reading.parts()).collect(),
            logprobs: logprobs.is_some(),
            legacy,
        };
        return Ok(notices.mark(sse::respond(streams, writer)));
    }
    let answers = complete(streams).await?;
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        envelope.add(&answer.finish, index == 0);
        let tokens = logprobs.map(|_| reported(tokenizer.as_deref(), &answer.tokens));
        let message = AssistantMessage::new(reading.parts().all(&answer.text), legacy);
        let calls = message.tool_calls.len() + usize::from(message.function_call.is_some());
        choices.push(Choice {
            index,
            finish_reason: with_calls(answer.finish_reason, calls, legacy),
            message,
            logprobs: tokens,
        });
    }
    Ok(notices.mark(envelope.whole(&choices)))
}

/// Why an answer with so many calls ended.
fn with_calls(finish_reason: &'static str, calls: usize, legacy: bool) -> &'static str {
    match finish_reason {
        "stop" if calls > 0 && legacy => "function_call",
        "stop" if calls > 0 => "tool_calls",
        reason => reason,
    }
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
    envelope: Envelope,
    tokenizer: Option<Arc<Tokenizer>>,
    ends: Vec<EndTokens>,
    parts: Vec<Parts>,
    logprobs: bool,
    /// Calls are told as those of functions.
    legacy: bool,
}

impl Writer for ChatWriter {
    fn open(&mut self, events: &mut Events) {
        for index in 0..self.ends.len() {
            let choice = ChunkChoice {
                index,
                delta: Delta {
                    role: Some("assistant"),
                    ..Delta::text(String::new())
                },
                logprobs: None,
                finish_reason: None,
            };
            self.envelope.send(choice, events);
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
            self.envelope.add(finish, index == 0);
        }
        let parts = &mut self.parts[index];
        let mut pieces = parts.push(&chunk.text);
        if finish_reason.is_some() {
            pieces.extend(parts.finish());
        }
        let calls = parts.calls();
        let mut reports = (self.logprobs && token.is_some())
            .then(|| reported(self.tokenizer.as_deref(), token.as_slice()));
        let mut deltas: Vec<Delta> = pieces
            .into_iter()
            .filter_map(|part| Delta::new(part, self.legacy))
            .collect();
        if reports.is_some() && deltas.is_empty() {
            deltas.push(Delta::text(String::new()));
        }
        for delta in deltas {
            let choice = ChunkChoice {
                index,
                delta,
                logprobs: reports.take(),
                finish_reason: None,
            };
            self.envelope.send(choice, events);
        }
        let finish_reason = finish_reason.map(|reason| with_calls(reason, calls, self.legacy));
        if finish_reason.is_some() {
            let choice = ChunkChoice {
                index,
                delta: Delta::default(),
                logprobs: None,
                finish_reason,
            };
            self.envelope.send(choice, events);
        }
        Ok(())
    }

    fn close(&mut self, events: &mut Events) {
        self.envelope.close(events);
    }
}
