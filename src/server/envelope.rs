//! What completions and chat completions have in common: the object around the choices, as
//! a whole and as events.

use super::answer::Usage;
use super::sse::Events;
use super::{App, StreamOptions, unix_time};
use crate::engine::Finish;
use axum::Json;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

/// What every object of an answer says, and the tokens that it took so far.
pub(super) struct Envelope {
    head: Head,
    /// Whether events tell the usage: the last one does, and the others that it is not
    /// known yet.
    usage_wanted: bool,
    usage: Usage,
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
    usage: Option<Option<Usage>>,
}

impl Envelope {
    /// Around the choices of answer `id`; `options` are those of a stream.
    pub fn new(
        app: &App,
        id: String,
        object: &'static str,
        model: String,
        options: Option<StreamOptions>,
    ) -> Self {
        Self {
            head: Head {
                id,
                object,
                created: unix_time(),
                model,
                system_fingerprint: app.fingerprint.clone(),
            },
            usage_wanted: options.is_some_and(|options| options.usage()),
            usage: Usage::default(),
        }
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
            usage: Some(Some(self.usage)),
        };
        Json(object).into_response()
    }

    /// Sends a piece of it.
    pub fn send<C: Serialize>(&self, choice: C, events: &mut Events) {
        events.json(&Object {
            head: &self.head,
            choices: &[choice],
            usage: self.usage_wanted.then_some(None),
        });
    }

    /// Sends the end.
    pub fn close(&self, events: &mut Events) {
        if self.usage_wanted {
            events.json(&Object::<()> {
                head: &self.head,
                choices: &[],
                usage: Some(Some(self.usage)),
            });
        }
        events.done();
    }
}
