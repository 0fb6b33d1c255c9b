//! The measurements, printed as a table or as JSON.

use quell::{DeviceError, DeviceInfo};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// An operation to measure, and the minimum work that it has to do.
pub struct Work {
    pub kernel: String,
    pub shape: String,
    pub rows: usize,
    /// The shape as named numbers, for programs that measure the same operation elsewhere.
    pub sizes: Vec<(&'static str, usize)>,
    /// Minimum number of bytes to read and write.
    pub bytes: usize,
    /// Minimum number of floating-point operations; 0 if they do not matter.
    pub operations: usize,
}

/// All measurements of a run.
pub struct Report {
    device: DeviceInfo,
    /// Bytes per second that a copy moves.
    bandwidth: f64,
    json: bool,
    measured: Vec<Value>,
    failed: Vec<String>,
    left_out: BTreeSet<String>,
}

impl Report {
    pub fn new(device: DeviceInfo, bandwidth: f64, format: Option<&str>) -> Self {
        let json = format == Some("json");
        if !json {
            println!("{}: {}", device.name, device.description);
            println!("copy: {:.3} TB/s, read and written", bandwidth / 1e12);
            println!(
                "{:<18} {:<34} {:>5} {:>10} {:>8} {:>9} {:>7}",
                "kernel", "shape", "rows", "µs", "TB/s", "TFLOP/s", "of copy"
            );
        }
        Self {
            device,
            bandwidth,
            json,
            measured: Vec::new(),
            failed: Vec::new(),
            left_out: BTreeSet::new(),
        }
    }

    /// Returns a report that prints no measurements and only collects failures.
    pub fn failures(device: DeviceInfo) -> Self {
        Self {
            device,
            bandwidth: 1.0,
            json: true,
            measured: Vec::new(),
            failed: Vec::new(),
            left_out: BTreeSet::new(),
        }
    }

    /// Records a failure.
    pub fn fail(&mut self, error: &str) {
        eprintln!("kernels: {error}");
        self.failed.push(error.to_owned());
    }

    /// Adds a measurement of launches that each run `repeats` operations.
    pub fn add(&mut self, work: Work, repeats: usize, times: Result<Vec<f64>, DeviceError>) {
        let Work {
            kernel,
            shape,
            rows,
            sizes,
            bytes,
            operations,
        } = work;
        let mut times = match times {
            Ok(times) => times,
            Err(error) => {
                eprintln!("kernels: {kernel} {shape}, {rows} rows: {error}");
                self.failed.push(format!("{kernel} {shape}: {error}"));
                return;
            }
        };
        times.iter_mut().for_each(|time| *time /= repeats as f64);
        times.sort_by(f64::total_cmp);
        let seconds = times[times.len() / 2];
        let (rate, speed) = (bytes as f64 / seconds, operations as f64 / seconds);
        let share = rate / self.bandwidth;
        if !self.json {
            println!(
                "{kernel:<18} {shape:<34} {rows:>5} {:>10.2} {:>8.3} {:>9.2} {:>6.1} %",
                seconds * 1e6,
                rate / 1e12,
                speed / 1e12,
                share * 100.0
            );
        }
        self.measured.push(json!({
            "kernel": kernel,
            "shape": shape,
            "rows": rows,
            "sizes": sizes.into_iter().collect::<BTreeMap<_, _>>(),
            "microseconds": seconds * 1e6,
            "fastest": times[0] * 1e6,
            "slowest": times[times.len() - 1] * 1e6,
            "bytes": bytes,
            "operations": operations,
            "tb_per_s": rate / 1e12,
            "tflop_per_s": speed / 1e12,
            "share_of_copy": share,
        }));
    }

    /// Records that there was no time left for a kernel.
    pub fn left_out(&mut self, kernel: &str) {
        if self.left_out.insert(kernel.to_owned()) {
            eprintln!("kernels: no time was left for all shapes of {kernel}");
        }
    }

    /// Returns whether every measurement succeeded.
    pub fn succeeded(&self) -> bool {
        self.failed.is_empty()
    }

    /// Prints the JSON report, if JSON was asked for. Returns whether every measurement
    /// succeeded.
    pub fn finish(self) -> bool {
        let succeeded = self.succeeded();
        if self.json {
            let report = json!({
                "device": self.device.name,
                "description": self.device.description,
                "copy_tb_per_s": self.bandwidth / 1e12,
                "kernels": self.measured,
                "failed": self.failed,
                "left_out": self.left_out,
            });
            println!("{report:#}");
        }
        succeeded
    }
}
