//! What is independent of the API: connections, TLS, who may use the server, the access log,
//! request bodies and the threads for long work.

pub(crate) mod access_log;
pub(crate) mod auth;
pub(crate) mod body;
pub(crate) mod connection;
pub(crate) mod drain;
pub(crate) mod guard;
pub(crate) mod host;
pub(crate) mod tls;
pub(crate) mod trace_context;
pub(crate) mod workers;
