//! How long a cancel takes, and what a storm of cancels costs the other requests.
//!
//! `cargo bench --bench cancel [-- --format json] [--device null|cpu|cuda] [--model PATH]
//! [--cancels N]`; without `--device`, every available device is measured.
//!
//! *Posted* is when the cancel flag is raised and *freed* is when the blocks are free; both
//! times come from the receipt. *Terminal* is when the scheduler thread wakes the request's
//! reader for the end of the stream, as recorded by the waker itself. If the reader was woken
//! by a last token instead, the cancel counts as freed only.

mod latency;
#[path = "../common/paced.rs"]
mod paced;
#[allow(dead_code)] // tests use the rest
#[path = "../../tests/common/random.rs"]
mod random;
mod report;
mod survivors;

use paced::PacedRunner;
use quell::internals::runner::{NullOptions, NullRunner};
use quell::{DeviceChoice, Engine, EngineConfig, LoadError, LoadOptions, Request};
use report::Report;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

type Failure = Box<dyn Error + Send + Sync>;

/// Device that the engine under test runs on.
#[derive(Clone, PartialEq, Eq)]
enum Device {
    Null,
    /// The null device, but each step takes this long.
    Paced(Duration),
    Cpu(PathBuf),
    Cuda(PathBuf),
}

impl Device {
    fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Paced(_) => "null, paced",
            Self::Cpu(_) => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }

    /// Starts an engine on this device for up to `live` requests, with some room to spare.
    fn engine(&self, live: usize, config: EngineConfig) -> Result<Engine, LoadError> {
        let config = EngineConfig {
            max_open_requests: live + 1024,
            audit: false,
            ..config
        };
        let null = NullOptions {
            context_tokens: 1 << 20,
            cache_blocks: 1 << 18,
            ..NullOptions::default()
        };
        let (path, device) = match self {
            Self::Null => {
                return Engine::with_runner(config, None, move || NullRunner::start(null));
            }
            &Self::Paced(step) => {
                return Engine::with_runner(config, None, move || {
                    PacedRunner::start(null, step, paced::spin)
                });
            }
            Self::Cpu(path) => (path, DeviceChoice::Cpu),
            Self::Cuda(path) => (path, DeviceChoice::Cuda(0)),
        };
        let config = EngineConfig {
            kv_cache_bytes: Some(1 << 30),
            ..config
        };
        let options = LoadOptions {
            device,
            ..LoadOptions::default()
        };
        Engine::load_with(path, config, options)
    }
}

/// Returns a request that outlasts every measurement.
fn endless(engine: &Engine, index: usize) -> Request {
    let vocabulary = engine.info().vocabulary;
    let prompt = (0..16)
        .map(|position| ((index * 977 + position * 389) % vocabulary) as u32)
        .collect::<Vec<_>>();
    let mut request = Request::new(prompt).greedy();
    request.ignore_eos = true;
    request
}

/// Returns the value of a command line flag.
fn after(flag: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != flag);
    arguments.nth(1)
}

fn run() -> Result<(), Failure> {
    let model = after("--model").map_or_else(
        || PathBuf::from("models/SmolLM2-135M-Instruct.Q4_1.gguf"),
        PathBuf::from,
    );
    let devices = [
        Device::Null,
        Device::Cpu(model.clone()),
        Device::Cuda(model),
    ];
    let only = after("--device");
    let cancels = after("--cancels").map(|text| text.parse()).transpose()?;
    let mut report = Report::new(after("--format").as_deref() == Some("json"));
    for device in devices {
        let asked = only.as_deref() == Some(device.name());
        if only.is_some() && !asked {
            continue;
        }
        // Skip devices that this machine lacks, unless they were asked for.
        if let Err(error) = device.engine(1, EngineConfig::default())
            && !asked
        {
            report.left_out(device.name(), &error.to_string());
            continue;
        }
        latency::run(&device, cancels, &mut report)?;
        // Readers cannot keep up with a device whose steps take no time at all.
        let device = match device {
            Device::Null => Device::Paced(Duration::from_millis(1)),
            device => device,
        };
        survivors::run(&device, &mut report)?;
    }
    report.finish();
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cancel: {error}");
            ExitCode::FAILURE
        }
    }
}
