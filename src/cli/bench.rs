//! `quell bench`: measures the speed of a model on this machine, or of a server under load.

mod exchange;
mod load;
mod local;
mod percentiles;
mod prompts;
mod random;
mod report;
mod server;
mod sse;

use super::args::{Format, RunArgs};
use super::error::CliError;
use clap::Args;

/// Measure prefill and decode speed, or put a server under load.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: local::WhichModel,
    #[command(flatten)]
    run: RunArgs,
    /// Number of prompt tokens for the prefill measurement; 0 skips it. With --server, the
    /// number of tokens in each request's prompt.
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Number of tokens that each stream decodes; 0 skips the decode measurement. With
    /// --server, the number of tokens in each answer.
    #[arg(long, value_name = "N", default_value_t = 128)]
    generate: usize,
    /// Number of tokens that each stream has when it starts to decode.
    #[arg(long, value_name = "N", default_value_t = 16)]
    decode_prompt: usize,
    /// Numbers of streams that decode at the same time, separated by commas. With --server,
    /// a closed loop: this many clients, each of which sends its next request when its
    /// answer has ended.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1, 16, 32])]
    concurrency: Vec<usize>,
    /// Also measure prompts and answers together: all streams start at once, and the tokens
    /// of both are counted.
    #[arg(long)]
    mixed: bool,
    /// Number of times that each figure is measured, after one unmeasured run.
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[command(flatten)]
    server: server::ServerArgs,
}

/// Ids of the arguments for the engine in this process, which conflict with `--server`.
const LOCAL_FLAGS: [&str; 19] = [
    "random_weights",
    "weights_format",
    "decode_prompt",
    "mixed",
    "repetitions",
    "device",
    "generation_config",
    "kv_cache_mib",
    "state_slots",
    "max_batch_tokens",
    "context",
    "no_prefix_cache",
    "swap_mib",
    "preemption",
    "threads",
    "cores",
    "simd",
    "activations",
    "kv_type",
];
#[cfg(feature = "cuda")]
const CUDA_FLAGS: [&str; 5] = [
    "cuda_activations",
    "gpu_memory_utilization",
    "no_warm_up",
    "enforce_eager",
    "no_overlap",
];

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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{Command, Parser};
    use std::collections::BTreeSet;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: BenchArgs,
    }

    fn ids(command: &Command) -> BTreeSet<String> {
        let each = command.get_arguments();
        each.map(|arg| arg.get_id().to_string()).collect()
    }

    #[test]
    fn every_flag_belongs_to_the_engine_here_to_a_server_or_to_both() {
        let all = ids(&BenchArgs::augment_args(Command::new("bench")));
        let server = ids(&server::ServerArgs::augment_args(Command::new("server")));
        let both = ["model", "prompt", "generate", "concurrency", "format"];
        let mut known = server;
        known.extend(LOCAL_FLAGS.map(str::to_owned));
        known.extend(both.map(str::to_owned));
        #[cfg(feature = "cuda")]
        known.extend(CUDA_FLAGS.map(str::to_owned));
        assert_eq!(all, known);
    }

    #[test]
    fn flags_of_the_engine_here_are_refused_with_a_server_and_the_other_way_round() {
        let parse = |flags: &[&str]| {
            let line = ["bench"].iter().chain(flags).copied();
            Line::try_parse_from(line).map_err(|error| error.to_string())
        };
        parse(&["--server", "http://h"]).unwrap();
        parse(&["--server", "http://h", "--rate", "0.5,2", "--seed", "3"]).unwrap();
        for refused in [
            &["--server", "http://h", "--threads", "2"][..],
            &["--server", "http://h", "--repetitions", "2"],
            &["--server", "http://h", "--random-weights", "x"],
            &["--model", "m", "--requests", "3"],
            &["--server", "http://h", "--rate", "1", "--concurrency", "2"],
        ] {
            let flag = refused[2];
            let problem = parse(refused).unwrap_err();
            assert!(problem.contains(flag), "{refused:?}: {problem}");
        }
    }
}
