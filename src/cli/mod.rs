//! The `quell` program: one file a subcommand.
//!
//! Results go to stdout, everything else to stderr. A command line that makes no
//! sense ends with one line and exit code 2, anything else that fails with one line
//! and exit code 1.

mod args;
mod bench;
mod chat;
mod generate;
#[cfg(feature = "hub")]
mod hub;
mod inspect;
mod progress;
#[cfg(feature = "server")]
mod serve;
mod tokenize;

use args::CliError;
use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use std::io::Write as _;
use std::process::ExitCode;

/// Run large language models: one scheduler thread, batched decoding, and
/// cancellation that always frees the KV cache.
#[derive(Debug, Parser)]
#[command(name = "quell", version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt, or answer a message.
    Generate(generate::GenerateArgs),
    /// Talk with a model in the terminal.
    Chat(chat::ChatArgs),
    /// Serve a model over HTTP, as OpenAI's API.
    #[cfg(feature = "server")]
    Serve(serve::ServeArgs),
    /// Turn text into token ids.
    Tokenize(tokenize::TokenizeArgs),
    /// Show what a model file holds and the memory that it needs.
    Inspect(inspect::InspectArgs),
    /// Measure prefill and decode speed, or a server under load.
    Bench(bench::BenchArgs),
}

/// Runs the program.
pub fn main() -> ExitCode {
    start_logging();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return command_line_error(&error),
    };
    let result = match cli.command {
        Command::Generate(args) => generate::run(args),
        Command::Chat(args) => chat::start(args),
        #[cfg(feature = "server")]
        Command::Serve(args) => serve::run(args),
        Command::Tokenize(args) => tokenize::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has had enough: no failure.
        Err(CliError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => {
            let code = error.exit_code();
            // With stderr gone there is nobody left to tell.
            let _ = writeln!(std::io::stderr(), "error: {}", one_line(&error.to_string()));
            ExitCode::from(code)
        }
    }
}

/// Help and version as clap prints them; every mistake as one line.
fn command_line_error(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(2)
        }
        _ => {
            let text = error.to_string();
            let what = text.split("\n\n").next().unwrap_or(&text);
            let _ = writeln!(std::io::stderr(), "{}", one_line(what));
            ExitCode::from(2)
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Logs go to stderr: what quell has to say, but not of each request, and others'
/// warnings and errors, unless we say them, too; or what `QUELL_LOG` asks for.
fn start_logging() {
    use tracing_subscriber::EnvFilter;
    let default =
        |_| EnvFilter::new("warn,quell=info,quell::request=warn,rustls_platform_verifier=off");
    let filter = EnvFilter::try_from_env("QUELL_LOG").unwrap_or_else(default);
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
}
