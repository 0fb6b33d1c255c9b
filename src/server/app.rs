//! The state that all handlers share.

use super::ServerOptions;
use super::error::ApiError;
use super::http::guard::Guard;
use super::http::workers::Workers;
use super::routes::responses;
use super::routes::sessions::Sessions;
use super::routes::snapshot::Snapshots;
use crate::engine::{Engine, SubmitError};
use crate::text::Tokenizer;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use uuid::Uuid;

/// The state that all handlers share.
#[derive(Debug)]
pub(crate) struct App {
    pub(super) engine: Engine,
    pub(super) options: ServerOptions,
    /// Start time in seconds since 1970.
    pub(super) started: u64,
    /// The `system_fingerprint` of answers: version and device of the server.
    pub(super) fingerprint: String,
    /// Responses that clients can retrieve and continue.
    pub(super) responses: responses::Store,
    pub(super) sessions: Sessions,
    pub(super) snapshots: Snapshots,
    pub(super) guard: Guard,
    pub(super) workers: Workers,
}

impl App {
    pub(super) fn new(engine: Engine, options: ServerOptions, guard: Guard) -> Self {
        let device = engine
            .info()
            .model
            .as_ref()
            .map(|model| &*model.device.name);
        let version = env!("CARGO_PKG_VERSION");
        let fingerprint = format!("quell-{version}-{}", device.unwrap_or("null"));
        Self {
            engine,
            options,
            started: unix_time(),
            fingerprint,
            responses: responses::Store::default(),
            sessions: Sessions::default(),
            snapshots: Snapshots::default(),
            guard,
            workers: Workers::default(),
        }
    }

    /// Returns the name by which a request calls the model; any unknown name is a 404 error. A
    /// request without a name gets the model that is served.
    pub(super) fn check_model(&self, name: Option<&str>) -> Result<String, ApiError> {
        let ours = &self.options.model_name;
        match name {
            Some(name) if name != ours && !self.options.aliases.iter().any(|a| a == name) => {
                let problem = format!("the model {name:?} does not exist; {ours:?} is served");
                Err(ApiError::not_found(problem)
                    .param("model")
                    .code("model_not_found"))
            }
            name => Ok(name.unwrap_or(ours).to_owned()),
        }
    }

    pub(super) fn require_tokenizer(
        &self,
        needed_for: &'static str,
    ) -> Result<&Arc<Tokenizer>, ApiError> {
        let missing = || SubmitError::NoTokenizer { needed_for }.into();
        self.engine.tokenizer().ok_or_else(missing)
    }

    /// Returns a new id for an answer, which clients and logs use.
    pub(super) fn answer_id(&self, kind: &str) -> String {
        format!("{kind}-{}", Uuid::new_v4().simple())
    }
}

/// Returns the current time in seconds since 1970.
pub(super) fn unix_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
