//! What completions and chat completions have in common: the object around the choices, as
//! a whole and as events.

use super::answer::Usage;
use super::logprobs::PromptLogProbs;
use super::sse::Events;
use super::{App, UsageEvents, unix_time};
use crate::engine::Finish;
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// What every object of an answer says, and the tokens that it took so far.
pub(super) struct Envelope {
    head: Head,
    /// Whether events tell the usage: the last one does, and the others that it is not
    /// known yet, or how many tokens there were so far.
    usage_events: UsageEvents,
    usage: Usage,
    so_far: UsageSoFar,
    /// Those of a chat's prompt.
    pub prompt_logprobs: Option<PromptLogProbs>,
}

/// Tokens before the answers are complete.
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
    /// Around the choices of answer `id`.
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

    /// Counts tokens of a prompt, and of an answer, before that has ended.
    pub fn count(&mut self, prompt_tokens: usize, completion_tokens: usize) {
        self.so_far.prompt_tokens += prompt_tokens;
        self.so_far.completion_tokens += completion_tokens;
        self.so_far.total_tokens += prompt_tokens + completion_tokens;
    }

    /// Counts an answer that has ended; its prompt if it is the first to it.
    pub fn add(&mut self, finish: &Finish, first: bool) {
        self.usage.add(finish, first);
    }

    /// The whole answer.
    pub fn whole<C: Serialize>(&self, choices: &[C]) -> Response {
        let object = Object {
            head: &self.head,
            choices,
            usage: Some(Some(AnyUsage::Whole(self.usage))),
            prompt_logprobs: self.prompt_logprobs.as_ref(),
        };
        Json(object).into_response()
    }

    /// Sends a piece of it.
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

    /// Sends the end.
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
