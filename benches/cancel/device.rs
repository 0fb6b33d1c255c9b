//! The devices that cancels are measured on.

use super::paced::{self, PacedRunner};
use quell::internals::runner::{NullOptions, NullRunner};
use quell::{DeviceChoice, Engine, EngineConfig, LoadError, LoadOptions, Request};
use std::error::Error;
use std::path::PathBuf;
use std::time::Duration;

/// Why a measurement failed.
pub type Failure = Box<dyn Error + Send + Sync>;

/// Device that the engine under test runs on.
#[derive(Clone, PartialEq, Eq)]
pub enum Device {
    /// The null device, whose steps take no time.
    Null,
    /// The null device, but each step takes this long.
    Paced(Duration),
    /// The CPU, with this model.
    Cpu(PathBuf),
    /// The first CUDA device, with this model.
    Cuda(PathBuf),
}

impl Device {
    /// Returns the name of the device.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Paced(_) => "null, paced",
            Self::Cpu(_) => "cpu",
            Self::Cuda(_) => "cuda",
        }
    }

    /// Starts an engine on this device for up to `live` requests, with some room to spare.
    pub fn engine(&self, live: usize, config: EngineConfig) -> Result<Engine, LoadError> {
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
pub fn endless(engine: &Engine, index: usize) -> Request {
    let vocabulary = engine.info().vocabulary;
    let prompt = (0..16)
        .map(|position| ((index * 977 + position * 389) % vocabulary) as u32)
        .collect::<Vec<_>>();
    let mut request = Request::new(prompt).greedy();
    request.ignore_eos = true;
    request
}
