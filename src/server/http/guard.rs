//! Keeps foreign web pages from using a server that requires no API key.
//!
//! A page of any site can make the browser send requests, including to a server on the same
//! machine or network. With DNS rebinding, a site can even give the server's address to a name
//! of its own. An API key stops both, because the page does not have it. Without keys, the
//! server checks two headers:
//!
//! - The `Host` of a request must be the server's: an IP address, which no name can be rebound
//!   to; a name that public DNS does not resolve, such as `localhost`; the name that the server
//!   listens on; or an allowed name.
//! - The `Origin` that browsers send with a request that changes something must be the server's
//!   own, or an allowed one.

use super::auth;
use crate::server::error::ApiError;
use crate::server::{App, ServeError, ServerOptions};
use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::sync::Arc;

/// Suffixes of names that are never registered, by RFC 6761, RFC 6762, and ICANN's resolution
/// on `internal`.
const PRIVATE: [&str; 3] = [".localhost", ".local", ".internal"];

/// Decides which requests pass.
#[derive(Debug)]
pub(crate) struct Guard {
    /// Names of the server; any name passes if `None`.
    hosts: Option<Vec<String>>,
    /// Origins whose pages may use the server; any origin passes if `None`.
    origins: Option<Vec<String>>,
}

impl Guard {
    /// Creates the guard of a server that listens on `address`, a host and a port.
    ///
    /// # Errors
    /// Returns an error if an allowed host is not a valid host.
    pub fn new(options: &ServerOptions, address: &str) -> Result<Self, ServeError> {
        let keys = !options.api_keys.is_empty();
        let all = |list: &[String]| list.iter().any(|one| one == "*");
        let allowed = &options.allowed_hosts;
        // A foreign page has no key, and its site's name is not in our certificate.
        let protected = allowed.is_empty() && (keys || options.tls.is_some());
        let hosts = if protected || all(allowed) {
            None
        } else {
            let own = address.parse::<Authority>().ok();
            let mut hosts: Vec<_> = own.iter().map(|own| host(own).to_owned()).collect();
            for allowed in allowed {
                let authority = allowed.parse::<Authority>();
                let authority = authority.map_err(|_| ServeError::Host {
                    host: allowed.clone(),
                })?;
                hosts.push(host(&authority));
            }
            Some(hosts)
        };
        let origins = match keys || all(&options.allowed_origins) {
            true => None,
            false => Some(options.allowed_origins.clone()),
        };
        Ok(Self { hosts, origins })
    }

    fn check(&self, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), ApiError> {
        let authority = authority(uri, headers);
        if let Some(hosts) = &self.hosts
            && !auth::OPEN.contains(&uri.path())
        {
            let own = |authority: &Authority| {
                let host = host(authority);
                is_private(&host) || hosts.contains(&host)
            };
            // HTTP/1.0 requests may lack a Host header, but no browser sends them.
            let named = authority.is_some() || headers.contains_key(header::HOST);
            if named && !authority.as_ref().is_some_and(own) {
                let given = headers.get(header::HOST).map(|host| host.to_str());
                let given = given.and_then(Result::ok).or(uri.host()).unwrap_or("?");
                let problem = format!(
                    "{given:?} is not a name of this server; if it should be, start the server \
                     with --allowed-hosts"
                );
                return Err(ApiError::forbidden(problem).code("host_not_allowed"));
            }
        }
        let safe = [Method::GET, Method::HEAD, Method::OPTIONS].contains(method);
        if let Some(origins) = self.origins.as_ref().filter(|_| !safe)
            && let Some(origin) = headers.get(header::ORIGIN)
        {
            let origin = origin.to_str().unwrap_or("?");
            let allowed = |allowed: &String| allowed.eq_ignore_ascii_case(origin);
            let own = is_own(origin, authority.as_ref()) || is_same_origin(headers);
            if !own && !origins.iter().any(allowed) {
                let problem = format!(
                    "pages of {origin} may not use this server; to allow them, start it with \
                     --allowed-origins"
                );
                return Err(ApiError::forbidden(problem).code("origin_not_allowed"));
            }
        }
        Ok(())
    }
}

/// Lets a request pass unless a foreign page may have sent it.
pub(crate) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let checked = app
        .guard
        .check(request.method(), request.uri(), request.headers());
    match checked {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    }
}

/// Returns the host that a request is for. HTTP/2 and the absolute form of HTTP/1 have it in
/// the URI, which takes precedence over the header.
fn authority(uri: &Uri, headers: &HeaderMap) -> Option<Authority> {
    if let Some(authority) = uri.authority() {
        return Some(authority.clone());
    }
    let host = headers.get(header::HOST)?;
    Authority::try_from(host.as_bytes()).ok()
}

/// Returns the host without its port, in lower case and without a trailing dot.
fn host(authority: &Authority) -> String {
    let host = authority.host();
    let host = host.strip_suffix('.').unwrap_or(host);
    host.to_ascii_lowercase()
}

/// Returns whether this host cannot be rebound by DNS, so that a page loaded from it comes from
/// the same server that its requests reach.
fn is_private(host: &str) -> bool {
    let address = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_address = address.unwrap_or(host).parse::<IpAddr>().is_ok();
    is_address || !host.contains('.') || PRIVATE.iter().any(|end| host.ends_with(end))
}

/// Returns whether a page of `origin` comes from this server, judged by host and port.
fn is_own(origin: &str, authority: Option<&Authority>) -> bool {
    let Ok(origin) = origin.parse::<Uri>() else {
        return false;
    };
    let default = match origin.scheme_str() {
        Some("http") => 80,
        Some("https") => 443,
        _ => return false,
    };
    let place = |authority: &Authority| (host(authority), authority.port_u16().unwrap_or(default));
    match (origin.authority(), authority) {
        (Some(origin), Some(own)) => place(origin) == place(own),
        _ => false,
    }
}

/// Returns whether the browser says that the page comes from the server that its request goes
/// to. A page cannot change this header, and proxies leave it alone although they may rewrite
/// the host.
fn is_same_origin(headers: &HeaderMap) -> bool {
    let site = headers.get("sec-fetch-site");
    site.is_some_and(|site| site == "same-origin")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::{ApiKeys, TlsFiles};

    fn guard(change: impl FnOnce(&mut ServerOptions)) -> Guard {
        let mut options = ServerOptions::new("model");
        change(&mut options);
        Guard::new(&options, "gpu.example.com:8000").unwrap()
    }

    fn passes(guard: &Guard, method: Method, path: &str, with: &[(&'static str, &str)]) -> bool {
        let mut headers = HeaderMap::new();
        for (name, value) in with {
            headers.insert(*name, value.parse().unwrap());
        }
        let uri = path.parse().unwrap();
        match guard.check(&method, &uri, &headers) {
            Ok(()) => true,
            Err(error) => {
                assert_eq!(error.status, 403);
                false
            }
        }
    }

    fn host_passes(guard: &Guard, host: &str) -> bool {
        passes(guard, Method::GET, "/v1/models", &[("host", host)])
    }

    #[test]
    fn hosts_that_a_page_could_have_been_loaded_from_are_refused() {
        let guard = guard(|options| options.allowed_hosts = vec!["llm.example.org".to_owned()]);
        for own in [
            "127.0.0.1:8000",
            "10.1.2.3",
            "[::1]:8000",
            "localhost:8000",
            "LocalHost.",
            "quell",
            "quell.default.svc.cluster.local:80",
            "box.internal",
            "gpu.example.com:1",
            "GPU.example.com.",
            "llm.example.org",
        ] {
            assert!(host_passes(&guard, own), "{own}");
        }
        for other in [
            "evil.example",
            "evil.example:8000",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "sub.gpu.example.com",
            "xlocal.example",
            "evil.example:8000@localhost:1:2",
            "",
        ] {
            assert!(!host_passes(&guard, other), "{other}");
        }
        // HTTP/2 has the host in the URI, which takes precedence over the header.
        let path = "http://evil.example/v1/models";
        assert!(!passes(&guard, Method::GET, path, &[("host", "localhost")]));
        let path = "http://localhost/v1/models";
        assert!(passes(&guard, Method::GET, path, &[]));
        // Probes may use any host name.
        for path in ["/health", "/ready", "/metrics"] {
            let host = [("host", "evil.example")];
            assert!(passes(&guard, Method::GET, path, &host), "{path}");
        }
        assert!(passes(&guard, Method::GET, "/v1/models", &[]), "HTTP/1.0");
    }

    #[test]
    fn any_host_passes_with_api_keys_or_a_certificate_or_a_star() {
        let keys = || ApiKeys::parse("key");
        let star = vec!["*".to_owned()];
        assert!(host_passes(
            &guard(|options| options.api_keys = keys()),
            "a.example"
        ));
        assert!(host_passes(
            &guard(|options| options.allowed_hosts = star),
            "a.example"
        ));
        let tls = TlsFiles {
            certificate: "c".into(),
            key: "k".into(),
        };
        assert!(host_passes(
            &guard(|options| options.tls = Some(tls)),
            "a.example"
        ));
        let named = guard(|options| {
            options.api_keys = keys();
            options.allowed_hosts = vec!["b.example:443".to_owned()];
        });
        assert!(host_passes(&named, "b.example") && !host_passes(&named, "a.example"));
    }

    #[test]
    fn an_invalid_host_cannot_be_allowed() {
        let mut options = ServerOptions::new("model");
        options.allowed_hosts = vec!["a b".to_owned()];
        let error = Guard::new(&options, "127.0.0.1:8000").unwrap_err();
        assert!(error.to_string().contains("\"a b\""), "{error}");
    }

    #[test]
    fn pages_of_other_origins_cannot_change_anything() {
        let post = |guard: &Guard, host: &str, origin: &str| {
            let with = [("host", host), ("origin", origin)];
            passes(guard, Method::POST, "/abort_request", &with)
        };
        let strict =
            guard(|options| options.allowed_origins = vec!["https://Friend.example".into()]);
        let host = "localhost:8000";
        for origin in [
            "http://localhost:8000",
            "https://localhost:8000",
            "https://friend.example",
        ] {
            assert!(post(&strict, host, origin), "{origin}");
        }
        assert!(post(&strict, "gpu.example.com", "https://gpu.example.com"));
        assert!(post(
            &strict,
            "gpu.example.com:80",
            "http://gpu.example.com"
        ));
        for origin in [
            "https://evil.example",
            "http://localhost:3000",
            "http://localhost",
            "https://friend.example:444",
            "null",
            "file://",
            "",
        ] {
            assert!(!post(&strict, host, origin), "{origin}");
        }
        // Clients other than browsers send no origin. Requests that change nothing need no
        // check, because a foreign page cannot read the answer.
        assert!(passes(
            &strict,
            Method::POST,
            "/abort_request",
            &[("host", host)]
        ));
        let with = [("host", host), ("origin", "https://evil.example")];
        assert!(passes(&strict, Method::GET, "/v1/models", &with));
        assert!(!passes(&strict, Method::DELETE, "/v1/sessions/1", &with));
        // A request through a proxy that rewrites the host.
        let with = [
            ("host", host),
            ("origin", "https://llm.example"),
            ("sec-fetch-site", "same-origin"),
        ];
        assert!(passes(&strict, Method::POST, "/abort_request", &with));
        let open = guard(|options| options.allowed_origins = vec!["*".to_owned()]);
        assert!(post(&open, host, "null"));
        let keys = guard(|options| options.api_keys = ApiKeys::parse("key"));
        assert!(post(&keys, host, "https://evil.example"));
    }
}
