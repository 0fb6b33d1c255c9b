//! `quell serve`: the OpenAI API over HTTP.

use super::args::{CliError, ModelArgs};
use clap::Args;
use quell::server::{ApiKeys, Metrics, Server, ServerOptions, TlsFiles};
use quell::text::Keywords;
use quell::text::tools::ToolFormat;
use quell::{Engine, Shutdown};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// Let in only who brings one of the keys in this file, one a line.
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,
    /// Origins whose pages may use the server from a browser; * for all.
    #[arg(long, value_name = "ORIGIN", value_delimiter = ',')]
    allowed_origins: Vec<String>,
    /// Serve HTTPS with this certificate, a PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key, a PEM file.
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
    /// Requests that may be open at the same time; one more is refused with status 429.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    max_open_requests: usize,
    /// Connections at the same time; more wait to be accepted.
    #[arg(long, value_name = "N", default_value_t = 8192)]
    max_connections: usize,
    /// Size of a request's body at most.
    #[arg(long, value_name = "MIB", default_value_t = 32)]
    max_body_mib: usize,
    /// How long an answer may take; 0 for without end.
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    request_timeout: u64,
    /// How long a client may leave its answer unread before it is cut off.
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
    #[cfg(feature = "otel")]
    pub fn otlp_endpoint(&self) -> Option<&str> {
        self.server.otlp_endpoint.as_deref()
    }
}

/// Runs the subcommand.
pub fn run(args: ServeArgs) -> Result<(), CliError> {
    let mut options = args.server.options(&args.model.model)?;
    // Before the engine, which keeps the recorder that it finds.
    options.metrics = Some(Metrics::install()?);
    let template = args.server.chat_template()?;
    let engine = args.model.start_with(template.as_deref(), |config| {
        config.max_open_requests = args.server.max_open_requests;
    })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let address = format!("{}:{}", args.server.host, args.server.port);
    runtime.block_on(async {
        let server = Server::bind(engine.clone(), options, address).await?;
        announce(&server)?;
        let drained = server.run(told_to_stop(engine)).await;
        if let Some(drained) = drained {
            let (finished, aborted) = (drained.finished, drained.aborted);
            tracing::info!(finished, aborted, "the server has stopped");
        }
        Ok(())
    })
}

/// Tells on stdout where the server listens.
fn announce(server: &Server) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    let (scheme, address) = (server.scheme(), server.local_addr());
    writeln!(out, "listening on {scheme}://{address}")?;
    out.flush()
}

impl HttpArgs {
    fn options(&self, model: &str) -> Result<ServerOptions, CliError> {
        for (flag, value) in [
            ("--max-open-requests", self.max_open_requests),
            ("--max-connections", self.max_connections),
            ("--max-body-mib", self.max_body_mib),
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
        options.tls = self
            .tls_certificate
            .clone()
            .zip(self.tls_key.clone())
            .map(|(certificate, key)| TlsFiles { certificate, key });
        options.max_connections = self.max_connections;
        options.max_body_bytes = self.max_body_mib.saturating_mul(1 << 20);
        let seconds = |seconds| Duration::from_secs(seconds);
        options.request_timeout = (self.request_timeout > 0).then(|| seconds(self.request_timeout));
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

/// Done at the first SIGTERM or Ctrl-C. The second one ends the open requests at once.
async fn told_to_stop(engine: Engine) {
    signalled().await;
    tracing::info!("finishing the open requests; once more to cancel them");
    tokio::spawn(async move {
        signalled().await;
        let _ = engine.shutdown(Shutdown::Abort).await;
    });
}

async fn signalled() {
    let interrupt = tokio::signal::ctrl_c();
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = interrupt => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = interrupt.await;
}
