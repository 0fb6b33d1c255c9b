//! Figures of a server under load.

use super::exchange::{End, FailureKind, Sample};
use super::load::Load;
use super::percentiles::Spread;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

/// Summary of one measurement. Latencies are those of finished requests, in milliseconds.
#[derive(Debug)]
pub struct Summary {
    load: Load,
    /// Seconds from the first request to the end of the last answer.
    seconds: f64,
    finished: usize,
    cancelled: usize,
    /// Number of requests that had not ended when Ctrl-C was pressed.
    interrupted: u64,
    /// Number of failures of each kind, with one example message.
    failures: BTreeMap<FailureKind, (usize, String)>,
    /// Number of finished requests whose tokens the server did not count.
    uncounted: usize,
    input_tokens: u64,
    /// Output tokens of finished requests.
    output_tokens: u64,
    /// Content events of cancelled requests.
    cancelled_tokens: u64,
    first: Option<Spread>,
    gaps: Option<Spread>,
    per_token: Option<Spread>,
    whole: Option<Spread>,
    /// Time from when a request was due until it was sent.
    late: Option<Spread>,
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

impl Summary {
    /// Summarises these samples, after `sent` requests were sent.
    pub fn of(load: Load, samples: &[Sample], sent: u64) -> Self {
        let ended = |wanted: &End| samples.iter().filter(|s| s.end == *wanted).count();
        let mut failures = BTreeMap::new();
        for sample in samples {
            if let End::Failed(failure) = &sample.end {
                let message = || (0, failure.message.clone());
                failures.entry(failure.kind).or_insert_with(message).0 += 1;
            }
        }
        let finished = || samples.iter().filter(|sample| sample.end == End::Finished);
        let cancelled = samples.iter().filter(|sample| sample.end == End::Cancelled);
        let usage = |sample: &Sample| sample.usage.map_or(0, |usage| usage.prompt_tokens);
        let spread = |each: &dyn Fn(&Sample) -> Option<Duration>| {
            Spread::of(finished().filter_map(each).map(milliseconds).collect())
        };
        let gaps = finished().flat_map(|sample| &sample.gaps);
        Self {
            load,
            seconds: span(samples).as_secs_f64(),
            finished: ended(&End::Finished),
            cancelled: ended(&End::Cancelled),
            interrupted: sent.saturating_sub(samples.len() as u64),
            failures,
            uncounted: finished().filter(|sample| sample.usage.is_none()).count(),
            input_tokens: finished().map(usage).sum(),
            output_tokens: finished().map(Sample::tokens).sum(),
            cancelled_tokens: cancelled.map(Sample::events).sum(),
            first: spread(&Sample::first),
            gaps: Spread::of(gaps.copied().map(milliseconds).collect()),
            per_token: spread(&Sample::per_token),
            whole: spread(&|sample| Some(sample.ended - sample.due)),
            late: spread(&|sample| Some(sample.sent - sample.due)),
        }
    }

    /// Returns the number of requests that failed.
    pub fn failed(&self) -> usize {
        self.failures.values().map(|(count, _)| count).sum()
    }

    /// Returns the number of requests that finished, were cancelled or failed.
    pub fn ended(&self) -> usize {
        self.finished + self.cancelled + self.failed()
    }

    /// Returns each kind of failure, its count and an example message.
    pub fn failures(&self) -> impl Iterator<Item = (FailureKind, usize, &str)> {
        let each = self.failures.iter();
        each.map(|(kind, (count, message))| (*kind, *count, message.as_str()))
    }

    fn per_second(&self, count: u64) -> f64 {
        if self.seconds > 0.0 {
            count as f64 / self.seconds
        } else {
            0.0
        }
    }

    fn output_rate(&self) -> f64 {
        self.per_second(self.output_tokens + self.cancelled_tokens)
    }

    fn latencies(&self) -> [(&'static str, Option<Spread>); 5] {
        [
            ("ttft", self.first),
            ("itl", self.gaps),
            ("tpot", self.per_token),
            ("e2e", self.whole),
            ("send_delay", self.late),
        ]
    }

    /// Returns the summary as JSON.
    pub fn json(&self) -> Value {
        let (rate, concurrency) = match self.load {
            Load::Rate(rate) => (Some(rate), None),
            Load::Concurrency(count) => (None, Some(count)),
        };
        let failures = self.failures().map(|(kind, count, message)| {
            json!({"kind": kind.to_string(), "count": count, "example": message})
        });
        let mut point = json!({
            "rate": rate,
            "concurrency": concurrency,
            "duration_s": self.seconds,
            "requests": {
                "finished": self.finished,
                "cancelled": self.cancelled,
                "failed": self.failed(),
                "interrupted": self.interrupted,
                "without_usage": self.uncounted,
            },
            "tokens": {
                "input": self.input_tokens,
                "output": self.output_tokens,
                "output_of_cancelled": self.cancelled_tokens,
            },
            "requests_per_s": self.per_second(self.finished as u64),
            "output_tokens_per_s": self.output_rate(),
            "input_tokens_per_s": self.per_second(self.input_tokens),
            "errors": failures.collect::<Vec<_>>(),
        });
        for (name, spread) in self.latencies() {
            point[format!("{name}_ms")] = json!(spread);
        }
        point
    }

    /// Prints the summary as text.
    pub fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let load = match self.load {
            Load::Rate(rate) => format!("{rate} requests/s offered"),
            Load::Concurrency(1) => "1 client".to_owned(),
            Load::Concurrency(count) => format!("{count} clients"),
        };
        let (finished, cancelled, failed) = (self.finished, self.cancelled, self.failed());
        write!(
            out,
            "\n{load}: {finished} finished, {cancelled} cancelled, {failed} failed"
        )?;
        if self.interrupted > 0 {
            write!(out, ", {} interrupted", self.interrupted)?;
        }
        writeln!(out, " in {:.2} s", self.seconds)?;
        writeln!(
            out,
            "{:.2} requests/s, {:.1} output tokens/s, {:.1} input tokens/s",
            self.per_second(self.finished as u64),
            self.output_rate(),
            self.per_second(self.input_tokens),
        )?;
        for (kind, count, message) in self.failures() {
            writeln!(out, "{count} × {kind}: {message}")?;
        }
        if self.uncounted > 0 {
            let count = self.uncounted;
            writeln!(
                out,
                "{count} answers without usage: their events count as tokens"
            )?;
        }
        writeln!(
            out,
            "{:<10} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "ms", "mean", "p50", "p90", "p95", "p99", "max"
        )?;
        for (name, spread) in self.latencies() {
            let Some(spread) = spread else {
                writeln!(out, "{name:<10} {:>9}", "–")?;
                continue;
            };
            write!(out, "{name:<10}")?;
            let Spread {
                mean,
                p50,
                p90,
                p95,
                p99,
                max,
                ..
            } = spread;
            for value in [mean, p50, p90, p95, p99, max] {
                write!(out, " {value:>9.2}")?;
            }
            writeln!(out)?;
        }
        Ok(())
    }
}

/// Returns the time from when the first request was due to the end of the last answer.
fn span(samples: &[Sample]) -> Duration {
    let first: Option<Instant> = samples.iter().map(|sample| sample.due).min();
    let last = samples.iter().map(|sample| sample.ended).max();
    match (first, last) {
        (Some(first), Some(last)) => last - first,
        _ => Duration::ZERO,
    }
}
