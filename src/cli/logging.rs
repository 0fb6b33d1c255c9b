//! Logs go to stderr: what quell has to say, but not of each request, and others'
//! warnings and errors, unless we say them, too; or what `QUELL_LOG` asks for.

use std::io::IsTerminal;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::layer;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn filter() -> EnvFilter {
    let default =
        |_| EnvFilter::new("warn,quell=info,quell::request=warn,rustls_platform_verifier=off");
    EnvFilter::try_from_env("QUELL_LOG").unwrap_or_else(default)
}

/// Starts logging.
pub fn start() {
    let print = layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    tracing_subscriber::registry()
        .with(filter())
        .with(print)
        .init();
}

/// Sends what is in the queue when it is dropped.
#[cfg(feature = "otel")]
pub struct Exporter(opentelemetry_sdk::trace::SdkTracerProvider);

#[cfg(feature = "otel")]
impl Drop for Exporter {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown() {
            tracing::warn!(%error, "the last spans could not be sent");
        }
    }
}

/// Starts logging, and sends the spans of requests to an OpenTelemetry collector: OTLP
/// over HTTP, to `endpoint`, such as `http://localhost:4318/v1/traces`.
#[cfg(feature = "otel")]
pub fn start_with_spans(endpoint: &str) -> Result<Exporter, super::args::CliError> {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_otlp::{SpanExporter, WithExportConfig};
    use opentelemetry_sdk::Resource;
    use opentelemetry_sdk::trace::SdkTracerProvider;
    use tracing_subscriber::Layer;
    use tracing_subscriber::filter::Targets;

    super::tls::provide();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_endpoint(endpoint)
        .build()
        .map_err(|error| {
            super::args::CliError::Usage(format!("--otlp-endpoint {endpoint}: {error}"))
        })?;
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(Resource::builder().with_service_name("quell").build())
        .build();
    let wanted = Targets::new()
        .with_target("quell::access", tracing::Level::INFO)
        .with_target("quell::request", tracing::Level::INFO);
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer("quell"))
        .with_filter(wanted);
    let print = layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_filter(filter());
    tracing_subscriber::registry()
        .with(spans)
        .with(print)
        .init();
    Ok(Exporter(provider))
}
