//! `POST /v1/chat/completions`: answers a conversation.

use crate::engine::{Chunk, Prompt};
use crate::sampling::Token;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::http::body::{JsonBody, integer, object};
use crate::server::openai::answer::{EndTokens, TokenNames, complete, finish_reason};
use crate::server::openai::conversation::{Conversation, Fit};
use crate::server::openai::envelope::Envelope;
use crate::server::openai::fields::Route;
use crate::server::openai::logprobs::PromptLogProbs;
use crate::server::openai::parts::{Part, Parts, call_id};
use crate::server::openai::rendering::RenderingFields;
use crate::server::openai::sampling::{SamplingFields, constrain};
use crate::server::openai::session_turn::SessionPrompt;
use crate::server::openai::sse::{self, Events, Writer};
use crate::server::openai::stream_options::StreamOptions;
use crate::server::openai::structure::StructureFields;
use crate::server::openai::tools::ToolFields;
use crate::server::submit::Submission;
use crate::text::{Message, Tokenizer};
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Maximum number of alternatives reported per token.
const MAX_TOP_LOGPROBS: u32 = 20;

#[derive(Debug, Deserialize)]
struct ChatRequest {
    model: Option<String>,
    messages: Vec<Message>,
    #[serde(default, deserialize_with = "integer::optional")]
    max_tokens: Option<usize>,
    /// The newer name of `max_tokens`, which takes precedence.
    #[serde(default, deserialize_with = "integer::optional")]
    max_completion_tokens: Option<usize>,
    stream: Option<bool>,
    #[serde(default, deserialize_with = "object::optional")]
    stream_options: Option<StreamOptions>,
    logprobs: Option<bool>,
    #[serde(default, deserialize_with = "integer::optional")]
    top_logprobs: Option<u32>,
    /// Whether tokens are named by their ids.
    return_tokens_as_token_ids: Option<bool>,
    /// A variable of the chat template; OpenAI's name for it.
    reasoning_effort: Option<String>,
    /// Another variable of the chat template.
    verbosity: Option<String>,
    include_reasoning: Option<bool>,
}

/// A complete answer.
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
    /// Null if there are only tool calls.
    content: Option<String>,
    refusal: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning_content: Option<String>,
    /// The same under the name that newer clients read.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<ToolCall>,
    /// The call in an answer to a request that uses `functions` instead of `tools`.
    #[serde(skip_serializing_if = "Option::is_none")]
    function_call: Option<Function>,
}

/// A tool call, or a piece of one in a stream.
#[derive(Serialize)]
struct ToolCall {
    /// Set only in a stream.
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
    /// Returns the message of an answer. For a `legacy` request, its first call becomes a
    /// `function_call`.
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
        message.reasoning.clone_from(&message.reasoning_content);
        if legacy {
            let mut calls = std::mem::take(&mut message.tool_calls).into_iter();
            message.function_call = calls.next().map(|call| call.function);
        }
        message
    }
}

/// A piece of an answer in a stream.
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
    /// The same under the name that newer clients read.
    #[serde(skip_serializing_if = "Option::is_none")]
    reasoning: Option<String>,
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

    /// Returns the delta for `part`, or `None` if it adds nothing to the stream.
    fn new(part: Part, legacy: bool) -> Option<Self> {
        let call = match part {
            Part::Text(text) => return Some(Self::text(text)),
            Part::Reasoning(text) => {
                return Some(Self {
                    reasoning_content: Some(text.clone()),
                    reasoning: Some(text),
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

/// Handles a chat completion request.
pub(crate) async fn chat_completions(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let bytes = body.len();
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Chat)?;
        Ok((
            body.parse::<ChatRequest>()?,
            body.parse::<SamplingFields>()?,
            body.parse::<ToolFields>()?.check()?,
            body.parse::<StructureFields>()?.structure()?,
            body.parse::<RenderingFields>()?,
        ))
    });
    let (request, sampling, tools, structure, rendering) = fields.await?;
    let model = app.check_model(request.model.as_deref())?;
    if request.messages.is_empty() {
        return Err(ApiError::invalid("messages is an empty list").param("messages"));
    }
    let logprobs = logprobs(request.logprobs, request.top_logprobs)?;
    let samples = sampling.samples(&app)?;
    let newer_name = request.max_completion_tokens.is_some();
    let max_tokens = request.max_completion_tokens.or(request.max_tokens);
    let streaming = request.stream.unwrap_or(false);
    let usage_events = StreamOptions::usage(request.stream_options, streaming)?;
    let prompt_logprobs = sampling.prompt_logprobs(streaming)?;
    let mut rendering = rendering.check(&app)?;
    if let Some(effort) = request.reasoning_effort {
        let variables = &mut rendering.options.extra;
        variables.entry("reasoning_effort").or_insert(effort.into());
    }
    if let Some(verbosity) = request.verbosity {
        let variables = &mut rendering.options.extra;
        variables.entry("verbosity").or_insert(verbosity.into());
    }
    let legacy = tools.legacy;
    let session = sampling.session(SessionPrompt::Whole);
    let id = sampling.answer_id(&app, "chatcmpl")?;
    let mut asked = sampling
        .request(&app, max_tokens, logprobs)?
        .label(id.as_str());
    let conversation = Conversation {
        messages: request.messages,
        tools,
        structure,
        rendering,
        hide_reasoning: !request.include_reasoning.unwrap_or(true),
        fit: asked.truncate_prompt.map_or(Fit::Refuse, Fit::Cut),
    };
    let prepared = conversation.prepare(&app, bytes).await?;
    let (reading, notices) = (prepared.reading, prepared.notices);
    constrain(&mut asked, prepared.constraint)?;
    asked.kept_tokens = prepared.kept_tokens;
    asked.prompt_logprobs = prompt_logprobs;
    let submission = Submission {
        request: asked,
        prompts: vec![Prompt::Tokens(prepared.prompt)],
        samples,
        add_special: false,
        session,
    };
    let streams = app.submit(&caller, submission).await.map_err(|mut error| {
        // Report fields under the names that this API has for them.
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
    let object = match streaming {
        true => "chat.completion.chunk",
        false => "chat.completion",
    };
    let mut envelope = Envelope::new(&app, id, object, model, usage_events);
    let tokenizer = app.engine.tokenizer().cloned();
    let as_ids = request.return_tokens_as_token_ids.unwrap_or(false);
    if streaming {
        let prompt = streams.first().map(|stream| stream.prompt_ids().len());
        envelope.count(prompt.unwrap_or(0), 0);
        let writer = ChatWriter {
            envelope,
            tokenizer,
            as_ids,
            ends: streams.iter().map(EndTokens::of).collect(),
            parts: streams.iter().map(|_| reading.parts()).collect(),
            logprobs: logprobs.is_some(),
            legacy,
        };
        return Ok(notices.mark(sse::respond(streams, writer)));
    }
    let names = TokenNames {
        tokenizer: tokenizer.as_deref(),
        as_ids,
    };
    let answers = complete(streams).await?;
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        envelope.add(&answer.finish, index == 0);
        if let (0, Some(prompt)) = (index, &answer.prompt) {
            envelope.prompt_logprobs = Some(PromptLogProbs::new(names, prompt));
        }
        let tokens = logprobs.map(|_| reported(names, &answer.tokens));
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

/// Returns the finish reason of an answer with this many calls.
fn with_calls(finish_reason: &'static str, calls: usize, legacy: bool) -> &'static str {
    match finish_reason {
        "stop" if calls > 0 && legacy => "function_call",
        "stop" if calls > 0 => "tool_calls",
        reason => reason,
    }
}

/// Returns how many alternatives to report per token; `None` without log probabilities.
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

/// Returns the log probabilities of tokens.
fn reported(names: TokenNames<'_>, tokens: &[Token]) -> LogProbs {
    let named = |id, logprob| NamedLogProb {
        token: names.name(id),
        logprob,
        bytes: names.bytes(id).unwrap_or_default().to_vec(),
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
    /// Whether tokens are named by their ids.
    as_ids: bool,
    ends: Vec<EndTokens>,
    parts: Vec<Parts>,
    logprobs: bool,
    /// Whether calls are reported as function calls instead of tool calls.
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
        self.envelope.count(0, chunk.tokens.len());
        let tokens = self.ends[index].visible(&mut chunk);
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
        let names = TokenNames {
            tokenizer: self.tokenizer.as_deref(),
            as_ids: self.as_ids,
        };
        let mut reports = (self.logprobs && !tokens.is_empty()).then(|| reported(names, &tokens));
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
