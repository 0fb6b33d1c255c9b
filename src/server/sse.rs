//! Answers as server-sent events.
//!
//! The response owns the token streams: when the connection goes, so do they, and that
//! cancels their requests.

use super::error::{ApiError, ErrorObject};
use crate::engine::{Chunk, TokenStream};
use axum::http::{HeaderName, HeaderValue, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt, stream};
use serde::Serialize;
use std::convert::Infallible;
use std::time::Duration;

/// A comment is sent when nothing else was for so long, so that proxies keep the
/// connection and a client that is gone is noticed.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an API tells of its answers, event by event.
pub(crate) trait Writer: Send + 'static {
    /// What comes before the first piece.
    fn open(&mut self, events: &mut Events);
    /// Whether that is sent at once, rather than together with the first piece. Clients
    /// take the first event for the first token unless the API has events that say that a
    /// request was accepted.
    fn opens_at_once(&self) -> bool {
        false
    }
    /// A piece of answer `index`.
    fn chunk(&mut self, index: usize, chunk: Chunk, events: &mut Events) -> Result<(), ApiError>;
    /// After the end of the last answer.
    fn close(&mut self, events: &mut Events);
    /// In place of the rest.
    fn fail(&mut self, error: &ApiError, events: &mut Events) {
        events.json(&ErrorObject { error: &error.body });
        events.done();
    }
}

/// Events that are ready to be sent.
#[derive(Default)]
pub(crate) struct Events(Vec<Event>);

impl Events {
    /// An event whose data is JSON.
    pub fn json(&mut self, data: &impl Serialize) {
        self.push(Event::default(), data);
    }

    /// The same with a name.
    pub fn named(&mut self, name: &str, data: &impl Serialize) {
        self.push(Event::default().event(name), data);
    }

    /// The end as OpenAI's older APIs mark it.
    pub fn done(&mut self) {
        self.0.push(Event::default().data("[DONE]"));
    }

    fn push(&mut self, event: Event, data: &impl Serialize) {
        match event.json_data(data) {
            Ok(event) => self.0.push(event),
            // Our own types are always JSON.
            Err(error) => tracing::error!(%error, "an event could not be written"),
        }
    }
}

/// The response that sends what `writer` makes of `answers`.
pub(crate) fn respond(answers: Vec<TokenStream>, writer: impl Writer) -> Response {
    send(events(answers, writer))
}

/// A response of events.
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

/// What is left to be done for the events of a request.
struct Open<W> {
    writer: W,
    /// Answers that have not ended.
    open: usize,
    /// Whether the writer's opening has been sent.
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

/// The chunks of all answers as they come, with the answer's index.
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
