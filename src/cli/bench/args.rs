//! The arguments of `quell bench`.

use super::prompts::Endpoint;
use crate::cli::args::{Format, RunArgs};
use clap::{Args, ValueEnum};

/// Measure prefill and decode speed, or put a server under load.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    pub(super) model: WhichModel,
    #[command(flatten)]
    pub(super) run: RunArgs,
    /// Number of prompt tokens for the prefill measurement; 0 skips it. With --server, the
    /// number of tokens in each request's prompt.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(super) prompt: usize,
    /// Number of tokens that each stream decodes; 0 skips the decode measurement. With
    /// --server, the number of tokens in each answer.
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(super) generate: usize,
    /// Number of tokens that each stream has when it starts to decode.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(super) decode_prompt: usize,
    /// Numbers of streams that decode at the same time, separated by commas. With --server,
    /// a closed loop: this many clients, each of which sends its next request when its
    /// answer has ended.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1, 16, 32])]
    pub(super) concurrency: Vec<usize>,
    /// Also measure prompts and answers together: all streams start at once, and the tokens
    /// of both are counted.
    #[arg(long)]
    pub(super) mixed: bool,
    /// Number of times that each figure is measured, after one unmeasured run.
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub(super) repetitions: usize,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    pub(super) format: Format,
    #[command(flatten)]
    pub(super) server: ServerArgs,
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

/// The model to measure.
#[derive(Debug, Args)]
pub struct WhichModel {
    /// Model to measure: a .gguf file, a Hugging Face folder, or hf:ORG/NAME[/FILE] to
    /// download. With --server, the server's name for the model [default: the first that it
    /// lists].
    #[arg(
        long,
        value_name = "PATH",
        required_unless_present_any = ["random_weights", "server"]
    )]
    pub(super) model: Option<String>,
    /// Measure random weights of the size given by a Hugging Face config.json instead of a
    /// model; llama-3.1-8b, llama-3.2-1b and qwen3-30b-a3b need no file.
    #[arg(long, value_name = "CONFIG", conflicts_with = "model")]
    pub(super) random_weights: Option<String>,
    /// Storage format of random weights.
    #[arg(long, value_enum, default_value_t, conflicts_with = "model")]
    pub(super) weights_format: WeightsFormat,
}

/// Storage format of random weights.
#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub(super) enum WeightsFormat {
    #[default]
    Bf16,
    F16,
    F32,
    #[value(name = "q4_0")]
    Q4_0,
    #[value(name = "q4_1")]
    Q4_1,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q4_k")]
    Q4K,
    #[value(name = "q6_k")]
    Q6K,
}

/// How to put load on a server.
#[derive(Debug, Args)]
#[command(next_help_heading = "Load on a server")]
pub struct ServerArgs {
    /// Put load on the server at this URL, instead of measuring a model here.
    ///
    /// The server must have OpenAI's API. Answers run to their full length: they are greedy
    /// and continue past their natural end (ignore_eos).
    ///
    /// Latencies are those of finished requests: ttft is the time until the first event
    /// with content, itl the time between one such event and the next, tpot the time per
    /// token after the first, and e2e the time until the end. They count from when a
    /// request was due, not from when it was sent, so that a client that falls behind hides
    /// nothing (no coordinated omission). Tokens are counted by the server, in its usage.
    ///
    /// Ctrl-C prints what was measured so far. The exit code is 1 if a request failed;
    /// cancelled requests do not count as failed.
    #[arg(long, value_name = "URL", conflicts_with_all = LOCAL_FLAGS)]
    #[cfg_attr(feature = "cuda", arg(conflicts_with_all = CUDA_FLAGS))]
    pub(super) server: Option<String>,
    /// Number of requests for each rate or concurrency.
    #[arg(long, value_name = "N", default_value_t = 100, requires = "server")]
    pub(super) requests: u64,
    /// Use an open loop instead of --concurrency: this many requests per second on average,
    /// as a Poisson process that does not wait for answers; several rates are separated by
    /// commas.
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        requires = "server",
        conflicts_with = "concurrency"
    )]
    pub(super) rate: Vec<f64>,
    /// Fraction of the requests, from 0 to 1, whose connection is closed at a random point
    /// of the answer.
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, requires = "server")]
    pub(super) cancel_share: f64,
    /// Number of tokens at the beginning of each prompt that are the same in all prompts.
    /// The others are random, so that a prefix cache does not help.
    #[arg(long, value_name = "N", default_value_t = 0, requires = "server")]
    pub(super) shared_prefix: usize,
    /// Upper bound of the token ids in prompts, which start at 100 [default: 30000, or
    /// fewer if the server says so].
    #[arg(long, value_name = "N", requires = "server")]
    pub(super) vocabulary: Option<u64>,
    /// Endpoint to send requests to.
    #[arg(long, value_enum, default_value_t, requires = "server")]
    pub(super) endpoint: Endpoint,
    /// Number of unmeasured requests before the first measurement, one after the other.
    #[arg(long, value_name = "N", default_value_t = 1, requires = "server")]
    pub(super) warm_up: u64,
    /// Seed of prompts, arrivals and cancellations.
    #[arg(long, value_name = "S", default_value_t = 0, requires = "server")]
    pub(super) seed: u64,
    /// Environment variable that holds the API key.
    #[arg(long, value_name = "VAR", requires = "server")]
    pub(super) api_key_env: Option<String>,
    /// Time in seconds after which a request counts as failed.
    #[arg(long, value_name = "S", default_value_t = 600.0, requires = "server")]
    pub(super) timeout: f64,
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
        let server = ids(&ServerArgs::augment_args(Command::new("server")));
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
