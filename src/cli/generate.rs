//! `quell generate`: continues a prompt or answers a message.

use super::args::{Format, ModelArgs, SamplingArgs, resolve};
use super::error::CliError;
use crate::{Engine, Finish, Generation, Message, Prompt, Request, SamplingParams};
#[cfg(feature = "grammar")]
use crate::{Grammar, SubmitError};
use clap::Args;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Arguments of `quell generate`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["prompt", "messages", "prompt_ids"]))]
pub struct GenerateArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to continue; names of special tokens in it are read as those tokens.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    prompt: Option<String>,
    /// Treat the prompt as a user message and answer it.
    #[arg(long, requires = "prompt", conflicts_with_all = ["messages", "prompt_ids"])]
    chat: bool,
    /// File with a conversation to answer: a JSON list of {"role": …, "content": …}.
    #[arg(long, value_name = "FILE")]
    messages: Option<PathBuf>,
    /// Token ids to continue, separated by commas.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    prompt_ids: Option<Vec<u32>>,
    /// Maximum number of new tokens.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// String that ends the answer; may be repeated.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    stop: Vec<String>,
    /// Continue past the model's end-of-sequence tokens.
    #[arg(long)]
    ignore_eos: bool,
    /// Constrain the answer to the JSON schema in this file.
    #[cfg(feature = "grammar")]
    #[arg(long, value_name = "FILE", conflicts_with = "json_object")]
    json_schema: Option<PathBuf>,
    /// Constrain the answer to a JSON object.
    #[cfg(feature = "grammar")]
    #[arg(long)]
    json_object: bool,
    /// Report the log probability of each token and those of the K likeliest.
    #[arg(long, value_name = "K")]
    logprobs: Option<u32>,
    /// Output format.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Print a line of statistics to stderr after the answer.
    #[arg(long)]
    stats: bool,
}

/// Runs the subcommand.
pub fn run(args: GenerateArgs) -> Result<(), CliError> {
    let sampling = args
        .sampling
        .params(&SamplingParams::greedy(), args.logprobs)?;
    if args.max_tokens == 0 {
        return Err(CliError::Usage(
            "--max-tokens is 0, but must be at least 1".to_owned(),
        ));
    }
    if args.stop.iter().any(String::is_empty) {
        return Err(CliError::Usage("--stop must not be empty".to_owned()));
    }
    #[cfg(feature = "grammar")]
    let schema = schema(&args)?;
    let mut request = Request {
        max_tokens: Some(args.max_tokens),
        sampling,
        stop: args.stop.clone(),
        ignore_eos: args.ignore_eos,
        ..Request::new(prompt(&args)?)
    };
    // One answer has few steps of each size: recording them in advance would take longer than it
    // saves.
    let engine = args.model.start(0)?;
    if engine.tokenizer().is_none() && !matches!(request.prompt, Prompt::Tokens(_)) {
        let path = resolve(&args.model.model)?;
        return Err(CliError::no_tokenizer(&args.model.model, &path));
    }
    if args.sampling.has_temperature() {
        let default = engine.sampling_defaults().params();
        request.sampling = args.sampling.params(&default, args.logprobs)?;
    }
    #[cfg(feature = "grammar")]
    let request = match schema {
        Some(schema) => {
            let tokenizer = engine.tokenizer().ok_or(SubmitError::NoTokenizer {
                needed_for: "a JSON schema",
            })?;
            request.constraint(Grammar::json_schema(tokenizer, &schema)?)
        }
        None => request,
    };
    match args.format {
        Format::Json => {
            let generation = engine.generate(request)?.complete_blocking()?;
            println_json(&result(&engine, &generation, args.logprobs.is_some()))?;
            if args.stats {
                print_stats(&engine, &generation.finish)?;
            }
        }
        Format::Text => {
            let finish = stream_text(&engine, request)?;
            if args.stats {
                print_stats(&engine, &finish)?;
            }
        }
    }
    Ok(())
}

/// Returns the schema that constrains the answer, if there is one.
#[cfg(feature = "grammar")]
fn schema(args: &GenerateArgs) -> Result<Option<Value>, CliError> {
    let Some(path) = &args.json_schema else {
        return Ok(args.json_object.then(|| json!({"type": "object"})));
    };
    let text = std::fs::read_to_string(path).map_err(|source| CliError::Read {
        path: path.to_owned(),
        source,
    })?;
    let schema = serde_json::from_str(&text).map_err(|error| CliError::Schema {
        path: path.to_owned(),
        problem: error.to_string(),
    })?;
    Ok(Some(schema))
}

fn prompt(args: &GenerateArgs) -> Result<Prompt, CliError> {
    Ok(match (&args.prompt, &args.messages, &args.prompt_ids) {
        (Some(text), ..) if args.chat => Prompt::Chat(vec![Message::new("user", text)]),
        (Some(text), ..) => Prompt::Text(text.clone()),
        (_, Some(path), _) => Prompt::Chat(read_messages(path)?),
        (_, _, Some(ids)) => Prompt::from(ids.as_slice()),
        // Unreachable: the argument group requires one of them.
        (None, None, None) => return Err(CliError::Usage("a prompt is missing".to_owned())),
    })
}

fn read_messages(path: &Path) -> Result<Vec<Message>, CliError> {
    read_conversation(path).map(|(messages, _)| messages)
}

/// Reads a conversation from a file and returns its messages and the whole JSON value. The
/// file holds a list of messages, or a chat request with the key `messages`.
pub fn read_conversation(path: &Path) -> Result<(Vec<Message>, Value), CliError> {
    let text = std::fs::read_to_string(path).map_err(|source| CliError::Read {
        path: path.to_owned(),
        source,
    })?;
    let bad = |error: serde_json::Error| CliError::Messages {
        path: path.to_owned(),
        problem: error.to_string(),
    };
    let request: Value = serde_json::from_str(&text).map_err(bad)?;
    let list = request.get("messages").unwrap_or(&request);
    let messages = serde_json::from_value(list.clone()).map_err(bad)?;
    Ok((messages, request))
}

/// Prints the answer as it arrives: text, or token ids if there is no tokenizer.
fn stream_text(engine: &Engine, request: Request) -> Result<Finish, CliError> {
    let mut out = std::io::stdout().lock();
    let has_text = engine.tokenizer().is_some();
    let mut separator = "";
    let mut finish = None;
    for chunk in engine.generate(request)?.blocking() {
        let chunk = chunk?;
        out.write_all(chunk.text.as_bytes())?;
        for id in chunk.tokens.ids().filter(|_| !has_text) {
            write!(out, "{separator}{id}")?;
            separator = ",";
        }
        out.flush()?;
        finish = chunk.finish.or(finish);
    }
    writeln!(out)?;
    finish.ok_or_else(|| CliError::Usage("the stream ended without a finish reason".to_owned()))
}

fn result(engine: &Engine, generation: &Generation, logprobs: bool) -> Value {
    let finish = &generation.finish;
    let steps: Vec<Value> = generation
        .tokens
        .iter()
        .map(|token| json!({"token": token.id, "logprob": token.logprob, "top": token.top}))
        .collect();
    let token_ids: Vec<u32> = generation.tokens.iter().map(|token| token.id).collect();
    json!({
        "prompt_ids": generation.prompt_ids,
        "token_ids": token_ids,
        "text": generation.text,
        "finish_reason": finish.outcome.as_str(),
        "logprobs": logprobs.then_some(steps),
        "timing": {
            "load_s": load_seconds(engine),
            "first_token_s": finish.timing.first_token.map(|time| time.as_secs_f64()),
            "total_s": finish.timing.total.as_secs_f64(),
            "prompt_tokens": finish.prompt_tokens,
            "cached_tokens": finish.cached_tokens,
            "generated_tokens": finish.generated_tokens,
            "decode_tokens_per_s": finish.timing.decode_rate(finish.generated_tokens),
        },
    })
}

/// Prints a JSON value on one line.
pub fn println_json(value: &Value) -> Result<(), CliError> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

fn print_stats(engine: &Engine, finish: &Finish) -> Result<(), CliError> {
    let stats = engine.stats()?;
    let tokens = finish.prompt_tokens + finish.generated_tokens;
    let used = match &engine.info().model {
        Some(model) => model.memory.sequence_blocks(tokens),
        None => tokens.div_ceil(stats.block_tokens),
    };
    let rate = match finish.timing.decode_rate(finish.generated_tokens) {
        Some(rate) => format!("{rate:.0} tokens/s"),
        None => "a single token".to_owned(),
    };
    let first = finish.timing.first_token.unwrap_or_default();
    writeln!(
        std::io::stderr(),
        "[{} + {} tokens, {rate}, first token after {:.0} ms, {used} KV blocks used, {} of {} free again; loaded in {:.2} s]",
        finish.prompt_tokens,
        finish.generated_tokens,
        first.as_secs_f64() * 1e3,
        stats.blocks.free,
        stats.blocks.total,
        load_seconds(engine),
    )?;
    Ok(())
}

/// Returns the time that the model took to load, in seconds.
pub fn load_seconds(engine: &Engine) -> f64 {
    let model = engine.info().model.as_ref();
    model.map_or(0.0, |model| model.load_time.as_secs_f64())
}
