//! What a process holds, as Linux says.

#![allow(dead_code)] // each test file uses its part

use std::path::PathBuf;

/// A process by its folder in `/proc`.
pub struct Process(PathBuf);

impl Process {
    /// This one.
    pub fn this() -> Self {
        Self("/proc/self".into())
    }

    /// The one with this number.
    pub fn with_id(id: u32) -> Self {
        Self(format!("/proc/{id}").into())
    }

    /// Bytes that `status` gives for a field, such as `VmRSS`.
    pub fn memory(&self, field: &str) -> usize {
        let status = std::fs::read_to_string(self.0.join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<usize>().unwrap() << 10
    }

    /// Lets `VmHWM`, the most that was ever resident, begin anew.
    pub fn forget_peak(&self) {
        std::fs::write(self.0.join("clear_refs"), "5").unwrap();
    }
}

/// Bytes that this process holds, by a field of its `status`.
pub fn memory(field: &str) -> usize {
    Process::this().memory(field)
}
