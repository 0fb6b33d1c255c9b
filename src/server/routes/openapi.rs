//! `GET /openapi.json`: the OpenAPI description of all routes.

use axum::http::header;
use axum::response::{IntoResponse, Response};

/// Returns the OpenAPI description of all routes.
pub(crate) async fn openapi() -> Response {
    let document = include_str!("openapi.json");
    ([(header::CONTENT_TYPE, "application/json")], document).into_response()
}
