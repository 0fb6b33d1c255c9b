//! The measurements, printed as a table or as JSON.

use serde_json::{Value, json};
use std::time::Duration;

/// Durations of one kind in microseconds, in ascending order.
pub struct Times(Vec<f64>);

impl Times {
    pub fn new(times: impl IntoIterator<Item = Duration>) -> Self {
        let mut times: Vec<f64> = times
            .into_iter()
            .map(|time| time.as_secs_f64() * 1e6)
            .collect();
        times.sort_by(f64::total_cmp);
        Self(times)
    }

    /// Returns the value below which the given share of the durations lies. `None` if there are
    /// too few durations to tell this value from the maximum.
    fn quantile(&self, share: f64) -> Option<f64> {
        let index = (self.0.len() as f64 * share) as usize;
        (index + 1 < self.0.len()).then(|| self.0[index])
    }

    fn columns(&self) -> [Option<f64>; 4] {
        [
            self.quantile(0.5),
            self.quantile(0.99),
            self.quantile(0.999),
            self.0.last().copied(),
        ]
    }

    fn table(&self) -> String {
        self.columns()
            .map(|value| value.map_or_else(|| format!("{:>9}", "-"), |us| format!("{us:>9.1}")))
            .concat()
    }

    fn json(&self) -> Value {
        let [p50, p99, p999, max] = self.columns();
        json!({ "p50": p50, "p99": p99, "p99.9": p999, "max": max, "count": self.0.len() })
    }
}

/// Latencies of the cancels of one case.
pub struct Latencies {
    pub device: &'static str,
    pub state: &'static str,
    pub live: usize,
    /// Mean time per step; `None` if no step ran.
    pub step: Option<Duration>,
    pub terminal: Times,
    pub freed: Times,
}

/// Time between tokens for the requests that are not cancelled.
pub struct Survivors {
    pub device: &'static str,
    pub survivors: usize,
    /// Number of cancels during the measurement; 0 without a storm.
    pub cancels: usize,
    pub between_tokens: Times,
}

/// All measurements of a run.
pub struct Report {
    json: bool,
    latencies: Vec<Value>,
    survivors: Vec<Value>,
    left_out: Vec<Value>,
}

impl Report {
    pub fn new(json: bool) -> Self {
        Self {
            json,
            latencies: Vec::new(),
            survivors: Vec::new(),
            left_out: Vec::new(),
        }
    }

    /// Prints the heading of a device's latencies.
    pub fn latencies(&self, device: &str) {
        self.print(|| {
            format!(
                "\n{device}: from posted to terminal, and to freed, µs\n{:<9} {:>6} {:>9} {}{}",
                "state",
                "live",
                "step",
                ["p50", "p99", "p99.9", "max"]
                    .map(|name| format!("{name:>9}"))
                    .concat(),
                ["p50", "p99", "p99.9", "max"]
                    .map(|name| format!("{name:>9}"))
                    .concat(),
            )
        });
    }

    pub fn add(&mut self, case: Latencies) {
        let step = case.step.map(|step| step.as_secs_f64() * 1e6);
        self.print(|| {
            format!(
                "{:<9} {:>6} {:>9} {}{}",
                case.state,
                case.live,
                step.map_or_else(|| "-".to_owned(), |us| format!("{us:.1}")),
                case.terminal.table(),
                case.freed.table()
            )
        });
        self.latencies.push(json!({
            "device": case.device,
            "state": case.state,
            "live": case.live,
            "step_us": step,
            "posted_to_terminal_us": case.terminal.json(),
            "posted_to_freed_us": case.freed.json(),
        }));
    }

    pub fn add_survivors(&mut self, case: Survivors) {
        self.print(|| {
            format!(
                "{}: {} survivors, {:>6} cancels: from token to token, µs {}",
                case.device,
                case.survivors,
                case.cancels,
                case.between_tokens.table()
            )
        });
        self.survivors.push(json!({
            "device": case.device,
            "survivors": case.survivors,
            "cancels": case.cancels,
            "token_to_token_us": case.between_tokens.json(),
        }));
    }

    /// Records that a device is not available.
    pub fn left_out(&mut self, device: &str, reason: &str) {
        self.print(|| format!("\n{device} is skipped: {reason}"));
        self.left_out
            .push(json!({ "device": device, "reason": reason }));
    }

    /// Prints the JSON report, if JSON was asked for.
    pub fn finish(self) {
        if self.json {
            let report = json!({
                "version": env!("CARGO_PKG_VERSION"),
                "latencies": self.latencies,
                "survivors": self.survivors,
                "left_out": self.left_out,
            });
            println!("{report:#}");
        }
    }

    fn print(&self, line: impl Fn() -> String) {
        if !self.json {
            println!("{}", line());
        }
    }
}
