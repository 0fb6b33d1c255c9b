//! Cost of the HTTP server: CPU time per streamed token, and the load of many connections at
//! once.
//!
//! `cargo bench --bench server [-- --format json] [--model PATH] [--seconds N]`
//!
//! The server runs in this process with an engine whose device computes nothing and whose steps
//! take a fixed time, spent asleep as if a GPU did the work. The clients run in another
//! process, so that the CPU time of this one is the server's. CPU time is the user and system
//! time of all threads, as Linux counts it, and so includes the network stack's share.
//!
//! *Overhead* is the CPU time of the server and its engine, minus the CPU time of the same
//! engine when tasks on the same kind of runtime read the same streams and discard them.

#[allow(dead_code)] // other benches use the rest
#[path = "../common/arguments.rs"]
mod arguments;
mod client;
mod load;
#[path = "../common/paced.rs"]
mod paced;
#[allow(dead_code)] // tests use the rest
#[path = "../../tests/common/process.rs"]
mod process;
mod usage;

use arguments::after;
use client::{Clients, Seen};
use load::{Failure, Load};
use paced::PacedRunner;
use quell::internals::runner::{ModelFiles, NullOptions};
use quell::server::{Server, ServerOptions};
use quell::{Engine, EngineConfig, LoadOptions, Request, Tokenizer};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::Runtime;
use usage::Usage;

/// Duration of a step of the null device.
const STEP: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    let outcome = match after("--client") {
        Some(address) => client::run(&address),
        None => run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("server: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Failure> {
    let model = after("--model").map_or_else(
        || PathBuf::from("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    let seconds: f64 = after("--seconds").map_or(Ok(10.0), |text| text.parse())?;
    let as_json = after("--format").as_deref() == Some("json");
    let print = |line: String| {
        if !as_json {
            println!("{line}");
        }
    };
    let steps = (seconds / STEP.as_secs_f64()) as usize;
    let load = Load {
        streams: 256,
        tokens: steps,
    };
    let cost = cost_a_token(&model, load)?;
    print(cost.line());
    let load = Load {
        streams: 2000,
        tokens: steps.min(250),
    };
    let many = connections(null_engine(&model, load)?, "null", load)?;
    print(many.line());
    let load = Load {
        streams: 64,
        tokens: 128,
    };
    let real = connections(real_engine(&model)?, "cpu, SmolLM2-135M Q4_1", load)?;
    print(real.line());
    if as_json {
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "cost_a_token": cost.json(),
            "connections": [many.json(), real.json()],
        });
        println!("{report:#}");
    }
    Ok(())
}

fn tokenizer(model: &Path) -> Result<Tokenizer, Failure> {
    let mut files = ModelFiles::open(model)?;
    Ok(files.take_tokenizer().ok_or("the model has no tokenizer")?)
}

/// Starts an engine that runs all streams in one batch and computes nothing.
fn null_engine(model: &Path, load: Load) -> Result<Engine, Failure> {
    let tokenizer = tokenizer(model)?;
    let options = NullOptions {
        vocabulary: tokenizer.vocabulary_size(),
        cache_blocks: 1 << 17,
        ..NullOptions::default()
    };
    let config = EngineConfig {
        max_sequences: load.streams,
        max_batch_tokens: Some(load.streams + 512),
        audit: false,
        ..EngineConfig::default()
    };
    let make = move || PacedRunner::start(options, STEP, paced::sleep);
    Ok(Engine::with_runner(config, Some(tokenizer), make)?)
}

fn real_engine(model: &Path) -> Result<Engine, Failure> {
    let config = EngineConfig {
        audit: false,
        ..EngineConfig::default()
    };
    Ok(Engine::load_with(model, config, LoadOptions::cpu())?)
}

fn runtime() -> Result<Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?)
}

/// Serves `engine` while `clients` runs.
fn serving<T>(
    engine: Engine,
    clients: impl FnOnce(&str) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let runtime = runtime()?;
    let options = ServerOptions::new("bench");
    let server = runtime.block_on(Server::bind(engine, options, "127.0.0.1:0"))?;
    let address = server.local_addr().to_string();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let served = runtime.spawn(server.run(async {
        let _ = stopped.await;
    }));
    let outcome = clients(&address);
    drop(stop);
    runtime.block_on(served)?;
    outcome
}

/// CPU time per token, with and without the server.
struct Cost {
    load: Load,
    with_server: f64,
    engine_only: f64,
    seen: Seen,
}

impl Cost {
    fn overhead(&self) -> f64 {
        self.with_server - self.engine_only
    }

    fn line(&self) -> String {
        format!(
            "{} streams, one token per stream every {STEP:?}: {:.1} µs of CPU per token with the server, {:.1} without, {:.1} overhead; between events p50 {:.1} ms, p99 {:.1} ms",
            self.load.streams,
            self.with_server,
            self.engine_only,
            self.overhead(),
            self.seen.gap_p50_ms,
            self.seen.gap_p99_ms,
        )
    }

    fn json(&self) -> Value {
        json!({
            "streams": self.load.streams,
            "tokens": self.load.tokens * self.load.streams,
            "step_ms": STEP.as_secs_f64() * 1e3,
            "cpu_us_with_server": self.with_server,
            "cpu_us_engine_only": self.engine_only,
            "overhead_us": self.overhead(),
            "clients": self.seen.json(),
        })
    }
}

fn cost_a_token(model: &Path, load: Load) -> Result<Cost, Failure> {
    let tokens = (load.tokens * load.streams) as f64;
    let engine = null_engine(model, load)?;
    let before = Usage::now()?;
    read_directly(&engine, load)?;
    let engine_only = (Usage::now()?.cpu - before.cpu).as_secs_f64() / tokens * 1e6;
    drop(engine);
    let engine = null_engine(model, load)?;
    let measured = serving(engine, |address| {
        let before = Usage::now()?;
        let seen = Clients::start(address, load.streams, load.tokens)?.finish()?;
        Ok((seen, Usage::now()?.cpu - before.cpu))
    })?;
    let (seen, cpu) = measured;
    Ok(Cost {
        load,
        with_server: cpu.as_secs_f64() / tokens * 1e6,
        engine_only,
        seen: seen.without_error(load)?,
    })
}

/// Reads the same streams without a server, in tasks on the same kind of runtime.
fn read_directly(engine: &Engine, load: Load) -> Result<(), Failure> {
    let runtime = runtime()?;
    let tasks: Vec<_> = (0..load.streams)
        .map(|index| {
            let mut request = Request::new(client::prompt(index)).max_tokens(load.tokens);
            request.ignore_eos = true;
            let stream = engine.generate(request)?;
            Ok(runtime.spawn(stream.complete()))
        })
        .collect::<Result<_, Failure>>()?;
    for task in tasks {
        let answer = runtime.block_on(task)??;
        if answer.tokens.len() != load.tokens {
            return Err(format!("{} tokens, expected {}", answer.tokens.len(), load.tokens).into());
        }
    }
    Ok(())
}

/// Result of many concurrent connections.
struct Connections {
    device: &'static str,
    load: Load,
    seen: Seen,
    cpu: Duration,
    memory: [usize; 3],
}

impl Connections {
    fn line(&self) -> String {
        let [idle, open, after] = self.memory.map(|bytes| bytes as f64 / 1e6);
        format!(
            "{} connections, {} tokens each, on {}: {} errors, {:.0} tokens/s, memory {idle:.1} MB idle, {open:.1} with all open, {after:.1} after",
            self.load.streams,
            self.load.tokens,
            self.device,
            self.seen.errors,
            self.seen.tokens as f64 / self.seen.seconds,
        )
    }

    fn json(&self) -> Value {
        json!({
            "device": self.device,
            "connections": self.load.streams,
            "tokens_each": self.load.tokens,
            "server_cpu_seconds": self.cpu.as_secs_f64(),
            "rss_bytes": { "idle": self.memory[0], "all_open": self.memory[1], "after": self.memory[2] },
            "clients": self.seen.json(),
        })
    }
}

fn connections(engine: Engine, device: &'static str, load: Load) -> Result<Connections, Failure> {
    let books = engine.clone();
    serving(engine, |address| {
        let before = Usage::now()?;
        let mut clients = Clients::start(address, load.streams, load.tokens)?;
        clients.all_open()?;
        let open = process::memory("VmRSS");
        let seen = clients.finish()?.without_error(load)?;
        let after = Usage::now()?;
        let stats = books.stats()?;
        if !stats.is_idle() {
            return Err(format!("the engine is not idle: {stats:?}").into());
        }
        Ok(Connections {
            device,
            load,
            seen,
            cpu: after.cpu - before.cpu,
            memory: [before.memory, open, after.memory],
        })
    })
}
