//! What the process holds, as the kernel says.

use super::process::memory;
use serde_json::{Value, json};

/// Growth of resident memory, in bytes, that counts as none: what an allocator keeps
/// for later moves by less. A leak of 100 bytes a request would be more.
const MEMORY: usize = 4 << 20;

/// What the process holds.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// Bytes of resident memory.
    memory: usize,
    /// Open file descriptors.
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

/// After a first tenth, in which buffers find their sizes, nothing grows.
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
