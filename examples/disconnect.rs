//! Shuts down the tokio runtime while it serves a hundred clients in the middle of their
//! answers. No task runs to clean up, yet every block is freed.
//!
//! `cargo run --release --example disconnect -- models/SmolLM2-135M-Instruct.Q4_1.gguf`

use futures_util::StreamExt;
use quell::{Engine, EngineStats, Request, SubmitError};
use std::time::Instant;

const CLIENTS: usize = 100;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: disconnect MODEL")?;
    let engine = Engine::load(path)?;
    report("before", &engine.stats()?);

    let runtime = tokio::runtime::Runtime::new()?;
    for client in 0..CLIENTS {
        let prompt = format!("Here is what happened to me on day {client} of my journey:");
        let request = Request::new(prompt).max_tokens(1000).ignore_eos();
        let mut answer = engine.generate(request)?;
        runtime.spawn(async move {
            while let Some(Ok(chunk)) = answer.next().await {
                // A server would write this to its client.
                drop(chunk);
            }
        });
    }
    // All requests are being answered and none has finished.
    let during = wait(&engine, |stats| stats.tokens_generated >= 300)?;
    report("during", &during);

    let shutdown = Instant::now();
    runtime.shutdown_background();
    let after = wait(&engine, EngineStats::is_idle)?;
    let elapsed = shutdown.elapsed();
    report("after", &after);
    println!(
        "{} of {CLIENTS} requests cancelled, {} blocks back, {:.1} ms after the shutdown began",
        after.outcomes.cancelled,
        during.blocks.referenced,
        elapsed.as_secs_f64() * 1e3
    );
    Ok(())
}

/// Polls the engine until it reaches a state; each poll takes at most one step.
fn wait(
    engine: &Engine,
    reached: impl Fn(&EngineStats) -> bool,
) -> Result<EngineStats, SubmitError> {
    loop {
        let stats = engine.stats()?;
        if reached(&stats) {
            return Ok(stats);
        }
    }
}

fn report(when: &str, stats: &EngineStats) {
    let blocks = &stats.blocks;
    println!(
        "{when:>6}: {:>3} requests open, blocks: {:>4} in use, {:>4} free, {:>4} in all",
        stats.open, blocks.referenced, blocks.free, blocks.total
    );
}
