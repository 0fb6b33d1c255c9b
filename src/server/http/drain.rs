//! What a server that is being drained tells its connections.

use crate::server::App;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, Version, header};
use axum::middleware::Next;
use axum::response::Response;
use std::sync::Arc;

/// Makes a draining server close each connection after its current request, so that clients
/// send the next one elsewhere.
pub(crate) async fn close_while_draining(
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
