//! The JSON object around the choices of completions and chat completions, for whole answers
//! and for events.

use super::answer::Usage;
use super::logprobs::PromptLogProbs;
use super::sse::Events;
use super::stream_options::UsageEvents;
use crate::engine::Finish;
use crate::server::{App, unix_time};
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// What all objects of an answer have in common, and the tokens used so far.
pub(crate) struct Envelope {
    head: Head,
    /// Which events report usage. The last event has the totals; earlier ones have null, or the
    /// counts so far.
    usage_events: UsageEvents,
    usage: Usage,
    so_far: UsageSoFar,
    /// Log probabilities of a chat's prompt.
    pub prompt_logprobs: Option<PromptLogProbs>,
}

/// Tokens used before the answers are complete.
#[derive(Clone, Copy, Debug, Default, Serialize)]
struct UsageSoFar {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
}

#[derive(Serialize)]
#[serde(untagged)]
enum AnyUsage {
    Whole(Usage),
    SoFar(UsageSoFar),
}

#[derive(Serialize)]
struct Head {
    id: String,
    object: &'static str,
    created: u64,
    model: String,
    system_fingerprint: String,
}

#[derive(Serialize)]
struct Object<'a, C> {
    #[serde(flatten)]
    head: &'a Head,
    choices: &'a [C],
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<AnyUsage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<&'a PromptLogProbs>,
}

impl Envelope {
    /// Creates the envelope of the answer with this id.
    pub fn new(
        app: &App,
        id: String,
        object: &'static str,
        model: String,
        usage_events: UsageEvents,
    ) -> Self {
        Self {
            head: Head {
                id,
                object,
                created: unix_time(),
                model,
                system_fingerprint: app.fingerprint.clone(),
            },
            usage_events,
            usage: Usage::default(),
            so_far: UsageSoFar::default(),
            prompt_logprobs: None,
        }
    }

    /// Counts tokens of a prompt and of an answer that has not ended yet.
    pub fn count(&mut self, prompt_tokens: usize, completion_tokens: usize) {
        self.so_far.prompt_tokens += prompt_tokens;
        self.so_far.completion_tokens += completion_tokens;
        self.so_far.total_tokens += prompt_tokens + completion_tokens;
    }

    /// Counts an answer that has ended. Its prompt is counted only with the `first` answer to
    /// it.
    pub fn add(&mut self, finish: &Finish, first: bool) {
        self.usage.add(finish, first);
    }

    /// Returns the complete answer.
    pub fn whole<C: Serialize>(&self, choices: &[C]) -> Response {
        let object = Object {
            head: &self.head,
            choices,
            usage: Some(Some(AnyUsage::Whole(self.usage))),
            prompt_logprobs: self.prompt_logprobs.as_ref(),
        };
        Json(object).into_response()
    }

    /// Sends a piece of the answer.
    pub fn send<C: Serialize>(&self, choice: C, events: &mut Events) {
        events.json(&Object {
            head: &self.head,
            choices: &[choice],
            usage: match self.usage_events {
                UsageEvents::None => None,
                UsageEvents::Last => Some(None),
                UsageEvents::Each => Some(Some(AnyUsage::SoFar(self.so_far))),
            },
            prompt_logprobs: None,
        });
    }

    /// Sends the end of the stream.
    pub fn close(&self, events: &mut Events) {
        if self.usage_events != UsageEvents::None {
            events.json(&Object::<()> {
                head: &self.head,
                choices: &[],
                usage: Some(Some(AnyUsage::Whole(self.usage))),
                prompt_logprobs: None,
            });
        }
        events.done();
    }
}
