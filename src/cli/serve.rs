//! `quell serve`: the OpenAI API over HTTP.

use super::args::{CliError, ModelArgs};
use clap::Args;
use quell::server::{Metrics, Server, ServerOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

/// Serve a model over HTTP, as OpenAI's API.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on.
    #[arg(long, value_name = "H", default_value = "127.0.0.1")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, value_name = "P", default_value_t = 8000)]
    port: u16,
    /// What clients call the model, also more than one name [default: the file's or
    /// folder's name].
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    served_model_name: Vec<String>,
    /// How long open requests may take to finish when the server is told to stop.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain_timeout: u64,
}

/// Runs the subcommand.
pub fn run(args: ServeArgs) -> Result<(), CliError> {
    let metrics = Metrics::install()?;
    let engine = args.model.start()?;
    let mut names = args.served_model_name.clone().into_iter();
    let mut options = ServerOptions::new(names.next().unwrap_or_else(|| name(&args.model.model)));
    options.aliases = names.collect();
    options.metrics = Some(metrics);
    options.drain_timeout = Duration::from_secs(args.drain_timeout);
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let address = format!("{}:{}", args.host, args.port);
        let server = Server::bind(engine.clone(), options, address).await?;
        let address = server.local_addr();
        let mut out = std::io::stdout().lock();
        writeln!(out, "listening on http://{address}")?;
        out.flush()?;
        drop(out);
        let drained = server.run(told_to_stop()).await;
        if let Some(drained) = drained {
            tracing::info!(
                finished = drained.finished,
                aborted = drained.aborted,
                "the server has stopped"
            );
        }
        Ok(())
    })
}

/// The model's name, as its file or folder is called.
fn name(model: &str) -> String {
    let path = Path::new(model.strip_prefix("hf:").unwrap_or(model));
    let name = match path.extension() {
        Some(extension) if extension == "gguf" => path.file_stem(),
        _ => path.file_name(),
    };
    name.map_or_else(
        || model.to_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Done at the first SIGTERM or Ctrl-C; the second one ends the process as usual.
async fn told_to_stop() {
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
