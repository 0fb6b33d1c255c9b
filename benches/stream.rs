//! Throughput of asynchronous token streams in tokens per second, with a device that computes
//! nothing.
//!
//! `cargo bench --bench stream [-- --format json]`
//!
//! Each stream is read to its end by its own task on a single-threaded tokio runtime. So two
//! threads are at work: the scheduler thread and the readers' thread.

#[path = "common/results.rs"]
mod results;

use futures_util::StreamExt;
use quell::internals::runner::{NullOptions, NullRunner};
use quell::{Engine, EngineConfig, Request};
use serde_json::json;
use std::error::Error;
use std::time::Instant;

const STREAMS: [usize; 4] = [1, 64, 256, 1024];
/// Total number of tokens over all streams, and number of measurements.
const TOKENS: usize = 1 << 19;
const ROUNDS: usize = 7;

fn main() -> Result<(), Box<dyn Error>> {
    let as_json = results::as_json();
    let mut rows = Vec::new();
    if !as_json {
        println!("{TOKENS} tokens, medians of {ROUNDS} rounds");
        println!("streams  tokens/s  (slowest, fastest)");
    }
    for streams in STREAMS {
        let mut rates = Vec::new();
        for _ in 0..ROUNDS {
            rates.push(rate(streams)?);
        }
        rates.sort_by(f64::total_cmp);
        let (slowest, median, fastest) = (rates[0], rates[ROUNDS / 2], rates[ROUNDS - 1]);
        if !as_json {
            println!("{streams:>7}  {median:>15.0}  ({slowest:.0}, {fastest:.0})");
        }
        rows.push(json!({
            "streams": streams,
            "tokens_per_s": { "median": median, "min": slowest, "max": fastest },
        }));
    }
    if as_json {
        results::print_json(
            "stream",
            json!({
                "tokens": TOKENS,
                "results": rows,
            }),
        );
    }
    Ok(())
}

/// Returns the tokens per second through `streams` streams.
fn rate(streams: usize) -> Result<f64, Box<dyn Error>> {
    let tokens = TOKENS / streams;
    let options = NullOptions {
        context_tokens: TOKENS + 64,
        cache_blocks: 2 * TOKENS / 16 + 2 * streams,
        ..NullOptions::default()
    };
    let config = EngineConfig {
        max_sequences: streams,
        max_open_requests: streams,
        audit: false,
        ..EngineConfig::default()
    };
    let engine = Engine::with_runner(config, None, move || NullRunner::start(options))?;
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let start = Instant::now();
    let read = runtime.block_on(async {
        let mut readers = tokio::task::JoinSet::new();
        for index in 0..streams {
            let mut request = Request::new(vec![index as u32 + 3; 8]);
            request.ignore_eos = true;
            let mut stream = engine.generate(request.greedy().max_tokens(tokens))?;
            readers.spawn(async move {
                let mut read = 0;
                while let Some(chunk) = stream.next().await {
                    read += chunk.map_or(0, |chunk| chunk.tokens.len());
                }
                read
            });
        }
        Ok::<usize, Box<dyn Error>>(readers.join_all().await.into_iter().sum())
    })?;
    let took = start.elapsed();
    assert_eq!(read, streams * tokens, "every token arrives");
    Ok(read as f64 / took.as_secs_f64())
}
