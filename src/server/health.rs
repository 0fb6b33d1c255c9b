//! `/health`, `/ready`, `/metrics`, `/version` and `/openapi.json`.

use super::App;
use super::error::ApiError;
use axum::Json;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
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

/// Makes a draining server close each connection after its current request, so that clients
/// send the next one elsewhere.
pub(super) async fn close_while_draining(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let first_version = request.version() <= Version::HTTP_11;
    let mut response = next.run(request).await;
    // HTTP/2 has no such header; it announces the shutdown itself.
    if first_version && app.engine.health().draining {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    response
}

/// Returns the metrics for Prometheus.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> Result<Response, ApiError> {
    let Some(metrics) = &app.options.metrics else {
        return Err(ApiError::not_found(
            "this server was started without metrics",
        ));
    };
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    Ok(([(header::CONTENT_TYPE, kind)], metrics.render()).into_response())
}

/// Returns the version of the program.
pub(crate) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// Returns the OpenAPI description of all routes.
pub(crate) async fn openapi() -> Response {
    let document = include_str!("openapi.json");
    ([(header::CONTENT_TYPE, "application/json")], document).into_response()
}
