//! The `quell` program, with one file per subcommand.
//!
//! Results go to stdout, everything else to stderr. An invalid command line prints one line
//! and exits with code 2. Any other failure prints one line and exits with code 1, or with
//! 130 after Ctrl-C.

mod args;
mod bench;
mod chat;
mod error;
mod generate;
#[cfg(feature = "hub")]
mod hub;
mod inspect;
mod logging;
#[cfg(feature = "server")]
mod lossy;
mod progress;
#[cfg(feature = "server")]
mod serve;
#[cfg(feature = "server")]
mod settings;
#[cfg(feature = "server")]
mod signals;
mod tls;
mod tokenize;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use error::CliError;
use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

/// How long to wait for stderr to accept the final error message.
const ERROR_TIMEOUT: Duration = Duration::from_millis(500);

/// Run, serve and measure large language models.
#[derive(Debug, Parser)]
#[command(name = "quell", bin_name = "quell", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continue a prompt, or answer a message.
    ///
    /// Without --temperature, the answer is greedy, whatever sampling defaults the model has.
    /// With it, the model's defaults apply to all settings that have no flag.
    Generate(generate::GenerateArgs),
    /// Chat with a model in the terminal.
    Chat(chat::ChatArgs),
    /// Serve a model over HTTP with OpenAI's API.
    ///
    /// Every flag can also be set by an environment variable (QUELL_ and the flag's name, such
    /// as QUELL_DRAIN_TIMEOUT) or in the file given with --config. Flags override the
    /// environment, and the environment overrides the file. API keys are read from
    /// --api-key-file and from the variable QUELL_API_KEYS, and admin keys from
    /// --admin-key-file and from QUELL_ADMIN_KEYS, each separated by commas.
    #[cfg(feature = "server")]
    Serve(serve::ServeArgs),
    /// Turn text into token ids.
    Tokenize(tokenize::TokenizeArgs),
    /// Show what a model file holds and how much memory it needs.
    Inspect(inspect::InspectArgs),
    /// Measure prefill and decode speed, or put a server under load.
    Bench(bench::BenchArgs),
}

/// Runs the program.
pub fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(Mistake::Arguments(error)) => return command_line_error(&error),
        #[cfg(feature = "server")]
        Err(Mistake::Settings(error)) => return failure(&error),
    };
    let logging = match &cli.command {
        #[cfg(feature = "server")]
        Command::Serve(args) => match logging::start_server(args.otlp_endpoint()) {
            Ok(logging) => logging,
            Err(error) => return failure(&error),
        },
        _ => logging::start(),
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
    // Flush the log first, so that the error is the last line.
    drop(logging);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // The reader of stdout, such as `head`, has closed it. This is not a failure.
        Err(CliError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(error) => failure(&error),
    }
}

fn failure(error: &CliError) -> ExitCode {
    let line = format!("error: {}", one_line(&error.to_string()));
    let (done, is_done) = crossbeam_channel::bounded(1);
    let print = move || {
        // There is nowhere left to report a failure to write to stderr.
        let _ = writeln!(std::io::stderr(), "{line}");
        let _ = done.try_send(());
    };
    // Print on a thread, so that a pipe that nobody reads cannot keep the process from
    // ending.
    if std::thread::Builder::new().spawn(print).is_ok() {
        let _ = is_done.recv_timeout(ERROR_TIMEOUT);
    }
    ExitCode::from(error.exit_code())
}

/// An invalid command line or settings file.
enum Mistake {
    Arguments(clap::Error),
    #[cfg(feature = "server")]
    Settings(Box<CliError>),
}

/// Parses the command line. For `quell serve`, the environment and the settings file supply
/// flags that are not given.
fn parse() -> Result<Cli, Mistake> {
    let command = Cli::command();
    #[cfg(feature = "server")]
    let command = {
        let arguments: Vec<_> = std::env::args_os().skip(1).collect();
        if arguments.first().is_some_and(|first| first == "serve") {
            let serve = command
                .find_subcommand("serve")
                .cloned()
                .unwrap_or_default();
            let file = settings::file(serve.clone(), &arguments);
            let wrong = |error| Mistake::Settings(Box::new(error));
            let file = file.map(settings::read).transpose().map_err(wrong)?;
            let file = file.unwrap_or_default();
            let serve = settings::layered(serve, &file).map_err(wrong)?;
            command.mut_subcommand("serve", |_| serve)
        } else {
            command
        }
    };
    let matches = command.try_get_matches().map_err(Mistake::Arguments)?;
    Cli::from_arg_matches(&matches).map_err(Mistake::Arguments)
}

/// Prints help and version as clap does, and any mistake on one line.
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
