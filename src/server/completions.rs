//! `POST /v1/completions`: text continued.

use super::answer::{EndTokens, complete, finish_reason, token_text};
use super::envelope::Envelope;
use super::error::ApiError;
use super::json::JsonBody;
use super::notices::Notices;
use super::sampling::SamplingFields;
use super::sessions::SessionPrompt;
use super::sse::{self, Events, Writer};
use super::structure::StructureFields;
use super::{App, StreamOptions};
use crate::engine::{Chunk, Prompt, Request, Token, TokenStream};
use crate::text::Tokenizer;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::sync::Arc;

/// Tokens of an answer when the request does not say, as OpenAI has it.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Log-probabilities a token at most.
const MAX_LOGPROBS: u32 = 20;

/// Prompts of a request at most.
const MAX_PROMPTS: usize = 2048;

#[derive(Debug, Deserialize)]
struct CompletionRequest {
    model: Option<String>,
    prompt: Value,
    max_tokens: Option<usize>,
    #[serde(default)]
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<u32>,
    #[serde(default)]
    echo: Option<bool>,
    suffix: Option<String>,
    best_of: Option<usize>,
}

/// A piece of an answer, or all of it.
#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<LogProbs>,
    finish_reason: Option<&'static str>,
}

/// One entry a token in each list.
#[derive(Default, Serialize)]
struct LogProbs {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<serde_json::Map<String, Value>>>,
    /// Characters before the token.
    text_offset: Vec<usize>,
}

impl LogProbs {
    /// Adds a token that begins after `offset` characters; gives where the next begins.
    fn push(&mut self, tokenizer: Option<&Tokenizer>, token: &Token, offset: usize) -> usize {
        let name = |id| token_text(tokenizer, id).0;
        let text = name(token.id);
        let next = offset + text.chars().count();
        let mut top = serde_json::Map::new();
        for &(id, logprob) in &token.top {
            // Of tokens with the same name the likeliest, which comes first.
            top.entry(name(id)).or_insert(logprob.into());
        }
        self.tokens.push(text);
        self.token_logprobs.push(Some(token.logprob));
        self.top_logprobs.push(Some(top));
        self.text_offset.push(offset);
        next
    }

    /// Adds what comes after it.
    fn append(&mut self, mut later: Self) {
        self.tokens.append(&mut later.tokens);
        self.token_logprobs.append(&mut later.token_logprobs);
        self.top_logprobs.append(&mut later.top_logprobs);
        self.text_offset.append(&mut later.text_offset);
    }
}

/// Answers the request.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let request: CompletionRequest = body.parse()?;
    let sampling: SamplingFields = body.parse()?;
    let model = app.check_model(request.model.as_deref())?;
    let samples = sampling.samples(&app)?;
    if request.best_of.is_some_and(|best_of| best_of != samples) {
        return Err(ApiError::invalid("best_of must be equal to n").param("best_of"));
    }
    if request.suffix.is_some_and(|suffix| !suffix.is_empty()) {
        let problem = "suffix is not supported: this model continues text, it does not fill it in";
        return Err(ApiError::invalid(problem).param("suffix"));
    }
    if request.logprobs.is_some_and(|count| count > MAX_LOGPROBS) {
        let problem = format!("logprobs must be from 0 to {MAX_LOGPROBS}");
        return Err(ApiError::invalid(problem).param("logprobs"));
    }
    let max_tokens = request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    let echo = request.echo.unwrap_or(false);
    let first = Prompt::Tokens(Vec::new());
    let session = sampling.session(SessionPrompt::Next);
    let id = app.answer_id("cmpl");
    let template = sampling.request(&app, first, Some(max_tokens), request.logprobs)?;
    let mut template = template.label(id.as_str());
    if echo && (request.logprobs.is_some() || max_tokens == 0) {
        template.prompt_logprobs = Some(request.logprobs.unwrap_or(0));
    }
    let mut notices = Notices::default();
    if let Some(structure) = body.parse::<StructureFields>()?.structure()? {
        let grammar = structure.compiled(&app).await?;
        notices.unenforced = grammar.unenforced().to_vec();
        template.constraint = Some(grammar.constraint());
    }
    let requests = prompts("prompt", request.prompt)?
        .into_iter()
        .map(|prompt| Request {
            prompt,
            ..template.clone()
        });
    let streams = app
        .submit_turn(session, requests.collect(), samples)
        .await?;
    let options = request.stream_options;
    let envelope = Envelope::new(&app, id, "text_completion", model, options);
    let mut writer = CompletionWriter::new(&app, envelope, &streams, samples);
    writer.logprobs = request.logprobs.is_some();
    if echo {
        writer.echo(&streams);
    }
    if request.stream.unwrap_or(false) {
        return Ok(notices.mark(sse::respond(streams, writer)));
    }
    let answers = complete(streams).await?;
    let mut choices = Vec::with_capacity(answers.len());
    for (index, answer) in answers.into_iter().enumerate() {
        writer.envelope.add(&answer.finish, index % samples == 0);
        let echoed = answer
            .prompt
            .and_then(|prompt| writer.echoed(index, &prompt));
        let mut logprobs = writer.logprobs_of(index, &answer.tokens);
        if let (Some(logprobs), Some(mut all)) = (&mut logprobs, echoed) {
            all.append(std::mem::take(logprobs));
            *logprobs = all;
        }
        let mut text = std::mem::take(&mut writer.opening[index]);
        text.push_str(&answer.text);
        choices.push(Choice {
            index,
            text,
            logprobs,
            finish_reason: Some(answer.finish_reason),
        });
    }
    Ok(notices.mark(writer.envelope.whole(&choices)))
}

/// One prompt or many, as text or token ids: what the request has in `field`.
pub(super) fn prompts(field: &'static str, prompt: Value) -> Result<Vec<Prompt>, ApiError> {
    let invalid = |problem: String| ApiError::invalid(format!("{field} {problem}")).param(field);
    let unexpected = || {
        let expected = "a string, a list of strings, a list of token ids, or a list of such lists";
        invalid(format!("must be {expected}"))
    };
    let tokens = |ids: &[Value]| {
        let each = ids.iter().map(|id| {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(unexpected)
        });
        Ok(Prompt::Tokens(each.collect::<Result<_, ApiError>>()?))
    };
    let list = match prompt {
        Value::String(text) => return Ok(vec![Prompt::Text(text)]),
        Value::Array(list) => list,
        _ => return Err(unexpected()),
    };
    match list.first() {
        None => Err(invalid("is an empty list".to_owned())),
        Some(Value::Number(_)) => Ok(vec![tokens(&list)?]),
        Some(_) if list.len() > MAX_PROMPTS => Err(invalid(format!(
            "has {} entries, at most {MAX_PROMPTS} are accepted",
            list.len()
        ))),
        Some(_) => {
            let each = list.into_iter().map(|prompt| match prompt {
                Value::String(text) => Ok(Prompt::Text(text)),
                Value::Array(ids) => tokens(&ids),
                _ => Err(unexpected()),
            });
            each.collect()
        }
    }
}

/// Writes the answers as events.
struct CompletionWriter {
    envelope: Envelope,
    tokenizer: Option<Arc<Tokenizer>>,
    samples: usize,
    ends: Vec<EndTokens>,
    /// Text before each answer: its prompt, if that is to be echoed.
    opening: Vec<String>,
    /// The first token of that prompt.
    first: Vec<Option<u32>>,
    /// Characters of the tokens of each answer so far, if log-probabilities are told.
    offsets: Vec<usize>,
    logprobs: bool,
}

impl CompletionWriter {
    fn new(app: &App, envelope: Envelope, streams: &[TokenStream], samples: usize) -> Self {
        Self {
            envelope,
            tokenizer: app.engine.tokenizer().cloned(),
            samples,
            ends: streams.iter().map(EndTokens::of).collect(),
            opening: vec![String::new(); streams.len()],
            first: vec![None; streams.len()],
            offsets: vec![0; streams.len()],
            logprobs: false,
        }
    }

    /// Puts the prompts before the answers.
    fn echo(&mut self, streams: &[TokenStream]) {
        for (index, stream) in streams.iter().enumerate() {
            self.first[index] = stream.prompt_ids().first().copied();
            if let Some(tokenizer) = &self.tokenizer {
                self.opening[index] = tokenizer.decode(stream.prompt_ids(), false);
            }
        }
    }

    /// The log-probabilities of a prompt that is echoed, whose tokens after the first are
    /// `tokens`. Before the first there is nothing that it could follow from.
    fn echoed(&mut self, index: usize, tokens: &[Token]) -> Option<LogProbs> {
        let first = self.first[index].filter(|_| self.logprobs)?;
        let tokenizer = self.tokenizer.as_deref();
        let mut lists = LogProbs::default();
        let text = token_text(tokenizer, first).0;
        let mut offset = text.chars().count();
        lists.tokens.push(text);
        lists.token_logprobs.push(None);
        lists.top_logprobs.push(None);
        lists.text_offset.push(0);
        for token in tokens {
            offset = lists.push(tokenizer, token, offset);
        }
        self.offsets[index] = offset;
        Some(lists)
    }

    /// The log-probabilities of the next tokens of an answer.
    fn logprobs_of(&mut self, index: usize, tokens: &[Token]) -> Option<LogProbs> {
        if !self.logprobs {
            return None;
        }
        let mut offset = self.offsets[index];
        let tokenizer = self.tokenizer.as_deref();
        let mut lists = LogProbs::default();
        for token in tokens {
            offset = lists.push(tokenizer, token, offset);
        }
        self.offsets[index] = offset;
        Some(lists)
    }
}

impl Writer for CompletionWriter {
    fn open(&mut self, events: &mut Events) {
        if self.logprobs {
            // Prompts come with their log-probabilities.
            return;
        }
        for (index, text) in std::mem::take(&mut self.opening).into_iter().enumerate() {
            if !text.is_empty() {
                let choice = Choice {
                    index,
                    text,
                    logprobs: None,
                    finish_reason: None,
                };
                self.envelope.send(choice, events);
            }
        }
    }

    fn chunk(
        &mut self,
        index: usize,
        mut chunk: Chunk,
        events: &mut Events,
    ) -> Result<(), ApiError> {
        let prompt = chunk.prompt_logprobs.take();
        if let Some(logprobs) = prompt.and_then(|prompt| self.echoed(index, &prompt)) {
            let choice = Choice {
                index,
                text: std::mem::take(&mut self.opening[index]),
                logprobs: Some(logprobs),
                finish_reason: None,
            };
            self.envelope.send(choice, events);
        }
        let token = self.ends[index].visible(&mut chunk);
        let finish_reason = chunk
            .finish
            .map(|finish| finish_reason(finish.outcome))
            .transpose()?;
        let logprobs = self.logprobs_of(index, token.as_slice());
        let says_something =
            !chunk.text.is_empty() || finish_reason.is_some() || (self.logprobs && token.is_some());
        if let Some(finish) = &chunk.finish {
            let first = index.is_multiple_of(self.samples);
            self.envelope.add(finish, first);
        }
        if says_something {
            let choice = Choice {
                index,
                text: chunk.text,
                logprobs,
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
