//! Faults of kernels.

use std::fmt;

/// The kind of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultKind {
    /// An access outside of every allocation, or beyond shared, local or parameter memory.
    OutOfBounds,
    /// An address that is not a multiple of the access size.
    Misaligned,
    /// A read of bytes that were never written.
    UninitialisedRead,
    /// Unordered accesses of several threads to the same shared memory.
    SharedRace,
    /// A barrier that not all threads of the block reach together.
    DivergentBarrier,
    /// A warp-wide instruction that some lanes do not execute.
    DivergentWarp,
    /// A launch that does not fit the kernel.
    BadParameters,
    /// A feature that is not emulated.
    Unsupported,
    /// A trap of the kernel itself.
    Trap,
    /// More instructions in a warp than allowed.
    Timeout,
    /// Something that a kernel does too early, while the kernel before it may still run.
    Overlap,
}

/// A fault, with everything that helps to locate it.
#[derive(Clone, Debug)]
pub struct Fault {
    pub kind: FaultKind,
    pub kernel: String,
    /// PTX line; 0 if the launch itself is at fault.
    pub line: u32,
    /// Source position as `file:line`, if the PTX contains it.
    pub source: Option<String>,
    pub block: [u32; 3],
    /// The first faulting thread.
    pub thread: Option<[u32; 3]>,
    pub address: Option<u64>,
    /// Allocation that contains the address, and offset in it.
    pub location: Option<String>,
    /// What happened and what was expected.
    pub detail: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} in `{}`", self.kind, self.kernel)?;
        if self.line > 0 {
            write!(f, ", PTX line {}", self.line)?;
        }
        if let Some(source) = &self.source {
            write!(f, " ({source})")?;
        }
        if self.line > 0 {
            write!(f, ", block {:?}", self.block)?;
        }
        if let Some(thread) = self.thread {
            write!(f, ", thread {thread:?}")?;
        }
        if let Some(address) = self.address {
            write!(f, ", address {address:#x}")?;
        }
        if let Some(location) = &self.location {
            write!(f, ", {location}")?;
        }
        write!(f, ": {}", self.detail)
    }
}

impl std::error::Error for Fault {}

/// A fault on its way to the top, where callers add its position.
#[derive(Debug)]
pub struct Stop {
    pub kind: FaultKind,
    pub lane: Option<u32>,
    pub address: Option<u64>,
    pub location: Option<String>,
    pub detail: String,
}

impl Stop {
    pub fn new(kind: FaultKind, detail: impl Into<String>) -> Box<Stop> {
        Box::new(Stop {
            kind,
            lane: None,
            address: None,
            location: None,
            detail: detail.into(),
        })
    }

    pub fn at_lane(mut self: Box<Self>, lane: usize) -> Box<Stop> {
        self.lane = Some(lane as u32);
        self
    }

    pub fn at(mut self: Box<Self>, address: u64, location: impl Into<String>) -> Box<Stop> {
        self.address = Some(address);
        self.location = Some(location.into());
        self
    }
}
