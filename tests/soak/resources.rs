//! What the process holds, as the kernel says.

use serde_json::{Value, json};

/// Growth of resident memory, in bytes, that counts as none: what an allocator keeps
/// for later moves by less. A leak of 100 bytes a request would be more.
const MEMORY: u64 = 4 << 20;

/// What the process holds.
#[derive(Clone, Copy, Debug)]
pub struct Resources {
    /// Bytes of resident memory.
    memory: u64,
    /// Open file descriptors.
    files: usize,
}

impl Resources {
    pub fn now() -> Self {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
        Self {
            memory: kilobytes << 10,
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
