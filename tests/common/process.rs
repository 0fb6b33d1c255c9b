//! What a process holds, as Linux reports it in `/proc`.

use std::path::PathBuf;

/// A process, by its folder in `/proc`.
pub struct Process(PathBuf);

impl Process {
    /// This process.
    pub fn this() -> Self {
        Self("/proc/self".into())
    }

    /// The process with this id.
    pub fn with_id(id: u32) -> Self {
        Self(format!("/proc/{id}").into())
    }

    /// Returns the value of a field of `status`, such as `VmRSS`, in bytes.
    pub fn memory(&self, field: &str) -> usize {
        let status = std::fs::read_to_string(self.0.join("status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field));
        let kib = line.unwrap().split_whitespace().nth(1).unwrap();
        kib.parse::<usize>().unwrap() << 10
    }

    /// Resets `VmHWM`, the peak resident set size.
    pub fn forget_peak(&self) {
        std::fs::write(self.0.join("clear_refs"), "5").unwrap();
    }
}

/// Returns a field of this process's `status`, in bytes.
pub fn memory(field: &str) -> usize {
    Process::this().memory(field)
}
