//! What a request brings: its body, and the open part of its path.

use super::auth::Caller;
use super::error::ApiError;
use super::wording::plain;
use super::workers::Job;
use super::{App, shape};
use axum::BoxError;
use axum::body::{Bytes, HttpBody};
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// The bytes of a body that claims to be JSON; read within the limits of size, time and
/// [`shape`].
pub(crate) struct JsonBody {
    bytes: Bytes,
    /// Who sent it.
    pub caller: Caller,
}

impl JsonBody {
    /// Whether the body is JSON, whatever it says.
    fn is_json(&self) -> bool {
        serde_json::from_slice::<IgnoredAny>(&self.bytes).is_ok()
    }

    /// The body as it came.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A body that a test has written.
    #[cfg(test)]
    pub fn of(text: String) -> Self {
        Self {
            bytes: text.into(),
            caller: Caller::default(),
        }
    }

    /// Bytes of the body.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// What `parse` makes of the body, which is done apart from other connections if it
    /// takes long.
    pub async fn read<T: Send + 'static>(
        self,
        app: &App,
        parse: impl FnOnce(&Self) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let bytes = self.len();
        let work = move |_: &Job| parse(&self);
        app.workers.run_if_long(bytes, work).await
    }

    /// The body as a `T`. Unknown fields are ignored; a wrong one is named.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let mut reader = serde_json::Deserializer::from_slice(&self.bytes);
        let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
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
            // A name that is given as a number is a syntax error to serde_json.
            if broken && self.is_json() && path != "." {
                let problem = format!("{path}: its value is of another type than expected");
                ApiError::invalid(problem).param(path)
            } else if broken {
                ApiError::invalid(format!("the body is no JSON: {problem}"))
            } else if path == "." {
                let problem = plain(&problem.to_string());
                ApiError::invalid(format!("the body is wrong: {problem}"))
            } else {
                let problem = plain(&problem.to_string());
                ApiError::invalid(format!("{path}: {problem}")).param(path)
            }
        })?;
        reader
            .end()
            .map_err(|error| ApiError::invalid(format!("the body goes on after it: {error}")))?;
        Ok(value)
    }

    /// As [`JsonBody::parse`]; no body at all means a `T` with nothing set.
    pub fn parse_or_default<T: DeserializeOwned + Default>(&self) -> Result<T, ApiError> {
        if self.bytes.trim_ascii().is_empty() {
            return Ok(T::default());
        }
        self.parse()
    }
}

/// Reads a field that is null or an object. What serde derives for a struct takes a list of
/// its fields' values as well.
pub(super) fn optional_object<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Object<T>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Object<T> {
        type Value = Option<T>;

        fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
            formatter.write_str("an object")
        }

        fn visit_unit<E>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_map<A: MapAccess<'de>>(self, fields: A) -> Result<Self::Value, A::Error> {
            T::deserialize(MapAccessDeserializer::new(fields)).map(Some)
        }
    }

    deserializer.deserialize_any(Object(PhantomData))
}

/// The part of the path that a route leaves open.
pub(crate) struct PathPart(pub String);

impl<S: Send + Sync> FromRequestParts<S> for PathPart {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let part = Path::<String>::from_request_parts(parts, state).await;
        let wrong = |error: PathRejection| ApiError::invalid(format!("the path: {error}"));
        part.map(|Path(part)| Self(part)).map_err(wrong)
    }
}

/// The field that serde says is not there.
fn missing_field(problem: &str) -> Option<&str> {
    let (field, _) = problem.strip_prefix("missing field `")?.split_once('`')?;
    Some(field)
}

/// Refuses a body that does not say that it is JSON. Browsers ask the server first whether
/// a page of another origin may send one that does.
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

/// Refuses a body that is compressed: it would be read as what it is not, and its size
/// would say nothing about what it holds.
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

/// All bytes of a body, which are copied once at most: there is only one copy of a large
/// body at any time.
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

    async fn from_request(mut request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        require_json(&request)?;
        refuse_compressed(request.headers())?;
        let caller = request.extensions_mut().remove::<Caller>();
        let caller = caller.unwrap_or_else(|| Caller::without_key(app));
        let limit = app.options.max_body_bytes;
        let too_large = || {
            ApiError::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "invalid_request_error",
                format!("the body has more than the {limit} bytes that are accepted"),
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
                app.workers.run_if_long(body.len(), check).await?;
                Ok(Self {
                    bytes: body,
                    caller,
                })
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
