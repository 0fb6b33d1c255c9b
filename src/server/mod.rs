//! The HTTP server: OpenAI's API over an [`Engine`].
//!
//! A handler owns the token streams of its answer. When the connection closes, hyper drops the
//! handler or the response body, and the streams with it, which posts a cancel to the scheduler
//! thread. A disconnect therefore needs no code of its own, and no task has to stay alive for
//! the clean-up.
//!
//! ```no_run
//! use quell::server::{Metrics, Server, ServerOptions};
//! use quell::{Engine, EngineConfig, LoadOptions};
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let metrics = Metrics::install()?;
//! let engine = Engine::load_with("model.gguf", EngineConfig::default(), LoadOptions::default())?;
//! let options = ServerOptions {
//!     metrics: Some(metrics),
//!     ..ServerOptions::new("my-model")
//! };
//! let server = Server::bind(engine, options, "127.0.0.1:8000").await?;
//! println!("http://{}", server.local_addr());
//! server.run(async { tokio::signal::ctrl_c().await.unwrap_or(()) }).await;
//! # Ok(())
//! # }
//! ```

mod abort;
mod access;
mod answer;
mod auth;
mod chat;
mod completions;
mod connection;
mod conversation;
mod embeddings;
mod envelope;
mod error;
pub mod fields;
mod guard;
mod health;
mod host;
mod integer;
mod json;
mod legacy;
mod logprobs;
mod metrics;
mod models;
mod notices;
mod page;
mod parts;
mod prompts;
mod rendering;
mod responses;
mod sampling;
mod sessions;
mod shape;
mod snapshot;
mod sse;
mod structure;
mod system_messages;
mod tls;
mod tokenize;
mod tools;
mod trace_context;
mod wording;
mod workers;

pub use auth::ApiKeys;
pub use metrics::{Metrics, MetricsError};
pub use tls::TlsFiles;

use crate::engine::{
    CancelReason, Drained, Engine, Places, Prompt, Request, SubmitError, TokenStream,
};
use crate::text::tools::ToolFormat;
use crate::text::{EncodeOptions, Keywords, Tokenizer};
use auth::Caller;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, middleware};
use error::ApiError;
use guard::Guard;
use serde::Deserialize;
use sessions::{SessionTurn, Sessions};
use snapshot::Snapshots;
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio_rustls::TlsAcceptor;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, CorsLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use uuid::Uuid;
use workers::{Job, Workers};

/// Maximum number of tokens in all prompts of a request together, where a prompt counts once
/// per answer to it. Every answer keeps its prompt's tokens, so this bounds the memory of a
/// request.
const MAX_BATCH_TOKENS: usize = 4 << 20;

/// The id of an HTTP request: the client's, or one that the server generates.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// How long a browser may cache the answer to a preflight request.
const PREFLIGHT_AGE: Duration = Duration::from_secs(600);

/// The configuration of a server.
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
    /// for probes and for the web page. If there are no keys, every request is accepted.
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
    pub schema_keywords: Keywords,
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
            schema_keywords: Keywords::Lenient,
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

/// An error that keeps a server from starting.
#[derive(Debug, Error)]
pub enum ServeError {
    /// The server cannot listen on the address.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// The address.
        address: String,
        /// The operating system's error.
        source: std::io::Error,
    },
    /// The certificate or its key cannot be used.
    #[error("cannot use {path} for TLS: {problem}")]
    Tls {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// An allowed host is not a valid host.
    #[error(
        "{host:?} is not a valid host, expected a name or an address like llm.example.com, or *"
    )]
    Host {
        /// The value that was given.
        host: String,
    },
    /// An allowed origin is not a valid origin.
    #[error("{origin:?} is not a valid origin, expected one like https://example.com, or *")]
    Origin {
        /// The value that was given.
        origin: String,
    },
}

/// A server that is bound to its address.
pub struct Server {
    app: Arc<App>,
    listener: TcpListener,
    address: SocketAddr,
    cors: Option<CorsLayer>,
    tls: Option<TlsAcceptor>,
}

impl std::fmt::Debug for Server {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Server")
            .field("address", &self.address)
            .field("options", &self.app.options)
            .finish_non_exhaustive()
    }
}

impl Server {
    /// Binds to `address`. Connections wait in the backlog until [`Server::run`] is called.
    ///
    /// # Errors
    /// Returns an error if an allowed host or origin is invalid, if the certificate or its key
    /// cannot be used, or if the server cannot listen on `address`.
    pub async fn bind(
        engine: Engine,
        options: ServerOptions,
        address: impl ToSocketAddrs + ToString,
    ) -> Result<Self, ServeError> {
        let name = address.to_string();
        let failed = |source| ServeError::Bind {
            address: name.clone(),
            source,
        };
        let cors = cors(&options.allowed_origins)?;
        let tls = options.tls.as_ref().map(TlsFiles::acceptor).transpose()?;
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let guard = Guard::new(&options, &name)?;
        let app = Arc::new(App::new(engine, options, guard));
        Ok(Self {
            app,
            listener,
            address,
            cors,
            tls,
        })
    }

    /// Returns `http` or `https`.
    pub fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// Returns the address that the server listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` completes. The server then refuses new requests (and `/ready` says
    /// so), gives open requests [`ServerOptions::drain_timeout`] to finish, cancels the rest,
    /// and closes the connections. Returns what became of the open requests, or `None` if the
    /// engine had ended before.
    pub async fn run(self, stop: impl Future<Output = ()>) -> Option<Drained> {
        let upkeep = self
            .app
            .options
            .metrics
            .clone()
            .map(|metrics| tokio::spawn(metrics.keep()));
        let sessions = tokio::spawn(sessions::keep(Arc::downgrade(&self.app)));
        let engine = self.app.engine.clone();
        let deadline = self.app.options.drain_timeout;
        let drain = async {
            stop.await;
            engine.drain(deadline).await.ok()
        };
        let limits = connection::Limits::of(&self.app.options);
        let router = router(self.app, self.cors);
        let drained = connection::serve(self.listener, self.tls, router, limits, drain).await;
        if let Some(upkeep) = upkeep {
            upkeep.abort();
        }
        sessions.abort();
        drained
    }
}

/// Returns the layer that lets pages of the given origins use the server, if there are any.
fn cors(origins: &[String]) -> Result<Option<CorsLayer>, ServeError> {
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

fn router(app: Arc<App>, cors: Option<CorsLayer>) -> Router {
    // Each layer wraps the ones before it, so requests pass the last one first.
    routes()
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            auth::check,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            health::close_while_draining,
        ))
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            guard::check,
        ))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(host::check))
        .layer(tower::util::option_layer(cors))
        .layer(middleware::from_fn(access::log))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
        .with_state(app)
}

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
        .route("/metrics", get(health::metrics))
        .route("/version", get(health::version))
        .route("/openapi.json", get(health::openapi))
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

/// The state that all handlers share.
#[derive(Debug)]
pub(crate) struct App {
    engine: Engine,
    options: ServerOptions,
    /// Start time in seconds since 1970.
    started: u64,
    /// The `system_fingerprint` of answers: version and device of the server.
    fingerprint: String,
    /// Responses that clients can retrieve and continue.
    responses: responses::Store,
    sessions: Sessions,
    snapshots: Snapshots,
    guard: Guard,
    workers: Workers,
}

impl App {
    fn new(engine: Engine, options: ServerOptions, guard: Guard) -> Self {
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
    fn check_model(&self, name: Option<&str>) -> Result<String, ApiError> {
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

    fn require_tokenizer(&self, needed_for: &'static str) -> Result<&Arc<Tokenizer>, ApiError> {
        let missing = || SubmitError::NoTokenizer { needed_for }.into();
        self.engine.tokenizer().ok_or_else(missing)
    }

    /// Returns a new id for an answer, which clients and logs use.
    fn answer_id(&self, kind: &str) -> String {
        format!("{kind}-{}", Uuid::new_v4().simple())
    }

    /// Submits `prompts` for a caller, each for `samples` answers with the settings of
    /// `request`. The streams are in the order of the prompts, with all answers to a prompt
    /// together. Dropping a stream cancels its answer as after a disconnect.
    async fn submit(
        self: &Arc<Self>,
        caller: &Caller,
        mut request: Request,
        prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, ApiError> {
        caller.admit(&mut request);
        if let (Some(tokens), None) = (request.max_tokens, request.truncate_prompt) {
            for prompt in &prompts {
                self.check_length(prompt, tokens)?;
            }
        }
        // Reserve places before processing the prompts, so that a request that is refused for
        // lack of room costs nothing.
        let places = self.engine.places(prompts.len(), samples)?;
        let bytes = prompts.iter().map(text_bytes).sum();
        let app = Arc::clone(self);
        let work = move |job: &Job| app.submit_blocking(job, places, request, prompts, samples);
        self.workers.run_if_long(bytes, work).await
    }

    /// Like [`App::submit`], but submits a turn if there is a session. A turn has one prompt
    /// and one answer.
    async fn submit_turn(
        self: &Arc<Self>,
        caller: &Caller,
        session: Option<SessionTurn>,
        mut request: Request,
        mut prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, ApiError> {
        let Some(SessionTurn { id, prompt: kind }) = session else {
            return self.submit(caller, request, prompts, samples).await;
        };
        let (Some(prompt), 0, 1) = (prompts.pop(), prompts.len(), samples) else {
            let problem = "a session answers one prompt at a time, with n = 1";
            return Err(ApiError::invalid(problem).param("session_id"));
        };
        caller.admit(&mut request);
        let session = self.sessions.find(&id)?;
        self.check_bytes(&prompt)?;
        let bytes = text_bytes(&prompt);
        request.prompt = prompt;
        let turn = move |_: &Job| Ok(session.turn(request, kind)?);
        let stream: TokenStream = self.workers.run_if_long(bytes, turn).await?;
        Ok(vec![stream.when_dropped(CancelReason::Disconnect)])
    }

    fn submit_blocking(
        &self,
        job: &Job,
        places: Places,
        request: Request,
        prompts: Vec<Prompt>,
        samples: usize,
    ) -> Result<Vec<TokenStream>, ApiError> {
        let mut tokenized = Vec::with_capacity(prompts.len());
        let mut total = 0;
        for prompt in prompts {
            let mut tokens = match prompt {
                Prompt::Tokens(tokens) => tokens,
                prompt => {
                    job.check()?;
                    if request.truncate_prompt.is_none() {
                        self.check_bytes(&prompt)?;
                    }
                    self.engine.tokenize(&prompt)?
                }
            };
            if let Some(truncation) = request.truncate_prompt {
                truncation.cut(&mut tokens);
            }
            if let Some(most) = request.max_tokens {
                self.check_answer(tokens.len(), most)?;
            }
            total += tokens.len();
            if total.saturating_mul(samples) > MAX_BATCH_TOKENS {
                let problem = format!(
                    "the prompts have more than {MAX_BATCH_TOKENS} tokens, counted once for \
                     each of the {samples} answers to a prompt; send fewer at a time"
                );
                return Err(ApiError::invalid(problem).param("prompt"));
            }
            tokenized.push(tokens);
        }
        let streams = self
            .engine
            .generate_in(places, request, tokenized, samples)?;
        let owned = |stream: TokenStream| stream.when_dropped(CancelReason::Disconnect);
        Ok(streams.into_iter().map(owned).collect())
    }

    /// Returns the tokens of each prompt, in order. With `bare`, text prompts get none of the
    /// special tokens that the tokenizer puts around a text. With `cut`, prompts may be longer
    /// than the context, because they are truncated later.
    async fn tokenize_all(
        self: &Arc<Self>,
        prompts: Vec<Prompt>,
        bare: bool,
        cut: bool,
    ) -> Result<Vec<Vec<u32>>, ApiError> {
        let bytes = prompts.iter().map(text_bytes).sum();
        let app = Arc::clone(self);
        let tokenize = move |job: &Job| {
            let each = prompts.into_iter().map(|prompt| match prompt {
                Prompt::Tokens(tokens) => Ok(tokens),
                prompt => {
                    job.check()?;
                    if !cut {
                        app.check_bytes(&prompt)?;
                    }
                    match prompt {
                        Prompt::Text(text) if bare => app.tokenize_bare(&text),
                        prompt => Ok(app.engine.tokenize(&prompt)?),
                    }
                }
            });
            each.collect()
        };
        self.workers.run_if_long(bytes, tokenize).await
    }

    /// Refuses a text that has more bytes than the tokens of a whole context can stand for.
    /// This needs no tokenization.
    fn check_bytes(&self, prompt: &Prompt) -> Result<(), ApiError> {
        self.check_text_bytes(text_bytes(prompt))
    }

    /// Like [`App::check_bytes`], for a text of `bytes` bytes.
    fn check_text_bytes(&self, bytes: usize) -> Result<(), ApiError> {
        let limit = self.engine.max_sequence_tokens();
        let per_token = self
            .engine
            .tokenizer()
            .and_then(|tokenizer| tokenizer.max_token_bytes());
        let most = per_token.map_or(usize::MAX, |most| limit.saturating_mul(most));
        if bytes <= most {
            return Ok(());
        }
        let problem = format!(
            "the prompt has {bytes} bytes, which are more tokens than the context has: this \
             model's maximum context length is {limit} tokens"
        );
        Err(ApiError::invalid(problem)
            .param("prompt")
            .code("context_length_exceeded"))
    }

    /// Tokenizes a text without special tokens around it.
    fn tokenize_bare(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        let tokenizer = self.require_tokenizer("a text prompt")?;
        let options = EncodeOptions {
            add_special: false,
            parse_special: true,
        };
        let tokens = tokenizer.encode(text, options);
        tokens.map_err(|error| SubmitError::Text(error).into())
    }

    /// Refuses an answer that the context has no room for, if the prompt is given as tokens.
    /// Texts are checked once they are tokenized.
    fn check_length(&self, prompt: &Prompt, max_tokens: usize) -> Result<(), ApiError> {
        match prompt {
            Prompt::Tokens(tokens) => self.check_answer(tokens.len(), max_tokens),
            _ => Ok(()),
        }
    }

    /// Refuses an answer of `max_tokens` tokens to a prompt of `tokens` tokens if the context
    /// has no room for both.
    fn check_answer(&self, tokens: usize, max_tokens: usize) -> Result<(), ApiError> {
        let limit = self.engine.max_sequence_tokens();
        // The engine refuses a prompt that is too long by itself.
        if tokens >= limit || max_tokens <= limit - tokens {
            return Ok(());
        }
        let problem = format!(
            "this model's maximum context length is {limit} tokens; the prompt has {tokens} \
             tokens and max_tokens is {max_tokens}, {} together",
            tokens.saturating_add(max_tokens),
        );
        Err(ApiError::invalid(problem)
            .param("max_tokens")
            .code("context_length_exceeded"))
    }
}

/// Returns the number of bytes of a prompt that must be tokenized.
fn text_bytes(prompt: &Prompt) -> usize {
    match prompt {
        Prompt::Text(text) => text.len(),
        Prompt::Tokens(_) => 0,
        Prompt::Chat(messages) | Prompt::Conversation { messages, .. } => {
            messages.iter().map(|message| message.content.len()).sum()
        }
    }
}

/// What a stream carries in addition to the answer.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct StreamOptions {
    include_usage: Option<bool>,
    continuous_usage_stats: Option<bool>,
}

/// Which events of a stream report token usage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum UsageEvents {
    #[default]
    None,
    /// One more event at the end.
    Last,
    /// Every event, with the counts so far.
    Each,
}

impl StreamOptions {
    /// Returns which events report usage. Stream options are refused without a stream.
    fn usage(options: Option<Self>, stream: bool) -> Result<UsageEvents, ApiError> {
        let Some(options) = options else {
            return Ok(UsageEvents::None);
        };
        if !stream {
            let problem = "stream_options needs stream: true";
            return Err(ApiError::invalid(problem).param("stream_options"));
        }
        let continuous = options.continuous_usage_stats.unwrap_or(false);
        Ok(match (options.include_usage.unwrap_or(false), continuous) {
            (false, _) => UsageEvents::None,
            (true, false) => UsageEvents::Last,
            (true, true) => UsageEvents::Each,
        })
    }
}

/// Returns the current time in seconds since 1970.
fn unix_time() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}
