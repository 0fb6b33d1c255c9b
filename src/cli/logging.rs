//! Logging to stderr.
//!
//! By default this shows quell's own messages from level info (those about single requests
//! from level warn) and the warnings and errors of other crates, except those that quell
//! reports itself. `QUELL_LOG` replaces this filter. The log of a server never makes it
//! wait; see `lossy.rs`.

#[cfg(feature = "server")]
use super::error::CliError;
#[cfg(feature = "server")]
use super::lossy::Lossy;
use std::io::IsTerminal;
#[cfg(feature = "server")]
use std::sync::OnceLock;
#[cfg(feature = "server")]
use std::time::Duration;
use tracing_subscriber::fmt::layer;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How long the process waits at its end for the last lines to be written.
#[cfg(feature = "server")]
const FLUSHING: Duration = Duration::from_millis(500);

/// How long the process waits at its end for the last spans to be sent.
#[cfg(feature = "otel")]
const SENDING: Duration = Duration::from_secs(1);

/// The log of the server, set once it has started.
#[cfg(feature = "server")]
static LOG: OnceLock<Lossy> = OnceLock::new();

/// Guard that writes the remaining logs and sends the remaining spans when it is dropped.
/// Both have a time limit.
#[derive(Default)]
pub struct Logging {
    #[cfg(feature = "otel")]
    spans: Option<opentelemetry_sdk::trace::SdkTracerProvider>,
}

impl Drop for Logging {
    fn drop(&mut self) {
        #[cfg(feature = "otel")]
        if let Some(spans) = &self.spans
            && let Err(error) = spans.shutdown_with_timeout(SENDING)
        {
            tracing::warn!(%error, "the last spans could not be sent");
        }
        #[cfg(feature = "server")]
        if let Some(log) = LOG.get() {
            log.flush(FLUSHING);
        }
    }
}

fn filter() -> EnvFilter {
    let default =
        |_| EnvFilter::new("warn,quell=info,quell::request=warn,rustls_platform_verifier=off");
    EnvFilter::try_from_env("QUELL_LOG").unwrap_or_else(default)
}

/// Returns a layer that prints to stderr through `writer`.
fn print<S>(writer: BoxMakeWriter) -> impl Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    layer()
        .with_writer(writer)
        .with_ansi(std::io::stderr().is_terminal())
        .log_internal_errors(false)
        .with_filter(filter())
}

/// Starts logging for commands other than the server. Log calls wait for stderr.
pub fn start() -> Logging {
    let print = print(BoxMakeWriter::new(std::io::stderr));
    tracing_subscriber::registry().with(print).init();
    Logging::default()
}

/// Starts the log of a server, which never waits for stderr. If `endpoint` is given, such
/// as `http://localhost:4318/v1/traces`, sends request spans to the OpenTelemetry collector
/// there (OTLP over HTTP).
#[cfg(feature = "server")]
pub fn start_server(endpoint: Option<&str>) -> Result<Logging, CliError> {
    let report = |dropped| {
        tracing::warn!(
            target: "quell",
            dropped,
            "log lines were dropped because the log was not read"
        );
    };
    let log = Lossy::start(std::io::stderr(), report)?;
    let writer = log.clone();
    let print = print(BoxMakeWriter::new(move || writer.clone()));
    let _ = LOG.set(log);
    let registry = tracing_subscriber::registry().with(print);
    #[cfg(feature = "otel")]
    let logging = match endpoint {
        None => {
            registry.init();
            Logging::default()
        }
        Some(endpoint) => {
            let provider = provider(endpoint)?;
            registry.with(spans(&provider)).init();
            Logging {
                spans: Some(provider),
            }
        }
    };
    #[cfg(not(feature = "otel"))]
    let logging = {
        let _ = endpoint;
        registry.init();
        Logging::default()
    };
    log_panics();
    Ok(logging)
}

/// Counts dropped lines in the metrics recorder that is installed now.
#[cfg(feature = "server")]
pub fn count_dropped() {
    if let Some(log) = LOG.get() {
        log.count();
    }
}

/// Logs panics. The hook of the standard library would wait for stderr.
#[cfg(feature = "server")]
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let location = panic.location().map(tracing::field::display);
        let backtrace = std::backtrace::Backtrace::capture();
        let captured = backtrace.status() == std::backtrace::BacktraceStatus::Captured;
        let backtrace = captured.then(|| tracing::field::display(backtrace));
        tracing::error!(
            target: "quell",
            thread = thread.name(),
            location,
            backtrace,
            "panicked: {}",
            panic.payload_as_str().unwrap_or("no message")
        );
    }));
}

/// Creates a provider that sends spans to `endpoint`.
#[cfg(feature = "otel")]
fn provider(endpoint: &str) -> Result<opentelemetry_sdk::trace::SdkTracerProvider, CliError> {
    use opentelemetry_otlp::{SpanExporter, WithExportConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;

    super::tls::provide();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(endpoint)
        .build()
        .map_err(|error| CliError::Usage(format!("--otlp-endpoint {endpoint}: {error}")))?;
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name("quell").build())
        .build();
    Ok(provider)
}

/// Returns a layer that gives the spans of requests to the provider.
#[cfg(feature = "otel")]
fn spans<S>(provider: &opentelemetry_sdk::trace::SdkTracerProvider) -> impl Layer<S>
where
    S: tracing::Subscriber + for<'a> tracing_subscriber::registry::LookupSpan<'a>,
{
    use opentelemetry::trace::TracerProvider;
    use tracing_subscriber::filter::Targets;

    let wanted = Targets::new()
        .with_target("quell::access", tracing::Level::INFO)
        .with_target("quell::request", tracing::Level::INFO);
    tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("quell"))
        .with_filter(wanted)
}
