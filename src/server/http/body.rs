//! Reads a request's JSON body and its path parameter.

pub(crate) mod integer;
pub(crate) mod object;
mod shape;
pub(crate) mod wording;

use super::workers::{Job, Work};
use crate::server::App;
use crate::server::error::ApiError;
use axum::BoxError;
use axum::body::{Bytes, HttpBody};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use object::Object;
use serde::de::{DeserializeOwned, IgnoredAny};
use std::sync::Arc;
use wording::plain;

/// The bytes of a body that is declared as JSON, read within the limits on size, time and
/// [`shape`].
pub(crate) struct JsonBody {
    bytes: Bytes,
}

impl JsonBody {
    /// Returns whether the body is valid JSON, whatever it contains.
    fn is_json(&self) -> bool {
        serde_json::from_slice::<IgnoredAny>(&self.bytes).is_ok()
    }

    /// Returns the body as it was received.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Creates a body for a test.
    #[cfg(test)]
    pub fn of(text: String) -> Self {
        Self { bytes: text.into() }
    }

    /// Returns the length of the body in bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Parses the body with `parse`, on a worker thread if the body is long.
    pub async fn read<T: Send + 'static>(
        self,
        app: &App,
        parse: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let bytes = self.len();
        let work = move |_: &Job| parse(&self);
        app.workers.run(Work::on(bytes), work).await
    }

    /// Parses the body, an object, as a `T`. Unknown fields are ignored; an error names the field that is
    /// wrong.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let mut reader = serde_json::Deserializer::from_slice(&self.bytes);
        let read = serde_path_to_error::deserialize(&mut reader);
        let Object(value) = read.map_err(|error| {
            let path = error.path().to_string();
            let problem = error.into_inner();
            if let Some(field) = missing_field(&problem.to_string()) {
                let path = if path == "." {
                    String::new()
                } else {
                    path + "."
                };
                let field = format!("{path}{field}");
                return ApiError::invalid(format!("{field} is missing")).param(field);
            }
            let broken = problem.is_syntax() || problem.is_eof();
            // serde_json reports a number in place of a variant's name as a syntax error.
            if broken && self.is_json() && path != "." {
                let problem = format!("{path}: its value has the wrong type");
                ApiError::invalid(problem).param(path)
            } else if broken {
                ApiError::invalid(format!("the body is not valid JSON: {problem}"))
            } else if path == "." {
                let problem = plain(&problem.to_string());
                ApiError::invalid(format!("the body is invalid: {problem}"))
            } else {
                let problem = plain(&problem.to_string());
                ApiError::invalid(format!("{path}: {problem}")).param(path)
            }
        })?;
        reader.end().map_err(|error| {
            let problem = "the body has trailing characters after the JSON value";
            ApiError::invalid(format!("{problem}: {error}"))
        })?;
        Ok(value)
    }

    /// Like [`JsonBody::parse`], but an empty body gives the default `T`.
    pub fn parse_or_default<T: DeserializeOwned + Default>(&self) -> Result<T, ApiError> {
        if self.bytes.trim_ascii().is_empty() {
            return Ok(T::default());
        }
        self.parse()
    }
}

/// The parameter in a route's path.
pub(crate) struct PathPart(pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathPart {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let part = Path::<String>::from_request_parts(parts, state).await;
        let wrong = |error: PathRejection| ApiError::invalid(format!("the path: {error}"));
        part.map(|Path(part)| Self(part)).map_err(wrong)
    }
}

/// Returns the field that serde reports as missing.
fn missing_field(problem: &str) -> Option<&str> {
    let (field, _) = problem.strip_prefix("missing field `")?.split_once('`')?;
    Some(field)
}

/// Refuses a body that is not declared as JSON. Browsers need the server's permission before a
/// page of another origin may send one that is.
fn require_json(request: &Request) -> Result<(), ApiError> {
    let problem = match request.headers().get(header::CONTENT_TYPE) {
        Some(kind) => {
            let kind = kind.to_str().unwrap_or("").to_ascii_lowercase();
            let essence = kind.split(';').next().unwrap_or("").trim();
            if essence == "application/json" || essence.ends_with("+json") {
                return Ok(());
            }
            format!("the body is {essence:?}, expected application/json")
        }
        None if request.body().size_hint().exact() == Some(0) => return Ok(()),
        None => "the body has no content type, expected application/json".to_owned(),
    };
    Err(unsupported(problem))
}

/// Refuses a compressed body: it would be parsed as if it were plain, and its size would say
/// nothing about the size of its contents.
fn refuse_compressed(headers: &HeaderMap) -> Result<(), ApiError> {
    for codings in headers.get_all(header::CONTENT_ENCODING) {
        let codings = codings.to_str().unwrap_or("?");
        let mut each = codings.split(',').map(str::trim);
        if let Some(coding) = each.find(|coding| !coding.eq_ignore_ascii_case("identity")) {
            let problem = format!("the body has the content encoding {coding:?}, expected none");
            return Err(unsupported(problem));
        }
    }
    Ok(())
}

fn unsupported(problem: String) -> ApiError {
    let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    ApiError::new(status, "invalid_request_error", problem)
}

/// Collects a body and copies its bytes at most once, so that there is only one copy of a large
/// body in memory at a time.
async fn collect(
    mut body: impl HttpBody<Data = Bytes, Error = BoxError> + Unpin,
) -> Result<Bytes, BoxError> {
    let mut first = Bytes::new();
    let mut whole = Vec::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame?.into_data() else {
            continue;
        };
        if first.is_empty() && whole.is_empty() {
            first = data;
            continue;
        }
        if whole.is_empty() {
            let expected = body.size_hint().lower();
            let expected = usize::try_from(expected).unwrap_or(0);
            whole.reserve(first.len() + data.len() + expected);
            whole.extend_from_slice(&std::mem::take(&mut first));
        }
        whole.extend_from_slice(&data);
    }
    match whole.is_empty() {
        true => Ok(first),
        false => Ok(whole.into()),
    }
}

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        require_json(&request)?;
        refuse_compressed(request.headers())?;
        let limit = app.options.max_body_bytes;
        let too_large = || {
            ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                format!("the body is larger than the limit of {limit} bytes"),
            )
        };
        let body = request.into_body();
        if body.size_hint().lower() > limit as u64 {
            return Err(too_large());
        }
        let body = collect(Limited::new(body, limit));
        match tokio::time::timeout(app.options.body_timeout, body).await {
            Ok(Ok(body)) => {
                let checked = body.clone();
                let check = move |_: &Job| shape::check(&checked);
                app.workers.run(Work::on(body.len()), check).await?;
                Ok(Self { bytes: body })
            }
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
            Ok(Err(error)) => Err(ApiError::invalid(format!("the body ended early: {error}"))),
            Err(_) => Err(ApiError::new(
                StatusCode::REQUEST_TIMEOUT,
                "timeout_error",
                format!(
                    "the body did not arrive within {:?}",
                    app.options.body_timeout
                ),
            )),
        }
    }
}
