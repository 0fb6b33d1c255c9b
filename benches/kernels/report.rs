//! The measurements, printed as a table or as JSON.

use crate::comparison;
use quell::{DeviceError, DeviceInfo};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

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
    /// Where the report is written after every measurement.
    file: Option<PathBuf>,
    measured: Vec<Value>,
    /// PyTorch's limits on this GPU.
    pytorch: Option<Value>,
    failed: Vec<String>,
    left_out: BTreeSet<String>,
}

impl Report {
    pub fn new(
        device: DeviceInfo,
        bandwidth: f64,
        format: Option<&str>,
        file: Option<PathBuf>,
    ) -> Self {
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
            file,
            measured: Vec::new(),
            pytorch: None,
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
            file: None,
            pytorch: None,
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
        self.write();
    }

    /// The report so far.
    fn json(&self) -> Value {
        let mut report = json!({
            "device": self.device.name,
            "description": self.device.description,
            "copy_tb_per_s": self.bandwidth / 1e12,
            "kernels": self.measured,
            "failed": self.failed,
            "left_out": self.left_out,
        });
        if let Some(pytorch) = &self.pytorch {
            report["pytorch"] = pytorch.clone();
        }
        report
    }

    /// Adds what PyTorch takes for the same operations, and prints it.
    pub fn compare(&mut self) {
        let compared = match comparison::peers(&self.measured) {
            Ok(compared) => compared,
            Err(problem) => {
                eprintln!("kernels: there is no comparison with PyTorch: {problem}");
                return;
            }
        };
        self.measured = compared.kernels;
        if !self.json {
            comparison::print(&compared.pytorch, &self.measured);
        }
        self.pytorch = Some(compared.pytorch);
    }

    /// Draws the kernels on the roofline of the GPU.
    pub fn draw(&self, picture: &Path) {
        match comparison::draw(&self.json(), picture) {
            Ok(()) => eprintln!("kernels: the roofline is in {}", picture.display()),
            Err(problem) => eprintln!("kernels: no roofline is drawn: {problem}"),
        }
    }

    /// Writes the report so far to its file, so that it is there if the program is stopped.
    fn write(&self) {
        let Some(file) = &self.file else { return };
        let new = file.with_extension("new");
        let text = format!("{:#}\n", self.json());
        let written = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, file));
        if let Err(error) = written {
            eprintln!("kernels: {}: {error}", file.display());
        }
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
        self.write();
        let succeeded = self.succeeded();
        if self.json {
            println!("{:#}", self.json());
        }
        succeeded
    }
}
