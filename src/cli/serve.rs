//! `quell serve`: serves the OpenAI API over HTTP.

use super::args::ModelArgs;
use super::error::CliError;
use super::logging;
use super::signals::Signals;
use crate::server::{ApiKeys, HalfClose, Metrics, Server, ServerOptions, TlsFiles};
use crate::{Engine, EngineFault, HealthStatus, SchemaKeywords, Shutdown, ToolFormat};
use clap::Args;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::oneshot;

/// How often the engine's health is checked.
const HEALTH_INTERVAL: Duration = Duration::from_millis(250);

/// How long connections may take to learn that the engine has failed, and to close.
const FAILURE_NOTICE: Duration = Duration::from_secs(2);

/// The process ends within this time after the engine has failed, even if something hangs.
const LAST_RESORT: Duration = Duration::from_millis(4500);

/// How long the server may take to end after all open requests should have ended.
/// Connections have 5 seconds to close; the rest is for the engine.
const STOP_TIMEOUT: Duration = Duration::from_secs(8);

/// Arguments of `quell serve`.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    server: HttpArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Server")]
struct HttpArgs {
    /// TOML file with settings; the keys are the flags' names without the leading dashes.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on.
    #[arg(long, value_name = "H", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 picks a free one.
    #[arg(long, value_name = "P", default_value_t = 8000)]
    port: u16,
    /// Names that clients may use for the model, separated by commas; answers use the first
    /// [default: the name of the file or folder].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,
    /// Format of the model's tool calls: hermes, llama, mistral, pythonic, deepseek, granite,
    /// nemotron, qwen_coder, seed, glm, minimax, kimi, lfm2, gemma, command_r or harmony [default: the
    /// format of its chat template].
    #[arg(long, value_name = "FORMAT")]
    tool_format: Option<ToolFormat>,
    /// Refuse JSON schemas with keywords that cannot be enforced, instead of ignoring those
    /// keywords and naming them in the header x-quell-unenforced.
    #[arg(long)]
    strict_schemas: bool,
    /// File with a chat template to use instead of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Allow requests to bring their own chat templates.
    #[arg(long)]
    trust_request_chat_template: bool,
    /// Require one of the API keys in this file, one per line. A line 'KEY max-priority=-5'
    /// sets --max-priority for that key.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Also accept the keys in this file, one per line, as admin keys: they show the engine's
    /// snapshot, and show and end the requests and sessions of all keys.
    #[arg(long, value_name = "FILE")]
    admin_key_file: Option<PathBuf>,
    /// Origins whose pages may use the server from a browser, separated by commas; * allows
    /// all.
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    allowed_origins: Vec<String>,
    /// Host names, in addition to --host, that clients reach the server by, separated by
    /// commas; * allows all. Addresses and names that are not public, such as localhost,
    /// need not be listed [default: all names if there are API keys or a certificate].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    allowed_hosts: Vec<String>,
    /// Most urgent priority that clients may give their requests. Lower numbers are more
    /// urgent and are raised to this one.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    max_priority: i32,
    /// Serve HTTPS with this certificate (PEM file).
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// Private key of the certificate (PEM file).
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Maximum number of open requests; further ones are refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_open_requests: usize,
    /// Maximum number of connections, or fewer if the process may not open as many files.
    /// Further ones wait to be accepted, and idle ones are closed to make room.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    max_connections: usize,
    /// Maximum number of connections from one address; a further one is refused unless
    /// another one is idle [default: half of all].
    #[arg(long, value_name = "N")]
    max_connections_per_address: Option<usize>,
    /// Close a connection that is unused between requests for this long. Choose a longer
    /// time than a proxy in front of the server keeps its connections.
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    keep_alive_timeout: u64,
    /// What to do when an HTTP/1 client stops sending while it waits for its answer: cancel
    /// (treat it as gone) or finish (it may still read).
    #[arg(long, value_name = "MEANING", default_value = "cancel")]
    half_close: HalfClose,
    /// Maximum size of a request body, in MiB.
    #[arg(long, value_name = "MIB", default_value_t = 32)]
    max_body_mib: usize,
    /// Maximum time for an answer; 0 means no limit.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    request_timeout: u64,
    /// Cut off a client that reads nothing of its answer for this long.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    write_timeout: u64,
    /// Maximum number of open sessions; a further one is refused.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_sessions: usize,
    /// End a session that is unused for this long.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    session_ttl: u64,
    /// How long open requests may take to finish after the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
    /// Send request spans to this OpenTelemetry collector, such as
    /// http://localhost:4318/v1/traces.
    #[cfg(feature = "otel")]
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
}

impl ServeArgs {
    /// Returns the URL that spans are sent to.
    pub fn otlp_endpoint(&self) -> Option<&str> {
        #[cfg(feature = "otel")]
        return self.server.otlp_endpoint.as_deref();
        #[cfg(not(feature = "otel"))]
        None
    }
}

/// Runs the subcommand.
pub fn run(args: ServeArgs) -> Result<(), CliError> {
    // Listen first, so that no signal meets the system's default action, which ends the
    // process without a drain.
    let mut signals = Signals::listen()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let ended = runtime.block_on(async {
        match prepare(args, &mut signals).await? {
            Some(prepared) => serve(prepared, signals).await,
            None => Ok(()),
        }
    });
    // Do not wait for its threads: no client is left to answer.
    runtime.shutdown_background();
    ended
}

/// A loaded engine and the server's settings.
struct Prepared {
    engine: Engine,
    options: ServerOptions,
    address: String,
}

impl ServeArgs {
    /// Reads files and loads the model. Both may take long.
    fn prepare(self) -> Result<Prepared, CliError> {
        let mut options = self.server.options(&self.model.model)?;
        // Install it before the engine starts, which keeps the recorder that it finds.
        options.metrics = Some(Metrics::install()?);
        logging::count_dropped();
        let template = self.server.chat_template()?;
        let template = template.as_deref();
        let engine = self.model.start_with(usize::MAX, template, |config| {
            config.max_open_requests = self.server.max_open_requests;
        })?;
        Ok(Prepared {
            engine,
            options,
            address: self.server.address(),
        })
    }
}

/// Prepares the server on a separate thread. Returns `None` if a signal arrives first; the
/// process must then end, and the thread with it.
async fn prepare(args: ServeArgs, signals: &mut Signals) -> Result<Option<Prepared>, CliError> {
    let (done, prepared) = oneshot::channel();
    std::thread::Builder::new()
        .name("quell-load".to_owned())
        .spawn(move || {
            // The receiver is gone if a signal arrived.
            let _ = done.send(args.prepare());
        })?;
    tokio::select! {
        prepared = prepared => prepared.map_err(|_| CliError::Loading)?.map(Some),
        signal = signals.next() => {
            tracing::info!(signal, "stopped before the model was loaded");
            Ok(None)
        }
    }
}

/// Serves until a signal has come and the open requests have ended, or until the engine
/// fails.
async fn serve(prepared: Prepared, mut signals: Signals) -> Result<(), CliError> {
    let Prepared {
        engine,
        options,
        address,
    } = prepared;
    let drain_timeout = options.drain_timeout;
    let server = tokio::select! {
        server = Server::bind(engine.clone(), options, address) => server?,
        _ = signals.next() => return Ok(()),
    };
    announce(&server);
    let (stop, stopped) = oneshot::channel::<()>();
    let stopping = async {
        let _ = stopped.await;
    };
    let drained = tokio::select! {
        drained = server.run(stopping) => drained,
        hung = end(&engine, signals, stop, drain_timeout) => return Err(hung),
    };
    match fault(&engine) {
        Some(fault) => Err(CliError::Engine(fault)),
        None => {
            // None if a second signal ended the engine before it was drained.
            let (finished, aborted) = drained
                .map(|drained| (drained.finished, drained.aborted))
                .unzip();
            tracing::info!(finished, aborted, "the server has stopped");
            Ok(())
        }
    }
}

/// Tells the server to stop at the first signal or when the engine fails, and cancels the
/// open requests at the second signal. Returns only if the server does not end in time,
/// with the error that the process must end with.
async fn end(
    engine: &Engine,
    mut signals: Signals,
    stop: oneshot::Sender<()>,
    drain_timeout: Duration,
) -> CliError {
    tokio::select! {
        signal = signals.next() => {
            tracing::info!(
                signal,
                "finishing the open requests; send the signal again to cancel them"
            );
        }
        fault = failure(engine) => {
            tracing::error!(%fault, "the engine has failed; shutting down the server");
            drop(stop);
            abort_after(LAST_RESORT);
            tokio::time::sleep(FAILURE_NOTICE).await;
            return CliError::Engine(fault);
        }
    }
    drop(stop);
    let draining = drain_timeout.saturating_add(STOP_TIMEOUT);
    tokio::select! {
        signal = signals.next() => {
            tracing::info!(signal, "cancelling the open requests");
        }
        fault = failure(engine) => {
            abort_after(LAST_RESORT);
            tokio::time::sleep(FAILURE_NOTICE).await;
            return CliError::Engine(fault);
        }
        () = tokio::time::sleep(draining) => return CliError::Stopping(draining),
    }
    // The shutdown is posted at once, without awaiting it. The server ends when the engine
    // has.
    let _aborting = engine.shutdown(Shutdown::Abort);
    tokio::time::sleep(STOP_TIMEOUT).await;
    CliError::Stopping(STOP_TIMEOUT)
}

/// Returns what ended the engine, unless it was told to end.
fn fault(engine: &Engine) -> Option<EngineFault> {
    match engine.health().status {
        HealthStatus::Healthy | HealthStatus::Closed(EngineFault::Shutdown) => None,
        HealthStatus::Closed(fault) => Some(fault),
        HealthStatus::Stuck { step, waited } => Some(EngineFault::Stuck { step, waited }),
    }
}

/// Waits until the engine fails. Polls the engine's health, which can be read without
/// blocking even if the engine hangs.
async fn failure(engine: &Engine) -> EngineFault {
    loop {
        if let Some(fault) = fault(engine) {
            return fault;
        }
        tokio::time::sleep(HEALTH_INTERVAL).await;
    }
}

/// Aborts the process if it is still alive after `time`. A driver whose device is lost may
/// block process exit indefinitely.
fn abort_after(time: Duration) {
    let wait = move || {
        std::thread::sleep(time);
        std::process::abort();
    };
    // If the thread cannot be started, the process ends by itself or not at all.
    let _ = std::thread::Builder::new().spawn(wait);
}

/// Prints to stdout where the server listens. Uses a separate thread, because stdout may be
/// a full pipe.
fn announce(server: &Server) {
    let (scheme, address) = (server.scheme(), server.local_addr());
    let write = move || {
        let mut out = std::io::stdout().lock();
        let written = writeln!(out, "listening on {scheme}://{address}");
        if let Err(error) = written.and_then(|()| out.flush()) {
            tracing::warn!(%error, "cannot announce {scheme}://{address} on stdout");
        }
    };
    if let Err(error) = std::thread::Builder::new().spawn(write) {
        tracing::warn!(%error, "cannot announce {scheme}://{address} on stdout");
    }
}

impl HttpArgs {
    /// Returns the address to listen on. An IPv6 address needs brackets before its port.
    fn address(&self) -> String {
        let (host, port) = (&self.host, self.port);
        match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]:{port}"),
            Err(_) => format!("{host}:{port}"),
        }
    }

    fn options(&self, model: &str) -> Result<ServerOptions, CliError> {
        for (flag, value) in [
            ("--max-open-requests", self.max_open_requests),
            ("--max-connections", self.max_connections),
            ("--max-body-mib", self.max_body_mib),
            (
                "--max-connections-per-address",
                self.max_connections_per_address.unwrap_or(1),
            ),
            ("--keep-alive-timeout", self.keep_alive_timeout as usize),
            ("--write-timeout", self.write_timeout as usize),
            ("--session-ttl", self.session_ttl as usize),
        ] {
            if value == 0 {
                let problem = format!("{flag} is 0, but must be at least 1");
                return Err(CliError::Usage(problem));
            }
        }
        let mut names = self.served_model_name.iter().cloned();
        let mut options = ServerOptions::new(names.next().unwrap_or_else(|| name(model)));
        options.aliases = names.collect();
        options.tool_format = self.tool_format;
        if self.strict_schemas {
            options.schema_keywords = SchemaKeywords::Strict;
        }
        options.trust_request_chat_template = self.trust_request_chat_template;
        options.api_keys = self.api_keys()?;
        options.allowed_origins = self.allowed_origins.clone();
        options.allowed_hosts = self.allowed_hosts.clone();
        options.max_priority = self.max_priority;
        options.tls = self
            .tls_certificate
            .clone()
            .zip(self.tls_key.clone())
            .map(|(certificate, key)| TlsFiles { certificate, key });
        options.max_connections = self.max_connections;
        options.max_connections_per_address = self.max_connections_per_address;
        options.max_body_bytes = self.max_body_mib.saturating_mul(1 << 20);
        let seconds = |seconds| Duration::from_secs(seconds);
        options.request_timeout = (self.request_timeout > 0).then(|| seconds(self.request_timeout));
        options.keep_alive_timeout = seconds(self.keep_alive_timeout);
        options.half_close = self.half_close;
        options.write_timeout = seconds(self.write_timeout);
        options.max_sessions = self.max_sessions;
        options.session_ttl = seconds(self.session_ttl);
        options.drain_timeout = seconds(self.drain_timeout);
        Ok(options)
    }

    /// Reads the chat template that replaces the model's own.
    fn chat_template(&self) -> Result<Option<String>, CliError> {
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|source| CliError::Read {
                path: path.clone(),
                source,
            })
        };
        self.chat_template.as_ref().map(read).transpose()
    }

    /// Returns the API keys, those of admins first: a key that is listed as both is an admin's.
    fn api_keys(&self) -> Result<ApiKeys, CliError> {
        let admin = keys("QUELL_ADMIN_KEYS", "--admin-key-file", &self.admin_key_file)?;
        let other = keys("QUELL_API_KEYS", "--api-key-file", &self.api_key_file)?;
        Ok(admin.for_admins().join(other))
    }
}

/// Returns the keys of an environment variable and of the file that a flag names. There is no
/// flag for keys, because the system shows the flags of a process to everyone.
fn keys(variable: &str, flag: &str, file: &Option<PathBuf>) -> Result<ApiKeys, CliError> {
    let keys = ApiKeys::parse(&std::env::var(variable).unwrap_or_default());
    let Some(path) = file else {
        return Ok(keys);
    };
    let text = std::fs::read_to_string(path).map_err(|source| CliError::Read {
        path: path.clone(),
        source,
    })?;
    let of_file = ApiKeys::parse(&text);
    if of_file.is_empty() {
        // An empty file must not open the server to everyone.
        let problem = format!("{flag} {} contains no key", path.display());
        return Err(CliError::Usage(problem));
    }
    Ok(keys.join(of_file))
}

/// Returns the model's name: that of its file or folder.
fn name(model: &str) -> String {
    let path = Path::new(model.strip_prefix("hf:").unwrap_or(model));
    let name = match path.extension() {
        Some(extension) if extension == "gguf" => path.file_stem(),
        _ => path.file_name(),
    };
    let name = name.map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| model.to_owned())
}
