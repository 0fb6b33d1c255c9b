//! `POST /v1/completions`: continues text.

use crate::engine::{Chunk, TokenStream};
use crate::sampling::Token;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::http::body::{JsonBody, integer, object};
use crate::server::openai::answer::{Answer, EndTokens, TokenNames, complete, finish_reason};
use crate::server::openai::envelope::Envelope;
use crate::server::openai::fields::Route;
use crate::server::openai::logprobs::{LogProbs, PromptLogProbs};
use crate::server::openai::notices::Notices;
use crate::server::openai::prompts::Prompts;
use crate::server::openai::sampling::{SamplingFields, constrain};
use crate::server::openai::session_turn::SessionPrompt;
use crate::server::openai::sse::{self, Events, Writer};
use crate::server::openai::stream_options::StreamOptions;
use crate::server::openai::structure::StructureFields;
use crate::server::submit::Submission;
use crate::text::Tokenizer;
use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::sync::Arc;

/// Maximum length of an answer if the request sets none, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;

/// Maximum number of alternatives reported per token.
const MAX_LOGPROBS: u32 = 20;

#[derive(Debug, Deserialize)]
struct CompletionRequest {
    model: Option<String>,
    prompt: Prompts,
    #[serde(default, deserialize_with = "integer::optional")]
    max_tokens: Option<usize>,
    stream: Option<bool>,
    #[serde(default, deserialize_with = "object::optional")]
    stream_options: Option<StreamOptions>,
    #[serde(default, deserialize_with = "integer::optional")]
    logprobs: Option<u32>,
    /// Whether tokens are named by their ids.
    return_tokens_as_token_ids: Option<bool>,
    echo: Option<bool>,
    add_special_tokens: Option<bool>,
    /// Number of answers from which the likeliest `n` are chosen.
    #[serde(default, deserialize_with = "integer::optional")]
    best_of: Option<usize>,
}

/// An answer, or a piece of one in a stream.
#[derive(Serialize)]
struct Choice {
    index: usize,
    text: String,
    logprobs: Option<LogProbs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogProbs>,
    finish_reason: Option<&'static str>,
}

impl Choice {
    fn piece(index: usize, text: String, logprobs: Option<LogProbs>) -> Self {
        Self {
            index,
            text,
            logprobs,
            prompt_logprobs: None,
            finish_reason: None,
        }
    }
}

/// Handles a completion request.
pub(crate) async fn completions(
    State(app): State<Arc<App>>,
    caller: Caller,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let fields = body.read(&app, |body| {
        body.check_fields(Route::Completions)?;
        Ok((
            body.parse::<CompletionRequest>()?,
            body.parse::<SamplingFields>()?,
            body.parse::<StructureFields>()?.structure()?,
        ))
    });
    let (request, sampling, structure) = fields.await?;
    let model = app.check_model(request.model.as_deref())?;
    let streaming = request.stream.unwrap_or(false);
    let usage_events = StreamOptions::usage(request.stream_options, streaming)?;
    let samples = sampling.samples(&app)?;
    let candidates = candidates(request.best_of, samples, &app, streaming)?;
    if request.logprobs.is_some_and(|count| count > MAX_LOGPROBS) {
        let problem = format!("logprobs must be from 0 to {MAX_LOGPROBS}");
        return Err(ApiError::invalid(problem).param("logprobs"));
    }
    let max_tokens = request.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
    let echo = request.echo.unwrap_or(false);
    let scored = sampling.prompt_logprobs(streaming)?;
    let session = sampling.session(SessionPrompt::Next);
    let id = sampling.answer_id(&app, "cmpl")?;
    let template = sampling.request(&app, Some(max_tokens), request.logprobs)?;
    let mut template = template.label(id.as_str());
    if candidates > samples {
        // The likeliest answers are chosen by their tokens' log probabilities.
        template.sampling.logprobs.get_or_insert(0);
    }
    template.prompt_logprobs = scored;
    if echo && (request.logprobs.is_some() || max_tokens == 0) {
        template.prompt_logprobs = scored.max(Some(request.logprobs.unwrap_or(0)));
    }
    let mut notices = Notices::default();
    let mut form = None;
    if let Some(structure) = structure {
        let grammar = structure.compiled(&app).await?;
        notices.unenforced = grammar.unenforced().to_vec();
        form = Some(grammar.constraint());
    }
    constrain(&mut template, form)?;
    let submission = Submission {
        request: template,
        prompts: request.prompt.into_vec("prompt")?,
        samples: candidates,
        add_special: request.add_special_tokens.unwrap_or(true),
        session,
    };
    let streams = app.submit(&caller, submission).await?;
    let envelope = Envelope::new(&app, id, "text_completion", model, usage_events);
    let mut writer = CompletionWriter::new(&app, envelope, &streams, candidates);
    writer.logprobs = request.logprobs;
    writer.as_ids = request.return_tokens_as_token_ids.unwrap_or(false);
    if echo {
        writer.echo(&streams);
    }
    if streaming {
        writer.count_prompts(&streams);
        return Ok(notices.mark(sse::respond(streams, writer)));
    }
    let mut answers = complete(streams).await?;
    for (index, answer) in answers.iter().enumerate() {
        writer.envelope.add(&answer.finish, index % candidates == 0);
    }
    let mut choices = Vec::with_capacity(answers.len());
    for place in likeliest(&answers, candidates, samples) {
        let index = choices.len();
        choices.push(writer.choice(index, place, &mut answers[place], scored));
    }
    Ok(notices.mark(writer.envelope.whole(&choices)))
}

/// Returns how many answers to compute per prompt.
fn candidates(
    best_of: Option<usize>,
    samples: usize,
    app: &App,
    stream: bool,
) -> Result<usize, ApiError> {
    let candidates = best_of.unwrap_or(samples);
    let most = app.options.max_samples;
    let problem = if !(samples..=most).contains(&candidates) {
        format!("best_of is {candidates}, but must be between n ({samples}) and {most}")
    } else if stream && candidates > samples {
        "best_of above n is not available in a stream".to_owned()
    } else {
        return Ok(candidates);
    };
    Err(ApiError::invalid(problem).param("best_of"))
}

/// Returns the indices of the `samples` likeliest answers in each group of `candidates`, by the
/// mean log probability of their tokens. If the two numbers are equal, all answers stay in
/// their order.
fn likeliest(answers: &[Answer], candidates: usize, samples: usize) -> Vec<usize> {
    if candidates == samples {
        return (0..answers.len()).collect();
    }
    let mean = |place: &usize| {
        let tokens = &answers[*place].tokens;
        let sum: f64 = tokens.iter().map(|token| f64::from(token.logprob)).sum();
        sum / tokens.len().max(1) as f64
    };
    let places: Vec<usize> = (0..answers.len()).collect();
    let groups = places.chunks(candidates).map(|group| {
        let mut group = group.to_vec();
        group.sort_by(|one, other| mean(other).total_cmp(&mean(one)));
        group.truncate(samples);
        group
    });
    groups.flatten().collect()
}

/// Writes the answers as events.
struct CompletionWriter {
    envelope: Envelope,
    tokenizer: Option<Arc<Tokenizer>>,
    samples: usize,
    ends: Vec<EndTokens>,
    /// Text before each answer: its prompt, if prompts are echoed.
    opening: Vec<String>,
    /// The first token of each echoed prompt.
    first: Vec<Option<u32>>,
    /// Characters of each answer's tokens so far, if log probabilities are reported.
    offsets: Vec<usize>,
    /// How many alternatives are reported per token; no log probabilities if `None`.
    logprobs: Option<u32>,
    /// Whether tokens are named by their ids.
    as_ids: bool,
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
            logprobs: None,
            as_ids: false,
        }
    }

    /// Puts the prompts before the answers.
    fn echo(&mut self, streams: &[TokenStream]) {
        for (index, stream) in streams.iter().enumerate() {
            self.first[index] = stream.prompt_ids().first().copied();
            if let Some(tokenizer) = &self.tokenizer {
                self.opening[index] = tokenizer.decode_prompt(stream.prompt_ids());
            }
        }
    }

    /// Counts the tokens of each prompt once.
    fn count_prompts(&mut self, streams: &[TokenStream]) {
        for stream in streams.iter().step_by(self.samples) {
            self.envelope.count(stream.prompt_ids().len(), 0);
        }
    }

    fn names(&self) -> TokenNames<'_> {
        TokenNames {
            tokenizer: self.tokenizer.as_deref(),
            as_ids: self.as_ids,
        }
    }

    /// Returns the answer of the stream at `place` as a choice.
    fn choice(
        &mut self,
        index: usize,
        place: usize,
        answer: &mut Answer,
        scored: Option<u32>,
    ) -> Choice {
        let prompt = answer.prompt.take();
        let prompt_logprobs = prompt.as_ref().zip(scored);
        let prompt_logprobs = prompt_logprobs
            .map(|(prompt, most)| PromptLogProbs::new(self.names(), &likeliest_of(prompt, most)));
        let echoed = prompt.and_then(|prompt| self.echoed(place, &prompt));
        let mut logprobs = self.logprobs_of(place, &answer.tokens);
        if let (Some(logprobs), Some(mut all)) = (&mut logprobs, echoed) {
            all.append(std::mem::take(logprobs));
            *logprobs = all;
        }
        let mut text = std::mem::take(&mut self.opening[place]);
        text.push_str(&answer.text);
        Choice {
            index,
            text,
            logprobs,
            prompt_logprobs,
            finish_reason: Some(answer.finish_reason),
        }
    }

    /// Returns the log probabilities of an echoed prompt whose tokens after the first are
    /// `tokens`. The first token has none, because nothing comes before it.
    fn echoed(&mut self, index: usize, tokens: &[Token]) -> Option<LogProbs> {
        let most = self.logprobs?;
        let first = self.first[index]?;
        let mut lists = LogProbs::default();
        let mut offset = lists.push_first(self.names(), first);
        for token in likeliest_of(tokens, most).iter() {
            offset = lists.push(self.names(), token, offset);
        }
        self.offsets[index] = offset;
        Some(lists)
    }

    /// Returns the log probabilities of the next tokens of an answer.
    fn logprobs_of(&mut self, index: usize, tokens: &[Token]) -> Option<LogProbs> {
        self.logprobs?;
        let mut offset = self.offsets[index];
        let mut lists = LogProbs::default();
        for token in tokens {
            offset = lists.push(self.names(), token, offset);
        }
        self.offsets[index] = offset;
        Some(lists)
    }
}

/// Returns the tokens with at most `most` alternatives each.
fn likeliest_of(tokens: &[Token], most: u32) -> Cow<'_, [Token]> {
    let most = most as usize;
    if tokens.iter().all(|token| token.top.len() <= most) {
        return Cow::Borrowed(tokens);
    }
    let mut tokens = tokens.to_vec();
    tokens.iter_mut().for_each(|token| token.top.truncate(most));
    Cow::Owned(tokens)
}

impl Writer for CompletionWriter {
    fn open(&mut self, events: &mut Events) {
        if self.logprobs.is_some() {
            // The prompts are sent later, together with their log probabilities.
            return;
        }
        for (index, text) in std::mem::take(&mut self.opening).into_iter().enumerate() {
            if !text.is_empty() {
                self.envelope.send(Choice::piece(index, text, None), events);
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
            let text = std::mem::take(&mut self.opening[index]);
            self.envelope
                .send(Choice::piece(index, text, Some(logprobs)), events);
        }
        self.envelope.count(0, chunk.tokens.len());
        let tokens = self.ends[index].visible(&mut chunk);
        let finish_reason = chunk
            .finish
            .map(|finish| finish_reason(finish.outcome))
            .transpose()?;
        let logprobs = self.logprobs_of(index, &tokens);
        let says_something = !chunk.text.is_empty()
            || finish_reason.is_some()
            || (self.logprobs.is_some() && !tokens.is_empty());
        if let Some(finish) = &chunk.finish {
            let first = index.is_multiple_of(self.samples);
            self.envelope.add(finish, first);
        }
        if says_something {
            let choice = Choice {
                finish_reason,
                ..Choice::piece(index, chunk.text, logprobs)
            };
            self.envelope.send(choice, events);
        }
        Ok(())
    }

    fn close(&mut self, events: &mut Events) {
        self.envelope.close(events);
    }
}
