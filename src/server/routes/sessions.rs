//! `/v1/sessions`: conversations whose keys and values are kept between turns.
//!
//! A turn is a completion or chat completion request with a `session_id`. The prompt of a
//! completion continues all turns before it. The messages of a chat are the whole conversation,
//! as usual; the part that they share with the turns before is not computed again. A session
//! has one turn at a time, and a second one is refused with status 409. If the connection of a
//! turn is closed, the session returns to its state before the turn.
//!
//! With API keys, only the key that has opened a session can begin a turn of it. Admin keys can
//! list, stop and end the sessions of all keys. To any other key, a session does not exist.

use super::abort::Freed;
use crate::engine::{
    EngineSnapshot, Request, Session, SessionOptions, Stop, SubmitError, TokenStream,
};
use crate::server::error::ApiError;
use crate::server::http::auth::{Caller, Owner};
use crate::server::http::body::{JsonBody, PathPart};
use crate::server::openai::session_turn::SessionPrompt;
use crate::server::{App, unix_time};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Longest interval between two searches for unused sessions.
const SWEEP: Duration = Duration::from_secs(30);

/// The open sessions by id.
#[derive(Debug, Default)]
pub(crate) struct Sessions(Mutex<HashMap<String, Arc<OpenSession>>>);

/// A session that a client has opened.
#[derive(Debug)]
pub(crate) struct OpenSession {
    id: String,
    owner: Owner,
    session: Session,
    pin: Option<Duration>,
    /// Seconds since 1970.
    created: u64,
    used: Mutex<Instant>,
}

impl OpenSession {
    /// Begins a turn.
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

    /// Marks the session as used now.
    fn touch(&self) {
        *self.used() = Instant::now();
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
        // Entries are added and removed as a whole, so the map is always consistent.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a session that the caller may begin a turn of, and marks it as used now.
    pub fn use_own(&self, caller: &Caller, id: &str) -> Result<Arc<OpenSession>, ApiError> {
        let session = self.managed(caller, id)?;
        if session.owner != caller.owner() {
            return Err(unknown(id));
        }
        session.touch();
        Ok(session)
    }

    /// Returns a session that the caller may see and end.
    fn managed(&self, caller: &Caller, id: &str) -> Result<Arc<OpenSession>, ApiError> {
        let open = self.open();
        let found = open.get(id).filter(|open| caller.manages(open.owner));
        found.cloned().ok_or_else(|| unknown(id))
    }

    /// Removes a session that the caller may end.
    fn remove(&self, caller: &Caller, id: &str) -> Result<Arc<OpenSession>, ApiError> {
        let mut open = self.open();
        match open.get(id) {
            Some(session) if caller.manages(session.owner) => open.remove(id),
            _ => None,
        }
        .ok_or_else(|| unknown(id))
    }

    /// Adds an open session, unless `most` are open already.
    fn add(&self, session: Arc<OpenSession>, most: usize) -> Result<(), ApiError> {
        let mut open = self.open();
        if open.len() >= most {
            let problem = format!("{most} sessions are open, which is the maximum");
            let status = StatusCode::TOO_MANY_REQUESTS;
            let refusal = ApiError::new(status, "rate_limit_error", problem);
            return Err(refusal.code("too_many_sessions").retry_after(1));
        }
        open.insert(session.id.clone(), session);
        Ok(())
    }

    /// Ends the sessions that have not been used for `ttl`. A session is in use during a turn.
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
            tracing::info!(session = %session.id(), "ended an unused session");
        }
    }
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found(format!("no session {id:?} is open"))
        .param("session_id")
        .code("session_not_found")
}

/// Ends unused sessions for as long as the server lives.
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

/// Longest time in seconds that a session may be pinned: one day.
const LONGEST_PIN: f64 = 86_400.0;

/// The options of a new session.
#[derive(Debug, Default, Deserialize)]
struct NewSession {
    /// For how long after each turn other requests cannot take the session's blocks.
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
    /// Seconds since the session was last used.
    idle_seconds: f64,
    /// Whether a turn is generating.
    generating: bool,
    /// Number of tokens of the finished turns.
    context_tokens: usize,
    /// How many of these have their keys and values in the cache. During a turn, the turn holds
    /// them instead of the session.
    #[serde(rename = "kept_tokens")]
    retained_tokens: usize,
    /// Number of blocks that hold them.
    #[serde(rename = "kept_blocks")]
    retained_blocks: usize,
    /// Whether the blocks are pinned, so that other requests cannot take them.
    pinned: bool,
}

impl SessionObject {
    fn new(open: &OpenSession, snapshot: &EngineSnapshot) -> Self {
        // The snapshot lists sessions in the order of their ids.
        let place = snapshot
            .sessions
            .binary_search_by_key(&open.session.id(), |state| state.id);
        let state = place.ok().and_then(|place| snapshot.sessions.get(place));
        let retained = state.map(|state| state.retained).unwrap_or_default();
        let idle = open.used().elapsed();
        Self {
            id: open.id.clone(),
            object: "session",
            created: open.created,
            pin_seconds: open.pin.map(|pin| pin.as_secs_f64()),
            idle_seconds: idle.as_secs_f64(),
            generating: open.is_generating(),
            context_tokens: open.context_tokens(),
            retained_tokens: retained.tokens,
            retained_blocks: retained.blocks,
            pinned: retained.pinned,
        }
    }
}

/// `POST /v1/sessions`: opens a session.
pub(crate) async fn create(
    State(app): State<Arc<App>>,
    caller: Caller,
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
    // Taken before the session is opened: nobody would know of a session that stays open after
    // an error. A session that is not in the snapshot retains nothing.
    let snapshot = app.engine.snapshot().await?;
    let session = OpenSession {
        id: format!("session-{}", Uuid::new_v4().simple()),
        owner: caller.owner(),
        session: app.engine.session_with(SessionOptions { pin }),
        pin,
        created: unix_time(),
        used: Mutex::new(Instant::now()),
    };
    let session = Arc::new(session);
    app.sessions
        .add(Arc::clone(&session), app.options.max_sessions)?;
    let object = SessionObject::new(&session, &snapshot);
    Ok((StatusCode::CREATED, Json(object)))
}

/// The open sessions, oldest first.
#[derive(Debug, Serialize)]
pub(crate) struct SessionList {
    object: &'static str,
    data: Vec<SessionObject>,
}

/// `GET /v1/sessions`: lists the open sessions that the caller may see.
pub(crate) async fn list(
    State(app): State<Arc<App>>,
    caller: Caller,
) -> Result<Json<SessionList>, ApiError> {
    let snapshot = app.engine.snapshot().await?;
    let mut open: Vec<_> = app.sessions.open().values().cloned().collect();
    open.retain(|session| caller.manages(session.owner));
    open.sort_unstable_by_key(|session| session.session.id());
    let data = open.iter().map(|open| SessionObject::new(open, &snapshot));
    Ok(Json(SessionList {
        object: "list",
        data: data.collect(),
    }))
}

/// `GET /v1/sessions/{id}`: returns an open session. This does not count as use.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    caller: Caller,
    PathPart(id): PathPart,
) -> Result<Json<SessionObject>, ApiError> {
    let session = app.sessions.managed(&caller, &id)?;
    let snapshot = app.engine.snapshot().await?;
    Ok(Json(SessionObject::new(&session, &snapshot)))
}

/// What to do with the turn that is stopped.
#[derive(Debug, Default, Deserialize)]
struct StopTurn {
    mode: Option<StopMode>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum StopMode {
    /// The session keeps the prompt and the answer so far.
    Keep,
    /// The session returns to its state before the turn.
    Rewind,
}

/// The receipt for a turn that was stopped or a session that was ended.
#[derive(Debug, Serialize)]
pub(crate) struct SessionReceipt {
    id: String,
    object: &'static str,
    #[serde(flatten)]
    freed: Freed,
}

/// `POST /v1/sessions/{id}/stop`: stops the turn that is generating, if there is one, and
/// answers once its blocks are free. The session keeps the turn unless the body says otherwise.
pub(crate) async fn stop(
    State(app): State<Arc<App>>,
    caller: Caller,
    PathPart(id): PathPart,
    body: JsonBody,
) -> Result<Json<SessionReceipt>, ApiError> {
    let stop: StopTurn = body.parse_or_default()?;
    let session = app.sessions.managed(&caller, &id)?;
    session.touch();
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

/// `DELETE /v1/sessions/{id}`: ends a session and its turn, and answers once all its blocks are
/// free.
pub(crate) async fn end(
    State(app): State<Arc<App>>,
    caller: Caller,
    PathPart(id): PathPart,
) -> Result<Json<SessionReceipt>, ApiError> {
    let session = app.sessions.remove(&caller, &id)?;
    let receipt = session.post_end();
    Ok(Json(SessionReceipt {
        id,
        object: "session.deleted",
        freed: receipt.await?.into(),
    }))
}
