//! Records for the tests: violations, calls, injected failures, statistics.

use super::codes::{self, Code};
use super::counted::Counted;
use std::collections::BTreeMap;
use std::fmt::Write;

/// Number of violations whose text is kept; further ones are only counted.
const KEPT: usize = 1000;
/// Number of counted launches that are kept; further ones are dropped.
const KEPT_LAUNCHES: usize = 10_000;

/// A request to make calls of a function fail.
#[derive(Clone, Debug)]
pub struct Injection {
    /// Name of the function, with or without the `_v2` suffix.
    pub function: String,
    /// Number of calls that still succeed first.
    pub before: u64,
    /// Number of calls that fail after that.
    pub times: u64,
    /// Error code of the failing calls.
    pub code: Code,
}

/// Usage of one kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct KernelUse {
    /// Number of launches.
    pub launches: u64,
    /// Number of instructions executed by its warps.
    pub warp_instructions: u64,
}

/// Violations, calls, injected failures and statistics.
#[derive(Debug, Default)]
pub struct Report {
    violations: Vec<String>,
    violation_count: u64,
    calls: BTreeMap<&'static str, u64>,
    injections: Vec<Injection>,
    /// Usage of each kernel.
    pub kernels: BTreeMap<String, KernelUse>,
    counted: Vec<Counted>,
    /// Number of calls that made the host wait for the device.
    pub synchronisations: u64,
    /// Number of graphs launched.
    pub graph_launches: u64,
    /// Number of nodes of the graph that was made executable last.
    pub graph_nodes: u64,
    /// Number of kernels launched that could begin while the one before still ran.
    pub overlapping: u64,
    /// Number of operations queued on streams, including each node of a launched graph.
    pub queued: u64,
    /// Number of operations that have run.
    pub executed: u64,
    /// Number of failures injected.
    pub injected: u64,
    /// Number of undefined bytes in copies to the host.
    pub undefined_bytes: u64,
    /// Maximum device memory in use, in bytes.
    pub peak_memory: u64,
}

impl Report {
    /// Records a violation as one line, and prints it.
    pub fn violation(&mut self, text: &str, backtrace: bool) {
        let text = text.trim().replace('\n', "; ");
        eprintln!("virtual GPU: violation: {text}");
        if backtrace {
            eprintln!("{}", std::backtrace::Backtrace::force_capture());
        }
        self.violation_count += 1;
        if self.violations.len() < KEPT {
            self.violations.push(text);
        }
    }

    /// Returns the number of violations.
    pub fn violation_count(&self) -> u64 {
        self.violation_count
    }

    /// Returns the texts of the first violations.
    pub fn violations(&self) -> &[String] {
        &self.violations
    }

    /// Counts a call. Returns the code with which it must fail, if a failure was requested.
    pub fn called(&mut self, function: &'static str) -> Option<Code> {
        *self.calls.entry(function).or_default() += 1;
        let mut fails = None;
        for injection in &mut self.injections {
            if plain(&injection.function) != plain(function) || injection.times == 0 {
                continue;
            }
            if injection.before > 0 {
                injection.before -= 1;
            } else if fails.is_none() {
                injection.times -= 1;
                fails = Some(injection.code);
            }
        }
        self.injections.retain(|injection| injection.times > 0);
        self.injected += u64::from(fails.is_some());
        fails
    }

    /// Requests that calls fail from now on.
    pub fn inject(&mut self, injection: Injection) {
        self.injections.push(injection);
    }

    /// Returns the number of requested failures that have not all happened yet.
    pub fn waiting_injections(&self) -> usize {
        self.injections.len()
    }

    /// Returns the number of calls of a function, by name with or without the `_v2` suffix.
    pub fn calls_of(&self, function: &str) -> u64 {
        let named = self
            .calls
            .iter()
            .filter(|(name, _)| plain(name) == plain(function));
        named.map(|(_, count)| count).sum()
    }

    /// Lists each function called and its count, one per line.
    pub fn calls(&self) -> String {
        let mut text = String::new();
        for (name, count) in &self.calls {
            let _ = writeln!(text, "{name} {count}");
        }
        text
    }

    /// Lists each kernel with its launches and warp instructions, one per line.
    pub fn kernels(&self) -> String {
        let mut text = String::new();
        for (name, uses) in &self.kernels {
            let _ = writeln!(text, "{name} {} {}", uses.launches, uses.warp_instructions);
        }
        text
    }

    /// Records a launch that was counted.
    pub fn count(&mut self, launch: Counted) {
        if self.counted.len() < KEPT_LAUNCHES {
            self.counted.push(launch);
        }
    }

    /// Lists the counted launches in the order in which they ran, one line of JSON each.
    pub fn launches(&self) -> String {
        self.counted
            .iter()
            .map(|launch| launch.json() + "\n")
            .collect()
    }

    /// Forgets the counted launches.
    pub fn forget_launches(&mut self) {
        self.counted.clear();
    }

    /// Returns a statistic by name.
    pub fn statistic(&self, name: &str) -> Option<u64> {
        Some(match name {
            "launches" => self.kernels.values().map(|uses| uses.launches).sum(),
            "warp_instructions" => self
                .kernels
                .values()
                .map(|uses| uses.warp_instructions)
                .sum(),
            "synchronisations" => self.synchronisations,
            "graph_launches" => self.graph_launches,
            "graph_nodes" => self.graph_nodes,
            "overlapping" => self.overlapping,
            "queued" => self.queued,
            "executed" => self.executed,
            "injected" => self.injected,
            "undefined_bytes" => self.undefined_bytes,
            "peak_memory" => self.peak_memory,
            "violations" => self.violation_count,
            _ => return None,
        })
    }

    /// The names that [`Report::statistic`] accepts.
    pub const STATISTICS: [&'static str; 12] = [
        "launches",
        "warp_instructions",
        "synchronisations",
        "graph_launches",
        "graph_nodes",
        "overlapping",
        "queued",
        "executed",
        "injected",
        "undefined_bytes",
        "peak_memory",
        "violations",
    ];

    /// Formats the whole report for the file that `VGPU_REPORT` names.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for name in Self::STATISTICS {
            let _ = writeln!(
                text,
                "statistic {name} {}",
                self.statistic(name).unwrap_or(0)
            );
        }
        for line in self.calls().lines() {
            let _ = writeln!(text, "call {line}");
        }
        for line in self.kernels().lines() {
            let _ = writeln!(text, "kernel {line}");
        }
        for line in self.launches().lines() {
            let _ = writeln!(text, "launch {line}");
        }
        for violation in &self.violations {
            let _ = writeln!(text, "violation {violation}");
        }
        text
    }
}

/// Returns a function's name without its version suffix.
fn plain(function: &str) -> &str {
    let function = function.trim();
    ["_v2", "_v3", "_v4"]
        .iter()
        .find_map(|suffix| function.strip_suffix(suffix))
        .unwrap_or(function)
}

/// Parses `FUNCTION:NTH:CODE[:TIMES]`, where the code is a number or a name.
///
/// # Errors
/// Returns a description of what is wrong with the text.
pub fn parse_injection(text: &str) -> Result<Injection, String> {
    let mut parts = text.split(':');
    let (Some(function), Some(nth), Some(code)) = (parts.next(), parts.next(), parts.next()) else {
        return Err("wants FUNCTION:NTH:CODE".to_owned());
    };
    let nth: u64 = nth.parse().map_err(|_| "NTH is not a number")?;
    let code = code
        .parse()
        .ok()
        .or_else(|| codes::by_name(code))
        .ok_or("CODE is unknown")?;
    let times = parts
        .next()
        .map_or(Ok(1), str::parse)
        .map_err(|_| "TIMES is not a number")?;
    let before = nth.checked_sub(1).ok_or("NTH begins at 1")?;
    Ok(Injection {
        function: function.to_owned(),
        before,
        times,
        code,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nth_call_fails() {
        let mut report = Report::default();
        report.inject(parse_injection("cuMemAlloc:2:OUT_OF_MEMORY").unwrap());
        assert_eq!(report.called("cuMemAlloc_v2"), None);
        assert_eq!(report.called("cuMemFree_v2"), None);
        assert_eq!(report.called("cuMemAlloc_v2"), Some(codes::OUT_OF_MEMORY));
        assert_eq!(report.called("cuMemAlloc_v2"), None);
        assert_eq!(report.calls_of("cuMemAlloc"), 3);
        assert_eq!(report.waiting_injections(), 0);
        assert!(parse_injection("cuMemAlloc:0:2").is_err());
        assert!(parse_injection("cuMemAlloc:1:NO_SUCH_CODE").is_err());
    }
}
