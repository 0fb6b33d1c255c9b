//! `GET /health` and `GET /ready`: whether the engine is alive, and whether the server accepts
//! requests.

use crate::server::App;
use crate::server::error::ApiError;
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};
use std::sync::Arc;

/// Reports whether the scheduler thread is alive, judged by its heartbeat.
pub(crate) async fn health(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let health = app.engine.health();
    if !health.is_healthy() {
        let problem = format!("the engine is not healthy: {:?}", health.status);
        return Err(ApiError::unavailable(problem).code("unhealthy"));
    }
    Ok(Json(json!({
        "status": "ok",
        "idle": health.idle,
        "draining": health.draining,
        "step": health.step.as_u64(),
        "since_beat_ms": health.since_beat.as_millis() as u64,
    })))
}

/// Reports whether the server accepts requests, which it does not while it drains.
pub(crate) async fn ready(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let health = app.engine.health();
    if health.draining {
        let problem = "the server is being drained";
        return Err(ApiError::unavailable(problem).code("draining"));
    }
    if !health.is_healthy() {
        let problem = format!("the engine is not healthy: {:?}", health.status);
        return Err(ApiError::unavailable(problem).code("unhealthy"));
    }
    Ok(Json(json!({"status": "ready"})))
}
