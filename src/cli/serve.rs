//! `quell serve`: the OpenAI API over HTTP.

use super::args::{CliError, ModelArgs};
use super::logging;
use super::signals::Signals;
use clap::Args;
use quell::server::{ApiKeys, HalfClose, Metrics, Server, ServerOptions, TlsFiles};
use quell::text::Keywords;
use quell::text::tools::ToolFormat;
use quell::{Engine, EngineFault, HealthStatus, Shutdown};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::oneshot;

/// How often the engine's health is looked at.
const LOOKING: Duration = Duration::from_millis(250);

/// How long connections may take to be told that the engine has failed, and to close.
const FAILING: Duration = Duration::from_secs(2);

/// The process ends within this time after the engine has failed, whatever it hangs in.
const LAST_RESORT: Duration = Duration::from_millis(4500);

/// How long the server may take to end when all that was open should have: connections have
/// 5 seconds to close, and the engine the rest of them.
const STOPPING: Duration = Duration::from_secs(8);

/// Serve a model over HTTP, as OpenAI's API.
///
/// Every flag can also be given by the environment, as QUELL_ and its name, and by a file;
/// a flag wins over the environment, and the environment over the file. API keys are read
/// from --api-key-file and from the variable QUELL_API_KEYS, separated by commas.
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
    /// A TOML file with settings: the flags' names without the dashes before them.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on.
    #[arg(long, value_name = "H", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, value_name = "P", default_value_t = 8000)]
    port: u16,
    /// What clients call the model; the first of several names is the one in answers
    /// [default: the file's or folder's name].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,
    /// How the model writes tool calls: hermes, llama, mistral, pythonic, deepseek or
    /// granite [default: as its chat template has it].
    #[arg(long, value_name = "FORMAT")]
    tool_format: Option<ToolFormat>,
    /// Refuse JSON schemas with keywords that answers cannot be held to, instead of leaving
    /// those out and naming them in the header x-quell-unenforced.
    #[arg(long)]
    strict_schemas: bool,
    /// A file with the chat template to use in place of the model's own.
    #[arg(long, value_name = "FILE")]
    chat_template: Option<PathBuf>,
    /// Let requests bring chat templates of their own.
    #[arg(long)]
    trust_request_chat_template: bool,
    /// Let in only who brings one of the keys in this file, one a line. A key may say
    /// how urgent its requests may be, as 'KEY max-priority=-5'.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Origins whose pages may use the server from a browser; * for all.
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    allowed_origins: Vec<String>,
    /// Names that clients reach the server by, beside --host; * for all. Addresses and
    /// names that are not public, such as localhost, need not be listed [default: all
    /// names if there are API keys or a certificate].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    allowed_hosts: Vec<String>,
    /// The most urgent priority that a client may give its requests; lower numbers, which
    /// are more urgent, are taken for this one.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        allow_negative_numbers = true
    )]
    max_priority: i32,
    /// Serve HTTPS with this certificate, a PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key, a PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Requests that may be open at the same time; one more is refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_open_requests: usize,
    /// Connections at the same time, or fewer if the process may not open so many files;
    /// more wait to be accepted, and idle ones are closed to make room.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    max_connections: usize,
    /// Connections from one address; one more is refused unless another one is idle
    /// [default: half of all].
    #[arg(long, value_name = "N")]
    max_connections_per_address: Option<usize>,
    /// How long a connection may be unused between requests before it is closed; longer
    /// than a proxy before the server keeps its own.
    #[arg(long, value_name = "SECONDS", default_value_t = 90)]
    keep_alive_timeout: u64,
    /// What it means that an HTTP/1 client sends no more while it waits for its answer:
    /// cancel (it is gone) or finish (it may still read).
    #[arg(long, value_name = "MEANING", default_value = "cancel")]
    half_close: HalfClose,
    /// Size of a request's body at most.
    #[arg(long, value_name = "MIB", default_value_t = 32)]
    max_body_mib: usize,
    /// How long an answer may take; 0 for without end.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    request_timeout: u64,
    /// How long a client may take nothing of its answer before it is cut off.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    write_timeout: u64,
    /// Sessions that may be open at the same time; one more is refused.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_sessions: usize,
    /// How long a session may be left alone before it is ended.
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    session_ttl: u64,
    /// How long open requests may take to finish when the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
    /// Send the spans of requests to this OpenTelemetry collector, such as
    /// http://localhost:4318/v1/traces.
    #[cfg(feature = "otel")]
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<String>,
}

impl ServeArgs {
    /// Where spans are to be sent.
    pub fn otlp_endpoint(&self) -> Option<&str> {
        #[cfg(feature = "otel")]
        return self.server.otlp_endpoint.as_deref();
        #[cfg(not(feature = "otel"))]
        None
    }
}

/// Runs the subcommand.
pub fn run(args: ServeArgs) -> Result<(), CliError> {
    // First of all: a signal is never answered by the system's default, which is no drain.
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
    // What goes on in its threads has nobody left to answer.
    runtime.shutdown_background();
    ended
}

/// What a server is made of.
struct Prepared {
    engine: Engine,
    options: ServerOptions,
    address: String,
}

impl ServeArgs {
    /// Reads files and loads the model, both of which may take long.
    fn prepare(self) -> Result<Prepared, CliError> {
        let mut options = self.server.options(&self.model.model)?;
        // Before the engine, which keeps the recorder that it finds.
        options.metrics = Some(Metrics::install()?);
        logging::count_dropped();
        let template = self.server.chat_template()?;
        let engine = self.model.start_with(template.as_deref(), |config| {
            config.max_open_requests = self.server.max_open_requests;
        })?;
        Ok(Prepared {
            engine,
            options,
            address: self.server.address(),
        })
    }
}

/// Prepares on a thread of its own. `None` if a signal comes first; the process is to end
/// then, and the thread with it.
async fn prepare(args: ServeArgs, signals: &mut Signals) -> Result<Option<Prepared>, CliError> {
    let (done, prepared) = oneshot::channel();
    std::thread::Builder::new()
        .name("quell-load".to_owned())
        .spawn(move || {
            // Nobody is there to take it if a signal came.
            let _ = done.send(args.prepare());
        })?;
    tokio::select! {
        prepared = prepared => prepared.map_err(|_| CliError::Loading)?.map(Some),
        signal = signals.next() => {
            tracing::info!(signal, "told to stop before the model was loaded");
            Ok(None)
        }
    }
}

/// Serves until a signal comes and what is open has ended, or until the engine fails.
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
            // None if a second signal has ended the engine before it was drained.
            let (finished, aborted) = drained
                .map(|drained| (drained.finished, drained.aborted))
                .unzip();
            tracing::info!(finished, aborted, "the server has stopped");
            Ok(())
        }
    }
}

/// Tells the server to stop at the first signal or when the engine fails, and cancels what
/// is open at the second signal. Done only if that does not end the server in time; gives
/// what the process is to end with then.
async fn end(
    engine: &Engine,
    mut signals: Signals,
    stop: oneshot::Sender<()>,
    drain_timeout: Duration,
) -> CliError {
    tokio::select! {
        signal = signals.next() => {
            tracing::info!(signal, "finishing the open requests; once more to cancel them");
        }
        fault = failure(engine) => {
            tracing::error!(%fault, "the engine has failed, and the server ends");
            drop(stop);
            abort_after(LAST_RESORT);
            tokio::time::sleep(FAILING).await;
            return CliError::Engine(fault);
        }
    }
    drop(stop);
    let draining = drain_timeout.saturating_add(STOPPING);
    tokio::select! {
        signal = signals.next() => {
            tracing::info!(signal, "cancelling the open requests");
        }
        fault = failure(engine) => {
            abort_after(LAST_RESORT);
            tokio::time::sleep(FAILING).await;
            return CliError::Engine(fault);
        }
        () = tokio::time::sleep(draining) => return CliError::Stopping(draining),
    }
    // Posted at once; the server ends when the engine has.
    let _aborting = engine.shutdown(Shutdown::Abort);
    tokio::time::sleep(STOPPING).await;
    CliError::Stopping(STOPPING)
}

/// What has ended the engine, unless it was told to end.
fn fault(engine: &Engine) -> Option<EngineFault> {
    match engine.health().status {
        HealthStatus::Healthy | HealthStatus::Closed(EngineFault::Shutdown) => None,
        HealthStatus::Closed(fault) => Some(fault),
        HealthStatus::Stuck { step, waited } => Some(EngineFault::Stuck { step, waited }),
        _ => None,
    }
}

/// Waits until the engine fails. Its health waits for nobody, and so does this.
async fn failure(engine: &Engine) -> EngineFault {
    loop {
        if let Some(fault) = fault(engine) {
            return fault;
        }
        tokio::time::sleep(LOOKING).await;
    }
}

/// Ends the process if it still lives after a while: a driver whose device is lost may keep
/// the end of the process waiting for ever.
fn abort_after(time: Duration) {
    let wait = move || {
        std::thread::sleep(time);
        std::process::abort();
    };
    // Without the thread the process ends by itself or not at all.
    let _ = std::thread::Builder::new().spawn(wait);
}

/// Tells on stdout where the server listens. On a thread of its own: stdout may be a pipe
/// that is full.
fn announce(server: &Server) {
    let (scheme, address) = (server.scheme(), server.local_addr());
    let write = move || {
        let mut out = std::io::stdout().lock();
        let written = writeln!(out, "listening on {scheme}://{address}");
        if let Err(error) = written.and_then(|()| out.flush()) {
            tracing::warn!(%error, "cannot say on stdout that {scheme}://{address} is listened on");
        }
    };
    if let Err(error) = std::thread::Builder::new().spawn(write) {
        tracing::warn!(%error, "cannot say on stdout that {scheme}://{address} is listened on");
    }
}

impl HttpArgs {
    /// Where to listen. An IPv6 address needs brackets before its port.
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
            options.schema_keywords = Keywords::Strict;
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

    /// The chat template that is to be used in place of the model's.
    fn chat_template(&self) -> Result<Option<String>, CliError> {
        let read = |path: &PathBuf| {
            std::fs::read_to_string(path).map_err(|source| CliError::Read {
                path: path.clone(),
                source,
            })
        };
        self.chat_template.as_ref().map(read).transpose()
    }

    /// The keys of the file and of the environment. Not those of a flag: the system shows
    /// everybody the flags of a process.
    fn api_keys(&self) -> Result<ApiKeys, CliError> {
        let variable = std::env::var("QUELL_API_KEYS").unwrap_or_default();
        let keys = ApiKeys::parse(&variable);
        let Some(path) = &self.api_key_file else {
            return Ok(keys);
        };
        let text = std::fs::read_to_string(path).map_err(|source| CliError::Read {
            path: path.clone(),
            source,
        })?;
        let of_file = ApiKeys::parse(&text);
        if of_file.is_empty() {
            // Rather than let everybody in.
            let problem = format!("--api-key-file {} has no key", path.display());
            return Err(CliError::Usage(problem));
        }
        Ok(keys.join(of_file))
    }
}

/// The model's name, as its file or folder is called.
fn name(model: &str) -> String {
    let path = Path::new(model.strip_prefix("hf:").unwrap_or(model));
    let name = match path.extension() {
        Some(extension) if extension == "gguf" => path.file_stem(),
        _ => path.file_name(),
    };
    let name = name.map(|name| name.to_string_lossy().into_owned());
    name.unwrap_or_else(|| model.to_owned())
}
