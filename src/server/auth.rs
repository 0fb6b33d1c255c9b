//! API keys.

use super::App;
use super::error::ApiError;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::fmt;
use std::sync::Arc;
use subtle::{Choice, ConstantTimeEq};

/// What a server may be asked without a key: whether it lives, and its page, which asks
/// for the key itself.
const OPEN: [&str; 6] = [
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
];

/// The keys that open a server. They are compared in constant time and never printed.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<Box<str>>);

impl ApiKeys {
    /// One key a line or between commas; spaces around it, empty lines and what follows a
    /// `#` at the beginning of a line do not count.
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        let keys = lines.flat_map(|line| line.split(',')).map(str::trim);
        Self(keys.filter(|key| !key.is_empty()).map(Into::into).collect())
    }

    /// Whether there are none: then everybody is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The keys of both.
    pub fn join(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Whether `given` is one of the keys. Takes the same time whichever it is, and
    /// however much of it is right.
    fn admit(&self, given: &[u8]) -> bool {
        let each = self.0.iter().map(|key| key.as_bytes().ct_eq(given));
        each.fold(Choice::from(0), |found, equal| found | equal)
            .into()
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} keys", self.0.len())
    }
}

/// Lets a request pass that brings a key, as `Authorization: Bearer KEY`.
pub(super) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.options.api_keys;
    if keys.is_empty() || OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let given = request.headers().get(header::AUTHORIZATION);
    let given = given.and_then(|value| bearer(value.as_bytes()));
    let problem = match given {
        Some(given) if keys.admit(given) => return next.run(request).await,
        Some(_) => "the API key is not known",
        None => "an API key is needed, as 'Authorization: Bearer KEY'",
    };
    let error = ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", problem);
    let mut response = error.code("invalid_api_key").into_response();
    let scheme = HeaderValue::from_static("Bearer");
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, scheme);
    response
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = value.split_at_checked(7)?;
    scheme
        .eq_ignore_ascii_case(b"bearer ")
        .then(|| key.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_read_from_lines_and_commas_and_never_shown() {
        let keys = ApiKeys::parse("# ours\n alpha \n\nbeta,gamma,\r\n");
        assert_eq!(format!("{keys:?}"), "3 keys");
        for key in ["alpha", "beta", "gamma"] {
            assert!(keys.admit(key.as_bytes()));
        }
        for key in ["", "alph", "alphaa", "# ours", "ours", "alpha beta"] {
            assert!(!keys.admit(key.as_bytes()), "{key}");
        }
    }

    #[test]
    fn a_key_comes_behind_the_word_bearer() {
        assert_eq!(bearer(b"Bearer  k "), Some(&b"k"[..]));
        assert_eq!(bearer(b"bearer k"), Some(&b"k"[..]));
        assert_eq!(bearer(b"Basic k"), None);
        assert_eq!(bearer(b"Bear"), None);
    }
}
