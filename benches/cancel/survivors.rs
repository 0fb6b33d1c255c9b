//! Time between the tokens of requests that keep running, while other requests next to them are
//! left alone or are repeatedly cancelled all at once.

use super::device::{Device, Failure, endless};
use super::report::{Report, Survivors, Times};
use futures_util::StreamExt;
use quell::{Engine, EngineConfig, GenerateError, TokenStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Measures a device without and with a storm of cancels.
pub fn run(device: &Device, report: &mut Report) -> Result<(), Failure> {
    let (survivors, others, seconds) = match device {
        Device::Null | Device::Paced(_) => (128, 128, 3),
        _ => (16, 16, 10),
    };
    for storm in [false, true] {
        let engine = device.engine(survivors + others, EngineConfig::default())?;
        let ended = AtomicBool::new(false);
        let (gaps, cancels) = std::thread::scope(|scope| {
            let beside = scope.spawn(|| {
                if storm {
                    cancel_until(&engine, others, &ended)
                } else {
                    read_until(&engine, others, &ended).map(|()| 0)
                }
            });
            let gaps = read_for(&engine, survivors, Duration::from_secs(seconds));
            ended.store(true, Ordering::Relaxed);
            (gaps, beside.join())
        });
        report.add_survivors(Survivors {
            device: device.name(),
            survivors,
            cancels: cancels.map_err(|_| "the other requests' thread panicked")??,
            between_tokens: Times::new(gaps?),
        });
    }
    Ok(())
}

fn submit(engine: &Engine, count: usize) -> Result<Vec<TokenStream>, Failure> {
    (0..count)
        .map(|index| Ok(engine.generate(endless(engine, index))?))
        .collect()
}

fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_current_thread().build()?)
}

/// Reads requests on one thread, one task per request, and returns the times between tokens.
fn read_for(engine: &Engine, count: usize, time: Duration) -> Result<Vec<Duration>, Failure> {
    let streams = submit(engine, count)?;
    let end = Instant::now() + time;
    runtime()?.block_on(async {
        let tasks: Vec<_> = streams
            .into_iter()
            .map(|stream| tokio::spawn(gaps(stream, end)))
            .collect();
        let mut all = Vec::new();
        for task in tasks {
            all.extend(task.await??);
        }
        Ok(all)
    })
}

async fn gaps(mut stream: TokenStream, end: Instant) -> Result<Vec<Duration>, GenerateError> {
    let mut gaps = Vec::new();
    let mut last = None;
    while let Some(chunk) = stream.next().await {
        chunk?;
        let now = Instant::now();
        gaps.extend(last.map(|last| now - last));
        last = Some(now);
        if now >= end {
            break;
        }
    }
    Ok(gaps)
}

/// Reads requests without cancelling any of them.
fn read_until(engine: &Engine, count: usize, ended: &AtomicBool) -> Result<(), Failure> {
    let streams = submit(engine, count)?;
    runtime()?.block_on(async {
        let mut all = futures_util::stream::select_all(streams);
        while let Some(chunk) = all.next().await {
            chunk?;
            if ended.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(())
    })
}

/// Repeatedly submits requests, waits until all have begun to answer, and drops them. Returns
/// the number of cancels.
fn cancel_until(engine: &Engine, count: usize, ended: &AtomicBool) -> Result<usize, Failure> {
    let mut cancels = 0;
    while !ended.load(Ordering::Relaxed) {
        let mut streams = submit(engine, count)?;
        for stream in &mut streams {
            if let Some(chunk) = stream.next_blocking() {
                chunk?;
            }
        }
        drop(streams);
        cancels += count;
    }
    Ok(cancels)
}
