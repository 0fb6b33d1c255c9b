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

// - `http`: what happens to a request before and after it is an API's: connections, TLS, access,
//   bodies.
// - `openai`: what several routes share to read requests and to write answers in the form of
//   OpenAI's API.
// - `routes`: one file per route.

mod app;
mod error;
mod http;
mod openai;
mod options;
mod router;
mod routes;
mod scoring;
mod submit;

pub use error::ServeError;
pub use http::auth::ApiKeys;
pub use http::tls::TlsFiles;
#[cfg(any(test, feature = "internals"))]
pub(crate) use openai::fields;
pub use options::{HalfClose, ServerOptions};
pub use routes::metrics::{Metrics, MetricsError};

use crate::engine::{Drained, Engine};
use app::{App, unix_time};
use http::connection;
use http::guard::Guard;
use routes::sessions;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio_rustls::TlsAcceptor;
use tower_http::cors::CorsLayer;

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
    /// Returns [`ServeError::Host`] or [`ServeError::Origin`] if an allowed host or origin is
    /// invalid, [`ServeError::Tls`] if the certificate or its key cannot be used, and
    /// [`ServeError::Bind`] if the server cannot listen on `address`.
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
        let cors = router::cors(&options.allowed_origins)?;
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
        let router = router::router(self.app, self.cors);
        let drained = connection::serve(self.listener, self.tls, router, limits, drain).await;
        if let Some(upkeep) = upkeep {
            upkeep.abort();
        }
        sessions.abort();
        drained
    }
}
