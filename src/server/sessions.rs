//! `/v1/sessions`: conversations whose keys and values carry over from turn to turn.
//!
//! A turn is a request for a completion or a chat completion with a `session_id`. A
//! completion's prompt continues from all the turns before it. The messages of a chat are
//! the whole conversation, as ever; what they have in common with the turns before is not
//! computed again. One turn at a time: another one is a conflict, 409. A turn whose
//! connection is closed leaves its session as it was before the turn.

use super::abort::Freed;
use super::error::ApiError;
use super::json::{JsonBody, PathPart};
use super::{App, unix_time};
use crate::engine::{
    EngineSnapshot, Request, Session, SessionOptions, Stop, SubmitError, TokenStream,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How often forgotten sessions are looked for, at most.
const SWEEP: Duration = Duration::from_secs(30);

/// The open sessions by their ids.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<HashMap<String, Arc<OpenSession>>>);

/// A session that a client has opened.
#[derive(Debug)]
pub(crate) struct OpenSession {
    id: String,
    session: Session,
    pin: Option<Duration>,
    /// Seconds since 1970.
    created: u64,
    used: Mutex<Instant>,
}

impl OpenSession {
    /// Takes a turn.
    pub fn turn(
        &self,
        request: Request,
        prompt: SessionPrompt,
    ) -> Result<TokenStream, SubmitError> {
        match prompt {
            SessionPrompt::Next => self.session.generate(request),
            SessionPrompt::Whole => self.session.generate_anew(request),
        }
    }

    fn used(&self) -> MutexGuard<'_, Instant> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Deref for OpenSession {
    type Target = Session;

    fn deref(&self) -> &Session {
        &self.session
    }
}

impl Sessions {
    fn open(&self) -> MutexGuard<'_, HashMap<String, Arc<OpenSession>>> {
        // Entries come and go as a whole.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An open session, which counts as used now.
    pub fn find(&self, id: &str) -> Result<Arc<OpenSession>, ApiError> {
        let found = self.open().get(id).cloned();
        let session = found.ok_or_else(|| unknown(id))?;
        *session.used() = Instant::now();
        Ok(session)
    }

    /// Opens a session, unless `most` are open.
    fn add(&self, session: Arc<OpenSession>, most: usize) -> Result<(), ApiError> {
        let mut open = self.open();
        if open.len() >= most {
            let problem = format!("{most} sessions are open, no more are accepted");
            let status = StatusCode::TOO_MANY_REQUESTS;
            let refusal = ApiError::new(status, "rate_limit_error", problem);
            return Err(refusal.code("too_many_sessions").retry_after(1));
        }
        open.insert(session.id.clone(), session);
        Ok(())
    }

    /// Ends the sessions that were left alone for `ttl`. A turn is use.
    fn sweep(&self, ttl: Duration) {
        let now = Instant::now();
        let forgotten = |session: &OpenSession| {
            let mut used = session.used();
            if session.is_generating() {
                *used = now;
            }
            now.saturating_duration_since(*used) >= ttl
        };
        let mut open = self.open();
        let ended: Vec<_> = open
            .extract_if(|_, session| forgotten(session))
            .map(|(_, session)| session)
            .collect();
        drop(open);
        for session in ended {
            tracing::info!(session = %session.id(), "a session was left alone, and is ended");
        }
    }
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found(format!("no session {id:?} is open"))
        .param("session_id")
        .code("session_not_found")
}

/// Ends forgotten sessions for as long as the server lives.
pub(crate) async fn keep(app: Weak<App>) {
    loop {
        let Some(ttl) = app.upgrade().map(|app| app.options.session_ttl) else {
            return;
        };
        tokio::time::sleep(SWEEP.min(ttl / 4).max(Duration::from_millis(1))).await;
        if let Some(app) = app.upgrade() {
            app.sessions.sweep(ttl);
        }
    }
}

/// Which session's turn a request is.
#[derive(Debug)]
pub(crate) struct SessionTurn {
    pub id: String,
    pub prompt: SessionPrompt,
}

/// What a prompt is to its session.
#[derive(Clone, Copy, Debug)]
pub(crate) enum SessionPrompt {
    /// It follows the turns before it.
    Next,
    /// It is the whole conversation.
    Whole,
}

/// Seconds that a session may be pinned for: a day.
const LONGEST_PIN: f64 = 86_400.0;

/// How a session is to be kept.
#[derive(Debug, Default, Deserialize)]
struct NewSession {
    /// After each turn, keep its keys and values from others for so long.
    pin_seconds: Option<f64>,
}

/// A session as clients see it.
#[derive(Debug, Serialize)]
pub(crate) struct SessionObject {
    id: String,
    object: &'static str,
    /// Seconds since 1970.
    created: u64,
    pin_seconds: Option<f64>,
    /// Since it was last asked for.
    idle_seconds: f64,
    /// Whether a turn is generating.
    generating: bool,
    /// Tokens of the finished turns.
    context_tokens: usize,
    /// Of these, how many have their keys and values in the cache. Those of a turn that
    /// is generating are the turn's.
    kept_tokens: usize,
    /// Blocks that hold them.
    kept_blocks: usize,
    /// Whether they are kept from others.
    pinned: bool,
}

impl SessionObject {
    fn new(open: &OpenSession, snapshot: &EngineSnapshot) -> Self {
        // They are in the order of their ids.
        let place = snapshot
            .sessions
            .binary_search_by_key(&open.session.id(), |state| state.id);
        let state = place.ok().and_then(|place| snapshot.sessions.get(place));
        let kept = state.map(|state| state.kept).unwrap_or_default();
        let idle = open.used().elapsed();
        Self {
            id: open.id.clone(),
            object: "session",
            created: open.created,
            pin_seconds: open.pin.map(|pin| pin.as_secs_f64()),
            idle_seconds: idle.as_secs_f64(),
            generating: open.is_generating(),
            context_tokens: open.context_tokens(),
            kept_tokens: kept.tokens,
            kept_blocks: kept.blocks,
            pinned: kept.pinned,
        }
    }
}

/// `POST /v1/sessions`: opens one.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    body: JsonBody,
) -> Result<(StatusCode, Json<SessionObject>), ApiError> {
    let new: NewSession = body.parse_or_default()?;
    let pin = new.pin_seconds.map(|seconds| {
        if (0.0..=LONGEST_PIN).contains(&seconds) {
            return Ok(Duration::from_secs_f64(seconds));
        }
        let problem = format!("pin_seconds is {seconds}, but must be from 0 to {LONGEST_PIN}");
        Err(ApiError::invalid(problem).param("pin_seconds"))
    });
    let pin = pin.transpose()?;
    app.sessions.sweep(app.options.session_ttl);
    let session = OpenSession {
        id: format!("session-{}", Uuid::new_v4().simple()),
        session: app.engine.session_with(SessionOptions { pin }),
        pin,
        created: unix_time(),
        used: Mutex::new(Instant::now()),
    };
    let session = Arc::new(session);
    app.sessions
        .add(Arc::clone(&session), app.options.max_sessions)?;
    let snapshot = app.engine.snapshot().await?;
    let object = SessionObject::new(&session, &snapshot);
    Ok((StatusCode::CREATED, Json(object)))
}

/// The open sessions, the oldest first.
#[derive(Debug, Serialize)]
pub(crate) struct SessionList {
    object: &'static str,
    data: Vec<SessionObject>,
}

/// `GET /v1/sessions`: all of them.
pub(crate) async fn list(State(app): State<Arc<App>>) -> Result<Json<SessionList>, ApiError> {
    let snapshot = app.engine.snapshot().await?;
    let mut open: Vec<_> = app.sessions.open().values().cloned().collect();
    open.sort_unstable_by_key(|session| session.session.id());
    let data = open.iter().map(|open| SessionObject::new(open, &snapshot));
    Ok(Json(SessionList {
        object: "list",
        data: data.collect(),
    }))
}

/// `GET /v1/sessions/{id}`.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    PathPart(id): PathPart,
) -> Result<Json<SessionObject>, ApiError> {
    let found = app.sessions.open().get(&id).cloned();
    let session = found.ok_or_else(|| unknown(&id))?;
    let snapshot = app.engine.snapshot().await?;
    Ok(Json(SessionObject::new(&session, &snapshot)))
}

/// What becomes of the turn that is stopped.
#[derive(Debug, Default, Deserialize)]
struct StopTurn {
    mode: Option<StopMode>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StopMode {
    /// The session keeps the prompt and the answer so far.
    Keep,
    /// The session is as it was before the turn.
    Rewind,
}

/// The receipt of something that was stopped or ended.
#[derive(Debug, Serialize)]
pub(crate) struct SessionReceipt {
    id: String,
    object: &'static str,
    #[serde(flatten)]
    freed: Freed,
}

/// `POST /v1/sessions/{id}/stop`: stops the turn that is generating, if there is one, and
/// answers when its blocks are free. Keeps it unless the body says otherwise.
pub(crate) async fn stop(
    State(app): State<Arc<App>>,
    PathPart(id): PathPart,
    body: JsonBody,
) -> Result<Json<SessionReceipt>, ApiError> {
    let stop: StopTurn = body.parse_or_default()?;
    let session = app.sessions.find(&id)?;
    let receipt = session.stop(match stop.mode.unwrap_or(StopMode::Keep) {
        StopMode::Keep => Stop::Keep,
        StopMode::Rewind => Stop::Rewind,
    });
    Ok(Json(SessionReceipt {
        id,
        object: "session.stopped",
        freed: receipt.await?.into(),
    }))
}

/// `DELETE /v1/sessions/{id}`: ends it and its turn, and answers when all its blocks are
/// free.
pub(crate) async fn end(
    State(app): State<Arc<App>>,
    PathPart(id): PathPart,
) -> Result<Json<SessionReceipt>, ApiError> {
    let removed = app.sessions.open().remove(&id);
    let session = removed.ok_or_else(|| unknown(&id))?;
    let receipt = session.post_end();
    Ok(Json(SessionReceipt {
        id,
        object: "session.deleted",
        freed: receipt.await?.into(),
    }))
}
