//! How close the CUDA kernels come to the GPU's limits: time by the GPU's clock, TB/s, TFLOP/s,
//! and the share of the bandwidth that a copy reaches in the same run.
//!
//! `cargo bench --bench kernels -- [--format json] [--write FILE] [--short] [--small]
//! [--only KERNEL] [--seconds N] [--peers] [--svg FILE]`
//!
//! `--write` writes the JSON to a file after every measurement. `--peers` compares with PyTorch
//! and `--svg` draws a roofline, both with the scripts in `scripts/gpu`. After N seconds no new
//! measurement is started. `--short` measures what matters most, in a minute. `--small` uses
//! tiny shapes, to try out the program on the virtual GPU. Without a usable GPU, the program
//! says so and exits.
//!
//! `cargo bench --bench kernels -- --virtual` measures nothing and needs no GPU: it counts what
//! the kernels do, and prints the bounds that follow (`counts/`).

#[path = "../common/arguments.rs"]
mod arguments;
#[path = "attention.rs"]
mod attention;
#[path = "bench.rs"]
mod bench;
#[path = "comparison.rs"]
mod comparison;
#[path = "counts/mod.rs"]
mod counts;
#[path = "linear.rs"]
mod linear;
#[path = "recurrent.rs"]
mod recurrent;
#[path = "report.rs"]
mod report;
#[path = "rows.rs"]
mod rows;
#[path = "shapes.rs"]
mod shapes;

use arguments::{after, has};
use bench::{Bench, SAMPLES};
use quell::CudaOptions;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use report::Report;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn run() -> Result<bool, Box<dyn Error>> {
    let begin = Instant::now();
    let (small, short) = (has("--small"), has("--short"));
    let seconds = after("--seconds").and_then(|seconds| seconds.parse().ok());
    let options = CudaOptions {
        max_graphs: 0,
        ..CudaOptions::default()
    };
    let mut device = match CudaDevice::new(&options) {
        Ok(device) => device,
        Err(error @ DeviceError::Unavailable { .. }) => {
            eprintln!("kernels: nothing is measured: {error}");
            return Ok(true);
        }
        Err(error) => return Err(error.into()),
    };
    let shapes = match (small, short) {
        (true, _) => shapes::SMALL,
        (false, true) => shapes::SHORT,
        (false, false) => shapes::MODELS,
    };
    device.reserve(&DeviceLimits {
        rows: if small { 32 } else { 2048 },
        sequences: if small { 4 } else { 256 },
        sequence_tokens: if small { 64 } else { 8192 },
        block_tokens: shapes::BLOCK,
        groups: 1,
        vocabulary: shapes
            .iter()
            .map(|shape| shape.vocabulary)
            .max()
            .unwrap_or(0),
        model: ModelShape::default(),
    })?;
    let (bytes, samples) = if small {
        (1 << 16, 2)
    } else {
        (2 << 30, SAMPLES)
    };
    let bandwidth = device.copy_bandwidth(bytes, samples)?;
    let file = after("--write").map(PathBuf::from);
    let format = after("--format");
    let report = Report::new(device.info(), bandwidth, format.as_deref(), file);
    let mut bench = Bench {
        device,
        report,
        small,
        short,
        only: after("--only"),
        end: seconds.map(|seconds| begin + Duration::from_secs(seconds)),
        counts: None,
    };
    for shape in shapes {
        linear::run(&mut bench, shape)?;
        rows::run(&mut bench, shape)?;
        attention::run(&mut bench, shape)?;
    }
    let (experts, rows) = if small {
        (shapes::SMALL_EXPERTS, [1, 4, 8])
    } else {
        (shapes::EXPERTS, [1, 64, 2048])
    };
    let sampled = if small { [1, 2, 4] } else { [1, 64, 256] };
    rows::sampling(&mut bench, &shapes[0], &sampled)?;
    linear::experts(&mut bench, &experts, &rows)?;
    if !small {
        recurrent::run(&mut bench)?;
    }
    if has("--peers") {
        bench.report.compare();
    }
    if let Some(picture) = after("--svg") {
        bench.report.draw(Path::new(&picture));
    }
    Ok(bench.report.finish())
}

fn main() -> ExitCode {
    let done = if has("--virtual") {
        counts::run()
    } else {
        run()
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("kernels: {error}");
            ExitCode::FAILURE
        }
    }
}
