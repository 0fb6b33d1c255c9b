//! Access log: a span around each request, and a line when its answer begins.

use super::trace_context;
use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use std::time::Instant;
use tower_http::request_id::RequestId;
use tracing::Instrument;

/// Routes that machines poll all the time; they are logged at debug level.
const POLLED: [&str; 3] = ["/health", "/ready", "/metrics"];

/// Handles the request within a span, which is the parent of the engine's own span for it, and
/// logs the response.
pub(crate) async fn log(request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let method = request.method().clone();
    let path = request.uri().path().to_owned();
    let route = request.extensions().get::<MatchedPath>();
    let name = format!(
        "{method} {}",
        route.map_or("(no route)", MatchedPath::as_str)
    );
    let id = request.extensions().get::<RequestId>();
    let id = id.and_then(|id| id.header_value().to_str().ok());
    let span = tracing::info_span!(
        target: "quell::access",
        "http",
        otel.name = name,
        otel.kind = "server",
        request_id = id,
        trace_id = tracing::field::Empty,
    );
    trace_context::join(&span, request.headers());
    let response = next.run(request).instrument(span.clone()).await;
    let status = response.status().as_u16();
    let milliseconds = begun.elapsed().as_secs_f64() * 1e3;
    let _entered = span.enter();
    if POLLED.contains(&path.as_str()) {
        tracing::debug!(target: "quell::access", %method, path, status, milliseconds);
    } else {
        tracing::info!(target: "quell::access", %method, path, status, milliseconds);
    }
    response
}
