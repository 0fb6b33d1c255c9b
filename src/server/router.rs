//! Every route with its handler, and the layers that each request passes.

use super::error::ApiError;
use super::http::{access_log, auth, drain, guard, host};
use super::openai::notices;
use super::routes::{
    abort, chat, completions, embeddings, health, metrics, models, openapi, page, rerank,
    responses, sessions, snapshot, tokenize, version,
};
use super::{App, ServeError};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, middleware};
use std::sync::Arc;
use std::time::Duration;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};

/// The id of an HTTP request: the client's, or one that the server generates.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How long a browser may cache the answer to a preflight request.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

/// Returns the layer that lets pages of the given origins use the server, if there are any.
pub(super) fn cors(origins: &[String]) -> Result<Option<CorsLayer>, ServeError> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        let each = origins.iter().map(|origin| {
            let value = HeaderValue::from_str(origin).ok();
            let value = value.filter(|_| origin.contains("://"));
            value.ok_or_else(|| ServeError::Origin {
                origin: origin.clone(),
            })
        });
        AllowOrigin::list(each.collect::<Result<Vec<_>, _>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        // Client libraries send many headers of their own, such as `x-stainless-os`. No header
        // lets a page of an allowed origin do more than it may do anyway.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([
            REQUEST_ID,
            header::RETRY_AFTER,
            notices::SKIPPED_TOOLS,
            notices::UNENFORCED,
        ])
        .max_age(PREFLIGHT_AGE);
    Ok(Some(layer))
}

/// Returns the service of all routes.
pub(super) fn router(app: Arc<App>, cors: Option<CorsLayer>) -> Router {
    // Each layer wraps the ones before it, so requests pass the last one first.
    routes()
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            auth::check,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            drain::close_while_draining,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            guard::check,
        ))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(host::check))
        .layer(tower::util::option_layer(cors))
        .layer(middleware::from_fn(access_log::log))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .with_state(app)
}

/// Every route with its handler.
fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/v1/completions", post(completions::completions))
        .route("/v1/chat/completions", post(chat::chat_completions))
        .route("/v1/responses", post(responses::create))
        .route("/v1/responses/input_tokens", post(responses::input_tokens))
        .route(
            "/v1/responses/{id}/input_items",
            get(responses::input_items),
        )
        .route(
            "/v1/responses/{id}",
            get(responses::get).delete(responses::delete),
        )
        .route("/v1/embeddings", post(embeddings::embeddings))
        .route("/v1/rerank", post(rerank::rerank))
        // Cohere's second version of the same route, and names without a version.
        .route("/v2/rerank", post(rerank::rerank))
        .route("/rerank", post(rerank::rerank))
        .route("/v1/score", post(rerank::score))
        .route("/score", post(rerank::score))
        .route("/v1/models", get(models::list))
        .route("/v1/models/", get(models::list))
        .route("/v1/models/{*name}", get(models::get))
        .route("/v1/sessions", get(sessions::list).post(sessions::create))
        .route(
            "/v1/sessions/{id}",
            get(sessions::get).delete(sessions::end),
        )
        .route("/v1/sessions/{id}/stop", post(sessions::stop))
        .route("/v1/engine/snapshot", get(snapshot::snapshot))
        .route("/abort_request", post(abort::abort_request))
        .route("/", get(page::page))
        .route("/tokenize", post(tokenize::tokenize))
        .route("/detokenize", post(tokenize::detokenize))
        .route("/tokenizer_info", get(tokenize::tokenizer_info))
        .route("/health", get(health::health))
        .route("/ready", get(health::ready))
        .route("/metrics", get(metrics::metrics))
        .route("/version", get(version::version))
        .route("/openapi.json", get(openapi::openapi))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is nothing at {}", uri.path())).code("unknown_url")
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    let problem = format!("{} does not support {method}", uri.path());
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "invalid_request_error",
        problem,
    )
}

/// Answers after a panic in a handler, so that a bug there affects neither the connection nor
/// other clients.
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let message = panic
        .downcast_ref::<&str>()
        .map(|message| (*message).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    tracing::error!(panic = message, "a request handler panicked");
    let status = StatusCode::INTERNAL_SERVER_ERROR;
    let message = "internal error; see the server's log";
    ApiError::new(status, "server_error", message).into_response()
}
