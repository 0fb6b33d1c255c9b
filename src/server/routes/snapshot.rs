//! `GET /v1/engine/snapshot`: the internal state of the engine, once or as a stream. It shows
//! the requests of everybody, so with API keys it needs an admin key.

use crate::engine::EngineSnapshot;
use crate::server::App;
use crate::server::error::ApiError;
use crate::server::http::auth::Caller;
use crate::server::openai::sse;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header;
use axum::response::sse::Event;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tokio::time::{MissedTickBehavior, interval};

/// How long a snapshot is reused. However many clients watch, the scheduler thread is asked at
/// most once per interval.
const FRESH: Duration = Duration::from_millis(50);

/// Accepted intervals between two snapshots of a stream, in milliseconds.
const EVERY_MS: std::ops::RangeInclusive<u64> = 50..=10_000;

/// The latest snapshot, shared by all clients.
#[derive(Debug, Default)]
pub(crate) struct Snapshots(Mutex<Option<Latest>>);

#[derive(Clone, Debug)]
struct Latest {
    at: Instant,
    json: Arc<str>,
    /// Whether no request was open or closing.
    at_rest: bool,
}

/// The snapshot as it is sent.
#[derive(Serialize)]
struct SnapshotObject<'a> {
    object: &'static str,
    model: &'a str,
    #[serde(flatten)]
    snapshot: &'a EngineSnapshot,
}

impl App {
    async fn latest_snapshot(&self) -> Result<Latest, ApiError> {
        let mut latest = self.snapshots.0.lock().await;
        if let Some(latest) = latest.as_ref().filter(|latest| latest.at.elapsed() < FRESH) {
            return Ok(latest.clone());
        }
        let snapshot = self.engine.snapshot().await?;
        let json = serde_json::to_string(&SnapshotObject {
            object: "engine.snapshot",
            model: &self.options.model_name,
            snapshot: &snapshot,
        });
        // Our own types always serialize.
        let json = json.map_err(|error| ApiError::unavailable(error.to_string()))?;
        let taken = Latest {
            at: Instant::now(),
            json: json.into(),
            at_rest: snapshot.stats.open == 0 && snapshot.stats.closing == 0,
        };
        *latest = Some(taken.clone());
        Ok(taken)
    }
}

/// How the snapshot is wanted.
#[derive(Debug, Deserialize)]
pub(crate) struct SnapshotQuery {
    /// Whether to send server-sent events.
    #[serde(default)]
    stream: bool,
    /// Interval between two events in milliseconds.
    every_ms: Option<u64>,
}

/// Returns a snapshot, or a stream of snapshots that ends when the server has been drained.
pub(crate) async fn snapshot(
    State(app): State<Arc<App>>,
    caller: Caller,
    query: Result<Query<SnapshotQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    caller.require_admin()?;
    let query = query.map_err(|problem| ApiError::invalid(problem.body_text()))?;
    let every = query.every_ms.unwrap_or(500);
    if !EVERY_MS.contains(&every) {
        let (least, most) = (EVERY_MS.start(), EVERY_MS.end());
        let problem = format!("every_ms is {every}, but must be from {least} to {most}");
        return Err(ApiError::invalid(problem).param("every_ms"));
    }
    if !query.stream {
        let json = app.latest_snapshot().await?.json;
        let kind = (header::CONTENT_TYPE, "application/json");
        return Ok(([kind], json.to_string()).into_response());
    }
    let mut ticks = interval(Duration::from_millis(every));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let watcher = Watcher {
        app,
        ticks,
        over: false,
    };
    Ok(sse::send(stream::unfold(watcher, Watcher::next)))
}

/// A client that receives a stream of snapshots.
struct Watcher {
    app: Arc<App>,
    ticks: tokio::time::Interval,
    over: bool,
}

impl Watcher {
    async fn next(mut self) -> Option<(Event, Self)> {
        if self.over {
            return None;
        }
        self.ticks.tick().await;
        let latest = self.app.latest_snapshot().await.ok()?;
        self.over = latest.at_rest && self.app.engine.health().draining;
        Some((Event::default().data(&*latest.json), self))
    }
}
