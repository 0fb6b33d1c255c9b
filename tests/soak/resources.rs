//! The resources that the process holds, as the kernel reports them.

use common::process::memory;
use serde_json::{Value, json};

/// Growth of resident memory, in bytes, that is tolerated. Memory that the allocator retains
/// varies by less; a leak of 100 bytes per request would exceed it.
const MEMORY: usize = 4 << 20;

/// The resources that the process holds.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// Resident memory, in bytes.
    memory: usize,
    /// Number of open file descriptors.
    files: usize,
}

impl Resources {
    pub fn now() -> Self {
        Self {
            memory: memory("VmRSS"),
            files: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        }
    }

    pub fn json(&self) -> Value {
        json!({ "resident_bytes": self.memory, "file_descriptors": self.files })
    }
}

/// Checks that nothing grows after the first tenth of the samples, during which buffers reach
/// their final sizes.
pub fn check(samples: &[Resources]) {
    println!("{samples:?}");
    let (warm, rest) = samples[samples.len() / 10..].split_first().unwrap();
    for sample in rest {
        assert!(
            sample.memory <= warm.memory + MEMORY,
            "memory has grown: {samples:?}"
        );
        assert_eq!(sample.files, warm.files, "file descriptors: {samples:?}");
    }
}
