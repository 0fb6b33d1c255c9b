//! `/v1/responses`: OpenAI's newer API, whose answers are lists of items that a later request
//! can continue by id.

mod input;
mod listing;
mod output;
mod store;

pub(crate) use listing::input_items;
pub(crate) use store::Store;

use crate::engine::{Chunk, Finish, Prompt};
use crate::sampling::Token;
use crate::server::error::ApiError;
use crate::server::http::auth::{Caller, Owner};
use crate::server::http::body::object::Object;
use crate::server::http::body::wording::plain;
use crate::server::http::body::{JsonBody, PathPart, integer, object};
use crate::server::openai::answer::{EndTokens, TokenNames, Usage, finish_reason};
use crate::server::openai::conversation::{Conversation, Fit, Prepared};
use crate::server::openai::fields::Route;
use crate::server::openai::logprobs::f64_with_f32_digits;
use crate::server::openai::parts::Parts;
use crate::server::openai::rendering::Rendering;
use crate::server::openai::sampling::{SamplingFields, constrain};
use crate::server::openai::sse::{self, Events, Writer, merge};
use crate::server::openai::stream_options::StreamOptions;
use crate::server::openai::structure::Format;
use crate::server::openai::tools::{ToolFields, Tools};
use crate::server::submit::Submission;
use crate::server::{App, unix_time};
use crate::text::{Message, RenderOptions, Tokenizer};
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use input::{Input, append_all, listed, new_id};
use output::{Feed, Output};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Number, Value, json};
use std::sync::Arc;

/// Maximum number of bytes of the items that a request refers to, which its body does not
/// contain.
const MAX_REFERRED: usize = 8 << 20;

#[derive(Debug, Deserialize)]
struct CreateRequest {
    model: Option<String>,
    input: Option<Input>,
    instructions: Option<String>,
    #[serde(default, deserialize_with = "integer::optional")]
    max_output_tokens: Option<usize>,
    /// Names of additional data to report.
    include: Option<Vec<String>>,
    #[serde(default, deserialize_with = "integer::optional")]
    top_logprobs: Option<u32>,
    truncation: Option<Truncation>,
    previous_response_id: Option<String>,
    store: Option<bool>,
    stream: Option<bool>,
    #[serde(default, deserialize_with = "object::optional")]
    stream_options: Option<StreamOptions>,
    #[serde(default, deserialize_with = "object::optional")]
    text: Option<TextFields>,
    #[serde(default, deserialize_with = "object::optional")]
    reasoning: Option<ReasoningFields>,
    /// Variables of the chat template, as in vLLM.
    chat_template_kwargs: Option<Map<String, Value>>,
    // The following fields are reported back, and not used otherwise here.
    metadata: Option<Map<String, Value>>,
    temperature: Option<Number>,
    top_p: Option<Number>,
    user: Option<String>,
}

/// What happens to a conversation that does not fit in the context.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Truncation {
    /// Messages at its beginning are left out.
    Auto,
    /// The request is refused.
    #[default]
    Disabled,
}

/// The accepted values of `include`. All but the first concern data that answers here never
/// have.
const INCLUDABLE: [&str; 9] = [
    LOGPROBS,
    "code_interpreter_call.outputs",
    "computer_call_output.output.image_url",
    "file_search_call.results",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "web_search_call.action.sources",
    "web_search_call.results",
    "mcp_call.outputs",
];

const LOGPROBS: &str = "message.output_text.logprobs";

/// Maximum number of alternatives reported per token.
const MAX_TOP_LOGPROBS: u32 = 20;

#[derive(Debug, Deserialize)]
struct TextFields {
    format: Option<Value>,
    verbosity: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ReasoningFields {
    effort: Option<String>,
}

/// A request whose prompt is ready for the engine.
struct Asked {
    prepared: Prepared,
    /// What is stored with the response, if it is.
    kept: Option<Kept>,
}

/// The conversation that a later request continues.
struct Kept {
    /// The conversation with the items of the input, without the instructions.
    messages: Vec<Message>,
    /// The items of the input.
    items: Vec<Value>,
}

/// Handles a request for a response.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let bytes = body.len();
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Responses)?;
        Ok((
            body.parse::<CreateRequest>()?,
            body.parse::<SamplingFields>()?,
            body.parse::<ToolFields>()?.check()?,
        ))
    });
    let (mut request, sampling, tools) = fields.await?;
    let model = app.check_model(request.model.as_deref())?;
    let logprobs = request.logprobs()?;
    let streaming = request.stream.unwrap_or(false);
    // Called only to check the options, because the last event has the usage in any case.
    StreamOptions::usage(request.stream_options, streaming)?;
    let store = request.store.unwrap_or(true);
    let asked = request
        .ask(&app, caller.owner(), &tools, bytes, store)
        .await?;
    let Asked { prepared, kept } = asked;
    let id = new_id("resp");
    let asked = sampling
        .request(&app, request.max_output_tokens, logprobs)
        .map_err(renamed)?;
    let mut asked = asked.label(id.as_str());
    constrain(&mut asked, prepared.constraint)?;
    asked.kept_tokens = prepared.kept_tokens;
    let submission = Submission {
        request: asked,
        prompts: vec![Prompt::Tokens(prepared.prompt)],
        samples: 1,
        add_special: false,
        session: None,
    };
    let streams = app.submit(&caller, submission).await.map_err(renamed)?;

    let notices = prepared.notices;
    let mut writer = ResponseWriter {
        logprobs: logprobs.is_some(),
        owner: caller.owner(),
        id,
        created: unix_time(),
        kept: kept.map(|kept| (kept.messages, listed(kept.items))),
        echo: request.echo(model, &tools),
        app,
        ends: streams.iter().map(EndTokens::of).next(),
        parts: prepared.reading.parts(),
        output: Output::default(),
        reasoning_tokens: 0,
        events_sent: 0,
        finish: None,
    };
    if streaming {
        return Ok(notices.mark(sse::respond(streams, writer)));
    }
    let mut chunks = merge(streams);
    while let Some((_, chunk)) = chunks.next().await {
        writer.take(chunk?, None)?;
    }
    let response = writer.complete(None);
    match writer.finish {
        Some(_) => Ok(notices.mark(Json(response).into_response())),
        // A stream always ends with a finish or an error.
        None => Err(ApiError::unavailable(
            "the answer ended without a finish reason",
        )),
    }
}

/// Counts a request's input tokens without generating an answer.
pub(crate) async fn input_tokens(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let bytes = body.len();
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Responses)?;
        Ok((
            body.parse::<CreateRequest>()?,
            body.parse::<ToolFields>()?.check()?,
        ))
    });
    let (mut request, tools) = fields.await?;
    app.check_model(request.model.as_deref())?;
    let asked = request
        .ask(&app, caller.owner(), &tools, bytes, false)
        .await?;
    let count = json!({
        "object": "response.input_tokens",
        "input_tokens": asked.prepared.prompt.len(),
    });
    let notices = asked.prepared.notices;
    Ok(notices.mark(Json(count).into_response()))
}

/// Renames the fields of an error to their names in this API.
fn renamed(mut error: ApiError) -> ApiError {
    let param = match error.body.param.as_deref() {
        Some(name) if name == "prompt" || name.starts_with("messages") => "input",
        Some("max_tokens") => "max_output_tokens",
        _ => return error,
    };
    error.body.param = Some(param.to_owned());
    error
}

/// Returns a stored response.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    caller: Caller,
    PathPart(id): PathPart,
) -> Result<Response, ApiError> {
    let response = app.responses.response(caller.owner(), &id)?;
    let json = (header::CONTENT_TYPE, "application/json");
    Ok(([json], response).into_response())
}

/// Deletes a stored response.
pub(crate) async fn delete(
    State(app): State<Arc<App>>,
    caller: Caller,
    PathPart(id): PathPart,
) -> Result<Json<Value>, ApiError> {
    app.responses.delete(caller.owner(), &id)?;
    Ok(Json(
        json!({"id": id, "object": "response", "deleted": true}),
    ))
}

/// Returns the conversation with the instructions before it. They are not part of what is
/// stored.
fn with_instructions(instructions: Option<&str>, mut messages: Vec<Message>) -> Vec<Message> {
    if let Some(instructions) = instructions {
        match messages.first_mut() {
            // Many templates accept only one system message.
            Some(first) if matches!(first.role.as_str(), "system" | "developer") => {
                first.content = format!("{instructions}\n\n{}", first.content);
            }
            _ => messages.insert(0, Message::new("system", instructions)),
        }
    }
    messages
}

impl CreateRequest {
    /// Makes a prompt of the input and the conversation before it, which both may refer to what
    /// `owner` has stored. The body had `bytes` bytes. Keeps a copy of the conversation if the
    /// response will be stored.
    async fn ask(
        &mut self,
        app: &Arc<App>,
        owner: Owner,
        tools: &Tools,
        bytes: usize,
        store: bool,
    ) -> Result<Asked, ApiError> {
        let mut messages = match &self.previous_response_id {
            Some(id) => app.responses.conversation(owner, id)?,
            None => Vec::new(),
        };
        let Some(input) = self.input.take() else {
            return Err(ApiError::invalid("input is missing").param("input"));
        };
        let limit = app.options.max_body_bytes.min(MAX_REFERRED);
        let items = input.items(&app.responses, owner, limit)?;
        append_all(&items, &mut messages)?;
        if messages.is_empty() {
            return Err(ApiError::invalid("input is an empty list").param("input"));
        }
        let mut variables = self.chat_template_kwargs.take().unwrap_or_default();
        if let Some(effort) = self.effort() {
            variables.entry("reasoning_effort").or_insert(effort.into());
        }
        if let Some(verbosity) = self.verbosity() {
            variables.entry("verbosity").or_insert(verbosity.into());
        }
        let kept = store.then(|| Kept {
            messages: messages.clone(),
            items,
        });
        let conversation = Conversation {
            messages: with_instructions(self.instructions.as_deref(), messages),
            tools: tools.clone(),
            structure: match self.format()? {
                Some(format) => format.structure("text.format")?,
                None => None,
            },
            rendering: Rendering {
                options: RenderOptions {
                    extra: variables,
                    ..RenderOptions::default()
                },
                ..Rendering::default()
            },
            hide_reasoning: false,
            fit: match self.truncation.unwrap_or_default() {
                Truncation::Auto => {
                    let answer = self.max_output_tokens.unwrap_or(1).max(1);
                    Fit::LeaveOut(app.engine.max_sequence_tokens().saturating_sub(answer))
                }
                Truncation::Disabled => Fit::Refuse,
            },
        };
        let prepared = conversation.prepare(app, bytes).await.map_err(renamed)?;
        Ok(Asked { prepared, kept })
    }

    /// Returns how many alternatives to report per token; `None` without log probabilities.
    fn logprobs(&self) -> Result<Option<u32>, ApiError> {
        let include = self.include.as_deref().unwrap_or_default();
        if let Some(name) = include
            .iter()
            .find(|name| !INCLUDABLE.contains(&name.as_str()))
        {
            let problem = format!("include has {name:?}, expected one of {INCLUDABLE:?}");
            return Err(ApiError::invalid(problem).param("include"));
        }
        let top = self.top_logprobs.unwrap_or(0);
        let wrong = |problem: String| Err(ApiError::invalid(problem).param("top_logprobs"));
        match include.iter().any(|name| name == LOGPROBS) {
            _ if top > MAX_TOP_LOGPROBS => wrong(format!(
                "top_logprobs is {top}, but must be from 0 to {MAX_TOP_LOGPROBS}"
            )),
            false if top > 0 => wrong(format!("top_logprobs needs include: [{LOGPROBS:?}]")),
            wanted => Ok(wanted.then_some(top)),
        }
    }

    fn verbosity(&self) -> Option<&str> {
        self.text.as_ref()?.verbosity.as_deref()
    }

    fn effort(&self) -> Option<&str> {
        self.reasoning.as_ref()?.effort.as_deref()
    }

    fn format(&self) -> Result<Option<Format>, ApiError> {
        let format = self.text.as_ref().and_then(|text| text.format.clone());
        let wrong = |error: serde_json::Error| {
            let problem = plain(&error.to_string());
            ApiError::invalid(format!("text.format: {problem}")).param("text.format")
        };
        format
            .map(|format| match serde_json::from_value(format) {
                Ok(Object(format)) => Ok(format),
                Err(error) => Err(wrong(error)),
            })
            .transpose()
    }

    /// Returns the fields that the response reports back.
    fn echo(&self, model: String, tools: &Tools) -> Map<String, Value> {
        let format = self.text.as_ref().and_then(|text| text.format.clone());
        let mut text = json!({"format": format.unwrap_or_else(|| json!({"type": "text"}))});
        if let Some(verbosity) = self.verbosity() {
            text["verbosity"] = verbosity.into();
        }
        let echo = json!({
            "model": model,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata.clone().unwrap_or_default(),
            "parallel_tool_calls": tools.parallel,
            "previous_response_id": self.previous_response_id,
            "reasoning": {"effort": self.effort(), "summary": null},
            "store": self.store.unwrap_or(true),
            "temperature": self.temperature.clone().unwrap_or_else(|| 1.into()),
            "text": text,
            "tool_choice": tools.choice(),
            "tools": tools.reported(),
            "top_p": self.top_p.clone().unwrap_or_else(|| 1.into()),
            "top_logprobs": self.top_logprobs.unwrap_or(0),
            "truncation": self.truncation.unwrap_or_default(),
            "user": self.user,
        });
        match echo {
            Value::Object(fields) => fields,
            _ => Map::new(),
        }
    }
}

/// Builds the response, and its events in a stream, as the answer arrives.
struct ResponseWriter {
    app: Arc<App>,
    owner: Owner,
    id: String,
    created: u64,
    /// Set if the response will be stored: the conversation before it, without instructions,
    /// and the items of its input.
    kept: Option<(Vec<Message>, Vec<Value>)>,
    echo: Map<String, Value>,
    ends: Option<EndTokens>,
    parts: Parts,
    /// Whether log probabilities are reported.
    logprobs: bool,
    output: Output,
    reasoning_tokens: usize,
    events_sent: u64,
    finish: Option<(Finish, &'static str)>,
}

impl ResponseWriter {
    /// Returns the response in its current state.
    fn response(&self, status: &str, error: Option<Value>) -> Value {
        let cut = self.finish.filter(|(_, reason)| *reason != "stop");
        let cut = cut.map(|(_, reason)| match reason {
            "length" => "max_output_tokens",
            reason => reason,
        });
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "background": false,
            "error": error,
            "incomplete_details": cut.map(|reason| json!({"reason": reason})),
            "output": self.output.items(),
        });
        if let Value::Object(fields) = &mut response {
            fields.extend(self.echo.clone());
            fields.insert("usage".to_owned(), self.usage());
        }
        response
    }

    fn usage(&self) -> Value {
        let Some((finish, _)) = &self.finish else {
            return Value::Null;
        };
        let mut usage = Usage::default();
        usage.add(finish, true);
        // Only complete blocks are kept for later requests.
        let engine = &self.app.engine;
        let block = engine.info().block_tokens.max(1);
        let complete = match engine.keeps_prefixes() {
            true => usage.prompt_tokens / block * block,
            false => 0,
        };
        let written = complete.saturating_sub(usage.prompt_tokens_details.cached_tokens);
        json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.prompt_tokens_details.cached_tokens,
                "cache_write_tokens": written,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        })
    }

    fn send_response(&mut self, event: &'static str, response: &Value, events: &mut Events) {
        let mut feed = Feed::new(Some(events), &mut self.events_sent);
        feed.send(event, || json!({"response": response}));
    }

    /// Takes a piece of the answer.
    fn take(&mut self, mut chunk: Chunk, events: Option<&mut Events>) -> Result<(), ApiError> {
        if let Some(finish) = chunk.finish {
            self.finish = Some((finish, finish_reason(finish.outcome)?));
        }
        let ends = self.ends.as_ref();
        let tokens = ends.map(|ends| ends.visible(&mut chunk));
        let mut tokens = tokens.unwrap_or_default().into_iter();
        let mut feed = Feed::new(events, &mut self.events_sent);
        // Each token is either part of the reasoning or of the answer.
        for text in chunk.texts() {
            let reasoning = self.parts.in_reasoning();
            let parts = self.parts.push(text);
            let reasoning = reasoning || self.parts.in_reasoning();
            if let Some(token) = tokens.next() {
                self.reasoning_tokens += usize::from(reasoning);
                if self.logprobs && !reasoning {
                    let tokenizer = self.app.engine.tokenizer().map(Arc::as_ref);
                    self.output.report(reported(tokenizer, &token));
                }
            }
            for part in parts {
                self.output.add(part, &mut feed);
            }
        }
        if chunk.finish.is_some() {
            for part in self.parts.finish() {
                self.output.add(part, &mut feed);
            }
        }
        Ok(())
    }

    /// Returns the finished response, and stores it if the request wants that.
    fn complete(&mut self, events: Option<&mut Events>) -> Value {
        let complete = matches!(self.finish, Some((_, "stop")));
        let status = if complete { "completed" } else { "incomplete" };
        let mut feed = Feed::new(events, &mut self.events_sent);
        self.output.finish(status, &mut feed);
        let response = self.response(status, None);
        if self.finish.is_some()
            && let Some((mut messages, items)) = self.kept.take()
        {
            match append_all(self.output.items(), &mut messages) {
                Ok(()) => {
                    let store = &self.app.responses;
                    store.keep(self.owner, &self.id, &response, &messages, &items);
                }
                Err(error) => tracing::error!(?error, "a response could not be stored"),
            }
        }
        response
    }
}

/// Returns a token with its log probability and the likeliest alternatives.
fn reported(tokenizer: Option<&Tokenizer>, token: &Token) -> Value {
    let names = TokenNames {
        tokenizer,
        as_ids: false,
    };
    let named = |id, logprob| {
        json!({
            "token": names.name(id),
            "bytes": names.bytes(id).unwrap_or_default(),
            "logprob": f64_with_f32_digits(logprob),
        })
    };
    let mut reported = named(token.id, token.logprob);
    let top = token.top.iter().map(|&(id, logprob)| named(id, logprob));
    reported["top_logprobs"] = top.collect();
    reported
}

impl Writer for ResponseWriter {
    fn opens_at_once(&self) -> bool {
        true
    }

    fn open(&mut self, events: &mut Events) {
        let response = self.response("in_progress", None);
        self.send_response("response.created", &response, events);
        self.send_response("response.in_progress", &response, events);
    }

    fn chunk(&mut self, _: usize, chunk: Chunk, events: &mut Events) -> Result<(), ApiError> {
        self.take(chunk, Some(events))
    }

    fn close(&mut self, events: &mut Events) {
        let response = self.complete(Some(events));
        let event = match self.finish {
            Some((_, "stop")) => "response.completed",
            _ => "response.incomplete",
        };
        self.send_response(event, &response, events);
    }

    fn fail(&mut self, error: &ApiError, events: &mut Events) {
        let error = json!({"code": "server_error", "message": error.body.message});
        let response = self.response("failed", Some(error));
        self.send_response("response.failed", &response, events);
    }
}
