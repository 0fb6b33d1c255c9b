//! Answers as server-sent events.
//!
//! The response owns the token streams. When the connection goes away, they are dropped with
//! it, which cancels their requests.

use crate::engine::{Chunk, TokenStream};
use crate::server::error::{ApiError, ErrorObject};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;

/// Time without an event after which a comment is sent, so that proxies keep the connection
/// open and a client that has gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Writes the events of an API's answers.
pub(crate) trait Writer: Send + 'static {
    /// Writes the events before the first chunk.
    fn open(&mut self, events: &mut Events);
    /// Returns whether the opening events are sent at once rather than together with the first
    /// chunk. Clients take the first event for the first token, unless the API has events that
    /// say that a request was accepted.
    fn opens_at_once(&self) -> bool {
        false
    }
    /// Writes the events of a chunk of answer `index`.
    fn chunk(&mut self, index: usize, chunk: Chunk, events: &mut Events) -> Result<(), ApiError>;
    /// Writes the events after the end of the last answer.
    fn close(&mut self, events: &mut Events);
    /// Writes the error that takes the place of all further events.
    fn fail(&mut self, error: &ApiError, events: &mut Events) {
        events.json(&ErrorObject { error: &error.body });
        events.done();
    }
}

/// Events that are ready to be sent.
#[derive(Default)]
pub(crate) struct Events(Vec<Event>);

impl Events {
    /// Adds an event whose data is JSON.
    pub fn json(&mut self, data: &impl Serialize) {
        self.push(Event::default(), data);
    }

    /// Adds a named event whose data is JSON.
    pub fn named(&mut self, name: &str, data: &impl Serialize) {
        self.push(Event::default().event(name), data);
    }

    /// Adds the end marker of OpenAI's older APIs.
    pub fn done(&mut self) {
        self.0.push(Event::default().data("[DONE]"));
    }

    fn push(&mut self, event: Event, data: &impl Serialize) {
        match event.json_data(data) {
            Ok(event) => self.0.push(event),
            // Our own types always serialize.
            Err(error) => tracing::error!(%error, "an event could not be written"),
        }
    }
}

/// Returns the response that sends the events of `answers`, as `writer` writes them.
pub(crate) fn respond(answers: Vec<TokenStream>, writer: impl Writer) -> Response {
    send(events(answers, writer))
}

/// Returns a response that sends these events.
pub(crate) fn send(events: impl Stream<Item = Event> + Send + 'static) -> Response {
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE);
    let sse = Sse::new(events.map(Ok::<_, Infallible>)).keep_alive(keep_alive);
    let unbuffered = (
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    let uncached = (header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    ([unbuffered, uncached], sse).into_response()
}

/// The state of a response that is being streamed.
struct Open<W> {
    writer: W,
    /// Number of answers that have not ended.
    open: usize,
    /// Whether the writer's opening events have been written.
    opened: bool,
}

fn events(answers: Vec<TokenStream>, mut writer: impl Writer) -> impl Stream<Item = Event> + Send {
    let mut opening = Events::default();
    let opened = writer.opens_at_once();
    if opened {
        writer.open(&mut opening);
    }
    let state = Open {
        writer,
        open: answers.len(),
        opened,
    };
    let rest = merge(answers).scan(state, |state, (index, chunk)| {
        if state.open == 0 {
            return std::future::ready(None);
        }
        let mut events = Events::default();
        let written = chunk.map_err(ApiError::from).and_then(|chunk| {
            if !std::mem::replace(&mut state.opened, true) {
                state.writer.open(&mut events);
            }
            state.open -= usize::from(chunk.finish.is_some());
            state.writer.chunk(index, chunk, &mut events)
        });
        match written {
            Ok(()) if state.open == 0 => state.writer.close(&mut events),
            Ok(()) => {}
            Err(error) => {
                state.open = 0;
                state.writer.fail(&error, &mut events);
            }
        }
        std::future::ready(Some(stream::iter(events.0)))
    });
    stream::iter(opening.0).chain(rest.flatten())
}

/// Merges the chunks of all answers as they arrive, each with the index of its answer.
pub(crate) fn merge<E>(
    answers: Vec<impl Stream<Item = Result<Chunk, E>> + Send + Unpin>,
) -> impl Stream<Item = (usize, Result<Chunk, E>)> + Send {
    let numbered = answers.into_iter().enumerate();
    let mut numbered = numbered.map(|(index, answer)| answer.map(move |chunk| (index, chunk)));
    match numbered.len() {
        // Most requests have one answer, and polling it directly costs less per token.
        1 => stream::iter(numbered.next()).flatten().left_stream(),
        _ => stream::select_all(numbered).right_stream(),
    }
}
