//! What this process has used.

use super::{Failure, process};
use std::time::Duration;

/// CPU time and memory of this process.
pub struct Usage {
    /// User and system time of all threads.
    pub cpu: Duration,
    /// Bytes in memory.
    pub memory: usize,
}

/// Linux counts CPU time for `/proc` in hundredths of a second.
const TICK: Duration = Duration::from_millis(10);

impl Usage {
    pub fn now() -> Result<Self, Failure> {
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        // The second field, the name, may hold spaces; it ends at the last parenthesis.
        let (_, fields) = stat.rsplit_once(')').ok_or("/proc/self/stat has no name")?;
        // User and system time are the 14th and 15th field of all.
        let times = fields.split_whitespace().skip(11).take(2);
        let ticks = times.map(str::parse::<u32>).sum::<Result<u32, _>>()?;
        Ok(Self {
            cpu: TICK * ticks,
            memory: process::memory("VmRSS"),
        })
    }
}
