//! The options of a server.

use super::{ApiKeys, Metrics, TlsFiles};
use crate::text::SchemaKeywords;
use crate::text::tools::ToolFormat;
use std::time::Duration;

/// The configuration of a server.
///
/// Construct it with `..ServerOptions::new(name)`: fields are added in minor releases.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Name of the model in the API.
    pub model_name: String,
    /// Further names of the model.
    pub aliases: Vec<String>,
    /// The metrics that `/metrics` returns; 404 if `None`.
    pub metrics: Option<Metrics>,
    /// Maximum number of answers that one request may ask for with `n`.
    pub max_samples: usize,
    /// Maximum size of a request body in bytes.
    pub max_body_bytes: usize,
    /// How long a request body may take to arrive.
    pub body_timeout: Duration,
    /// How long the headers of a request may take to arrive.
    pub header_timeout: Duration,
    /// How long a client may leave its answer unread before the answer is dropped. With HTTP/1,
    /// the connection is closed as well.
    pub write_timeout: Duration,
    /// How long an answer may take, counted from its submission; no limit if `None`.
    pub request_timeout: Option<Duration>,
    /// How long a connection may stay idle between two requests before it is closed. With
    /// HTTP/2, this also limits the time from connecting to the first request.
    pub keep_alive_timeout: Duration,
    /// What it means if a client closes its sending side while it waits for an answer.
    pub half_close: HalfClose,
    /// Maximum number of connections at a time; fewer if the process may not open that many
    /// files. Further connections wait to be accepted, and an idle one is closed to make room.
    pub max_connections: usize,
    /// Maximum number of connections from one IPv4 address or one IPv6 /64 network; half of all
    /// connections if `None`. A further connection is refused unless another one from there is
    /// idle and can be closed.
    pub max_connections_per_address: Option<usize>,
    /// The format in which the model writes tool calls; detected from its chat template if
    /// `None`.
    pub tool_format: Option<ToolFormat>,
    /// Whether a request may bring its own chat template.
    pub trust_request_chat_template: bool,
    /// Maximum number of sessions that may be open at a time; a further one is refused.
    pub max_sessions: usize,
    /// How long a session may stay unused before it is ended.
    pub session_ttl: Duration,
    /// How long open requests may take to finish after the server is told to stop.
    pub drain_timeout: Duration,
    /// The accepted API keys. Requests without one of them are refused, except on the routes
    /// for probes and for the web page. What was created with a key exists only for that key;
    /// [`ApiKeys::for_admins`] makes keys that see the requests of all others. If there are no
    /// keys, every request is accepted, and everybody sees everything.
    pub api_keys: ApiKeys,
    /// Origins whose pages may use the server from a browser (CORS); `*` for all. By default,
    /// only the server's own origin may.
    pub allowed_origins: Vec<String>,
    /// Host names of the server in addition to the one that it listens on; `*` for all. IP
    /// addresses and names that public DNS does not resolve need not be listed. If the list is
    /// empty, any name is allowed as long as there are API keys or a certificate.
    pub allowed_hosts: Vec<String>,
    /// The most urgent [`Request::priority`](crate::Request) that a client may give its
    /// requests, unless its key sets another limit. Lower numbers, which are more urgent, are
    /// raised to this one.
    pub max_priority: i32,
    /// Certificate and key for HTTPS; HTTP if `None`.
    pub tls: Option<TlsFiles>,
    /// Whether a schema with keywords that cannot be enforced is refused, or accepted with
    /// these keywords named in the header `x-quell-unenforced`. Lenient by default.
    pub schema_keywords: SchemaKeywords,
}

impl ServerOptions {
    /// Creates options with working defaults for a model that clients call `model_name`.
    pub fn new(model_name: impl Into<String>) -> Self {
        Self {
            model_name: model_name.into(),
            aliases: Vec::new(),
            metrics: None,
            max_samples: 128,
            max_body_bytes: 32 << 20,
            body_timeout: Duration::from_secs(30),
            header_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(30),
            keep_alive_timeout: Duration::from_secs(90),
            half_close: HalfClose::default(),
            request_timeout: None,
            max_connections: 8192,
            max_connections_per_address: None,
            tool_format: None,
            trust_request_chat_template: false,
            max_sessions: 1024,
            session_ttl: Duration::from_secs(3600),
            drain_timeout: Duration::from_secs(30),
            api_keys: ApiKeys::default(),
            allowed_origins: Vec::new(),
            allowed_hosts: Vec::new(),
            max_priority: 0,
            tls: None,
            schema_keywords: SchemaKeywords::Lenient,
        }
    }
}

/// What it means if a client closes its sending side while it waits for an answer. TCP does not
/// tell a client that has closed its connection from one that only sends no more.
///
/// HTTP/2 marks the end of each request, so there the end of a connection always means that the
/// client is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HalfClose {
    /// The client is gone, and its request is cancelled. Most web servers and proxies treat it
    /// this way, and HTTP clients usually keep their sending side open.
    #[default]
    Cancel,
    /// The client may still read, and gets its answer. If it has gone, this is noticed once
    /// something is written to it, or when it resets the connection.
    Finish,
}

impl std::str::FromStr for HalfClose {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "cancel" => Ok(Self::Cancel),
            "finish" => Ok(Self::Finish),
            _ => Err(format!("{text:?} is neither cancel nor finish")),
        }
    }
}
