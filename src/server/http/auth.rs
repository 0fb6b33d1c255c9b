//! API keys.

use crate::engine::{self, RequestQuery};
use crate::server::App;
use crate::server::error::ApiError;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::convert::Infallible;
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
    /// Whether the key is an operator's: see [`ApiKeys::for_admins`].
    admin: bool,
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
            admin: false,
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

    /// Turns the keys into admin keys. Like any other key, an admin key grants access to what
    /// was created with it. In addition, it shows the engine's snapshot, and shows and ends the
    /// requests and sessions of all keys. It does not grant access to what others have sent or
    /// received.
    pub fn for_admins(mut self) -> Self {
        self.0.iter_mut().for_each(|key| key.admin = true);
        self
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

/// Who has created a request, session or stored response: the index of the API key that came
/// with the HTTP request. On a server without keys, everything has the same owner.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Owner(Option<usize>);

impl Owner {
    /// Creates the owner with the key of this index; without a key if `None`.
    #[cfg(test)]
    pub fn of_key(key: Option<usize>) -> Self {
        Self(key)
    }
}

/// The sender of a request, and what it is allowed to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Caller {
    owner: Owner,
    /// Whether the caller may see and end what others have created.
    admin: bool,
    max_priority: i32,
}

impl Caller {
    /// Returns the caller of a request without a key. If the server requires keys, such a request
    /// reaches only what is open to everybody.
    pub fn without_key(app: &App) -> Self {
        Self {
            owner: Owner(None),
            admin: app.options.api_keys.is_empty(),
            max_priority: app.options.max_priority,
        }
    }

    fn with_key(app: &App, index: usize) -> Self {
        let key = app.options.api_keys.0.get(index);
        let own = key.and_then(|key| key.max_priority);
        Self {
            owner: Owner(Some(index)),
            admin: key.is_some_and(|key| key.admin),
            max_priority: own.unwrap_or(app.options.max_priority),
        }
    }

    /// Returns the owner of what the caller creates. Only the owner may use it.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Returns whether the caller may see that something of this owner exists, and may end it.
    pub fn manages(&self, owner: Owner) -> bool {
        self.admin || self.owner == owner
    }

    /// Refuses callers that may not see the requests of other keys.
    pub fn require_admin(&self) -> Result<(), ApiError> {
        match self.admin {
            true => Ok(()),
            false => {
                let problem = "this shows the requests of all API keys, and needs an admin key";
                Err(ApiError::forbidden(problem).code("admin_key_required"))
            }
        }
    }

    /// Limits a query to the requests that the caller may see and cancel.
    pub fn limit(&self, query: RequestQuery) -> RequestQuery {
        match self.admin {
            true => query,
            // No request has the owner that stands for none.
            false => query.owner(self.number().unwrap_or(u64::MAX)),
        }
    }

    /// Applies the caller's limits to a request: bounds its priority, names its owner, and keeps
    /// its cached prefixes and its tenant apart from those of other keys.
    pub fn admit(&self, request: &mut engine::Request) {
        request.priority = self.priority(request.priority);
        request.owner = self.number();
        request.cache_salt = self.cache_salt(request.cache_salt.take());
        request.tenant = self.tenant(request.tenant.take());
    }

    /// Like [`Caller::admit`], for the request of an embedding.
    pub fn admit_embedding(&self, request: &mut engine::EmbedRequest) {
        request.priority = self.priority(request.priority);
        request.owner = self.number();
        request.cache_salt = self.cache_salt(request.cache_salt.take());
        request.tenant = self.tenant(request.tenant.take());
    }

    /// Returns the number of the key, as the engine knows it.
    fn number(&self) -> Option<u64> {
        self.owner.0.map(|key| key as u64)
    }

    /// Returns the priority of a request that asks for `asked`, limited to the most urgent one
    /// that the caller may use.
    fn priority(&self, asked: i32) -> i32 {
        asked.max(self.max_priority)
    }

    /// Returns the cache salt of a request that asks for `asked`. The salts of two keys are
    /// never equal.
    fn cache_salt(&self, asked: Option<Arc<str>>) -> Option<Arc<str>> {
        let Some(key) = self.owner.0 else {
            return asked;
        };
        let asked = asked.as_deref().unwrap_or_default();
        Some(format!("{key} {asked}").into())
    }

    /// Returns the tenant of a request that names `asked`. The tenants of two keys are never
    /// equal, so no key can use up the share of another one's users.
    fn tenant(&self, asked: Option<Arc<str>>) -> Option<Arc<str>> {
        let Some(key) = self.owner.0 else {
            return asked;
        };
        Some(match asked {
            Some(asked) => format!("{key} {asked}").into(),
            None => key.to_string().into(),
        })
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Infallible> {
        let caller = parts.extensions.get::<Self>().cloned();
        Ok(caller.unwrap_or_else(|| Self::without_key(app)))
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
    fn two_keys_never_have_the_same_salt_or_tenant() {
        let caller = |key| Caller {
            owner: Owner(key),
            ..Caller::default()
        };
        let salt = |key, asked: Option<&str>| caller(key).cache_salt(asked.map(Into::into));
        assert_eq!(salt(None, None), None);
        assert_eq!(salt(None, Some("1 ")), Some("1 ".into()));
        let each = [Some(1), Some(11)]
            .map(|key| [None, Some("1 "), Some("a")].map(|asked| salt(key, asked)));
        let all: std::collections::BTreeSet<_> = each.iter().flatten().collect();
        assert_eq!(all.len(), 6);
        let tenant = |key, asked: Option<&str>| caller(key).tenant(asked.map(Into::into));
        assert_eq!(tenant(None, Some("1 ")), Some("1 ".into()));
        let each = [Some(1), Some(11)]
            .map(|key| [None, Some("1 "), Some("a")].map(|asked| tenant(key, asked)));
        let all: std::collections::BTreeSet<_> = each.iter().flatten().collect();
        assert_eq!(all.len(), 6);
    }

    #[test]
    fn a_caller_manages_what_is_its_own_and_an_admin_manages_everything() {
        let [none, one, two] = [None, Some(1), Some(2)].map(Owner);
        let caller = |owner, admin| Caller {
            owner,
            admin,
            ..Caller::default()
        };
        assert!(caller(one, false).manages(one) && !caller(one, false).manages(two));
        assert!(caller(one, true).manages(two) && caller(none, true).manages(none));
        let limited = |caller: Caller| caller.limit(RequestQuery::default()).owner;
        assert_eq!(limited(caller(two, false)), Some(2));
        assert_eq!(limited(caller(two, true)), None);
        assert_eq!(limited(caller(none, true)), None);
        assert_eq!(limited(caller(none, false)), Some(u64::MAX));
        assert!(caller(one, true).require_admin().is_ok());
        assert_eq!(caller(one, false).require_admin().unwrap_err().status, 403);
    }

    #[test]
    fn admin_keys_are_marked_as_such() {
        let keys = ApiKeys::parse("root")
            .for_admins()
            .join(ApiKeys::parse("a\nroot"));
        assert_eq!(keys.find(b"root"), Some(0));
        let admins: Vec<_> = keys.0.iter().map(|key| key.admin).collect();
        assert_eq!(admins, [true, false, false]);
    }

    #[test]
    fn the_key_follows_the_word_bearer() {
        assert_eq!(bearer_of(b"Bearer  k "), Some(&b"k"[..]));
        assert_eq!(bearer_of(b"bearer k"), Some(&b"k"[..]));
        assert_eq!(bearer_of(b"Basic k"), None);
        assert_eq!(bearer_of(b"Bear"), None);
    }
}
