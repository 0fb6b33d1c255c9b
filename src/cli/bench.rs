//! `quell bench`: prefill and decode speed, as medians with their spread.

use super::args::{CliError, Format, ModelArgs};
use super::generate::println_json;
use super::progress;
use clap::Args;
use quell::{Engine, Request};
use serde_json::{Value, json};
use std::io::Write;

/// Measure prefill and decode speed.
#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Tokens of the prompt whose prefill is measured; 0 leaves prefill out.
    #[arg(long, value_name = "N", default_value_t = 512)]
    prompt: usize,
    /// Tokens that each stream decodes; 0 leaves decoding out.
    #[arg(long, value_name = "N", default_value_t = 128)]
    generate: usize,
    /// How many streams decode at once; a list, separated by commas.
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_values_t = [1, 16, 32])]
    concurrency: Vec<usize>,
    /// How often each figure is measured, after one unmeasured run.
    #[arg(long, value_name = "N", default_value_t = 5)]
    repetitions: usize,
    /// How the result is printed.
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

/// What is measured: a name and how to measure it once, in tokens a second.
struct Figure {
    name: String,
    streams: usize,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Prefill,
    Decode,
}

/// Tokens of the prompts from which streams decode.
const DECODE_PROMPT: usize = 16;

/// Runs the subcommand.
pub fn run(args: BenchArgs) -> Result<(), CliError> {
    if args.repetitions == 0 || args.concurrency.contains(&0) {
        let problem = "--repetitions and each entry of --concurrency must be at least 1";
        return Err(CliError::Usage(problem.to_owned()));
    }
    if args.generate == 1 {
        let problem = "--generate is 1, but must be 0 or at least 2: the first token is prefill";
        return Err(CliError::Usage(problem.to_owned()));
    }
    let engine = args.model.start()?;
    let mut figures = Vec::new();
    if args.prompt > 0 {
        figures.push(Figure {
            name: format!("prefill {}", args.prompt),
            streams: 1,
            phase: Phase::Prefill,
        });
    }
    if args.generate > 0 {
        figures.extend(args.concurrency.iter().map(|&streams| Figure {
            name: format!("decode {} × {streams}", args.generate),
            streams,
            phase: Phase::Decode,
        }));
    }
    let bar = progress::bar((figures.len() * (args.repetitions + 1)) as u64, "measuring");
    let mut rows = Vec::new();
    for figure in &figures {
        let mut rates = Vec::with_capacity(args.repetitions);
        for repetition in 0..=args.repetitions {
            let rate = measure(&engine, figure, &args, repetition as u64)?;
            if repetition > 0 {
                rates.push(rate);
            }
            bar.inc(1);
        }
        rates.sort_by(f64::total_cmp);
        rows.push((figure, rates));
    }
    bar.finish_and_clear();
    report(&engine, &args, &rows)
}

/// One measurement, in tokens a second over all streams.
fn measure(
    engine: &Engine,
    figure: &Figure,
    args: &BenchArgs,
    round: u64,
) -> Result<f64, CliError> {
    let vocabulary = engine.info().vocabulary as u64;
    let (prompt, tokens) = match figure.phase {
        Phase::Prefill => (args.prompt, 1),
        Phase::Decode => (DECODE_PROMPT, args.generate),
    };
    let streams: Vec<_> = (0..figure.streams)
        .map(|stream| {
            let mut state = round * 7919 + stream as u64 + 1;
            let ids: Vec<u32> = (0..prompt)
                .map(|_| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    ((state >> 33) % vocabulary) as u32
                })
                .collect();
            let mut request = Request::new(ids).greedy().max_tokens(tokens);
            request.ignore_eos = true;
            engine.generate(request)
        })
        .collect::<Result<_, _>>()?;
    let mut first = 0.0f64;
    let mut total = 0.0f64;
    for stream in streams {
        let timing = stream.complete_blocking()?.finish.timing;
        first = first.max(timing.first_token.unwrap_or_default().as_secs_f64());
        total = total.max(timing.total.as_secs_f64());
    }
    Ok(match figure.phase {
        Phase::Prefill => prompt as f64 / first,
        Phase::Decode => (figure.streams * (tokens - 1)) as f64 / (total - first),
    })
}

fn report(engine: &Engine, args: &BenchArgs, rows: &[(&Figure, Vec<f64>)]) -> Result<(), CliError> {
    let median = |rates: &[f64]| rates[rates.len() / 2];
    let model = engine.info().model.as_ref();
    let device = model.map(|model| format!("{}: {}", model.device.name, model.device.description));
    if args.format == Format::Json {
        let figures: Vec<Value> = rows
            .iter()
            .map(|(figure, rates)| {
                json!({
                    "name": figure.name,
                    "phase": if figure.phase == Phase::Prefill { "prefill" } else { "decode" },
                    "streams": figure.streams,
                    "tokens_per_s": median(rates),
                    "min": rates.first(),
                    "max": rates.last(),
                    "repetitions": rates.len(),
                })
            })
            .collect();
        return println_json(&json!({
            "model": args.model.model,
            "device": device,
            "version": env!("CARGO_PKG_VERSION"),
            "figures": figures,
        }));
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}, {}", args.model.model, device.unwrap_or_default())?;
    writeln!(
        out,
        "{:<18} {:>10}   {:>9} – max",
        "tokens/s", "median", "min"
    )?;
    for (figure, rates) in rows {
        writeln!(
            out,
            "{:<18} {:>10.1}   {:>9.1} – {:.1}",
            figure.name,
            median(rates),
            rates[0],
            rates[rates.len() - 1]
        )?;
    }
    Ok(())
}
