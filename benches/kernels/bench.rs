//! Measures or counts one operation after the other.

use crate::counts::recorder::Recorder;
use crate::report::{Report, Work};
use quell::internals::device::DeviceError;
use quell::internals::device::cuda::CudaDevice;
use std::time::{Duration, Instant};

/// Larger than the L2 cache of any GPU, so that operands have to be read from memory.
const WORKING_SET: usize = 512 << 20;

/// How long an operation runs before it is measured: an idle GPU has slow clocks.
const WARM_UP: Duration = Duration::from_millis(50);

/// Launches per measurement.
pub const SAMPLES: usize = 15;

/// State shared by all measurements.
pub struct Bench {
    pub device: CudaDevice,
    pub report: Report,
    pub small: bool,
    /// Whether only what matters most is measured.
    pub short: bool,
    /// Part of the names of the kernels that are measured; all if `None`.
    pub only: Option<String>,
    /// When no new measurement is started anymore.
    pub end: Option<Instant>,
    /// Counts operations instead of timing them.
    pub counts: Option<Recorder>,
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

    /// Counts an operation. A failure is reported.
    fn count(&mut self, work: Work, run: impl FnMut(&mut CudaDevice) -> Result<(), DeviceError>) {
        let Some(recorder) = &mut self.counts else {
            return;
        };
        if let Err(error) = recorder.count(&mut self.device, work, run) {
            self.report.fail(&error.to_string());
        }
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
