//! `quell bench` without a server: measures prefill and decode speed, as medians with
//! minimum and maximum.

use super::args::{BenchArgs, WeightsFormat, WhichModel};
use super::percentiles::percentile;
use crate::cli::args::{Format, resolve};
use crate::cli::error::CliError;
use crate::cli::generate::{load_seconds, println_json};
use crate::cli::progress;
use crate::runner::random_model;
use crate::weights::{DType, from_python_json};
use crate::{Engine, EngineConfig, GenerateError, ModelFiles, Request, TokenStream};
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

impl WeightsFormat {
    fn dtype(self) -> DType {
        match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
            Self::Q4_0 => DType::Q4_0,
            Self::Q4_1 => DType::Q4_1,
            Self::Q8_0 => DType::Q8_0,
            Self::Q4K => DType::Q4K,
            Self::Q6K => DType::Q6K,
        }
    }
}

/// The models whose `config.json` is built in.
const BUILT_IN: [(&str, &str); 3] = [
    ("llama-3.1-8b", include_str!("llama-3.1-8b.json")),
    ("llama-3.2-1b", include_str!("llama-3.2-1b.json")),
    ("qwen3-30b-a3b", include_str!("qwen3-30b-a3b.json")),
];

impl WhichModel {
    fn open(&self) -> Result<ModelFiles, CliError> {
        if let Some(model) = &self.model {
            return Ok(ModelFiles::open(&resolve(model)?)?);
        }
        let settings = random_settings(self.name())?;
        let format = self.weights_format.dtype();
        Ok(random_model(&settings, format)?)
    }

    /// Returns the name that the user gave for the model.
    fn name(&self) -> &str {
        let name = self.model.as_deref().or(self.random_weights.as_deref());
        name.unwrap_or_default()
    }
}

/// Returns the `config.json` of a model without weights: a built-in one, or a file.
fn random_settings(name: &str) -> Result<Value, CliError> {
    let text = match BUILT_IN.iter().find(|(built_in, _)| *built_in == name) {
        Some((_, text)) => (*text).to_owned(),
        None => std::fs::read_to_string(name).map_err(|source| CliError::Read {
            path: PathBuf::from(name),
            source,
        })?,
    };
    from_python_json(text.as_bytes()).map_err(|error| CliError::Config {
        path: PathBuf::from(name),
        problem: error.to_string(),
    })
}

/// One figure to measure, in tokens per second.
struct Figure {
    name: String,
    streams: usize,
    phase: Phase,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Prefill,
    Decode,
    /// Prompts and answers together, as a server handles them.
    Mixed,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
            Self::Mixed => "mixed",
        }
    }
}

impl BenchArgs {
    /// Returns the number of tokens that the first of `streams` streams may decode before
    /// the last one starts, or 0 if one step of `step_tokens` tokens takes the prompts of all of
    /// them.
    fn lead(&self, streams: usize, step_tokens: usize) -> usize {
        let steps = (streams * self.decode_prompt).div_ceil(step_tokens);
        // Tokens of streams that already decode take up a part of each step.
        if steps <= 1 { 0 } else { 2 * steps + 4 }
    }
}

/// Measures a model on this machine.
pub fn run(args: &BenchArgs) -> Result<(), CliError> {
    if args.repetitions == 0 || args.decode_prompt == 0 || args.concurrency.contains(&0) {
        let problem =
            "--repetitions, --decode-prompt and each entry of --concurrency must be at least 1";
        return Err(CliError::Usage(problem.to_owned()));
    }
    if args.generate == 1 {
        let problem = "--generate is 1, but must be 0 or at least 2: the first token is prefill";
        return Err(CliError::Usage(problem.to_owned()));
    }
    let settings = args.run.config()?;
    let most = args.concurrency.iter().max().copied().unwrap_or(1);
    let config = EngineConfig {
        // A stream must not be paused while other streams are being read.
        // Prefill alone generates one token.
        stream_buffer: (args.generate + args.lead(most, settings.max_batch_tokens.unwrap_or(512)))
            .max(1),
        // Each repetition must compute its prompts.
        prefix_cache: false,
        ..settings
    };
    let engine = args.run.start_with(args.model.open()?, config, most)?;
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
    if args.mixed && args.prompt > 0 && args.generate > 0 {
        figures.extend(args.concurrency.iter().map(|&streams| Figure {
            name: format!("mixed {}+{} × {streams}", args.prompt, args.generate),
            streams,
            phase: Phase::Mixed,
        }));
    }
    let bar = progress::bar((figures.len() * (args.repetitions + 1)) as u64, "measuring");
    let mut rows = Vec::new();
    for figure in &figures {
        let mut rates = Vec::with_capacity(args.repetitions);
        for repetition in 0..=args.repetitions {
            let rate = measure(&engine, figure, args, repetition as u64)?;
            if repetition > 0 {
                rates.push(rate);
            }
            bar.inc(1);
        }
        rates.sort_by(f64::total_cmp);
        rows.push((figure, rates));
    }
    bar.finish_and_clear();
    report(&engine, args, &rows)
}

/// Measures a figure once. Returns tokens per second over all streams.
fn measure(
    engine: &Engine,
    figure: &Figure,
    args: &BenchArgs,
    round: u64,
) -> Result<f64, CliError> {
    let begin = Instant::now();
    let lead = args.lead(figure.streams, engine.info().max_batch_tokens);
    let (prompt, tokens) = match figure.phase {
        Phase::Prefill => (args.prompt, 1),
        Phase::Mixed => (args.prompt, args.generate),
        Phase::Decode => (args.decode_prompt, args.generate + lead),
    };
    let streams = (0..figure.streams)
        .map(|stream| {
            let ids = random_ids(engine, round * 7919 + stream as u64 + 1, prompt);
            let mut request = Request::new(ids).greedy().max_tokens(tokens);
            request.ignore_eos = true;
            Ok(engine.generate(request)?)
        })
        .collect::<Result<Vec<_>, CliError>>()?;
    if figure.phase == Phase::Decode && lead > 0 {
        return decode_rate(engine, streams, args.generate);
    }
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
        Phase::Mixed => (figure.streams * (prompt + tokens)) as f64 / begin.elapsed().as_secs_f64(),
    })
}

/// Returns tokens per second over all streams, from the moment when all of them decode
/// until the last one has `count` tokens.
fn decode_rate(
    engine: &Engine,
    mut streams: Vec<TokenStream>,
    count: usize,
) -> Result<f64, CliError> {
    for stream in &mut streams {
        read_tokens(stream, 1)?;
    }
    let (begin, before) = (Instant::now(), engine.stats()?.tokens_generated);
    if let Some(last) = streams.last_mut() {
        read_tokens(last, count - 1)?;
    }
    let after = engine.stats()?.tokens_generated;
    let seconds = begin.elapsed().as_secs_f64();
    for stream in streams {
        // The next measurement must start with an idle engine.
        stream.cancel().wait().map_err(GenerateError::from)?;
    }
    if after == before {
        let problem = "--generate is too small: the streams ended before they could be measured";
        return Err(CliError::Usage(problem.to_owned()));
    }
    Ok((after - before) as f64 / seconds)
}

/// Returns the random token ids of prompt `number`, which are the same every time.
fn random_ids(engine: &Engine, number: u64, length: usize) -> Vec<u32> {
    let vocabulary = engine.info().vocabulary as u64;
    let mut state = number;
    let next = |_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        ((state >> 33) % vocabulary) as u32
    };
    (0..length).map(next).collect()
}

/// Waits for the next `count` tokens of a stream.
fn read_tokens(stream: &mut TokenStream, mut count: usize) -> Result<(), CliError> {
    while count > 0 {
        let Some(chunk) = stream.next_blocking() else {
            let problem = "a stream ended before it had all its tokens; --context is too small";
            return Err(CliError::Usage(problem.to_owned()));
        };
        count = count.saturating_sub(chunk?.tokens.len());
    }
    Ok(())
}

/// Describes the machine: the processor's name as Linux reports it, the number of threads
/// that this process may use, and the operating system.
fn machine() -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let mut names = cpus.lines().filter(|line| line.starts_with("model name"));
    let name = names.next().and_then(|line| line.split_once(':'));
    let name = name.map_or(std::env::consts::ARCH, |(_, name)| name.trim());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{name}, {threads} threads, {}", std::env::consts::OS)
}

/// Returns the median of sorted values.
fn median(sorted: &[f64]) -> f64 {
    percentile(sorted, 50.0)
}

fn report(engine: &Engine, args: &BenchArgs, rows: &[(&Figure, Vec<f64>)]) -> Result<(), CliError> {
    let model = engine.info().model.as_ref();
    let format = model.and_then(|model| model.weights_format);
    let device = model.map(|model| format!("{}: {}", model.device.name, model.device.description));
    if args.format == Format::Json {
        let figures: Vec<Value> = rows
            .iter()
            .map(|(figure, rates)| {
                json!({
                    "name": figure.name,
                    "phase": figure.phase.name(),
                    "streams": figure.streams,
                    "tokens_per_s": median(rates),
                    "min": rates.first(),
                    "max": rates.last(),
                    "repetitions": rates.len(),
                })
            })
            .collect();
        return println_json(&json!({
            "model": args.model.name(),
            "random_weights": args.model.model.is_none(),
            "weights_format": format,
            "device": device,
            "machine": machine(),
            "load_s": load_seconds(engine),
            "version": env!("CARGO_PKG_VERSION"),
            "figures": figures,
        }));
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}, {}", args.model.name(), device.unwrap_or_default())?;
    let loaded = load_seconds(engine);
    writeln!(out, "{}; loaded in {loaded:.2} s", machine())?;
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Parameters of the published models. In 4 bits, they fit into the memory of the tests.
    #[test]
    fn the_built_in_models_have_the_size_of_their_namesakes() {
        for (name, parameters) in [
            ("llama-3.1-8b", 8_030_261_248),
            ("llama-3.2-1b", 1_235_814_400),
            ("qwen3-30b-a3b", 30_532_122_624),
        ] {
            let settings = random_settings(name).expect(name);
            let model = random_model(&settings, DType::Q4K).expect(name);
            assert_eq!(model.source().parameters().total, parameters, "{name}");
        }
        assert_eq!(BUILT_IN.len(), 3);
    }

    #[test]
    fn the_median_of_an_even_number_is_the_mean_of_the_middle_two() {
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[1.0, 2.0]), 1.5);
        assert_eq!(median(&[1.0, 2.0, 9.0]), 2.0);
        assert_eq!(median(&[1.0, 2.0, 4.0, 9.0]), 3.0);
    }
}
