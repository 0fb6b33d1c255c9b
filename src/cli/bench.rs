//! `quell bench`: measures the speed of a model on this machine, or of a server under load.

mod args;
mod exchange;
mod load;
mod local;
mod percentiles;
mod prompts;
mod random;
mod report;
mod server;
mod sse;

use super::error::CliError;

pub use args::BenchArgs;

/// Runs the subcommand.
pub fn run(args: BenchArgs) -> Result<(), CliError> {
    if args.concurrency.contains(&0) {
        let problem = "each entry of --concurrency must be at least 1";
        return Err(CliError::Usage(problem.to_owned()));
    }
    match &args.server.server {
        Some(url) => server::run(url, &args),
        None => local::run(&args),
    }
}
