//! The `Host` header, which every HTTP/1.1 request must have exactly once.

use crate::server::error::ApiError;
use axum::extract::Request;
use axum::http::{Version, header};
use axum::middleware::Next;
use axum::response::Response;

/// Refuses an HTTP/1.1 request without a `Host` header, and any request with more than one,
/// because a proxy and the server might pick different hosts (RFC 9112, section 3.2).
pub(crate) async fn check(request: Request, next: Next) -> Result<Response, ApiError> {
    let hosts = request.headers().get_all(header::HOST).iter().count();
    if hosts > 1 {
        let problem = format!("the request has {hosts} Host headers, expected one");
        return Err(ApiError::invalid(problem));
    }
    if hosts == 0 && request.version() == Version::HTTP_11 {
        return Err(ApiError::invalid("the request has no Host header"));
    }
    Ok(next.run(request).await)
}
