//! How long a cancel takes, and what a storm of cancels costs the other requests.
//!
//! `cargo bench --bench cancel [-- --format json] [--device null|cpu|cuda] [--model PATH]
//! [--cancels N]`; without `--device`, every available device is measured.
//!
//! *Posted* is when the cancel flag is raised and *freed* is when the blocks are free; both
//! times come from the receipt. *Terminal* is when the scheduler thread wakes the request's
//! reader for the end of the stream, as recorded by the waker itself. If the reader was woken
//! by a last token instead, the cancel counts as freed only.

#[allow(dead_code)] // other benches use the rest
#[path = "../common/arguments.rs"]
mod arguments;
mod device;
mod latency;
#[path = "../common/paced.rs"]
mod paced;
#[allow(dead_code)] // tests use the rest
#[path = "../../tests/common/random.rs"]
mod random;
mod report;
mod survivors;

use arguments::after;
use device::{Device, Failure};
use quell::EngineConfig;
use report::Report;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

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
