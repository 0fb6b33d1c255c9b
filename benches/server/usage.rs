//! Resource usage of this process.

use super::load::Failure;
use super::process;
use std::time::Duration;

/// CPU time and memory of this process.
pub struct Usage {
    /// User and system time of all threads.
    pub cpu: Duration,
    /// Resident memory in bytes.
    pub memory: usize,
}

/// Unit of CPU time in `/proc`: Linux counts it in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

impl Usage {
    pub fn now() -> Result<Self, Failure> {
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        // The second field, the process name, may contain spaces; it ends at the last
        // parenthesis.
        let (_, fields) = stat.rsplit_once(')').ok_or("/proc/self/stat has no name")?;
        // User and system time are fields 14 and 15 of the whole line.
        let times = fields.split_whitespace().skip(11).take(2);
        let ticks = times.map(str::parse::<u32>).sum::<Result<u32, _>>()?;
        Ok(Self {
            cpu: TICK * ticks,
            memory: process::memory("VmRSS"),
        })
    }
}
