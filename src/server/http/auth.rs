//! API keys.

use crate::engine;
use crate::server::App;
use crate::server::error::ApiError;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::fmt;
use std::sync::Arc;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// Paths that need no API key: probes, metrics, version and API description, and the web page,
/// which asks its user for the key.
pub(crate) const OPEN: [&str; 6] = [
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/version",
    "/openapi.json",
];

/// Header in which clients of other APIs send the key.
const API_KEY: &str = "x-api-key";

/// The setting after a key that says how urgent its requests may be.
const MAX_PRIORITY: &str = "max-priority=";

/// A key that grants access to the server.
#[derive(Clone)]
struct ApiKey {
    secret: Box<str>,
    /// Replaces [`ServerOptions::max_priority`](crate::server::ServerOptions) for this key.
    max_priority: Option<i32>,
}

impl ApiKey {
    fn parse(text: &str) -> Self {
        let setting = text
            .rsplit_once(char::is_whitespace)
            .and_then(|(key, rest)| {
                let priority = rest.strip_prefix(MAX_PRIORITY)?.parse().ok()?;
                Some((key.trim_end(), priority))
            });
        let (secret, max_priority) = match setting {
            Some((key, priority)) => (key, Some(priority)),
            None => (text, None),
        };
        Self {
            secret: secret.into(),
            max_priority,
        }
    }
}

/// The keys that grant access to a server. They are compared in constant time and never
/// printed.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<ApiKey>);

impl ApiKeys {
    /// Reads keys that are separated by line breaks or commas. Surrounding spaces, empty lines
    /// and lines that begin with `#` are ignored. `KEY max-priority=-5` lets the requests of
    /// this key have a priority down to -5.
    pub fn parse(text: &str) -> Self {
        let lines = text
            .lines()
            .filter(|line| !line.trim_start().starts_with('#'));
        let keys = lines.flat_map(|line| line.split(',')).map(str::trim);
        let keys = keys.filter(|key| !key.is_empty()).map(ApiKey::parse);
        Self(keys.collect())
    }

    /// Returns whether there are no keys, in which case everybody has access.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the keys of both lists.
    pub fn join(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    /// Returns the index of the key that equals `given`, the first one if there are several.
    /// The time that this takes does not depend on which key matches or on how many bytes of a
    /// key are correct, only on the lengths.
    fn find(&self, given: &[u8]) -> Option<usize> {
        let (mut found, mut index) = (Choice::from(0), 0);
        for (number, key) in self.0.iter().enumerate() {
            let equal = key.secret.as_bytes().ct_eq(given);
            index.conditional_assign(&(number as u64), equal & !found);
            found |= equal;
        }
        bool::from(found).then_some(index as usize)
    }
}

/// The sender of a request, and what it is allowed to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    /// Index of the API key that came with the request.
    key: Option<usize>,
    max_priority: i32,
}

impl Caller {
    /// Returns the caller of a server that requires no key.
    pub fn without_key(app: &App) -> Self {
        Self {
            key: None,
            max_priority: app.options.max_priority,
        }
    }

    fn with_key(app: &App, index: usize) -> Self {
        let key = app.options.api_keys.0.get(index);
        let own = key.and_then(|key| key.max_priority);
        Self {
            key: Some(index),
            max_priority: own.unwrap_or(app.options.max_priority),
        }
    }

    /// Applies the caller's limits to a request: bounds its priority, and keeps its cached
    /// prefixes apart from those of other keys.
    pub fn admit(&self, request: &mut engine::Request) {
        request.priority = self.priority(request.priority);
        request.cache_salt = self.cache_salt(request.cache_salt.take());
    }

    /// Returns the priority of a request that asks for `asked`, limited to the most urgent one
    /// that the caller may use.
    pub fn priority(&self, asked: i32) -> i32 {
        asked.max(self.max_priority)
    }

    /// Returns the cache salt of a request that asks for `asked`. The salts of two keys are
    /// never equal.
    pub fn cache_salt(&self, asked: Option<Arc<str>>) -> Option<Arc<str>> {
        let Some(key) = self.key else {
            return asked;
        };
        let asked = asked.as_deref().unwrap_or_default();
        Some(format!("{key} {asked}").into())
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} keys", self.0.len())
    }
}

/// Lets a request pass if it has a valid key, as `Authorization: Bearer KEY` or `X-API-Key:
/// KEY`.
pub(crate) async fn check(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    let keys = &app.options.api_keys;
    if keys.is_empty() || OPEN.contains(&request.uri().path()) {
        return next.run(request).await;
    }
    let headers = request.headers();
    let bearer = headers.get(header::AUTHORIZATION);
    let bearer = bearer.and_then(|value| bearer_of(value.as_bytes()));
    let plain = headers.get(API_KEY).map(|value| value.as_bytes());
    let given = [bearer, plain.map(<[u8]>::trim_ascii)];
    let [bearer, plain] = given.map(|key| keys.find(key?));
    if let Some(key) = bearer.or(plain) {
        let caller = Caller::with_key(&app, key);
        request.extensions_mut().insert(caller);
        return next.run(request).await;
    }
    let problem = match given {
        [None, None] => {
            "an API key is required, as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
        }
        _ => "unknown API key",
    };
    let error = ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", problem);
    let mut response = error.code("invalid_api_key").into_response();
    let scheme = HeaderValue::from_static("Bearer");
    response
        .headers_mut()
        .insert(header::WWW_AUTHENTICATE, scheme);
    response
}

fn bearer_of(value: &[u8]) -> Option<&[u8]> {
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
        for (index, key) in ["alpha", "beta", "gamma"].into_iter().enumerate() {
            assert_eq!(keys.find(key.as_bytes()), Some(index));
        }
        for key in ["", "alph", "alphaa", "# ours", "ours", "alpha beta"] {
            assert_eq!(keys.find(key.as_bytes()), None, "{key}");
        }
        let twice = ApiKeys::parse("one,two").join(ApiKeys::parse("two\none"));
        assert_eq!(twice.find(b"two"), Some(1), "the first of equal ones");
    }

    #[test]
    fn a_key_may_set_the_priority_limit_of_its_requests() {
        let keys = ApiKeys::parse("alpha max-priority=-5\nbeta\ngamma max-priority=x");
        let limits = keys.0.iter().map(|key| key.max_priority);
        assert_eq!(limits.collect::<Vec<_>>(), [Some(-5), None, None]);
        assert_eq!(keys.find(b"alpha"), Some(0));
        assert_eq!(keys.find(b"gamma max-priority=x"), Some(2));
    }

    #[test]
    fn two_keys_never_have_the_same_salt() {
        let caller = |key| Caller {
            key,
            max_priority: 0,
        };
        let salt = |key, asked: Option<&str>| caller(key).cache_salt(asked.map(Into::into));
        assert_eq!(salt(None, None), None);
        assert_eq!(salt(None, Some("1 ")), Some("1 ".into()));
        let each = [Some(1), Some(11)]
            .map(|key| [None, Some("1 "), Some("a")].map(|asked| salt(key, asked)));
        let all: std::collections::BTreeSet<_> = each.iter().flatten().collect();
        assert_eq!(all.len(), 6);
    }

    #[test]
    fn the_key_follows_the_word_bearer() {
        assert_eq!(bearer_of(b"Bearer  k "), Some(&b"k"[..]));
        assert_eq!(bearer_of(b"bearer k"), Some(&b"k"[..]));
        assert_eq!(bearer_of(b"Basic k"), None);
        assert_eq!(bearer_of(b"Bear"), None);
    }
}
