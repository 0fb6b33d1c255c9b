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

#[path = "attention.rs"]
mod attention;
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

use quell::CudaOptions;
use quell::internals::device::cuda::CudaDevice;
use quell::internals::device::*;
use report::{Report, Work};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Larger than the L2 cache of any GPU, so that operands have to be read from memory.
const WORKING_SET: usize = 512 << 20;

/// How long an operation runs before it is measured: an idle GPU has slow clocks.
const WARM_UP: Duration = Duration::from_millis(50);

/// Launches per measurement.
const SAMPLES: usize = 15;

/// State shared by all measurements.
pub struct Bench {
    pub device: CudaDevice,
    pub report: Report,
    pub small: bool,
    /// Whether only what matters most is measured.
    pub short: bool,
    only: Option<String>,
    end: Option<Instant>,
    /// Counts operations instead of timing them.
    counts: Option<counts::Recorder>,
}

impl Bench {
    /// Returns how many operands of this size to use in turn, so that each is read from memory.
    pub fn copies(&self, bytes: usize) -> usize {
        let set = if self.small || self.counts.is_some() {
            1
        } else {
            WORKING_SET
        };
        set.div_ceil(bytes.max(1)).clamp(1, 64)
    }

    /// Returns whether this kernel was asked for and there is time left to measure it.
    pub fn wants(&mut self, kernel: &str) -> bool {
        if self.end.is_some_and(|end| Instant::now() > end) {
            self.report.left_out(kernel);
            return false;
        }
        self.only
            .as_deref()
            .is_none_or(|only| kernel.contains(only))
    }

    /// Measures `run`, which enqueues the operation `repeats` times. A failure is reported.
    pub fn measure(
        &mut self,
        work: Work,
        repeats: usize,
        mut run: impl FnMut(&mut CudaDevice) -> Result<(), DeviceError>,
    ) {
        if self.counts.is_some() {
            return self.count(work, run);
        }
        let times = self.sample(|device, samples| device.time(samples, &mut run));
        self.report.add(work, repeats, times);
    }

    /// Like [`measure`](Self::measure), for an operation that cannot be recorded as a graph.
    pub fn measure_unrecorded(
        &mut self,
        work: Work,
        mut run: impl FnMut(&mut CudaDevice) -> Result<(), DeviceError>,
    ) {
        if self.counts.is_some() {
            return self.count(work, run);
        }
        let times = self.sample(|device, samples| device.time_unrecorded(samples, &mut run));
        self.report.add(work, 1, times);
    }

    /// Returns the times of several samples, after a warm-up.
    fn sample(
        &mut self,
        mut time: impl FnMut(&mut CudaDevice, usize) -> Result<Vec<f64>, DeviceError>,
    ) -> Result<Vec<f64>, DeviceError> {
        let begin = Instant::now();
        while begin.elapsed() < WARM_UP {
            time(&mut self.device, 1)?;
        }
        time(&mut self.device, if self.small { 2 } else { SAMPLES })
    }
}

/// Returns pseudo-random numbers between −1 and 1.
pub fn values(count: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(next).collect()
}

/// Returns whether the program was given this flag.
fn has(flag: &str) -> bool {
    std::env::args().any(|argument| argument == flag)
}

/// Returns the argument after this flag.
fn after(flag: &str) -> Option<String> {
    let mut arguments = std::env::args().skip_while(|argument| argument != flag);
    arguments.nth(1)
}

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
